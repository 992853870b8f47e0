"""``python -m service``: gunicorn with this package's configuration; every setting is an environment variable."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from models.bundle import open_bundle
from models.cache import joined_dir
from models.errors import UserError
from service.settings import Settings


def main() -> int:
    """Join a head-only bundle, if need be and if the training side is installed, then run gunicorn in this process."""
    try:
        settings = Settings.from_environment()
        bundle = open_bundle(settings.bundle, files=())
    except UserError as error:
        print(f"service: {error}", file=sys.stderr)
        return 2
    if bundle.is_head_only and not joined_dir(bundle).is_dir() and find_spec("torch"):
        done = subprocess.run([sys.executable, "-m", "finetune", "join", str(settings.bundle)], stdout=subprocess.DEVNULL)
        if done.returncode:
            return done.returncode

    from gunicorn.app.wsgiapp import WSGIApplication

    os.environ.pop("GUNICORN_CMD_ARGS", None)
    sys.argv = ["gunicorn", "--config", str(Path(__file__).with_name("gunicorn.conf.py"))]
    WSGIApplication("%(prog)s [OPTIONS]").run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
