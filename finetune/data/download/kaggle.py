"""Competition archives, through Kaggle's own client: it holds the credentials, so we never see them."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

from models.errors import DataError


def download_competition(competition: str, folder: Path) -> Path:
    """Download a competition's archive into ``folder`` with the ``kaggle`` command, and give its path.

    What the client prints goes on to standard error as it comes. An archive that is there already is the client's to
    look at: it skips one that is whole.

    Raises ``DataError`` where the command is missing or fails.
    """
    remedy = (
        f"accept the rules at https://www.kaggle.com/c/{competition}/rules and put your kaggle.json in ~/.kaggle, or "
        "download the archive in a browser and pass --archive FILE"
    )
    command = shutil.which("kaggle")
    if command is None:
        raise DataError(f"There is no kaggle command on PATH; type `pip install kaggle`, {remedy}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        status, words = _run([command, "competitions", "download", "-c", competition, "-p", str(folder)])
    except OSError as error:
        raise DataError(f"Could not run {command} ({error.strerror or error}); {remedy}.") from error
    if status != 0:
        raise DataError(f"The kaggle command failed ({words or f'exit status {status}'}); {remedy}.")
    archive = folder / f"{competition}.zip"
    if not archive.is_file():
        raise DataError(f"The kaggle command left no {archive.name} in {folder}; {remedy}.")
    return archive


def _run(command: list[str]) -> tuple[int, str]:
    """Run a command, pass on what it prints, and give its exit status and its last line."""
    tail = ""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        # newline="" ends a line at each \r of a progress bar too, and passes it on as it is
        with io.TextIOWrapper(process.stdout, errors="replace", newline="") as lines:
            for line in lines:
                sys.stderr.write(line)
                tail = line.strip() or tail
    return process.returncode, tail.rstrip(".")
