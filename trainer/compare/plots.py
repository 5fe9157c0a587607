"""Plots as SVG that stands inside a page: its colours are classes (g0, g1, ...), so that the page decides about light
and dark, and may hide a group. Coordinates are pixels of the view box."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trainer.compare.fold import Point, Spread

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40
NUM_COLOURS = 8
# On a light ground, for whoever shows the plots.
PALETTE = "--c0:#2563c9;--c1:#d9622b;--c2:#16866b;--c3:#a13ea8;--c4:#b58900;--c5:#c62f53;--c6:#4a90a4;--c7:#6f6f7a"
STYLE = (
    ".grid{stroke:var(--grid)}.axis{stroke:var(--rule)}"
    ".line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.dashed{stroke-dasharray:5 3}"
    + "".join(f".g{n}{{--c:var(--c{n})}}" for n in range(NUM_COLOURS))
)
MAX_POINTS = 150  # of a line: more than a plot of this width can show


@dataclass(frozen=True)
class Scale:
    """Values low..high on pixels start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values from low to high: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """Neighbours averaged until there are few enough; the last point stays what it is."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return list(points)
    blocks = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [
        Point(
            statistics.fmean(point.x for point in block),
            Spread(
                statistics.fmean(point.value.mean for point in block),
                None
                if block[0].value.deviation is None
                else statistics.fmean(point.value.deviation or 0.0 for point in block),
                block[0].value.count,
            ),
        )
        for block in blocks
    ]
    return [*means, points[-1]]


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * 0.05 or 1.0
    return low - room, high + room


def curves(title: str, lines: Sequence[Sequence[Point]], x_label: str) -> str:
    """One line for each group, with a band of a standard deviation on both sides where it has several seeds.

    Args:
        lines: in the order of the groups; an empty one is left out.
    """
    thin = [thinned(line) for line in lines]
    points = [point for line in thin for point in line]
    if not points:
        return ""
    edges = [point.value.mean + side * (point.value.deviation or 0.0) for point in points for side in (-1, 1)]
    x_values = [point.x for point in points]
    x_low, x_high = min(x_values), max(x_values)
    x = Scale(x_low, x_high if x_high > x_low else x_low + 1, LEFT, WIDTH - RIGHT)
    y = Scale(*_range(edges, 0.06), HEIGHT - BOTTOM, TOP)
    parts = [_open(title, x, y), _axes(x, y, x_label)]
    for number, line in enumerate(thin):
        if not line:
            continue
        spread = [point for point in line if point.value.deviation is not None]
        if len(spread) > 1:
            upper = [(x(p.x), y(p.value.mean + (p.value.deviation or 0.0))) for p in spread]
            lower = [(x(p.x), y(p.value.mean - (p.value.deviation or 0.0))) for p in reversed(spread)]
            parts.append(f'<polygon class="band {colour(number)}" points="{_path([*upper, *lower])}"/>')
        line_points = _path([(x(p.x), y(p.value.mean)) for p in line])
        kind = "line dashed" if number >= NUM_COLOURS else "line"
        parts.append(f'<polyline class="{kind} {colour(number)}" data-group="{number}" points="{line_points}"/>')
        if len(line) == 1:
            dot = (x(line[0].x), y(line[0].value.mean))
            parts.append(f'<circle class="dot {colour(number)}" cx="{dot[0]:.1f}" cy="{dot[1]:.1f}" r="3"/>')
    return "".join([*parts, "</svg>"])


def dots(title: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A row for each group: every run a dot, their mean a bar."""
    row, left = 30, 150
    height = TOP + row * len(names) + 26
    known = [value for some in values for value in some]
    if not known:
        return ""
    x = Scale(*_range(known, 0.1), left, WIDTH - RIGHT)
    parts = [f'<svg class="plot dots" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    parts += _uprights(x, 5, TOP, height)
    for number, (name, some) in enumerate(zip(names, values, strict=True)):
        middle = TOP + row * (number + 0.5)
        short = name if len(name) <= 22 else f"…{name[-21:]}"
        parts.append(
            f'<text class="label" x="{left - 12}" y="{middle + 4:.1f}" text-anchor="end">{escape(short)}</text>'
        )
        for value in some:
            parts.append(f'<circle class="dot {colour(number)}" cx="{x(value):.1f}" cy="{middle:.1f}" r="4.5"/>')
        if some:
            mean = x(statistics.fmean(some))
            parts.append(
                f'<line class="mean {colour(number)}" x1="{mean:.1f}" x2="{mean:.1f}" '
                f'y1="{middle - 11:.1f}" y2="{middle + 11:.1f}"/>'
            )
    return "".join([*parts, "</svg>"])


def histograms(title: str, positive: Sequence[float], negative: Sequence[float], number: int) -> str:
    """Shares of similarities from -1 to 1 in equal bins: of positives filled, of negatives as a grey area."""
    height = 130
    x = Scale(-1.0, 1.0, 16, WIDTH - RIGHT)
    y = Scale(0.0, max([*positive, *negative]) or 1.0, height - 26, 10)
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    parts += _uprights(x, 4, 10, height)
    for shares, kind in ((negative, "rest"), (positive, f"fill {colour(number)}")):
        steps = [(-1.0, 0.0)]
        for place, share in enumerate(shares):
            left, right = (-1.0 + 2.0 * edge / len(shares) for edge in (place, place + 1))
            steps += [(left, share), (right, share)]
        steps.append((1.0, 0.0))
        parts.append(f'<polygon class="{kind}" points="{_path([(x(a), y(b)) for a, b in steps])}"/>')
    return "".join([*parts, "</svg>"])


def colour(number: int) -> str:
    """The class of a group."""
    return f"g{number % NUM_COLOURS} n{number}"


def _open(title: str, x: Scale, y: Scale) -> str:
    """The page's script reads values off the pixels with these ranges."""
    return (
        f'<svg class="plot curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-x="{x.low:.9g} {x.high:.9g} {x.start} {x.end}" data-y="{y.low:.9g} {y.high:.9g} {y.start} {y.end}">'
    )


def _uprights(x: Scale, most: int, top: int, height: int) -> list[str]:
    """Grid lines from the top down, with their values at the foot."""
    return [
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - 26}"/>'
        f'<text class="tick" x="{x(tick):.1f}" y="{height - 10}" text-anchor="middle">{tick_text(tick)}</text>'
        for tick in ticks(x.low, x.high, most)
    ]


def _axes(x: Scale, y: Scale, x_label: str) -> str:
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>'
        for tick in ticks(y.low, y.high, 5)
    ]
    bottom = HEIGHT - BOTTOM
    parts += [
        f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{tick_text(tick)}</text>'
        for tick in ticks(x.low, x.high, 6)
    ]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.2f}" for a, b in points)
