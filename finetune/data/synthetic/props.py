"""Draw furniture, toys and landscape elements, which do not depend on the class.

The unit is the image height; ``edge`` is the y coordinate at which the wall meets the floor.
"""

from __future__ import annotations

from finetune.data.synthetic.pen import Color, Pen, darker, lighter, mirrored, mix

WALLS: tuple[Color, ...] = (
    (214, 198, 176), (176, 196, 190), (196, 176, 190), (232, 214, 160), (160, 180, 206),
    (206, 150, 130), (120, 134, 128), (226, 222, 214), (98, 108, 132), (170, 190, 150),
)  # fmt: skip
FLOORS: tuple[Color, ...] = (
    (164, 118, 78), (120, 88, 66), (196, 164, 124), (150, 150, 154), (206, 196, 184), (98, 74, 68),
)  # fmt: skip
TOYS: tuple[Color, ...] = (
    (214, 76, 70), (70, 130, 190), (240, 190, 70), (96, 164, 104), (160, 104, 176), (236, 140, 80), (240, 236, 226),
)  # fmt: skip
GREENS: tuple[Color, ...] = ((104, 156, 76), (136, 170, 84), (72, 126, 80), (160, 164, 90), (84, 140, 110))
SKIES: tuple[tuple[Color, Color], ...] = (
    ((120, 178, 226), (214, 234, 242)),
    ((242, 170, 120), (252, 224, 170)),
    ((150, 170, 190), (210, 214, 216)),
    ((96, 140, 206), (246, 214, 204)),
    ((170, 206, 220), (240, 240, 220)),
)


def box(pen: Pen, x: float, y: float, width: float, height: float, fill: Color) -> None:
    """Fill an axis-aligned box with its top left corner at (x, y)."""
    pen.polygon([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], fill)


def window(pen: Pen, x: float, edge: float) -> None:
    """Draw a window with a view of the sky, sometimes with curtains."""
    high, (sky, low) = edge * 0.62, pen.rng.choice(SKIES)
    box(pen, x - 0.02, 0.06, 0.42, high, (240, 236, 228))
    box(pen, x, 0.08, 0.38, high - 0.04, sky)
    box(pen, x, 0.08 + high * 0.5, 0.38, high * 0.5 - 0.04, low)
    box(pen, x + 0.18, 0.08, 0.02, high - 0.04, (240, 236, 228))
    box(pen, x, 0.08 + high * 0.45, 0.38, 0.02, (240, 236, 228))
    if pen.rng.random() < 0.6:
        curtain = pen.rng.choice(TOYS)
        box(pen, x - 0.1, 0.03, 0.12, high + 0.1, curtain)
        box(pen, x + 0.36, 0.03, 0.12, high + 0.1, curtain)


def frame(pen: Pen, x: float, edge: float) -> None:
    """Draw a framed picture on the wall."""
    high, inside = pen.rng.uniform(0.16, 0.3), pen.rng.choice(TOYS + WALLS)
    box(pen, x, 0.1, 0.3, high, darker(inside, 0.6))
    box(pen, x + 0.02, 0.12, 0.26, high - 0.04, lighter(inside, 0.4))
    pen.ellipse(x + 0.15, 0.1 + high * 0.5, 0.08, high * 0.3, inside)


def lamp(pen: Pen, x: float, edge: float) -> None:
    """Draw a floor lamp."""
    shade = lighter(pen.rng.choice(TOYS), 0.35)
    box(pen, x + 0.12, 0.3, 0.015, edge - 0.25, (70, 60, 56))
    pen.polygon([(x + 0.06, 0.14), (x + 0.2, 0.14), (x + 0.26, 0.34), (x, 0.34)], shade)


def shelf(pen: Pen, x: float, edge: float) -> None:
    """Draw two shelves of books."""
    wood = pen.rng.choice(FLOORS)
    for y in (0.22, edge * 0.7):
        at = x + 0.02
        while at < x + 0.42:
            width, high = pen.rng.uniform(0.025, 0.05), pen.rng.uniform(0.09, 0.15)
            box(pen, at, y - high, width, high, pen.rng.choice(TOYS))
            at += width + 0.004
        box(pen, x, y, 0.48, 0.025, darker(wood, 0.2))


