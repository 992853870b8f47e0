"""Print the steps of a long command."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Print what the block does. On a terminal, update the elapsed seconds until it ends."""
    if not sys.stdout.isatty():
        print(f"{text} ...")
        yield
        return
    started, ended = time.monotonic(), threading.Event()

    def show() -> None:
        print(f"\r{text} ... {time.monotonic() - started:.0f} s", end="", flush=True)

    def update() -> None:
        show()
        while not ended.wait(1):
            show()

    thread = threading.Thread(target=update, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        show()
        print()
