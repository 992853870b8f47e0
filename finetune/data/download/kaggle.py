"""Download Kaggle competition archives with Kaggle's own client, which keeps the credentials to itself."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

from models.errors import DataError


def download_competition(competition: str, folder: Path) -> Path:
    """Download a competition's archive with the ``kaggle`` command, which skips it if it is already complete.

    The output of the command is forwarded to standard error.

    Args:
        competition: Name of the competition.
        folder: Folder for the archive.

    Returns:
        The path of the archive.

    Raises:
        DataError: The command is missing or fails.
    """
    remedy = (
        f"Accept the rules at https://www.kaggle.com/c/{competition}/rules and put your kaggle.json in ~/.kaggle, or "
        "download the archive in a browser and pass --archive FILE."
    )
    command = shutil.which("kaggle")
    if command is None:
        raise DataError(f"The kaggle command was not found. Run `pip install kaggle`. {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        status, last_line = _run([command, "competitions", "download", "-c", competition, "-p", str(folder)])
    except OSError as error:
        raise DataError(f"Could not run {command} ({error.strerror or error}). {remedy}") from error
    if status != 0:
        raise DataError(f"The kaggle command failed ({last_line or f'exit status {status}'}). {remedy}")
    archive = folder / f"{competition}.zip"
    if not archive.is_file():
        raise DataError(f"The kaggle command did not create {archive.name} in {folder}. {remedy}")
    return archive


def _run(command: list[str]) -> tuple[int, str]:
    """Run a command, forward its output to standard error, and return its exit status and last line."""
    last_line = ""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        # newline="" also splits at the \r of a progress bar and does not translate it
        with io.TextIOWrapper(process.stdout, errors="replace", newline="") as lines:
            for line in lines:
                sys.stderr.write(line)
                last_line = line.strip() or last_line
    return process.returncode, last_line.rstrip(".")
