"""Draw bodies, tails and poses. The unit is half the head width, and the head center is (0, 0)."""

from __future__ import annotations

import itertools

from finetune.data.synthetic.appearance import Appearance
from finetune.data.synthetic.faces import draw_head
from finetune.data.synthetic.pen import Color, Pen, darker, lighter, mirrored, mix

POSES = ("portrait", "sitting", "standing", "lying")

_CAT_TAILS = (
    [(0.0, 0.0), (0.7, -0.05), (1.0, -0.7), (0.75, -1.4), (1.05, -1.9)],
    [(0.0, 0.0), (0.8, 0.1), (1.15, -0.5), (1.2, -1.3), (0.85, -1.75)],
    [(0.0, 0.0), (0.6, 0.2), (1.3, 0.05), (1.7, -0.5), (1.45, -0.95)],
)
_DOG_TAILS = (
    [(0.0, 0.0), (0.45, -0.25), (0.7, -0.7), (0.72, -1.15)],
    [(0.0, 0.0), (0.5, -0.1), (0.9, -0.4), (1.15, -0.8)],
    [(0.0, 0.0), (0.4, -0.5), (0.15, -0.95), (-0.25, -0.85)],
)


def draw_animal(pen: Pen, appearance: Appearance, pose: str) -> None:
    """Draw the animal in one of ``POSES``, with the head center at the pen's origin."""
    {"portrait": _portrait, "sitting": _sitting, "standing": _standing, "lying": _lying}[pose](pen, appearance)


def _limbs(appearance: Appearance) -> tuple[Color, Color]:
    """Return the colors of the legs and the paws."""
    leg = mix(appearance.fur, appearance.marks, 0.75) if appearance.coat == "pointed" else appearance.fur
    return leg, appearance.second if appearance.coat in ("tuxedo", "patched") else lighter(leg, 0.12)


def _paw(pen: Pen, x: float, y: float, rx: float, fill: Color) -> None:
    pen.smoothed().ellipse(x, y, rx, 0.19, fill)
    for toe in (-0.33, 0.33):
        pen.sleek().stroke([(x + rx * toe, y - 0.02), (x + rx * toe, y + 0.13)], 0.03, 0.03, darker(fill, 0.45))


def _tail(pen: Pen, appearance: Appearance, *, length: float = 1.0) -> None:
    """Draw a tail from the origin up to the right."""
    wag, fur = pen.rng.uniform(-0.3, 0.3), _limbs(appearance)[0]
    path = pen.rng.choice(_CAT_TAILS if appearance.cat else _DOG_TAILS)
    path = [(x * length, y * length) for x, y in path]
    path[-1] = (path[-1][0] + wag / 2, path[-1][1] + wag / 2)
    pen.stroke(path, *((0.34, 0.24) if appearance.cat else (0.44, 0.12)), fur)
    if appearance.cat and appearance.coat == "striped":
        for (ax, ay), (bx, by) in itertools.pairwise(path[1:]):
            x, y = (ax + bx) / 2, (ay + by) / 2
            pen.sleek().stroke([(x - 0.1, y - 0.02), (x + 0.1, y + 0.02)], 0.12, 0.12, appearance.marks)


def _collar(pen: Pen, appearance: Appearance, y: float, rx: float) -> None:
    if appearance.collar:
        pen.sleek().stroke([(-rx, y - 0.14), (0, y + 0.08), (rx, y - 0.14)], 0.2, 0.2, appearance.collar)
        pen.sleek().ellipse(0, y + 0.24, 0.13, 0.13, (236, 196, 84))


def _chest(pen: Pen, appearance: Appearance, y: float, rx: float, ry: float) -> None:
    if appearance.coat in ("tuxedo", "patched"):
        pen.sleek().ellipse(0, y, rx, ry, appearance.second)


def _portrait(pen: Pen, appearance: Appearance) -> None:
    broad = pen.rng.uniform(0.95, 1.2) * (1.0 if appearance.cat else 1.15)
    pen.shape(mirrored([(0.55, 0.3), (0.85 * broad, 1.1), (1.25 * broad, 2.0), (1.6 * broad, 8)]), appearance.fur)
    _chest(pen, appearance, 1.9, 0.55, 1.0)
    if appearance.coat == "striped":
        for side in (-1, 1):
            for y in (1.3, 1.75, 2.2):
                pen.sleek().stroke(
                    [(side * (0.3 + y * 0.36) * broad, y), (0.45 * side, y + 0.12)], 0.16, 0.06, appearance.marks
                )
    _collar(pen, appearance, 1.02, 0.68)
    draw_head(pen, appearance)


def _sitting(pen: Pen, appearance: Appearance) -> None:
    leg, paw = _limbs(appearance)
    stout = pen.rng.uniform(0.9, 1.15)
    side = pen.rng.choice((-1, 1))
    _tail(pen.moved(0.75 * stout * side, 2.75, flip=side < 0), appearance)
    pear = [(0.5, 0.4), (0.8 * stout, 1.2), (1.1 * stout, 2.2), (1.0 * stout, 3.0), (0, 3.12)]
    pen.shape(mirrored(pear), appearance.fur)
    _chest(pen, appearance, 1.5, 0.46, 0.75)
    for half in (-1, 1):
        if appearance.coat == "striped":
            for y in (1.3, 1.7, 2.1):
                pen.sleek().stroke(
                    [(half * (0.48 + y * 0.22) * stout, y), (0.42 * half, y + 0.1)], 0.14, 0.05, appearance.marks
                )
        pen.ellipse(0.84 * half * stout, 2.6, 0.42, 0.5, leg, degrees=-16 * half)
        _paw(pen, 0.98 * half * stout, 3.04, 0.36, paw)
    for half in (-1, 1):
        pen.shape(
            [(0.36 * half - 0.2, 1.7), (0.36 * half + 0.2, 1.7), (0.33 * half + 0.21, 3.0), (0.33 * half - 0.21, 3.0)],
            leg,
        )
        _paw(pen, 0.34 * half, 3.06, 0.29, paw)
    pen.sleek().ellipse(0, 1.62, 0.5, 0.4, appearance.second if appearance.coat in ("tuxedo", "patched") else appearance.fur)
    _collar(pen, appearance, 0.98, 0.6)
    draw_head(pen, appearance)


def _standing(pen: Pen, appearance: Appearance) -> None:
    """Draw a side view with the head on the left."""
    leg, paw = _limbs(appearance)
    long, tall = pen.rng.uniform(2.4, 3.0), pen.rng.uniform(1.25, 1.7) + (0.0 if appearance.cat else 0.2)
    _tail(pen.moved(long + 0.3, 0.95), appearance)
    step = pen.rng.uniform(-0.25, 0.25)
    for x, lean in ((0.55, -step), (long, step)):
        pen.stroke([(x, 1.4), (x + lean, 1.4 + tall)], 0.46, 0.34, darker(leg, 0.2))
        _paw(pen, x + lean - 0.08, 1.45 + tall, 0.27, darker(paw, 0.2))
    pen.shape([(0.1, 0.45), (1.0, 0.62), (long - 0.5, 0.6), (long + 0.3, 0.75), (long + 0.52, 1.3), (long + 0.1, 1.85),
               (long * 0.6, 1.8), (0.6, 2.0), (0.05, 1.6), (-0.2, 0.9)], appearance.fur)  # fmt: skip
    _side_marks(pen.sleek(), appearance, long)
    for x, lean in ((0.3, step), (long + 0.15, -step)):
        pen.stroke([(x, 1.45), (x + lean, 1.45 + tall)], 0.52, 0.36, leg)
        _paw(pen, x + lean - 0.08, 1.52 + tall, 0.29, paw)
    pen.sleek().ellipse(0.35, 1.3, 0.42, 0.5, leg if appearance.coat != "pointed" else appearance.fur)
    pen.sleek().ellipse(long + 0.08, 1.3, 0.38, 0.48, leg if appearance.coat != "pointed" else appearance.fur)
    draw_head(pen.moved(-0.15, 0), appearance)


def _side_marks(pen: Pen, appearance: Appearance, long: float) -> None:
    if appearance.coat == "striped":
        for i in range(5):
            x = 0.9 + i * (long - 0.9) / 4.5
            pen.stroke(
                [(x, 0.68), (x + 0.08, 1.05), (x - 0.02, 1.3 + pen.rng.uniform(-0.15, 0.15))], 0.16, 0.05, appearance.marks
            )
    elif appearance.coat == "patched":
        pen.ellipse(long * 0.62, 1.1, 0.62, 0.4, appearance.marks, degrees=pen.rng.uniform(-15, 15))
        pen.ellipse(long * 0.98, 1.0, 0.3, 0.24, appearance.second)
    elif appearance.coat == "tuxedo":
        pen.shape([(0.2, 1.3), (long, 1.62), (long * 0.7, 1.76), (0.6, 1.92)], appearance.second)


def _lying(pen: Pen, appearance: Appearance) -> None:
    leg, paw = _limbs(appearance)
    side = pen.rng.choice((-1, 1))
    wide = pen.rng.uniform(1.3, 1.9)
    body = pen.moved(0, 0, flip=side < 0)
    _tail(body.moved(wide + 0.5, 1.3), appearance, length=0.8)
    body.shape([(-0.85, 0.5), (0, 0.15), (wide * 0.8, 0.1), (wide + 0.55, 0.5), (wide + 0.75, 1.1), (wide + 0.3, 1.55),
                (-0.6, 1.58), (-1.05, 1.2)], appearance.fur)  # fmt: skip
    if appearance.coat == "striped":
        for i in range(4):
            x = 0.95 + i * (wide - 0.5) / 3
            body.sleek().stroke([(x, 0.2 + i * 0.04), (x + 0.06, 0.5), (x - 0.05, 0.8)], 0.15, 0.05, appearance.marks)
    elif appearance.coat == "patched":
        body.sleek().ellipse(wide * 0.85, 0.6, 0.45, 0.34, appearance.marks)
    body.ellipse(wide + 0.1, 1.15, 0.55, 0.45, leg)
    _paw(body, wide - 0.1, 1.5, 0.36, paw)
    _chest(pen, appearance, 1.1, 0.55, 0.42)
    for half in (-1, 1):
        pen.ellipse(0.45 * half, 1.42, 0.32, 0.3, leg)
        _paw(pen, 0.46 * half, 1.56, 0.34, paw)
    _collar(pen, appearance, 0.95, 0.6)
    draw_head(pen, appearance)
