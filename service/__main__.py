"""Start the service: ``serve-classifier [BUNDLE]`` or ``python -m service``. All settings are environment variables."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from models.artifacts.bundle import open_bundle
from models.artifacts.paths import merged_dir
from models.errors import ConfigError, UserError
from service.settings import process_settings


def check_free(host: str, port: int) -> None:
    """Check that the address can be bound, as gunicorn retries five times and only logs why.

    Raises:
        ConfigError: The port is in use, or the address is not one of this machine.
    """
    if {"LISTEN_FDS", "GUNICORN_FD"} & os.environ.keys():  # a listening socket is inherited
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gunicorn does
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"PORT: {port} of {host} is in use. Stop the program that uses it, or set another PORT (0: any free one)."
                ) from None
            raise ConfigError(
                f"HOST: cannot listen on port {port} of {host} ({error.strerror}). Set another HOST or PORT."
            ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run gunicorn in this process.

    Returns:
        The exit code: 2 for a usage or input error, which is explained in one line.
    """
    _set_environment(argv)
    try:
        settings = process_settings()
        check_free(settings.host, settings.port)
        bundle = open_bundle(settings.bundle, files=())
        if bundle.is_head_only and not merged_dir(bundle).is_dir() and not find_spec("torch"):
            raise ConfigError(
                f"The bundle {settings.bundle} contains only the trained layers, and merging it with its pretrained weights "
                "needs PyTorch once. Install the extra `finetune`, or serve a bundle that was exported with --export full."
            )
    except UserError as error:
        print(f"service: {error}", file=sys.stderr)
        return 2

    from gunicorn.app.wsgiapp import WSGIApplication

    os.environ.pop("GUNICORN_CMD_ARGS", None)
    sys.argv = ["gunicorn", "--config", str(Path(__file__).with_name("gunicorn.conf.py"))]
    WSGIApplication("%(prog)s [OPTIONS]").run()
    return 0


def _set_environment(argv: Sequence[str] | None) -> None:
    """Copy the command line to the environment, where gunicorn's workers find it. A flag overrides a variable."""
    parser = argparse.ArgumentParser(
        prog="serve-classifier",
        description="Serve a bundle over HTTP. Other settings are environment variables; see the documentation.",
        allow_abbrev=False,
    )
    parser.add_argument("bundle", nargs="?", help="folder that `finetune train` exported (default: the shipped cats and dogs)")
    parser.add_argument("--data-dir", help="folder of labeled images to show in the gallery")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on (default: 8000; 0: any free port)")
    for name, value in vars(parser.parse_args(argv)).items():
        if value is not None:
            os.environ[name.upper()] = value


if __name__ == "__main__":
    sys.exit(main())
