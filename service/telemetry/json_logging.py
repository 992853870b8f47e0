"""Logs as JSON lines on standard error, one per request. They contain no images, file names or keys."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

from gunicorn.glogging import Logger

# The attributes of every record. Any other was passed as ``extra``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
# Skip computing what no line shows: https://docs.python.org/3/howto/logging.html#optimization
logging._srcfile = None
logging.logThreads = logging.logMultiprocessing = False
_encode = json.JSONEncoder(default=str).encode


class JsonFormatter(logging.Formatter):
    """Format a record as one JSON object: time in UTC, level, logger, message, process and ``extra``.

    python-json-logger would take a tenth of a request's time outside of decoding and inference.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        line.update((key, value) for key, value in vars(record).items() if key not in _STANDARD)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)


class StderrHandler(logging.Handler):
    """Write each line to standard error in one system call, so that lines of threads and processes do not mix.

    The standard handler holds a lock while it writes, which the threads of a busy server wait for.
    """

    def handle(self, record: logging.LogRecord) -> bool:
        if accepted := bool(self.filter(record)):
            self.emit(record)
        return accepted

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = memoryview((self.format(record) + "\n").encode(errors="backslashreplace"))
            while line:
                line = line[os.write(sys.stderr.fileno(), line) :]
        except Exception:
            self.handleError(record)


class QuietLogger(Logger):
    """gunicorn's logger without its line per request, as the application logs a more complete one."""

    def access(self, *_: Any) -> None:
        return


class TerminalFormatter(logging.Formatter):
    """Format a record for a person: level, message and the reason, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{record.levelname.capitalize()}: {record.getMessage()}"
        if reason := getattr(record, "reason", None):
            line += f" ({reason})"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def is_terminal() -> bool:
    """Return whether a person sees the output."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def logging_config(level: str, *, terminal: bool = False) -> dict[str, Any]:
    """Return the configuration for ``logging.config.dictConfig``, which includes gunicorn's loggers.

    Args:
        level: The lowest level to log.
        terminal: Write for a person: warnings and errors in plain text, unless the level is debug.
    """
    if terminal and level == "info":
        level = "warning"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}, "terminal": {"()": TerminalFormatter}},
        "handlers": {"stderr": {"()": StderrHandler, "formatter": "terminal" if terminal else "json"}},
        "root": {"level": level.upper(), "handlers": ["stderr"]},
        # Pillow logs errors for invalid files of clients, and at debug level each of their chunks.
        "loggers": {
            "PIL": {"level": "CRITICAL"},
            "alembic": {"level": "WARNING"},
            "gunicorn.error": {"level": level.upper(), "propagate": True, "handlers": []},
        },
    }
