"""Draw faces, which distinguish cats from dogs: ears, eyes, noses, mouths and whiskers.

The head center is (0, 0), and half the head width is about one unit.
"""

from __future__ import annotations

from finetune.data.synthetic.appearance import Appearance
from finetune.data.synthetic.pen import Color, Pen, brightness, darker, lighter, mirrored, mix

PINK: Color = (228, 150, 148)
TONGUE: Color = (232, 112, 122)

_CAT_HEAD = mirrored([(0, -0.86), (0.5, -0.8), (0.9, -0.35), (1.06, 0.22), (0.86, 0.58), (0.45, 0.83), (0, 0.9)])
_DOG_HEAD = mirrored([(0, -0.93), (0.42, -0.86), (0.78, -0.45), (0.84, 0), (0.74, 0.42), (0.48, 0.78), (0, 0.9)])
_SNOUT = mirrored([(0, -0.06), (0.22, -0.02), (0.4, 0.26), (0.44, 0.48), (0.24, 0.64), (0, 0.6)])
_JAW = mirrored([(0.36, 0.5), (0.26, 0.86), (0, 0.98)])
_BLAZE = mirrored([(0.03, -0.66), (0.16, 0), (0.5, 0.5), (0, 0.74)])


def draw_head(pen: Pen, appearance: Appearance) -> None:
    """Draw the animal's head at the pen's origin, slightly tilted."""
    pen = pen.moved(0, 0, degrees=pen.rng.uniform(-14, 14), scale=pen.rng.uniform(0.95, 1.08))
    (_cat_head if appearance.cat else _dog_head)(pen, appearance)


def _cat_head(pen: Pen, appearance: Appearance) -> None:
    turn, plain = appearance.turn, pen.sleek()
    _cat_ears(pen, appearance)
    pen.shape(_CAT_HEAD, appearance.fur)
    _face_marks(plain, appearance)
    muzzle = plain.moved(0.3 * turn, 0.06)
    pale = appearance.second if appearance.coat in ("tuxedo", "patched") else lighter(appearance.fur, 0.22)
    if appearance.coat == "pointed":
        pale = mix(appearance.marks, appearance.fur, 0.3)
        muzzle.ellipse(0, 0.18, 0.52, 0.56, mix(appearance.marks, appearance.fur, 0.55))
    muzzle.ellipse(0, 0.56, 0.24, 0.19, pale)
    if appearance.mouth == "open":
        muzzle.ellipse(0, 0.58, 0.15, 0.17, darker(TONGUE, 0.6))
        muzzle.ellipse(0, 0.66, 0.1, 0.08, TONGUE)
    for side in (-1, 1):
        muzzle.ellipse(0.2 * side, 0.4, 0.26, 0.2, pale, degrees=12 * side)
    for side in (-1, 1):
        _cat_eye(plain.moved((0.43 + 0.02 * side * turn) * side + 0.17 * turn, -0.06, flip=side < 0), appearance)
    ink = darker(appearance.fur, 0.75) if brightness(pale) > 70 else lighter(pale, 0.35)
    nose = PINK if brightness(appearance.fur) > 70 else darker(PINK, 0.35)
    muzzle.shape([(-0.13, 0.18), (0, 0.16), (0.13, 0.18), (0.07, 0.28), (0, 0.32), (0, 0.32), (-0.07, 0.28)], nose)
    muzzle.stroke([(0, 0.32), (0, 0.41)], 0.03, 0.03, ink)
    for side in (-1, 1):
        muzzle.stroke([(0, 0.41), (0.1 * side, 0.49), (0.24 * side, 0.46)], 0.04, 0.02, ink)
        _whiskers(muzzle.moved(0, 0, flip=side < 0), lighter(pale, 0.85) if brightness(appearance.fur) < 170 else ink)


