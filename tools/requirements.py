"""Print the requirements of extras in pyproject.toml, one per line.

    python tools/requirements.py serve finetune > requirements.txt
    pip install -c requirements.lock -r requirements.txt

The Dockerfile installs these in a layer of their own, which is rebuilt only if a requirement changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """List the requirements of the project and of its ``extras``. Raises KeyError for an unknown extra."""
    project = tomllib.loads(pyproject)["project"]
    optional = project["optional-dependencies"]
    return sorted({*project["dependencies"], *(row for extra in extras for row in optional[extra])})


if __name__ == "__main__":
    print("\n".join(requirements(Path("pyproject.toml").read_text(encoding="utf-8"), sys.argv[1:])))
