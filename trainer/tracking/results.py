"""What `trainer validate` and `test` found: a table for people, metrics.json or test.json for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.table import Table

from trainer.files import write_whole

RESULTS_NAME, TEST_NAME = "metrics.json", "test.json"  # of validate, of test


def write_results(metrics: Mapping[str, float], about: Mapping[str, Any], path: Path) -> None:
    """Writes JSON: what was evaluated, and `eval/<set>/<metric>` -> value; null where it is not finite."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**about, "metrics": finite}, indent=1, ensure_ascii=False) + "\n")


def checkpoint_in(path: Path) -> Optional[str]:
    """The checkpoint whose figures a file of results holds; None: they are of the untouched model, or there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("checkpoint")
    except (OSError, ValueError, AttributeError):  # AttributeError: JSON, but of something else
        return None


def print_results(metrics: Mapping[str, float], sets: Sequence[str], console: Optional[Console] = None) -> None:
    """One column for each set, one row for each metric; sets of other metrics get a table of their own.

    Args:
        metrics: `eval/<set>/<metric>` -> value.
        sets: in the order of their columns; the mean of a suite stands behind its sets.
        console: stdout by default.
    """
    by_set: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        one, _, metric = name.removeprefix("eval/").rpartition("/")
        by_set.setdefault(one, {})[metric] = value
    order = [*sets, *(one for one in by_set if one not in sets)]
    alike: dict[tuple[str, ...], list[str]] = {}
    for one in order:
        alike.setdefault(tuple(by_set[one]), []).append(one)
    console = console or Console()
    for names, together in alike.items():
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("metric", style="cyan", no_wrap=True)
        for one in together:
            table.add_column(one, justify="right", overflow="fold")
        for name in names:
            table.add_row(name, *(f"{by_set[one][name]:.4f}" for one in together))
        console.print(table, highlight=False)
