"""Print what pyproject.toml wants of the given extras, one requirement a line, for an image that installs no project.

    python tools/requirements.py serve finetune > wanted.txt
    pip install -c requirements.lock -r wanted.txt

So an image's packages stay as they are built while only the project's code changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """The project's own requirements and those of ``extras``; KeyError names an extra that is not there."""
    project = tomllib.loads(pyproject)["project"]
    optional = project["optional-dependencies"]
    return sorted({*project["dependencies"], *(row for extra in extras for row in optional[extra])})


if __name__ == "__main__":
    print("\n".join(requirements(Path("pyproject.toml").read_text(encoding="utf-8"), sys.argv[1:])))
