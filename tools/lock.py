"""Write requirements.lock: the versions that pip chooses today, for each Python given, as one constraints file.

    python tools/lock.py python3.10 python3.11

Where two Pythons get different versions of a package, each line carries a marker; the last Python stands for all newer ones.
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
# Written by tools/lock.py from the ranges in pyproject.toml; `make lock` renews it.
"""


def resolve(python: str) -> tuple[str, dict[str, str]]:
    """The interpreter's version ("3.11") and what pip would install for it, {package: version}."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = Path(folder) / "bin" / "pip"
        report = Path(folder) / "report.json"
        wanted = f"{ROOT}[serve,finetune,dev,docs]"
        subprocess.run([pip, "install", "--quiet", "--dry-run", "--report", report, wanted], check=True)
        told = json.loads(report.read_text())
    version = told["environment"]["python_version"]
    metadata = [item["metadata"] for item in told["install"]]
    return version, {m["name"].lower().replace("_", "-"): m["version"] for m in metadata if m["name"] != "dogs-vs-cats"}


def merge(resolved: list[tuple[str, dict[str, str]]]) -> list[str]:
    lines = []
    for name in sorted({name for _, versions in resolved for name in versions}):
        found = [(python, versions[name]) for python, versions in resolved if name in versions]
        if len(found) == len(resolved) and len({version for _, version in found}) == 1:
            lines.append(f"{name}=={found[0][1]}")
        else:
            newest = resolved[-1][0]
            lines += [
                f'{name}=={version} ; python_version {">=" if python == newest else "=="} "{python}"'
                for python, version in found
            ]
    return lines


if __name__ == "__main__":
    result = merge([resolve(python) for python in sys.argv[1:] or [sys.executable]])
    (ROOT / "requirements.lock").write_text(HEAD + "\n".join(result) + "\n")
