"""Measure how many images per second `finetune predict --output` scores, by the number of processors and processes.

    python benchmarks/score_speed.py BUNDLE PHOTOS [--photos 1400] [--rounds 3] [--processes 1 2 4] [--precision fp32]

Each round measures one process on one processor, then several processes that share all processors, then inference alone on
decoded pixels with all processors. The rate of a process is its own count, from the first image to the last. "with start"
includes imports and compiling the network. The medians are printed. On a busy machine compare the processor time per image,
which is printed too.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from finetune.data.image_files import ImageSearch
from models.artifacts.bundle import open_bundle
from models.artifacts.paths import resolve_bundle
from models.runtime.openvino_engine import OpenVINOEngine

IMAGES_PER_FILE = 100
ENGINE_PHOTOS = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--photos", type=int, default=1400, help="images per round; a smaller folder is scored repeatedly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32")
    args = parser.parse_args()
    bundle, images = resolve_bundle(args.bundle), list(ImageSearch().walk([args.data]))
    if not images:
        parser.error(f"no photos in {args.data}")
    processors = sorted(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = defaultdict(list)
    cpu_times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        list_file = Path(folder) / "list.txt"
        list_file.write_text("".join(f"{path.resolve()}\n" for path in islice(cycle(images), args.photos)))
        for number in range(args.rounds):
            for count, allowed in ((1, processors[:1]), *((count, processors) for count in args.processes)):
                name = f"{count} process{'es' if count > 1 else ''}, {len(allowed)} processor{'s' if len(allowed) > 1 else ''}"
                out = Path(folder) / f"{number}-{count}-{len(allowed)}"
                start = processor_seconds()
                rate, with_start = score(bundle, list_file, out, count, allowed, args)
                cpu_ms = 1000 * (processor_seconds() - start) / args.photos
                cpu_times[name].append(cpu_ms)
                rates[name].append(rate)
                rates[f"{name}, with start"].append(with_start)
                print(
                    f"round {number + 1}: {name}: {rate:.1f} images/s, with start {with_start:.1f}, {cpu_ms:.1f} ms",
                    file=sys.stderr,
                    flush=True,
                )
            rates["inference alone"].append(inference_alone(bundle, images, args.precision))
            print(
                f"round {number + 1}: inference alone: {rates['inference alone'][-1]:.1f} images/s", file=sys.stderr, flush=True
            )
    base = statistics.median(next(iter(rates.values())))
    print(f"{args.photos} images, {args.precision}, median of {args.rounds}:")
    for name, row in rates.items():
        print(f"  {name:<34}{statistics.median(row):8.1f} images/s  {statistics.median(row) / base:5.2f} times the first")
    for name, row in cpu_times.items():
        print(f"  {name:<34}{statistics.median(row):8.1f} ms of processor time per image")
    return 0


def score(
    bundle: Path, list_file: Path, out: Path, count: int, allowed: list[int], args: argparse.Namespace
) -> tuple[float, float]:
    """Score with ``count`` processes on the processors ``allowed``. Returns images per second without and with start."""
    arguments = [
        "predict",
        "--bundle",
        bundle,
        "--list",
        list_file,
        "--output",
        out,
        "--images-per-file",
        IMAGES_PER_FILE,
        "--precision",
        args.precision,
    ]
    started = time.perf_counter()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "finetune", *map(str, arguments)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate()[0] for process in running]
    with_start = args.photos / (time.perf_counter() - started)
    if any(process.returncode for process in running):
        raise SystemExit("a process failed")
    reports = [re.search(r"([\d,.]+) photos scored \(([\d,.]+) per second\)", text) for text in outputs]
    seconds = [int(match[1].replace(",", "")) / float(match[2].replace(",", "")) for match in reports if match]
    return args.photos / max(seconds), with_start


def processor_seconds() -> float:
    """Return the processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def inference_alone(path: Path, images: list[Path], precision: str, *, seconds: float = 5.0) -> float:
    """Measure images per second of the engine, configured like batch prediction, without reading or decoding."""
    from concurrent.futures import ThreadPoolExecutor

    from finetune.batch_inference.parquet import BATCH
    from finetune.io.threaded_map import available_cpus

    bundle, threads = open_bundle(path), available_cpus()
    pixels = np.stack([bundle.preprocessing.pixels(photo.read_bytes()) for photo in islice(cycle(images), ENGINE_PHOTOS)])
    engine = OpenVINOEngine(
        bundle.graph(precision),
        outputs=["probabilities"],
        precision=precision,
        threads=threads,
        streams=threads,
        batch_sizes=(BATCH,),
    )
    engine.run(pixels)
    deadline = time.perf_counter() + seconds

    def work(_: int) -> int:
        done = 0
        while time.perf_counter() < deadline:
            engine.run(pixels)
            done += len(pixels)
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    return done / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
