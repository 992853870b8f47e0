"""Skip tests whose system packages are missing, or fail them if CI is set."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def skip_without(package: str) -> NoReturn:
    """Skip the running test because a Debian package is not installed.

    Raises:
        pytest.fail.Exception: in CI, where a skipped test would go unnoticed.
    """
    reason = f"{package} is not installed; run: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
