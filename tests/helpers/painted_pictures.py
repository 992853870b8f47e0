"""A folder of pictures with two kinds of mistakes: some are in the folder of the other class, and one is a copy."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune.data.image_folder import read_dataset
from tests.helpers.tiny_network import COLORS, paint

CLASSES = ("cats", "dogs")  # of the included classifier; the pictures are blue and red, which any network separates
MISLABELED = 2  # of each class
COPY = "cats/copy.jpg"


@dataclass(frozen=True)
class Pictures:
    """The folder, with a folder of ``count`` pictures for each class.

    ``mislabeled`` are validation pictures in the folder of the other class. The copy is one more.
    """

    root: Path
    count: int
    mislabeled: frozenset[str]


def paint_pictures(root: Path, *, count: int = 30) -> Pictures:
    """Paint the pictures into a folder that exists."""
    names = {label: [f"{label}/{number:02d}.jpg" for number in range(count)] for label in CLASSES}
    colors = {name: COLORS[index] for index, label in enumerate(CLASSES) for name in names[label]}
    for seed, (name, color) in enumerate(colors.items()):
        paint(root / name, color, seed=seed)
    held_out = {sample.name for sample in read_dataset(root).samples if sample.split == "valid"}
    mislabeled = [name for label in CLASSES for name in sorted(held_out.intersection(names[label]))[:MISLABELED]]
    for seed, name in enumerate(mislabeled, start=len(colors)):
        paint(root / name, next(color for color in COLORS if color != colors[name]), seed=seed)
    shutil.copyfile(root / "cats" / "00.jpg", root / COPY)
    return Pictures(root, count, frozenset(mislabeled))
