"""The report: one HTML file that needs no network, for people to pass on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from trainer.compare.fold import AXES, Group, differences, metrics_of, primary_metrics
from trainer.compare.plots import PALETTE, STYLE, colour, curves, dots, histograms
from trainer.compare.show import cost_cells, differing_losses, heading, metric, notes, setting, winners
from trainer.tracking.runs import best, last

PAGE = Path(__file__).with_name("page.html")
_HEALTH = "health/"
_MAIN = ("train/loss", "train/loss/")  # curves that are shown at once; the others behind a click


def render_report(groups: Sequence[Group]) -> str:
    """The whole page."""
    num_runs = sum(len(group.runs) for group in groups)
    title = " · ".join(group.name for group in groups) if len(groups) <= 4 else f"{len(groups)} groups"
    sections = [
        _summary(groups),
        _curves(groups),
        _config(groups),
        _evaluations(groups),
        _health(groups),
        _cost(groups),
        _runs(groups),
    ]
    about = f"{num_runs} run{'s' * (num_runs > 1)}, {time.strftime('%Y-%m-%d %H:%M')}"
    parts = {
        "TITLE": escape(title),
        "ABOUT": escape(about),
        "LEGEND": "".join(_legend(groups)),
        "PALETTE": PALETTE,
        "PLOTS": STYLE,
        "HIDE": "".join(f"body:has(#show{n}:not(:checked)) .n{n}{{display:none}}" for n in range(len(groups))),
        "BODY": "".join(section for section in sections if section),
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text).replace(f"/*{name}*/", text)
    return page


def _legend(groups: Sequence[Group]) -> Iterator[str]:
    for number, group in enumerate(groups):
        kind = "seeds" if len(set(map(str, group.seeds))) == len(group.runs) else "runs"
        runs = f"{len(group.runs)} {kind}" if len(group.runs) > 1 else "1 run"
        yield (
            f'<label class="chip g{number % 8}"><input type="checkbox" id="show{number}" checked>'
            f'<i></i><b data-name="{number}">{escape(group.name)}</b> <span>{runs}</span></label>'
        )


# -- sections ---------------------------------------------------------------------------------------------


def _section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>" if body else ""


def _figure(title: str, plot: str, kind: str = "") -> str:
    return f'<figure class="{kind}"><figcaption>{escape(title)}</figcaption>{plot}</figure>' if plot else ""


def _summary(groups: Sequence[Group]) -> str:
    primary = primary_metrics(groups)
    names = [group.name for group in groups]
    figures = ""
    for name in primary:
        values = [[found[0] for run in group.runs if (found := best(run.rows, name))] for group in groups]
        figures += _figure(f"{heading(name, name.removeprefix('eval/'))}, best of each run", dots(name, names, values))
    columns = [*primary, "train/loss"] if metrics_of(groups, "train/loss") else primary
    crowns = [winners(groups, name) for name in columns]
    rows = []
    for number, group in enumerate(groups):
        cells = [metric(group.best(name)) for name in columns]
        took = cost_cells(group)
        bold = {place + 1 for place, crown in enumerate(crowns) if number in crown}
        tail = [took["rows/s"], took["wall time"], took["device hours"]]
        rows.append(_row([group.name, *cells, *tail], bold, colour(number)))
    head = ["", *(heading(name, name.removeprefix("eval/")) for name in columns), "rows/s", "wall time", "device hours"]
    note = "Best value of each run: mean ± standard deviation over its seeds."
    note += "".join(f"<br>Note: {escape(one)}." for one in notes(groups))
    return _section("Results", f'<div class="plots big">{figures}</div>' + _table(head, rows), note)


def _curves(groups: Sequence[Group]) -> str:
    logged = [name for name in metrics_of(groups, "train/") if name not in AXES]
    losses = [name for name in logged if name.startswith(_MAIN)]
    main = [*primary_metrics(groups), *losses]
    axes = [axis for axis in AXES if any(axis in row for group in groups for run in group.runs for row in run.rows)]
    switch = "".join(
        f'<input type="radio" name="axis" id="axis{n}"{" checked" * (n == 0)}>'
        f'<label for="axis{n}">{escape(AXES[axis])}</label>'
        for n, axis in enumerate(axes)
    )
    figures = ""
    for name in main:
        plots = "".join(f'<div class="by axis{n}">{_plot(groups, name, axis)}</div>' for n, axis in enumerate(axes))
        figures += _figure(heading(name, name.removeprefix("eval/")), plots)
    others = [name for name in [*metrics_of(groups, "eval/"), *logged] if name not in main]
    more = "".join(_figure(heading(name), _plot(groups, name, "step")) for name in others)
    note = "The band is one standard deviation over seeds."
    if differing := differing_losses(groups):
        note += (
            f" Other {', '.join(differing)}: the values of the losses can't be compared; only the course of each can."
        )
    body = f'<div class="switch">{switch}</div><div class="plots big">{figures}</div>' if figures else ""
    if more:
        body += f'<details><summary>{len(others)} more curves</summary><div class="plots">{more}</div></details>'
    return _section("Curves", body, note)


def _plot(groups: Sequence[Group], name: str, axis: str) -> str:
    return curves(name, [group.curve(name, axis) for group in groups], AXES[axis])


def _config(groups: Sequence[Group]) -> str:
    if len(groups) < 2:
        return ""
    found = differences(groups)
    rows = [_row([key, *map(setting, values)]) for key, values in found.items()]
    same = len(set().union(*(group.settings for group in groups))) - len(found)
    return _section("Config", _table(_heads(groups), rows, "config"), f"What differs; {same} other keys are the same.")


def _evaluations(groups: Sequence[Group]) -> str:
    of_set: dict[str, list[str]] = {}
    for name in metrics_of(groups, "eval/"):
        of_set.setdefault(name.removeprefix("eval/").rpartition("/")[0], []).append(name)
    body = ""
    for one, names in of_set.items():
        rows = []
        for name in names:
            found = [(group.best(name), group.last(name)) for group in groups]
            cells = [
                metric(top or end) + (f" <small>{end.mean:.4f}</small>" if top and end else "") for top, end in found
            ]
            rows.append(
                _row([heading(name, name.rpartition("/")[2]), *cells], {n + 1 for n in winners(groups, name)}, raw=True)
            )
        body += f"<h3>{escape(one)}</h3>" + _table(_heads(groups), rows)
    return _section(
        "Evaluations", body, "Best value of each run, mean ± standard deviation; small: the mean of the last."
    )


def _health(groups: Sequence[Group]) -> str:
    names = metrics_of(groups, _HEALTH)
    figures = "".join(
        _figure(name.removeprefix(_HEALTH), _plot(groups, name, "step")) for name in names if "histogram" not in name
    )
    shapes = ""
    for one in dict.fromkeys(name.rpartition("/")[0] for name in names if name.endswith("/positive_histogram")):
        for number, group in enumerate(groups):
            positive, negative = (_shares(group, f"{one}/{kind}_histogram") for kind in ("positive", "negative"))
            if positive and negative:
                plot = histograms(f"{one} {group.name}", positive, negative, number)
                shapes += _figure(f"{one.removeprefix(_HEALTH)}: similarities, {group.name}", plot, f"n{number}")
    note = (
        "Of a sample of each validation set. Alignment: mean squared distance of positives, 0 is best. Uniformity: "
        "lower is more even. Effective rank: directions in use. Filled: similarities of positives at the last "
        "evaluation, grey: of other pairs."
    )
    body = f'<div class="plots">{shapes}</div>' if shapes else ""
    if figures:
        body += f'<details><summary>Over the training</summary><div class="plots">{figures}</div></details>'
    return _section("Embedding health", body, note)


def _shares(group: Group, name: str) -> list[float]:
    """Of the last evaluation of each run, all runs together; empty where nothing was logged."""
    counts = [found for run in group.runs if (found := next((r[name] for r in reversed(run.rows) if name in r), None))]
    total = sum(sum(one) for one in counts)
    return [sum(column) / total for column in zip(*counts, strict=True)] if total else []


def _cost(groups: Sequence[Group]) -> str:
    columns = [cost_cells(group) for group in groups]
    rows = [_row([label, *(column[label] for column in columns)]) for label in columns[0]]
    note = "Rates: median over the logs. Device hours: wall time since the first step times ranks, evaluation included."
    return _section("Cost", _table(_heads(groups), rows), note)


def _runs(groups: Sequence[Group]) -> str:
    primary = primary_metrics(groups)
    rows = []
    for number, group in enumerate(groups):
        for run in group.runs:
            cells = [f"{found[0]:.4f} at {found[1]:,}" if (found := best(run.rows, name)) else "–" for name in primary]
            seed = "–" if run.seed is None else str(run.seed)
            rows.append(_row([run.name, seed, f"{last(run.rows, 'step') or 0:,.0f}", *cells], kind=colour(number)))
    head = ["run", "seed", "steps", *(heading(name, name.removeprefix("eval/")) for name in primary)]
    return _section("Runs", f"<details><summary>Every run</summary>{_table(head, rows)}</details>")


# -- tables -----------------------------------------------------------------------------------------------


def _heads(groups: Sequence[Group]) -> list[str]:
    return ["", *(group.name for group in groups)]


def _row(cells: Sequence[str], bold: Sequence[int] | set[int] = (), kind: str = "", raw: bool = False) -> str:
    """The first cell is the row's heading; ``raw`` cells are HTML already."""
    first, *others = cells
    said = others if raw else [escape(cell) for cell in others]
    marked = "".join(f"<td{' class=best' * (place in bold)}>{cell}</td>" for place, cell in enumerate(said, 1))
    square = "<i></i>" if kind else ""
    return f'<tr class="{kind}"><th scope="row">{square}{escape(first)}</th>{marked}</tr>'


def _table(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    heads = "".join(f'<th scope="col">{escape(one)}</th>' for one in head)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )
