"""Write a labeled dataset of drawn cats and dogs, to try the pipeline without a download."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from finetune.data.synthetic.appearance import random_appearance
from finetune.data.synthetic.bodies import POSES, draw_animal
from finetune.data.synthetic.pen import Pen
from finetune.data.synthetic.scenes import draw_scene, gradient
from finetune.io.output_folder import atomic_folder
from models.errors import DataError, did_you_mean

CLASSES = ("cats", "dogs")
README = """These images are drawings, not photos.

They were created by `finetune synthesize` (train {train}, valid {valid}, seed {seed}), so that every step of the pipeline
can be tried without a download. Accuracy on them says nothing about photos: drawings are much easier to classify.
See `finetune download --help` for real photos.
"""

_ASPECTS = ((4, 3), (4, 3), (13, 10), (6, 5), (1, 1), (3, 4), (5, 6))


@dataclass(frozen=True)
class SyntheticDataset:
    """Summary of a written dataset. ``train`` and ``valid`` count the images of both classes together."""

    out: Path
    train: int
    valid: int
    seed: int


def write_synthetic_dataset(out: Path, *, train: int = 200, valid: int = 80, seed: int = 0) -> SyntheticDataset:
    """Write drawings to ``out/{train,valid}/{cats,dogs}`` atomically.

    Args:
        out: The folder to create.
        train: Number of training images, both classes together.
        valid: Number of validation images, both classes together.
        seed: Random seed. An image depends only on the seed, its split, class and number, so larger datasets contain the
            images of smaller ones.

    Raises:
        DataError: ``out`` is not empty or cannot be written, or there would be less than one image per class.
    """
    for flag, count in (("--train", train), ("--valid", valid)):
        if count < len(CLASSES):
            raise DataError(f"{flag} must be at least {len(CLASSES)}, one image per class (got {count}).")
    with atomic_folder(out) as folder, tqdm(total=train + valid, unit=" images", disable=None, leave=False) as bar:
        for split, count in (("train", train), ("valid", valid)):
            for i in range(count):
                label, number = CLASSES[i % 2], i // 2 + 1
                path = folder / split / label / f"{label[:-1]}.{number:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                draw_image(label, rng=random.Random(f"{seed}/{split}/{label}/{number}")).save(path, quality=88)
                bar.update()
        (folder / "README.txt").write_text(README.format(train=train, valid=valid, seed=seed), encoding="utf-8")
    return SyntheticDataset(out=out, train=train, valid=valid, seed=seed)


def draw_image(label: str, *, rng: random.Random) -> Image.Image:
    """Draw one animal of the class ``label`` in a random scene: RGB, with sides of 200 to 520 pixels.

    Raises DataError for an unknown label.
    """
    if label not in CLASSES:
        raise DataError(f"Unknown class {label!r}. The classes are cats and dogs.{did_you_mean(label, CLASSES)}")
    wide, high = rng.choice(_ASPECTS)
    short_px = rng.randint(200, 390) if wide != high else rng.randint(240, 390)
    size_px = (short_px * wide // min(wide, high), short_px * high // min(wide, high))
    image, ground = draw_scene(size_px, rng)
    animal, shape, corner = _animal(label, size_px, ground, rng)
    if ground:
        _cast_shadow(image, corner, shape.size)
    image.paste(animal, corner, shape)
    return _apply_camera_effects(image, rng)


def _animal(
    label: str, size_px: tuple[int, int], ground: float, rng: random.Random
) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """Draw the animal and return its image, its mask and the position of its top left corner."""
    appearance, pose = random_appearance(label, rng), rng.choice(POSES)
    width, height = size_px
    # Pillow does not antialias, so draw at twice the size and downscale.
    canvas = Image.new("RGBA", (width * 2, height * 2), (*appearance.fur, 0))
    x, y, unit = _place(pose, width / height, ground, rng)
    flip = rng.random() < 0.5
    pen = Pen(ImageDraw.Draw(canvas), rng, line=rng.choice((0.015, 0.022, 0.035)), fluff=rng.choice((0.0, 0.03, 0.06)))
    pen = pen.moved(
        (width - x * height if flip else x * height) * 2,
        y * height * 2,
        scale=unit * height * 2,
        degrees=rng.uniform(-5, 5),
        flip=flip,
    )
    draw_animal(pen, appearance, pose)
    left, top, right, bottom = canvas.getbbox() or (0, 0, 2, 2)
    corner = left // 2, top // 2
    bands = canvas.crop((corner[0] * 2, corner[1] * 2, right, bottom)).split()
    red, green, blue, shape = [band.reduce(2) for band in bands]
    bright, dim = rng.randint(235, 255), rng.randint(130, 210)
    light = gradient(shape.size, (bright,) * 3, (dim,) * 3, across=rng.random() < 0.4)
    return ImageChops.multiply(Image.merge("RGB", (red, green, blue)), light), shape, corner


def _place(pose: str, aspect: float, ground: float, rng: random.Random) -> tuple[float, float, float]:
    """Choose the head center (x, y) and the drawing unit, as fractions of the image height."""
    room = min(1.0, aspect * 0.85)
    if pose == "portrait":
        unit = rng.uniform(0.2, 0.34) * room
        top = max(1.25 * unit, 1 - 3.3 * unit)
        return rng.uniform(0.32, 0.68) * aspect, rng.uniform(top, max(top + 0.05, 0.62)), unit
    low, high, below, left, right = {
        "sitting": (0.14, 0.215, 3.2, 0.28, 0.72),
        "standing": (0.13, 0.19, 3.3, 0.2, 0.42),
        "lying": (0.16, 0.25, 1.75, 0.3, 0.7),
    }[pose]
    unit = rng.uniform(low, high) * room
    feet = rng.uniform(min(max(ground + 0.06, (below + 1.3) * unit), 0.97), 0.98)
    return rng.uniform(left, right) * aspect, feet - below * unit, unit


def _cast_shadow(image: Image.Image, corner: tuple[int, int], size_px: tuple[int, int]) -> None:
    """Darken the ground where the animal touches it."""
    left, bottom = corner[0], corner[1] + size_px[1]
    if bottom >= image.height - 1:
        return
    across, deep = size_px[0] // 4, max(size_px[0] // 40, 2)
    small = Image.new("L", (across + 8, deep * 2 + 8))
    ImageDraw.Draw(small).ellipse((4, 4, across + 4, deep * 2 + 4), fill=110)
    soft = small.filter(ImageFilter.BoxBlur(2)).resize((small.width * 4, small.height * 4))
    image.paste((20, 18, 30), (left - 16, bottom - 16 - round(deep * 5.6)), soft)


def _apply_camera_effects(image: Image.Image, rng: random.Random) -> Image.Image:
    """Vary brightness, contrast, white balance, blur and noise."""
    warmth, contrast, lift = rng.uniform(-14, 14), rng.uniform(0.8, 1.15), rng.uniform(-16, 16)
    level = 128 * (1 - contrast) + lift
    image = image.convert("RGB", (contrast, 0, 0, level + warmth, 0, contrast, 0, level, 0, 0, contrast, level - warmth))
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.4:
        width, height = image.size
        grain = Image.frombytes("L", (width, height), rng.randbytes(width * height))
        image = Image.blend(image, Image.merge("RGB", (grain,) * 3), rng.uniform(0.02, 0.07))
    return image
