"""Logs as JSON lines on standard error: one a request, with its id; never a photo, a file's name or a key."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

from gunicorn.glogging import Logger

# What a record has anyway; the rest is what the call named in ``extra``.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
# What no line shows is not looked for (logging's documentation, "Optimization"): the caller's place, its thread and task.
logging._srcfile = None
logging.logThreads = logging.logMultiprocessing = False
_encode = json.JSONEncoder(default=str).encode


class JsonFormatter(logging.Formatter):
    """A line a record: time in UTC, level, logger, message, process and what the call added.

    Not python-json-logger's, which takes a tenth of a request's time outside of decoding and computing.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        line.update((key, value) for key, value in vars(record).items() if key not in _OWN)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)


class StderrHandler(logging.Handler):
    """Each line to standard error in one system call, so that the lines of threads and of processes do not mix.

    logging's own holds a lock meanwhile, and in a busy server the threads queue for that.
    """

    def handle(self, record: logging.LogRecord) -> bool:
        if kept := bool(self.filter(record)):
            self.emit(record)
        return kept

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = memoryview((self.format(record) + "\n").encode(errors="backslashreplace"))
            while line:
                line = line[os.write(sys.stderr.fileno(), line) :]
        except Exception:
            self.handleError(record)


class QuietLogger(Logger):
    """gunicorn's logger without its line for each request: the application's own knows more."""

    def access(self, *_: Any) -> None:
        return


def logging_config(level: str) -> dict[str, Any]:
    """For logging.config.dictConfig, and for gunicorn's own loggers as well."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stderr": {"()": StderrHandler, "formatter": "json"}},
        "root": {"level": level.upper(), "handlers": ["stderr"]},
        # Pillow logs errors for files that strangers sent, and in debugging a line for each chunk of them.
        "loggers": {
            "PIL": {"level": "CRITICAL"},
            "gunicorn.error": {"level": level.upper(), "propagate": True, "handlers": []},
        },
    }