def _cat_ears(pen: Pen, appearance: Appearance) -> None:
    turn = appearance.turn
    high = {"tall": 1.42, "wide": 1.22, "small": 1.08}[appearance.ears] + pen.rng.uniform(-0.06, 0.06)
    tip = {"tall": 0.74, "wide": 0.98, "small": 0.72}[appearance.ears] + pen.rng.uniform(-0.05, 0.05)
    ear_fur = appearance.marks if appearance.coat == "pointed" else appearance.fur
    for side in (-1, 1):
        ear = pen.moved(0.06 * turn, 0, flip=side < 0)
        x = tip * (1 + 0.12 * side * turn)
        ear.shape(
            [(0.14, -0.72), (x - 0.22, 0.16 - high), (x, -high), (x, -high), (x + 0.12, 0.3 - high), (0.96, -0.15)],
            ear_fur,
        )
        inner = [(0.36, -0.7), (x - 0.15, 0.32 - high), (x - 0.01, 0.2 - high), (x + 0.03, 0.42 - high), (0.82, -0.32)]
        ear.sleek().shape(inner, mix(PINK, ear_fur, 0.25))


def _cat_eye(pen: Pen, appearance: Appearance) -> None:
    rim = darker(appearance.fur, 0.7) if brightness(appearance.fur) > 70 else (14, 12, 14)
    if appearance.eyes == "shut":
        pen.stroke([(-0.2, 0.02), (0, 0.12), (0.2, 0)], 0.05, 0.04, lighter(appearance.fur, 0.45) if rim[0] < 20 else rim)
        return
    pen.shape([(-0.27, 0.08), (-0.1, -0.2), (0.1, -0.22), (0.28, -0.1), (0.16, 0.17), (-0.08, 0.21)], rim)
    pen.shape([(-0.21, 0.06), (-0.08, -0.16), (0.09, -0.18), (0.22, -0.09), (0.13, 0.13), (-0.06, 0.17)], appearance.eye)
    pen.ellipse(0.01, 0.0, pen.rng.choice((0.035, 0.05, 0.075)), 0.155, (16, 14, 18))
    pen.ellipse(0.07, -0.08, 0.04, 0.045, (252, 252, 250))


def _whiskers(pen: Pen, ink: Color) -> None:
    droop = pen.rng.uniform(-0.06, 0.14)
    for row in (-1, 0, 1):
        y = 0.4 + 0.07 * row
        pen.stroke([(0.26, y), (0.75, y + 0.1 * row - 0.03), (1.32, y + 0.22 * row + droop)], 0.026, 0.008, ink)


def _face_marks(pen: Pen, appearance: Appearance) -> None:
    turn = appearance.turn
    if appearance.coat == "striped" and appearance.cat:
        for x in (-0.26, 0, 0.26):
            pen.stroke(
                [(x * 1.1 + 0.1 * turn, -0.8), (x * 0.8 + 0.15 * turn, -0.42 - abs(x) * 0.3)], 0.12, 0.05, appearance.marks
            )
        for side in (-1, 1):
            for y in (0.16, 0.36):
                pen.stroke([(0.98 * side, y), (0.68 * side + 0.1 * turn, y - 0.02)], 0.09, 0.03, appearance.marks)
    elif appearance.coat == "patched":
        side = appearance.patch_side
        pen.ellipse(0.44 * side + 0.12 * turn, -0.16, 0.36, 0.42, appearance.marks, degrees=20 * side)
    elif appearance.coat == "tuxedo":
        pen.moved(0.15 * turn, 0).shape(_BLAZE, appearance.second)


def _dog_head(pen: Pen, appearance: Appearance) -> None:
    turn, plain = appearance.turn, pen.sleek()
    behind = appearance.ears in ("hanging", "long", "shaggy")
    if not behind:
        _dog_ears(pen, appearance)
    pen.shape(_DOG_HEAD, appearance.fur)
    _face_marks(plain, appearance)
    for side in (-1, 1):
        _dog_eye(plain.moved((0.36 + 0.03 * side * turn) * side + 0.16 * turn, -0.14, flip=side < 0), appearance)
    if behind:
        _dog_ears(pen, appearance)
    _dog_snout(pen.moved(0.34 * turn, 0.1), appearance)


