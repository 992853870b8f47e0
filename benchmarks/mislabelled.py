"""How many wrong labels do out-of-fold predictions bring to light? Flip some on purpose, train on them, and count.

    python -m benchmarks.mislabelled DATA [--flips 30] [--backbone efficientnet_lite0]

Links the photos of DATA into a temporary folder, with ``--flips`` of the training photos (as many of each class) in another
class's folder, trains there, runs `finetune evaluate --folds` and prints which of the flips are found, and who else is named.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from finetune.config import Config
from finetune.data.image_folder import read_dataset
from finetune.evaluation.cross_validation import cross_validate
from finetune.pipeline import train
from models.artifacts.label_issues import rank_label_issues


def flip_labels(data: Path, out: Path, *, flips: int, seed: int) -> set[str]:
    """Link the photos below ``out``, some training ones in the next class's folder; gives the names of those."""
    dataset = read_dataset(data, seed=seed)
    each = flips // len(dataset.classes)
    chosen = set()
    for label in range(len(dataset.classes)):
        names = [photo.name for photo in dataset.in_split("train") if photo.label == label]
        chosen |= set(random.Random(f"{seed}/{label}").sample(names, each))
    flipped = set()
    for photo in dataset.samples:
        label = (photo.label + (photo.name in chosen)) % len(dataset.classes)
        link = out / photo.split / dataset.classes[label] / photo.path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(photo.path.resolve())
        if photo.name in chosen:
            flipped.add(link.relative_to(out).as_posix())
    return flipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--flips", type=int, default=30)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mislabelled-") as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        flipped = flip_labels(args.data, data, flips=args.flips, seed=args.seed)
        config = Config(data_dir=data, backbone=args.backbone, output_dir=run, export="head", allow_leakage=True)
        bundle = train(config)
        began = time.perf_counter()
        predictions, _ = cross_validate(bundle.path, data, folds=args.folds, out=Path(folder) / "folds")
        seconds = time.perf_counter() - began
    named = [predictions.image_names[row] for row in rank_label_issues(predictions)]
    found = flipped & set(named)
    wrong = {predictions.image_names[row] for row in np.flatnonzero(~predictions.correct)}
    first = len(flipped & set(named[: len(flipped)]))
    print(f"\n{len(flipped)} of {predictions.splits.count('train'):,} training labels flipped; {seconds:.0f} s for the folds")
    print(f"named: {len(named)}; of the flips {len(found)} are found, and {len(named) - len(found)} others are named")
    print(
        f"among the first {len(flipped)} named are {first} flips; of the flips {len(flipped & wrong)} are predicted otherwise"
    )
    print("missed:", ", ".join(sorted(flipped - found)) or "none")
    print("others:", ", ".join(name for name in named if name not in flipped) or "none")


if __name__ == "__main__":
    main()