def sofa(pen: Pen, x: float, edge: float) -> None:
    """Draw a sofa against the wall."""
    cloth = mix(pen.rng.choice(TOYS), pen.rng.choice(WALLS), 0.5)
    back = mirrored([(0, -0.24), (0.4, -0.2), (0.44, 0.2)])
    pen.moved(x + 0.4, edge).shape(back, darker(cloth, 0.15))
    pen.ellipse(x + 0.4, edge + 0.12, 0.44, 0.09, lighter(cloth, 0.12))
    for side in (0.0, 0.8):
        pen.ellipse(x + side, edge + 0.08, 0.09, 0.16, cloth)


def _ball(pen: Pen, color: Color) -> None:
    radius = pen.rng.uniform(0.035, 0.075)
    pen.ellipse(0.01, radius * 0.8, radius, radius * 0.35, (70, 62, 60))
    pen.ellipse(0, 0, radius, radius, color)
    pen.stroke([(-radius * 0.9, 0), (0, radius * 0.35), (radius * 0.9, 0)], 0.012, 0.012, lighter(color, 0.6))


def _bowl(pen: Pen, color: Color) -> None:
    pen.polygon([(-0.07, -0.04), (0.07, -0.04), (0.1, 0.04), (-0.1, 0.04)], color)
    pen.ellipse(0, -0.04, 0.075, 0.02, darker(color, 0.5))


def _plant(pen: Pen, color: Color) -> None:
    leaf = pen.rng.choice(GREENS)
    for lean in (-0.16, -0.09, -0.02, 0.05, 0.12, 0.18):
        blade = [(0, -0.08), (lean * 0.5, -0.2), (lean, -0.3 + abs(lean) * 0.6)]
        pen.stroke(blade, 0.05, 0.012, darker(leaf, abs(lean)))
    pen.polygon([(-0.08, -0.1), (0.08, -0.1), (0.06, 0.04), (-0.06, 0.04)], color)


def _parcel(pen: Pen, color: Color) -> None:
    high = pen.rng.uniform(0.08, 0.16)
    box(pen, -0.1, -high, 0.2, high, mix(color, (190, 150, 104), 0.6))
    box(pen, -0.1, -high, 0.2, 0.03, mix(color, (150, 110, 74), 0.6))


def scatter(pen: Pen, wide: float, edge: float) -> None:
    """Draw up to three objects on the floor."""
    for _ in range(pen.rng.randint(0, 3)):
        thing = pen.rng.choice((_ball, _ball, _bowl, _plant, _parcel))
        thing(pen.moved(pen.rng.uniform(0.05, wide - 0.05), pen.rng.uniform(edge + 0.05, 0.97)), pen.rng.choice(TOYS))


def hills(pen: Pen, wide: float, y: float, color: Color) -> None:
    """Fill everything below a wavy line around ``y``."""
    rough = pen.rng.uniform(0.02, 0.09)
    tops = [(wide * i / 5, y + pen.rng.uniform(-rough, rough)) for i in range(-1, 7)]
    pen.shape([*tops, (wide * 1.3, 1.3), (-wide * 0.3, 1.3)], color)


def tree(pen: Pen, leaf: Color) -> None:
    """Draw a fir or a round tree at the pen's origin."""
    box(pen, -0.02, -0.25, 0.04, 0.27, (110, 80, 60))
    if pen.rng.random() < 0.4:
        for up in (0.0, 0.16, 0.32):
            half = 0.2 - up / 3
            pen.polygon([(0, -0.42 - up), (half, -0.12 - up), (-half, -0.12 - up)], darker(leaf, 0.2))
    else:
        for x, y in ((-0.12, -0.3), (0.12, -0.32), (0, -0.44)):
            pen.ellipse(x, y, 0.16, 0.15, darker(leaf, 0.25 + x))


def clouds(pen: Pen, wide: float, color: Color) -> None:
    """Draw up to three clouds."""
    for _ in range(pen.rng.randint(0, 3)):
        x, y, size = pen.rng.uniform(0, wide), pen.rng.uniform(0.05, 0.3), pen.rng.uniform(0.6, 1.3)
        for dx, dy, r in ((-0.1, 0.02, 0.06), (0, 0, 0.085), (0.1, 0.02, 0.06)):
            pen.ellipse(x + dx * size, y + dy * size, r * 1.3 * size, r * 0.7 * size, color)
