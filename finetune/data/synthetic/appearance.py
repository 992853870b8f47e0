"""Random appearance of a drawn animal: coat, colors, ears and expression.

Cats and dogs share coat colors, collars and patterns, so that color alone does not reveal the class.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from finetune.data.synthetic.pen import Color, brightness, darker, lighter, mix

FURS: tuple[Color, ...] = (
    (52, 48, 54),  # black
    (92, 92, 102),  # slate
    (138, 142, 152),  # gray
    (238, 234, 228),  # white
    (236, 214, 178),  # cream
    (226, 146, 72),  # ginger
    (214, 172, 104),  # golden
    (150, 98, 62),  # brown
    (104, 70, 52),  # chocolate
    (190, 158, 126),  # fawn
)
COLLARS: tuple[Color, ...] = (
    (196, 58, 62),
    (54, 112, 178),
    (60, 142, 96),
    (236, 186, 60),
    (136, 84, 160),
    (40, 40, 48),
)
CAT_EYES: tuple[Color, ...] = ((150, 186, 84), (214, 180, 62), (108, 168, 204), (206, 130, 56), (120, 176, 140))
DOG_EYES: tuple[Color, ...] = ((70, 42, 28), (44, 30, 26), (112, 70, 36), (118, 160, 190))


@dataclass(frozen=True)
class Appearance:
    """The appearance of one animal."""

    cat: bool
    fur: Color
    second: Color  # muzzle, chest and paws, or the patches
    marks: Color  # stripes and spots
    coat: str
    eye: Color
    collar: Color | None
    turn: float  # head direction: -1 to its right, 0 frontal, 1 to its left
    ears: str
    mouth: str
    eyes: str
    patch_side: int


def random_appearance(label: str, rng: random.Random) -> Appearance:
    """Draw a random appearance for the class ``label``, "cats" or "dogs"."""
    cat = label == "cats"
    fur = rng.choice(FURS)
    fur = mix(fur, rng.choice(FURS), rng.uniform(0, 0.25))
    second = lighter(fur, rng.uniform(0.35, 0.9)) if rng.random() < 0.75 else mix(fur, rng.choice(FURS), 0.6)
    dark = rng.uniform(0.3, 0.6)
    ears = ("tall", "wide", "small") if cat else ("hanging", "hanging", "long", "folded", "folded", "shaggy")
    return Appearance(
        cat=cat,
        fur=fur,
        second=second,
        marks=darker(fur, dark) if brightness(fur) > 80 else lighter(fur, dark / 2),
        coat=rng.choice(("plain", "tuxedo", "tuxedo", "striped", "striped", "patched", "pointed")),
        eye=rng.choice(CAT_EYES if cat else DOG_EYES),
        collar=rng.choice(COLLARS) if rng.random() < 0.45 else None,
        turn=rng.uniform(-0.9, 0.9),
        ears=rng.choice(ears),
        mouth=rng.choice(("smile", "smile", "tongue", "open") if not cat else ("smile", "smile", "smile", "open")),
        eyes=rng.choice(("open", "open", "open", "open", "open", "shut")),
        patch_side=rng.choice((-1, 1)),
    )
