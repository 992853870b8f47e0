"""``python -m service``: gunicorn with this package's configuration; every setting is an environment variable."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from models.artifacts.bundle import open_bundle
from models.artifacts.paths import merged_dir
from models.errors import ConfigError, UserError
from service.settings import Settings


def check_free(host: str, port: int) -> None:
    """Raise ConfigError where nothing can listen there. gunicorn would try five times, and say so in its log only."""
    if {"LISTEN_FDS", "GUNICORN_FD"} & os.environ.keys():  # a socket that listens already was handed over
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gunicorn: what ended a moment ago is in no way
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"The port {port} of {host} is in use; stop what listens there, or name another with PORT (0: any free)."
                ) from None
            raise ConfigError(
                f"Nothing can listen on the port {port} of {host} ({error.strerror}); name others with HOST and PORT."
            ) from None


def main() -> int:
    """Merge a head-only bundle, if need be and if the training side is installed, then run gunicorn in this process."""
    try:
        settings = Settings.from_environment()
        check_free(settings.host, settings.port)
        bundle = open_bundle(settings.bundle, files=())
    except UserError as error:
        print(f"service: {error}", file=sys.stderr)
        return 2
    if bundle.is_head_only and not merged_dir(bundle).is_dir() and find_spec("torch"):
        done = subprocess.run([sys.executable, "-m", "finetune", "merge", str(settings.bundle)], stdout=subprocess.DEVNULL)
        if done.returncode:
            return done.returncode

    from gunicorn.app.wsgiapp import WSGIApplication

    os.environ.pop("GUNICORN_CMD_ARGS", None)
    sys.argv = ["gunicorn", "--config", str(Path(__file__).with_name("gunicorn.conf.py"))]
    WSGIApplication("%(prog)s [OPTIONS]").run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
