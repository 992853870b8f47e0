"""Measure how many deliberately flipped labels `finetune evaluate --folds` finds.

    python -m benchmarks.label_errors DATA [--flips 30] [--backbone efficientnet_lite0]

Links the photos of DATA into a temporary folder, with ``--flips`` training photos (equally many of each class) in the folder
of another class. Trains on it, runs the cross-validation, and prints which flips are reported and which other photos are.
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
    """Link the photos into ``out``, some training photos into the next class's folder. Returns the new names of these."""
    dataset = read_dataset(data, seed=seed)
    per_class = flips // len(dataset.classes)
    selected = set()
    for label in range(len(dataset.classes)):
        names = [photo.name for photo in dataset.in_split("train") if photo.label == label]
        selected |= set(random.Random(f"{seed}/{label}").sample(names, per_class))
    flipped = set()
    for photo in dataset.samples:
        label = (photo.label + (photo.name in selected)) % len(dataset.classes)
        link = out / photo.split / dataset.classes[label] / photo.path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(photo.path.resolve())
        if photo.name in selected:
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
    with tempfile.TemporaryDirectory(prefix="label-errors-") as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        flipped = flip_labels(args.data, data, flips=args.flips, seed=args.seed)
        config = Config(data_dir=data, backbone=args.backbone, output_dir=run, export="head", allow_leakage=True)
        bundle = train(config)
        start = time.perf_counter()
        predictions = cross_validate(bundle.path, data, folds=args.folds, out=Path(folder) / "folds").predictions
        seconds = time.perf_counter() - start
    reported = [predictions.image_names[row] for row in rank_label_issues(predictions)]
    true_positives = flipped & set(reported)
    misclassified = {predictions.image_names[row] for row in np.flatnonzero(~predictions.correct)}
    top = len(flipped & set(reported[: len(flipped)]))
    print(
        f"\n{len(flipped)} of {predictions.splits.count('train'):,} training labels flipped, cross-validated in {seconds:.0f} s"
    )
    print(f"reported {len(reported)}: {len(true_positives)} flips and {len(reported) - len(true_positives)} other photos")
    print(f"the first {len(flipped)} reports contain {top} flips; {len(flipped & misclassified)} flips are misclassified")
    print("missed:", ", ".join(sorted(flipped - true_positives)) or "none")
    print("others:", ", ".join(name for name in reported if name not in flipped) or "none")


if __name__ == "__main__":
    main()
