"""Draw background scenes: studio, room, meadow, night, beach, snow and lights.

The unit is the image height: y goes from 0 (top) to 1, x from 0 to the aspect ratio.
"""

from __future__ import annotations

import random

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from finetune.data.synthetic.pen import Color, Pen, darker, lighter, mirrored, mix
from finetune.data.synthetic.props import (
    FLOORS,
    GREENS,
    SKIES,
    TOYS,
    WALLS,
    box,
    clouds,
    frame,
    hills,
    lamp,
    scatter,
    shelf,
    sofa,
    tree,
    window,
)


def gradient(size_px: tuple[int, int], first: Color, second: Color, *, across: bool = False) -> Image.Image:
    """Create a gradient from the first color at the top (or left if ``across``) to the second."""
    length = size_px[0] if across else size_px[1]
    ends = Image.new("RGB", (2, 1), first)
    ends.putpixel((1, 0), second)
    row = ends.resize((length, 1), Image.Resampling.BILINEAR, box=(0.5, 0, 1.5, 1))
    if not across:
        row = row.transpose(Image.Transpose.TRANSPOSE)
    return row.resize(size_px, Image.Resampling.NEAREST)


def draw_scene(size_px: tuple[int, int], rng: random.Random) -> tuple[Image.Image, float]:
    """Draw a slightly blurred scene. Returns it and the y coordinate where the ground begins (0 if there is no horizon)."""
    scene = rng.choice((_studio, _room, _room, _room, _meadow, _meadow, _night, _beach, _snow, _lights))
    width, height = size_px
    image, ground = scene((width // 2, height // 2), rng)
    image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.4:
        glow: list[Color] = [(255, 252, 240), (rng.randint(110, 190),) * 3]
        rng.shuffle(glow)
        image = ImageChops.multiply(image, gradient(image.size, *glow, across=rng.random() < 0.7))
    return image.resize(size_px, Image.Resampling.BILINEAR), ground


def _pen(image: Image.Image, rng: random.Random) -> tuple[Pen, float]:
    """Return a pen in scene units and the width of the scene."""
    scale = image.height
    return Pen(ImageDraw.Draw(image), rng).moved(0, 0, scale=scale), image.width / image.height


def _studio(size_px: tuple[int, int], rng: random.Random) -> tuple[Image.Image, float]:
    first = rng.choice(WALLS + TOYS)
    second = mix(rng.choice(WALLS), first, rng.uniform(0, 0.6))
    image = gradient(size_px, first, second, across=rng.random() < 0.5)
    pen, wide = _pen(image, rng)
    lean, kind = rng.uniform(-0.6, 0.6), rng.choice(("bands", "discs", "discs"))
    for _ in range(rng.randint(1, 4)):
        x, radius = rng.uniform(0, wide), rng.uniform(0.1, 0.45)
        shade = mix(first, second, rng.uniform(-0.5, 1.5))
        if kind == "discs":
            pen.ellipse(x, rng.uniform(0, 1), radius, radius, shade)
        else:
            pen.polygon([(x, 0), (x + radius, 0), (x + radius + lean, 1), (x + lean, 1)], shade)
    return image, 0.0


def _room(size_px: tuple[int, int], rng: random.Random) -> tuple[Image.Image, float]:
    wall, floor = rng.choice(WALLS), rng.choice(FLOORS)
    image = gradient(size_px, lighter(wall, rng.uniform(0, 0.25)), darker(wall, rng.uniform(0, 0.25)))
    pen, wide = _pen(image, rng)
    edge = rng.uniform(0.55, 0.8)
    _wallpaper(pen, wide, edge, mix(wall, rng.choice(WALLS), 0.35))
    for thing in rng.sample((window, frame, lamp, shelf), rng.randint(1, 2)):
        thing(pen, rng.uniform(0, wide * 0.8), edge)
    box(pen, 0, edge, wide, 1 - edge, floor)
    box(pen, 0, edge - 0.03, wide, 0.03, lighter(wall, 0.5))
    _floor(pen, wide, edge, floor)
    if rng.random() < 0.4:
        sofa(pen, rng.uniform(-0.2, wide * 0.5), edge)
    scatter(pen, wide, edge)
    return image, edge


def _wallpaper(pen: Pen, wide: float, edge: float, ink: Color) -> None:
    kind, gap = pen.rng.choice(("none", "stripes", "dots", "panels")), pen.rng.uniform(0.09, 0.2)
    columns = int(wide / gap) + 1
    if kind == "stripes":
        for i in range(columns):
            box(pen, i * gap, 0, gap / 2, edge, ink)
    elif kind == "dots":
        for i in range(columns):
            for j in range(int(edge / gap) + 1):
                pen.ellipse((i + 0.5 * (j % 2)) * gap, j * gap, gap / 6, gap / 6, ink)
    elif kind == "panels":
        box(pen, 0, edge * 0.62, wide, edge * 0.38, ink)


def _floor(pen: Pen, wide: float, edge: float, floor: Color) -> None:
    slant = pen.rng.uniform(-0.5, 0.5)
    if pen.rng.random() < 0.5:
        for i in range(-2, 12):
            x = i * wide / 9
            pen.stroke([(x, edge), (x + slant * (x - wide / 2) + 0.1 * slant, 1.02)], 0.004, 0.01, darker(floor, 0.25))
    if pen.rng.random() < 0.45:
        rug = pen.rng.choice(TOYS)
        x = pen.rng.uniform(0.3, 0.7) * wide
        for k in (1.0, 0.8, 0.5):
            pen.ellipse(x, 0.93, 0.55 * k, 0.13 * k, rug if k != 0.8 else lighter(rug, 0.5))


def _plant_tree(pen: Pen, wide: float, edge: float, leaf: Color) -> None:
    tree(pen.moved(pen.rng.uniform(0, wide), edge + 0.04, scale=pen.rng.uniform(0.6, 1.3)), leaf)


def _meadow(size_px: tuple[int, int], rng: random.Random) -> tuple[Image.Image, float]:
    sky, low = rng.choice(SKIES)
    image = gradient(size_px, sky, low)
    pen, wide = _pen(image, rng)
    if rng.random() < 0.5:
        pen.ellipse(rng.uniform(0, wide), rng.uniform(0.05, 0.3), 0.08, 0.08, (255, 240, 190))
    clouds(pen, wide, lighter(low, 0.6))
    edge, green = rng.uniform(0.35, 0.7), rng.choice(GREENS)
    hills(pen, wide, edge - rng.uniform(0.05, 0.12), mix(green, low, 0.5))
    for _ in range(rng.randint(0, 4)):
        _plant_tree(pen, wide, edge, rng.choice(GREENS))
    if rng.random() < 0.3:
        for i in range(int(wide / 0.1) + 1):
            box(pen, i * 0.1, edge - 0.1, 0.05, 0.2, (226, 218, 204))
        box(pen, 0, edge - 0.05, wide, 0.025, (226, 218, 204))
    hills(pen, wide, edge, green)
    for _ in range(rng.randint(0, 22)):
        x, y = rng.uniform(0, wide), rng.uniform(edge + 0.06, 1)
        pen.ellipse(x, y, 0.014, 0.012, rng.choice(TOYS))
    for _ in range(rng.randint(5, 25)):
        x, y = rng.uniform(0, wide), rng.uniform(edge + 0.08, 1.02)
        pen.stroke([(x, y), (x + rng.uniform(-0.02, 0.02), y - 0.05)], 0.012, 0.003, darker(green, 0.2))
    if rng.random() < 0.4:
        scatter(pen, wide, edge)
    return image, edge


def _night(size_px: tuple[int, int], rng: random.Random) -> tuple[Image.Image, float]:
    sky: Color = rng.choice(((30, 36, 74), (48, 40, 84), (24, 52, 78)))
    image = gradient(size_px, sky, lighter(sky, rng.uniform(0.2, 0.45)))
    pen, wide = _pen(image, rng)
    for _ in range(rng.randint(10, 40)):
        pen.ellipse(rng.uniform(0, wide), rng.uniform(0, 0.6), 0.006, 0.006, (250, 246, 220))
    x, y, radius = rng.uniform(0, wide), rng.uniform(0.08, 0.35), rng.uniform(0.07, 0.16)
    pen.ellipse(x, y, radius, radius, (248, 240, 206))
    edge = rng.uniform(0.55, 0.75)
    at = -0.1
    while at < wide:
        width, high = rng.uniform(0.16, 0.3), rng.uniform(0.1, 0.3)
        house = darker(sky, rng.uniform(0.1, 0.5))
        box(pen, at, edge - high, width, high + 0.1, house)
        roof = [(at - 0.02, edge - high), (at + width / 2, edge - high - 0.09), (at + width + 0.02, edge - high)]
        pen.polygon(roof, house)
        if rng.random() < 0.7:
            box(pen, at + width * 0.4, edge - high * 0.7, 0.05, 0.06, (250, 214, 120))
        at += width + rng.uniform(0, 0.15)
    hills(pen, wide, edge, mix(rng.choice(GREENS), sky, 0.6))
    return image, edge


def _beach(size_px: tuple[int, int], rng: random.Random) -> tuple[Image.Image, float]:
    sky, low = rng.choice(SKIES)
    image = gradient(size_px, sky, low)
    pen, wide = _pen(image, rng)
    clouds(pen, wide, lighter(low, 0.6))
    sea, edge = rng.uniform(0.3, 0.5), rng.uniform(0.55, 0.75)
    box(pen, 0, sea, wide, 1, mix((60, 140, 176), sky, rng.uniform(0, 0.5)))
    for _ in range(rng.randint(2, 9)):
        x, y = rng.uniform(0, wide), rng.uniform(sea + 0.02, edge)
        pen.stroke([(x, y), (x + rng.uniform(0.1, 0.3), y)], 0.008, 0.003, (226, 240, 244))
    hills(pen, wide, edge, rng.choice(((232, 208, 160), (220, 190, 150), (240, 226, 196))))
    if rng.random() < 0.5:
        cloth, parasol = rng.choice(TOYS), pen.moved(rng.uniform(0.1, wide), 0)
        parasol.stroke([(0, 0.3), (0.06, edge + 0.12)], 0.015, 0.015, (240, 236, 226))
        parasol.shape(mirrored([(0, 0.16), (0.2, 0.22), (0.3, 0.36)]), cloth)
        parasol.shape(mirrored([(0, 0.16), (0.06, 0.22), (0.1, 0.36)]), lighter(cloth, 0.7))
    scatter(pen, wide, edge)
    return image, edge


def _snow(size_px: tuple[int, int], rng: random.Random) -> tuple[Image.Image, float]:
    sky: Color = rng.choice(((150, 176, 204), (186, 190, 204), (112, 128, 164), (226, 190, 190)))
    image = gradient(size_px, sky, lighter(sky, 0.5))
    pen, wide = _pen(image, rng)
    edge = rng.uniform(0.45, 0.7)
    hills(pen, wide, edge - 0.1, mix(sky, (236, 240, 246), 0.6))
    for _ in range(rng.randint(2, 6)):
        _plant_tree(pen, wide, edge, rng.choice(((70, 110, 96), (96, 130, 130))))
    hills(pen, wide, edge, (236, 240, 246))
    for _ in range(rng.randint(10, 50)):
        radius = rng.uniform(0.004, 0.012)
        pen.ellipse(rng.uniform(0, wide), rng.uniform(0, 1), radius, radius, (252, 252, 255))
    return image, edge


def _lights(size_px: tuple[int, int], rng: random.Random) -> tuple[Image.Image, float]:
    dark = darker(rng.choice(WALLS + GREENS), rng.uniform(0.1, 0.65))
    image = gradient(size_px, dark, lighter(dark, 0.2), across=rng.random() < 0.5)
    pen, wide = _pen(image, rng)
    glow = rng.choice(TOYS)
    for _ in range(rng.randint(8, 24)):
        radius = rng.uniform(0.03, 0.12)
        light = mix(mix(glow, rng.choice(TOYS), rng.random() * 0.5), dark, rng.uniform(0.3, 0.85))
        pen.ellipse(rng.uniform(0, wide), rng.uniform(0, 1), radius, radius, light)
    return image, 0.0
