"""The comparison in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.compare.fold import Group, differences, metrics_of
from trainer.compare.show import cost_cells, heading, metric, notes, setting, winners

_AT_ONCE = 5  # groups beside each other


def print_comparison(groups: Sequence[Group], console: Console) -> None:
    """What differs in the configs, the metrics, what it took: a column for each group, five at a time."""
    num_runs = sum(len(group.runs) for group in groups)
    console.print(f"{num_runs} run{'s' * (num_runs > 1)} in {len(groups)} group{'s' * (len(groups) > 1)}")
    for note in notes(groups):
        console.print(f"note: {note}", soft_wrap=True)
    differing = differences(groups)
    names = [*metrics_of(groups, "eval/"), *metrics_of(groups, "train/loss")]
    for start in range(0, len(groups), _AT_ONCE):
        some = groups[start : start + _AT_ONCE]
        if len(groups) > 1:
            table = _table("config", some)
            for key, values in differing.items():
                table.add_row(key, *(setting(values[groups.index(group)]) for group in some))
            console.print(table)
        _print_metrics(names, some, groups, console)
        table = _table("cost", some)
        columns = [cost_cells(group) for group in some]
        for label in columns[0]:
            table.add_row(label, *(column[label] for column in columns))
        console.print(table)


def _print_metrics(names: Sequence[str], some: Sequence[Group], groups: Sequence[Group], console: Console) -> None:
    table = _table("metrics: best (last), mean ± sd", some)
    for name in names:
        first, cells = winners(groups, name), []
        for group in some:
            best, last = group.best(name), group.last(name)
            cell = Text(metric(best or last), style="bold green" if groups.index(group) in first else "")
            if best is not None and last is not None:
                cell.append(f" ({last.mean:.4f})", style="not bold dim")
            cells.append(cell)
        table.add_row(heading(name), *cells)
    console.print(table)


def _table(title: str, some: Sequence[Group]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", style="cyan", overflow="fold")
    for group in some:
        table.add_column(group.name, justify="right", overflow="fold")
    return table