def _dog_ears(pen: Pen, appearance: Appearance) -> None:
    fur = (
        appearance.fur
        if appearance.coat == "tuxedo" and appearance.patch_side > 0
        else mix(appearance.fur, appearance.marks, 0.6)
    )
    swing = pen.rng.uniform(-0.08, 0.16)
    for side in (-1, 1):
        ear = pen.moved(0.06 * appearance.turn, 0, flip=side < 0, degrees=pen.rng.uniform(-6, 6))
        if appearance.ears == "folded":
            ear.shape([(0.2, -0.78), (0.42, -1.08), (0.66, -1.16), (0.94, -0.86), (0.96, -0.2)], fur)
            ear.shape(
                [(0.44, -1.08), (0.66, -1.17), (0.98, -0.9), (1.12, -0.34), (1.12, -0.34), (0.74, -0.56)],
                darker(fur, 0.18),
            )
        else:
            drop = {"hanging": 0.45, "long": 0.95, "shaggy": 0.7}[appearance.ears] + swing
            wide = {"hanging": 1.18, "long": 1.12, "shaggy": 1.3}[appearance.ears]
            ear.shape([(0.36, -0.82), (0.66, -0.9), (wide - 0.1, -0.5), (wide, drop * 0.4), (wide - 0.12, drop),
                       (wide - 0.36, drop - 0.02), (0.72, drop * 0.3), (0.62, -0.35)], fur)  # fmt: skip


def _dog_snout(pen: Pen, appearance: Appearance) -> None:
    plain = pen.sleek()
    pale = appearance.second if appearance.coat in ("tuxedo", "patched") else lighter(appearance.fur, 0.2)
    if appearance.coat == "pointed":
        pale = mix(appearance.marks, appearance.fur, 0.15)
    ink = darker(appearance.fur, 0.8) if brightness(pale) > 70 else (10, 9, 11)
    if appearance.mouth in ("tongue", "open"):
        pen.shape(_JAW, pale)
        plain.shape([(-0.27, 0.5), (0.27, 0.5), (0.18, 0.8), (0, 0.88), (-0.18, 0.8)], darker(TONGUE, 0.7))
        out = 1.22 if appearance.mouth == "tongue" else 0.84
        lean = pen.rng.uniform(-0.14, 0.14)
        plain.shape([(-0.15, 0.55), (0.15, 0.55), (0.18 + lean, out - 0.2), (lean, out), (-0.18 + lean, out - 0.2)], TONGUE)
        plain.stroke([(0, 0.6), (lean * 0.8, out - 0.18)], 0.03, 0.02, darker(TONGUE, 0.25))
    pen.shape(_SNOUT, pale)
    plain.stroke([(0, 0.26), (0, 0.56)], 0.035, 0.035, ink)
    for side in (-1, 1):
        plain.stroke([(0, 0.54), (0.17 * side, 0.63), (0.38 * side, 0.54)], 0.045, 0.025, ink)
        for x, y in ((0.2, 0.36), (0.28, 0.46), (0.16, 0.47)):
            plain.ellipse(x * side, y, 0.018, 0.018, ink)
    plain.shape([(-0.2, 0.02), (0, -0.03), (0.2, 0.02), (0.2, 0.14), (0.06, 0.27), (-0.06, 0.27), (-0.2, 0.14)], (34, 28, 32))
    plain.ellipse(-0.06, 0.06, 0.07, 0.03, (128, 122, 128))


def _dog_eye(pen: Pen, appearance: Appearance) -> None:
    around = darker(appearance.fur, 0.75) if brightness(appearance.fur) > 70 else (12, 10, 12)
    if appearance.eyes == "shut":
        pen.stroke([(-0.16, 0.06), (0, -0.05), (0.16, 0.06)], 0.05, 0.05, around)
    else:
        pen.ellipse(0, 0, 0.18, 0.185, lighter(appearance.fur, 0.3) if brightness(appearance.fur) < 70 else around)
        pen.ellipse(0, 0.0, 0.155, 0.16, appearance.eye)
        pen.ellipse(0, 0.01, 0.1, 0.105, (16, 12, 14))
        pen.ellipse(0.05, -0.06, 0.05, 0.05, (252, 252, 250))
    pen.stroke([(-0.1, -0.34), (0.06, -0.38), (0.16, -0.33)], 0.06, 0.04, mix(appearance.fur, appearance.marks, 0.8))
