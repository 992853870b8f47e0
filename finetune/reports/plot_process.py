"""Draw plots in a process of their own, while the caller continues. Matplotlib then takes no time and memory of the caller."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class PlotProcess:
    """A process that draws the plots of ``finetune.reports.figures.write_plots``. Leaving the context ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PlotProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()

    def start(self, *args: Any, **options: Any) -> None:
        """Start to draw, with the arguments of ``write_plots``."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:  # the process then reports why it ended
            pickle.dump((args, options), pipe)
        self._process.stdin = None

    def wait(self) -> None:
        """Wait until the plots are written. Raises what ``write_plots`` raised."""
        if not self._process:
            return
        output, _ = self._process.communicate()
        code, self._process = self._process.returncode, None
        if code:
            raise subprocess.CalledProcessError(code, __name__)
        if error := pickle.loads(output):
            raise error


def main() -> None:
    """Read the arguments from standard input, draw, and write the error to standard output, or None."""
    from finetune.reports.figures import write_plots

    args, options = pickle.load(sys.stdin.buffer)
    error = None
    try:
        write_plots(*args, **options)
    except OSError as raised:  # such as a full disk
        error = raised
    sys.stdout.buffer.write(pickle.dumps(error))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # the caller reports it
        main()
