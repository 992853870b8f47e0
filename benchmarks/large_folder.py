"""Measure the time and peak memory of `finetune audit` and `finetune train` on a large folder of small photos.

    python benchmarks/large_folder.py [--photos 25000] [--size 200] [--backbone efficientnet_lite0] [--epochs N] [--keep DIR]

The photos are drawn by this program: JPEGs of random soft shapes in two classes, a fifth of them for validation. All caches
are empty at the start. The audit and the training are run one after the other, each in its own process; training repeats the
audit. "again" is the same training run with a filled cache. CPU time is less affected by other processes than elapsed time.
The anonymous part of the memory is what the system cannot reclaim: it excludes libraries and features, which are files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"blue": (40, 60, 200), "red": (200, 60, 40)}
VALID_EVERY = 5
POLL_S = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=25_000)
    parser.add_argument("--size", type=int, default=200, help="longer side in pixels")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--epochs", type=int, help="default: the network's recipe")
    parser.add_argument("--keep", type=Path, help="folder to draw the photos in, reused by the next run (default: temporary)")
    parser.add_argument(
        "--int8", action="store_true", help="with a graph in int8, which does not depend on the number of photos"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = args.keep or Path(folder) / "photos"
        draw_folder(data, args.photos, args.size)
        caches = ("--cache-dir", Path(folder) / "cache")
        train = ["train", "--data-dir", data, "--backbone", args.backbone, *caches]
        train += ["--epochs", args.epochs] if args.epochs else []
        train += [] if args.int8 else ["--no-int8"]
        measure("audit", ["audit", data, "--cache-dir", Path(folder) / "audit-cache"])
        measure("train", [*train, "--output-dir", Path(folder) / "first"])
        measure("again", [*train, "--output-dir", Path(folder) / "second"])
    return 0


def draw_folder(data: Path, photos: int, size: int) -> None:
    """Draw the missing photos, in one process per CPU."""
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, [(data, number, size) for number in range(photos)], chunksize=256))


def draw(task: tuple[Path, int, int]) -> None:
    data, number, size = task
    name = list(COLORS)[number % 2]
    path = data / ("valid" if number // 2 % VALID_EVERY == 0 else "train") / name / f"{number:06d}.jpg"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    coarse = (rng.integers(0, 256, (8, 8, 3)) + np.array(COLORS[name])) // 2
    shape = (size, size * 3 // 4) if number % 3 else (size * 3 // 4, size)
    Image.fromarray(coarse.astype(np.uint8)).resize(shape, Image.Resampling.BICUBIC).save(path, quality=88)


def measure(name: str, command: list[object]) -> None:
    """Run a command of finetune and print its elapsed time, CPU time and peak memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started, anonymous_mb = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", *map(str, command)], stdout=subprocess.DEVNULL, env=dict(os.environ)
    )
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        anonymous_mb = max(anonymous_mb, read_anonymous_mb(process.pid))
        time.sleep(POLL_S)
    _, status, usage = ended
    elapsed = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"finetune {command[0]} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    memory = f"peak memory {usage.ru_maxrss / 1024:,.0f} MB, {anonymous_mb:,} MB of it anonymous"
    print(f"{name}: {elapsed:.1f} s, {cpu:.1f} s of CPU time, {memory}", flush=True)


def read_anonymous_mb(pid: int) -> int:
    """Return the anonymous memory of a process that may have ended. Only Linux reports it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) // 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
