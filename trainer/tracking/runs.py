"""Runs as they are read again: config, rows of metrics, what they ran on. From run directories and W&B's offline
files; nothing heavy is imported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import yaml

from trainer.messages import cause_of
from trainer.tracking.direction import direction

METRICS_FILE = "metrics.jsonl"
ABOUT_FILE = "run.json"
STEP = "trainer/global_step"  # on W&B

Row = dict[str, Any]  # step, and metric -> value; null where it was not finite; a histogram is a list of counts


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: its place, without the folders that all have.
        config: effective config, as nested mappings.
        rows: of metrics, in the order of their steps.
        about: device, ranks, nodes, primary_metrics (run.json), as far as they are known.
    """

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Row]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> Any:
        return self.config.get("seed_everything")


def read_log(path: Path) -> list[Row]:
    """Rows of a metrics.jsonl; what a kill has cut, or a disk has damaged, is left out, a missing file has none."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [row for line in lines if (row := read_row(line)) is not None]


def read_row(line: bytes) -> Row | None:
    """A line of a metrics.jsonl; None where it is damaged."""
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_about(folder: Path) -> dict[str, Any]:
    """What a run directory says of the machine and the sets; nothing where it has no run.json."""
    return _read(folder / ABOUT_FILE, json.loads)


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A mapping in a file; an empty one where there is no file."""
    try:
        return dict(parse(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    except (yaml.YAMLError, ValueError, TypeError) as error:
        cause = cause_of(error)
        raise ValueError(f"{path} can't be read: {cause}; mend it, or leave this run out") from error


def number(row: Mapping[str, Any], name: str) -> Optional[float]:
    """A finite value of a row; None where there is none, or something else."""
    value = row.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def best(rows: Iterable[Row], metric: str) -> Optional[tuple[float, int]]:
    """The best value and its step, the first of equals; None where neither side is better, or nothing was logged.

    Step 0 is the untouched base, which no training has made: it counts where no later step has the metric.
    """
    which = direction(metric)
    rows = [row for row in rows if metric in row]
    rows = [row for row in rows if row["step"] > 0] or rows
    found = [(value, row["step"]) for row in rows if (value := number(row, metric)) is not None]
    if which is None or not found:
        return None
    return max(found, key=lambda one: one[0]) if which == "max" else min(found, key=lambda one: one[0])


def last(rows: Sequence[Row], name: str) -> Optional[float]:
    """The last finite value that was logged: of a sum or a position."""
    return next((value for row in reversed(rows) if (value := number(row, name)) is not None), None)


def final(rows: Sequence[Row], metric: str) -> Optional[float]:
    """What a metric ended in: nan where its last row has no finite value."""
    row = next((row for row in reversed(rows) if metric in row), None)
    return None if row is None else math.nan if (value := number(row, metric)) is None else value


def read_run_dir(folder: Path) -> RunRecord:
    """A run directory of `trainer fit`.

    Raises:
        ValueError: it has no row of metrics yet, or a file of it can't be read.
    """
    rows, config = read_log(folder / METRICS_FILE), folder / "config.yaml"
    if not rows:
        raise ValueError(f"{folder} holds no metrics yet: metrics.jsonl is empty; leave it out, or wait for its steps")
    return RunRecord(
        name=str(folder),
        # libyaml where it is there: the pure reader takes a quarter of a second for a config
        config=_read(config, partial(yaml.load, Loader=_LOADER)),
        rows=rows,
        about=read_about(folder),
    )


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def joined(fragments: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of a run that several processes wrote one after the other: each goes on from a checkpoint, so what was
    written before at or behind its first step did not last."""
    rows: list[Row] = []
    for fragment in fragments:
        if fragment:
            rows = [row for row in rows if row["step"] < fragment[0]["step"]] + list(fragment)
    return rows
