"""How many photos a second does `finetune predict --output` score, and how does that grow with processors and processes?

    python benchmarks/score_speed.py BUNDLE PHOTOS [--photos 1400] [--rounds 3] [--processes 1 2 4] [--precision fp32]

In turn, each alone as far as this program goes: one process on one processor; then as many processes as are named, which
share all processors; and the engine alone, on pixels that are decoded already, on all processors. A process's rate is its own
count, from the first photo to the last; `whole` has its start too (imports, compiling the network). The medians count. On a
machine that is not idle look at the processor time a photo, which waits for nobody: it is printed too, with the start.
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

from finetune.data.image_files import walk_images
from models.artifacts.bundle import GRAPH, open_bundle
from models.artifacts.paths import resolve_bundle
from models.runtime.openvino_engine import OpenVINOEngine

PART = 100
ENGINE_PHOTOS = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--photos", type=int, default=1400, help="photos in a round; of fewer, some are scored repeatedly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    bundle, found = resolve_bundle(args.bundle), list(walk_images(args.data))
    if not found:
        parser.error(f"no photos below {args.data}")
    processors = sorted(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "list.txt"
        listed.write_text("".join(f"{path.resolve()}\n" for path in islice(cycle(found), args.photos)))
        for number in range(args.rounds):
            for count, allowed in ((1, processors[:1]), *((count, processors) for count in args.processes)):
                name = f"{count} process{'es' if count > 1 else ''}, {len(allowed)} processor{'s' if len(allowed) > 1 else ''}"
                out = Path(folder) / f"{number}-{count}-{len(allowed)}"
                began = processor_seconds()
                rate, whole = score(bundle, listed, out, count, allowed, args)
                cost = 1000 * (processor_seconds() - began) / args.photos
                costs[name].append(cost)
                rates[name].append(rate)
                rates[f"{name}, whole"].append(whole)
                print(
                    f"round {number + 1}: {name}: {rate:.1f} photos/s, whole {whole:.1f}, {cost:.1f} ms",
                    file=sys.stderr,
                    flush=True,
                )
            rates["engine alone"].append(engine_alone(bundle, found, args.precision))
            print(f"round {number + 1}: engine alone: {rates['engine alone'][-1]:.1f} photos/s", file=sys.stderr, flush=True)
    base = statistics.median(next(iter(rates.values())))
    print(f"{args.photos} photos, {args.precision}, median of {args.rounds}:")
    for name, row in rates.items():
        print(f"  {name:<34}{statistics.median(row):8.1f} photos/s  {statistics.median(row) / base:5.2f} times the first")
    for name, row in costs.items():
        print(f"  {name:<34}{statistics.median(row):8.1f} ms of processor time a photo")
    return 0


def score(
    bundle: Path, listed: Path, out: Path, count: int, allowed: list[int], args: argparse.Namespace
) -> tuple[float, float]:
    """Photos a second of ``count`` processes together on the processors ``allowed``: without their start, and with it."""
    words = [
        "predict",
        "--bundle",
        bundle,
        "--list",
        listed,
        "--output",
        out,
        "--images-per-file",
        PART,
        "--precision",
        args.precision,
    ]
    started = time.perf_counter()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "finetune", *map(str, words)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate()[0] for process in running]
    whole = args.photos / (time.perf_counter() - started)
    if any(process.returncode for process in running):
        raise SystemExit("a process failed")
    own = [re.search(r"([\d,.]+) photos scored \(([\d,.]+) per second\)", text) for text in said]
    seconds = [int(match[1].replace(",", "")) / float(match[2].replace(",", "")) for match in own if match]
    return args.photos / max(seconds), whole


def processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def engine_alone(path: Path, found: list[Path], precision: str, *, seconds: float = 5.0) -> float:
    """Photos a second through the engine, as scoring runs it, without reading or decoding."""
    from concurrent.futures import ThreadPoolExecutor

    from finetune.batch_inference.parquet import BATCH
    from finetune.io.threaded_map import available_cpus

    bundle, threads = open_bundle(path, files=(GRAPH,)), available_cpus()
    pixels = np.stack([bundle.preprocessing.pixels(photo.read_bytes()) for photo in islice(cycle(found), ENGINE_PHOTOS)])
    engine = OpenVINOEngine(
        path / GRAPH,
        outputs=["probabilities"],
        precision=precision,
        threads=threads,
        streams=threads,
        batch_sizes=(BATCH,),
    )
    engine.run(pixels)
    until = time.perf_counter() + seconds

    def work(_: int) -> int:
        done = 0
        while time.perf_counter() < until:
            engine.run(pixels)
            done += len(pixels)
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    return done / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
