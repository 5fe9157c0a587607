"""The loss and the main metrics over the steps of a run, as one SVG file for its model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from trainer.compare.fold import Point, Spread
from trainer.compare.plots import HEIGHT, PALETTE, STYLE, WIDTH, colour, curves
from trainer.tracking.runs import number

FILE = "training.svg"
_COLUMNS, _GAP, _TITLE = 2, 16, 26
# Readable on any page, light or dark: it brings its own ground.
_STYLE = (
    "svg{--card:#fff;--ink:#1d2129;--soft:#636b78;--rule:#c9cdd4;--grid:#eceef1;"
    f"{PALETTE};"
    'font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}'
    ".ground{fill:var(--card)}.title{font-size:13px;font-weight:600;fill:var(--ink)}.key{fill:var(--c)}"
    f".tick,.label{{fill:var(--soft)}}.dot{{fill:var(--c)}}{STYLE}"
)


def training_curves(rows: Iterable[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """One plot of the training loss, and one for each kind of metric with a line for each validation set.

    Args:
        rows: of metrics.jsonl.
        metrics: names of those that count, `eval/<set>/<metric>`.

    Returns:
        The file's content; empty where nothing was logged twice.
    """
    logged = list(rows)
    panels: dict[str, list[str]] = {"train/loss": ["train/loss"]}
    for name in metrics:
        panels.setdefault(name.rpartition("/")[2], []).append(name)
    drawn = []
    for title, names in panels.items():
        lines = [_points(logged, name) for name in names]
        if any(len(line) > 1 for line in lines):
            keys = names if title != "train/loss" else []
            drawn.append((title, [name.split("/", 1)[1].rpartition("/")[0] for name in keys], lines))
    if not drawn:
        return ""
    columns = min(_COLUMNS, len(drawn))
    width = columns * (WIDTH + _GAP) + _GAP
    height = -(-len(drawn) // columns) * (HEIGHT + _TITLE + _GAP) + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<style>{_STYLE}</style><rect class="ground" width="{width}" height="{height}" rx="8"/>',
    ]
    for place, (title, keys, lines) in enumerate(drawn):
        x = _GAP + place % columns * (WIDTH + _GAP)
        y = _GAP + place // columns * (HEIGHT + _TITLE + _GAP)
        key = "".join(f'<tspan class="key {colour(n)}" dx="10">{escape(one)}</tspan>' for n, one in enumerate(keys))
        parts.append(f'<text class="title" x="{x + 4}" y="{y + 14}">{escape(title)}{key}</text>')
        plot = curves(title, lines, "optimizer steps")
        parts.append(plot.replace("<svg ", f'<svg x="{x}" y="{y + _TITLE}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    return "".join([*parts, "</svg>\n"])


def _points(rows: Iterable[Mapping[str, Any]], name: str) -> list[Point]:
    found = {row["step"]: value for row in rows if (value := number(row, name)) is not None}
    return [Point(step, Spread(found[step], None, 1)) for step in sorted(found)]
