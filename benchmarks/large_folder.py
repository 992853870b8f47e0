"""Measure the time and peak memory of `finetune audit` and `finetune train` on a large folder of small photos.

    python benchmarks/large_folder.py [--photos 25000] [--size 200] [--backbone efficientnet_lite0] [--epochs N] [--keep DIR]

The photos are drawn by this program: JPEGs of random soft shapes in two classes, a fifth of them for validation. All caches
are empty at the start. The audit and the training are run one after the other, each in its own process; training repeats the
audit. "again" is the same training run with a filled cache. CPU time is less affected by other processes than elapsed time.

The memory is the sum over all processes of a command, where a page that several of them use counts once. Its anonymous part is
what the system cannot reclaim: it excludes libraries and features, which are files. A phase lasts from one line of the
command's output to the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"blue": (40, 60, 200), "red": (200, 60, 40)}
VALID_EVERY = 5
POLL_S = 0.5
MIN_PHASE_S = 0.5  # shorter ones are not printed
RUNS = ("audit", "train", "again")


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
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="what to measure (default: all)")
    parser.add_argument("--cache-dir", type=Path, help="a cache to reuse (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = args.keep or Path(folder) / "photos"
        draw_folder(data, args.photos, args.size)
        caches = ("--cache-dir", args.cache_dir or Path(folder) / "cache")
        train = ["train", "--data-dir", data, "--backbone", args.backbone, *caches]
        train += ["--epochs", args.epochs] if args.epochs else []
        train += [] if args.int8 else ["--no-int8"]
        for run in args.runs:
            audit = ["audit", data, "--cache-dir", Path(folder) / "audit-cache"]
            measure(run, audit if run == "audit" else [*train, "--output-dir", Path(folder) / run])
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
    """Run a command of finetune and print its elapsed time, CPU time and peak memory, and those of its phases."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout
    memory = MemorySampler(process.pid)
    phases = [Phase("importing")]
    for line in process.stdout:
        if line.strip():
            phases[-1].end(memory.take_peak())
            phases.append(Phase(line.strip()))
    phases[-1].end(memory.take_peak())
    status = process.wait()
    elapsed = time.perf_counter() - started
    memory.stop()
    if status not in (0, 1):
        raise SystemExit(f"finetune {command[0]} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name}: {elapsed:.1f} s, {cpu:.1f} s of CPU time, peak memory of all processes {memory.peak}")
    for peak_mb, process_name in memory.process_peaks_mb.values():
        print(f"  {peak_mb:,} MB resident in the process {process_name[:80]}")
    for phase in phases:
        if phase.seconds >= MIN_PHASE_S:
            print(f"  {phase.seconds:6.1f} s, {phase.peak}  {phase.title[:100]}")
    sys.stdout.flush()


@dataclass(frozen=True, order=True)
class Memory:
    """Memory of a process and its children in MB: proportional to the processes that use each page, and what is anonymous."""

    total_mb: int = 0
    anonymous_mb: int = 0

    def __str__(self) -> str:
        return f"{self.total_mb:,} MB ({self.anonymous_mb:,} MB anonymous)"


class Phase:
    """What a command does from one line of its output to the next one."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.seconds, self.peak = 0.0, Memory()
        self._started = time.perf_counter()

    def end(self, peak: Memory) -> None:
        """Set the duration and the peak memory."""
        self.seconds, self.peak = time.perf_counter() - self._started, peak


class MemorySampler:
    """Reads the memory of a process and its children in a thread, every POLL_S. Only Linux reports it.

    Attributes:
        peak: The peak of their sum.
        process_peaks_mb: The largest resident memory of each process and its command, by process ID.
    """

    def __init__(self, pid: int) -> None:
        self.peak = Memory()
        self.process_peaks_mb: dict[int, tuple[int, str]] = {}
        self._pid = pid
        self._phase_peak = Memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take_peak(self) -> Memory:
        """Return the peak since the last call."""
        self._sample()
        peak, self._phase_peak = self._phase_peak, Memory()
        return peak

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(POLL_S):
            self._sample()

    def _sample(self) -> None:
        total, anonymous = 0, 0
        for pid in descendants(self._pid):
            with contextlib.suppress(OSError):
                pages = read_kb(Path(f"/proc/{pid}/smaps_rollup"))
                total += pages["Pss"]
                anonymous += pages["Anonymous"]
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                resident = read_kb(Path(f"/proc/{pid}/status"))["VmHWM"] // 1024
                self.process_peaks_mb[pid] = resident, " ".join(words[1:4])
        now = Memory(total // 1024, anonymous // 1024)
        self.peak, self._phase_peak = max(self.peak, now), max(self._phase_peak, now)


def descendants(pid: int) -> list[int]:
    """Return a process and its children, and theirs."""
    pids = [pid]
    for parent in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return pids


def read_kb(file: Path) -> dict[str, int]:
    """Return the values of a file of /proc that are in kB."""
    fields = (line.split() for line in file.read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) for name, value, _ in fields}


if __name__ == "__main__":
    sys.exit(main())
