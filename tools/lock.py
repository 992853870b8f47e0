"""Write requirements.lock: the versions that pip selects today for the given Pythons, as one constraints file.

    python tools/lock.py python3.10 python3.11

If the Pythons get different versions of a package, each line has an environment marker. The last Python's line applies to all
newer ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# Versions that are known to work together, as constraints: pip install -c requirements.lock -e '.[serve,finetune,dev,docs]'
# Written by tools/lock.py from the ranges in pyproject.toml. Update it with `make lock`.
"""


def resolve(python: str) -> tuple[str, dict[str, str]]:
    """Return the interpreter's version ("3.11") and the packages that pip would install for it, {package: version}."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = Path(folder) / "bin" / "pip"
        report = Path(folder) / "report.json"
        project = f"{ROOT}[serve,finetune,dev,docs]"
        subprocess.run([pip, "install", "--quiet", "--dry-run", "--report", report, project], check=True)
        resolved = json.loads(report.read_text())
    version = resolved["environment"]["python_version"]
    metadata = [item["metadata"] for item in resolved["install"]]
    return version, {m["name"].lower().replace("_", "-"): m["version"] for m in metadata if m["name"] != "dogs-vs-cats"}


def merge(resolved: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Return the lines of the constraints file for the packages of several Pythons."""
    lines = []
    for name in sorted({name for _, versions in resolved for name in versions}):
        pins = [(python, versions[name]) for python, versions in resolved if name in versions]
        if len(pins) == len(resolved) and len({version for _, version in pins}) == 1:
            lines.append(f"{name}=={pins[0][1]}")
        else:
            newest = resolved[-1][0]
            lines += [
                f'{name}=={version} ; python_version {">=" if python == newest else "=="} "{python}"'
                for python, version in pins
            ]
    return lines


if __name__ == "__main__":
    result = merge([resolve(python) for python in sys.argv[1:] or [sys.executable]])
    (ROOT / "requirements.lock").write_text(HEAD + "\n".join(result) + "\n")
