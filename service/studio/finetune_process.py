"""Run commands of ``finetune`` as processes: the service neither imports it nor loads PyTorch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from models.errors import UserError

SECRETS = ("API_KEYS", "ADMIN_KEYS", "DATABASE_URL")  # settings of the service that a command does not need
NOT_INSTALLED = "Training is not installed here. Install it with `pip install -e '.[finetune]'`, or use the image that trains."


class CommandError(UserError):
    """A command could not be run, took too long, or ended with an error. The message is the command's own."""


def is_installed() -> bool:
    """Return whether the packages for training are installed, without importing one."""
    return find_spec("finetune") is not None and find_spec("torch") is not None


def environment() -> dict[str, str]:
    """Return the environment of a command, without the keys of the service."""
    return {name: value for name, value in os.environ.items() if name not in SECRETS}


def run(arguments: Sequence[str], *, timeout_s: float, ok: Sequence[int] = (0,)) -> str:
    """Run ``finetune`` and return its standard output.

    Args:
        arguments: The command and its arguments.
        timeout_s: When to kill it, with the processes that it started.
        ok: The exit codes of success.

    Raises:
        CommandError: It is not installed, took too long, or failed.
    """
    if not is_installed():
        raise CommandError(NOT_INSTALLED)
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise CommandError(f"`finetune {arguments[0]}` took over {timeout_s:g} s and was stopped. Use fewer photos.") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode not in ok:
        lines = errors.decode(errors="replace").strip().splitlines()
        message = lines[-1].removeprefix("finetune: ") if lines else f"it ended with {process.returncode}"
        raise CommandError(message)
    return output.decode()


def run_json(arguments: Sequence[str], *, timeout_s: float, ok: Sequence[int] = (0,)) -> Any:
    """Run ``finetune`` and return the JSON that it prints. See ``run``."""
    return json.loads(run(arguments, timeout_s=timeout_s, ok=ok))
