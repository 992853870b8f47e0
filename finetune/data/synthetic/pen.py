"""Draw smooth shapes on a Pillow canvas in a scaled, rotated coordinate system."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import ImageDraw

Point = tuple[float, float]
Color = tuple[int, int, int]

_CIRCLE = [(math.cos(i * math.tau / 24), math.sin(i * math.tau / 24)) for i in range(24)]
_ROUND_END = 0.03  # half line width, in units, above which lines get round ends
_STEPS = [i / 5 for i in range(5)]
# Catmull-Rom spline: the weights of four neighboring points at each step between the middle two.
_SPLINE = [
    (
        (-t + 2 * t**2 - t**3) / 2,
        (2 - 5 * t**2 + 3 * t**3) / 2,
        (t + 4 * t**2 - 3 * t**3) / 2,
        (-(t**2) + t**3) / 2,
    )
    for t in _STEPS
]


def mix(first: Color, second: Color, fraction: float) -> Color:
    """Interpolate between two colors: ``fraction`` 0 is the first, 1 the second."""
    red, green, blue = (round(a + (b - a) * fraction) for a, b in zip(first, second, strict=True))
    return red, green, blue


def darker(color: Color, fraction: float) -> Color:
    """Darken a color toward a warm black."""
    return mix(color, (24, 16, 20), fraction)


def lighter(color: Color, fraction: float) -> Color:
    """Lighten a color toward a warm white."""
    return mix(color, (255, 250, 242), fraction)


def brightness(color: Color) -> float:
    """Return the perceived brightness, 0 to 255 (ITU-R BT.601 luma, as in Pillow)."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def mirrored(half: Sequence[Point]) -> list[Point]:
    """Complete a symmetric shape from its right half, which goes from top to bottom."""
    return [*half, *((-x, y) for x, y in reversed(half) if x)]


def smooth(points: Sequence[Point], *, closed: bool) -> list[Point]:
    """Interpolate a smooth curve through the points. A repeated point makes a corner."""
    count = len(points)
    curve: list[Point] = []
    for i in range(count if closed else count - 1):
        if closed:
            four = [points[(i + k) % count] for k in (-1, 0, 1, 2)]
        else:
            four = [points[min(max(i + k, 0), count - 1)] for k in (-1, 0, 1, 2)]
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = four
        curve += [(ax * p + bx * q + cx * r + dx * s, ay * p + by * q + cy * r + dy * s) for p, q, r, s in _SPLINE]
    return curve if closed else [*curve, points[-1]]


def _normals(points: Sequence[Point], *, closed: bool) -> list[Point]:
    last = len(points) - 1
    normals = []
    for i in range(len(points)):
        ax, ay = points[i - 1] if i or closed else points[0]
        bx, by = points[i + 1] if i < last else points[0 if closed else last]
        length = math.hypot(bx - ax, by - ay) or 1.0
        normals.append(((by - ay) / length, (ax - bx) / length))
    return normals


def _grown(points: Sequence[Point], normals: Sequence[Point], lengths: Sequence[float]) -> list[Point]:
    return [(x + nx * d, y + ny * d) for (x, y), (nx, ny), d in zip(points, normals, lengths, strict=True)]


@dataclass(frozen=True)
class Pen:
    """A drawing context with an affine coordinate system: x to the right, y down, one unit is half a head width.

    ``line`` is the width of outlines and ``fluff`` the length of hairs along edges, both in units.
    """

    ink: ImageDraw.ImageDraw
    rng: random.Random
    line: float = 0.0
    fluff: float = 0.0
    affine: tuple[float, float, float, float, float, float] = (1, 0, 0, 0, 1, 0)

    def moved(self, x: float, y: float, *, scale: float = 1.0, degrees: float = 0.0, flip: bool = False) -> Pen:
        """Return a pen with its origin at (x, y), rotated clockwise, scaled and optionally mirrored."""
        a, b, c, d, e, f = self.affine
        cos, sin = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
        sign = -1 if flip else 1
        turned = (
            sign * (a * cos + b * sin),
            b * cos - a * sin,
            a * x + b * y + c,
            sign * (d * cos + e * sin),
            e * cos - d * sin,
            d * x + e * y + f,
        )
        return replace(self, affine=turned)

    def sleek(self) -> Pen:
        """Return a pen without outlines and hairs, for eyes and markings."""
        return replace(self, line=0.0, fluff=0.0)

    def smoothed(self) -> Pen:
        """Return a pen without hairs."""
        return replace(self, fluff=0.0)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color, *, degrees: float = 0.0) -> None:
        """Fill an ellipse centered at (x, y), rotated clockwise."""
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        outline = [(x + u * rx * cos - v * ry * sin, y + u * rx * sin + v * ry * cos) for u, v in _CIRCLE]
        self._fill(outline, fill)

    def shape(self, points: Sequence[Point], fill: Color) -> None:
        """Fill a smooth closed shape through the points, which are in clockwise order."""
        self._fill(smooth(points, closed=True), fill)

    def stroke(self, points: Sequence[Point], start: float, end: float, fill: Color) -> None:
        """Draw a smooth line through the points, tapering from ``start`` to ``end`` units wide, with round ends."""
        curve = smooth(points, closed=False)
        normals = _normals(curve, closed=False)
        halves = [(start + (end - start) * i / (len(curve) - 1)) / 2 for i in range(len(curve))]
        if self.line:
            self._ribbon(curve, normals, [half + self.line for half in halves], darker(fill, 0.45))
        self._ribbon(curve, normals, halves, fill)

    def _ribbon(self, curve: list[Point], normals: list[Point], halves: list[float], fill: Color) -> None:
        left = _grown(curve, normals, halves)
        right = _grown(curve, normals, [-half for half in halves])
        self.polygon(left + right[::-1], fill)
        for (x, y), half in ((curve[0], halves[0]), (curve[-1], halves[-1])):
            if half > _ROUND_END:
                self.polygon([(x + u * half, y + v * half) for u, v in _CIRCLE[::2]], fill)

    def _fill(self, outline: list[Point], fill: Color) -> None:
        if self.fluff or self.line:
            normals = _normals(outline, closed=True)
            hairs = [self.fluff * self.rng.random() * (i % 2) for i in range(len(outline))]
            outline = _grown(outline, normals, hairs)
            self.polygon(_grown(outline, normals, [self.line] * len(outline)), darker(fill, 0.45))
        self.polygon(outline, fill)

    def polygon(self, points: Sequence[Point], fill: Color) -> None:
        """Fill a polygon, without outline or hairs."""
        a, b, c, d, e, f = self.affine
        self.ink.polygon([(a * x + b * y + c, d * x + e * y + f) for x, y in points], fill=fill)
