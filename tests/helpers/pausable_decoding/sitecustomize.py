"""Pause decoding in a service under test (``raw_connection.hold_requests``), so that it stays at capacity."""

import os
import tempfile
import time

from PIL import Image

_open = Image.open


def open_when_released(*args: object, **kwargs: object) -> object:
    """Wait while the file ``hold`` is in the service's temporary folder."""
    while os.path.exists(os.path.join(tempfile.gettempdir(), "hold")):
        time.sleep(0.005)
    return _open(*args, **kwargs)


Image.open = open_when_released
