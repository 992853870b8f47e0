"""Logs as JSON lines on standard error: one a request, with its id; never a photo, a file's name or a key."""

from __future__ import annotations

from typing import Any


def log_config(level: str) -> dict[str, Any]:
    """For logging.config.dictConfig, and for gunicorn's own loggers as well."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": "{asctime}{levelname}{name}{message}{process}",
                "style": "{",
                "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
            }
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "root": {"level": level.upper(), "handlers": ["stderr"]},
        "loggers": {"gunicorn.error": {"level": level.upper(), "propagate": True, "handlers": []}},
    }
