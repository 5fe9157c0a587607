"""Runs that differ in nothing but the seed, in config and machine, are one group: a mean and a spread."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from trainer.tracking.runs import RunRecord, best, final, last, number

# Of a config: the seed, and where a run lies and how it is watched.
_NOT_COMPARED = re.compile(
    r"seed_everything|data\.(seed|cache_dir|stream_cache_gib)|model\.print_first_batch|ckpt_path|weights_only"
    r"|trainer\.(default_root_dir|logger(\..*)?|enable_.*)|(tracking|watch|check|resume)\..*|config"
)
_MACHINE = ("device", "ranks", "nodes")  # of run.json: what a run costs follows from them
_OF_ONE_RUN = re.compile(r"(^|[_\-/])(seed|job|s)[=\-_]?\d+(?=$|[_\-/])")
AXES = {
    "step": "optimizer steps",
    "train/rows_seen": "rows seen",
    "train/tokens_seen": "tokens seen",
    "train/wall_s": "wall time, s",
    "train/gpu_hours": "device hours",
}


@dataclass(frozen=True)
class Spread:
    """Mean over runs and their standard deviation (of a sample; None of a single run).

    Attributes:
        missing: runs beside these that have no value.
    """

    mean: float
    deviation: Optional[float]
    count: int
    missing: int = 0

    @classmethod
    def of(cls, values: Iterable[Optional[float]]) -> Optional[Spread]:
        """None where no run has a value."""
        given = list(values)
        known = [value for value in given if value is not None]
        if not known:
            return None
        # Of what they are above the first, so that equal values have no spread. statistics.stdev counts in fractions:
        # over 30 times slower, and there is one for each point of a curve.
        above = [value - known[0] for value in known]
        mean = math.fsum(above) / len(above)
        squares = math.fsum((value - mean) ** 2 for value in above)
        deviation = math.sqrt(squares / (len(above) - 1)) if len(above) > 1 else None
        return cls(known[0] + mean, deviation, len(known), len(given) - len(known))


@dataclass(frozen=True)
class Point:
    """A step of a curve: where it lies on an axis, and the value of the runs there."""

    x: float
    value: Spread


@dataclass(frozen=True)
class Group:
    """Runs of one config on one kind of machine.

    Attributes:
        settings: key of the config -> value, without what differs between seeds; and `run.<key>`, the machine.
    """

    name: str
    runs: Sequence[RunRecord]
    settings: Mapping[str, Any]

    @property
    def seeds(self) -> list[Any]:
        return [run.seed for run in self.runs]

    def best(self, metric: str) -> Optional[Spread]:
        """Of the best value of each run; None where the metric has no better side."""
        return Spread.of(found[0] if (found := best(run.rows, metric)) else None for run in self.runs)

    def last(self, metric: str) -> Optional[Spread]:
        """Of what each run ended in; its mean is nan where one ended so."""
        return Spread.of(final(run.rows, metric) for run in self.runs)

    def curve(self, metric: str, axis: str) -> list[Point]:
        """The steps that all runs have (where there is none, that any has), in their order."""
        at_step = [{row["step"]: row for row in run.rows if number(row, metric) is not None} for run in self.runs]
        at_step = [rows for rows in at_step if rows]
        shared = set.intersection(*map(set, at_step)) if at_step else set()
        points = []
        for step in sorted(shared or set().union(*at_step)):
            rows = [rows[step] for rows in at_step if step in rows]
            x, value = Spread.of(number(row, axis) for row in rows), Spread.of(number(row, metric) for row in rows)
            if x and value:
                points.append(Point(x.mean, value))
        return points


def metrics_of(groups: Sequence[Group], prefix: str) -> list[str]:
    """Names of all metrics under a prefix, each once, in the order in which they were logged."""
    rows = (row for group in groups for run in group.runs for row in run.rows)
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)))


def primary_metrics(groups: Sequence[Group]) -> list[str]:
    """What stands for each validation set: as the run says, else the first metric of the set."""
    said = [name for group in groups for run in group.runs for name in run.about.get("primary_metrics", ())]
    logged = metrics_of(groups, "eval/")
    first: dict[str, str] = {}
    for name in [*said, *logged]:
        if name in logged:
            first.setdefault(name.rpartition("/")[0], name)
    return list(dict.fromkeys([name for name in said if name in logged] or first.values()))


# -- groups -----------------------------------------------------------------------------------------------


def fold(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups in the order of their first run."""
    found: list[tuple[str, list[RunRecord]]] = []
    names = _short_names([run.name for run in runs])
    for run, name in zip(runs, names, strict=True):
        settings = _settings(run.config)
        # Without a config nothing says that two runs are seeds of one.
        key = json.dumps(_integral(settings), sort_keys=True, default=str) if settings else name
        record = RunRecord(name, run.config, run.rows, run.about)
        fitting = (members for other, members in found if other == key and _fits(record, members))
        if (members := next(fitting, None)) is None:
            found.append((key, members := []))
        members.append(record)
    groups: list[Group] = []
    for _, members in found:
        name, number = _group_name(members), 2
        while name in [group.name for group in groups]:
            name, number = f"{_group_name(members)} ({number})", number + 1
        machine = {f"run.{key}": value for run in reversed(members) for key, value in _machine(run).items()}
        groups.append(Group(name, members, {**_settings(members[0].config), **machine}))
    return groups


def _machine(run: RunRecord) -> dict[str, Any]:
    """What is known of it: W&B may know less than run.json."""
    return {key: value for key in _MACHINE if (value := run.about.get(key)) not in (None, "?")}


def _fits(run: RunRecord, members: Sequence[RunRecord]) -> bool:
    """Whether nothing that is known of the machines speaks against it."""
    mine = _machine(run)
    return all(mine.get(key, value) == value for other in members for key, value in _machine(other).items())


def _short_names(names: Sequence[str]) -> list[str]:
    """Without the folders that all are in; with the last of these where seed and job would be all that is left."""
    absolute = {os.path.isabs(name) for name in names}
    if len(absolute) == 2 or len(set(names)) < len(names):  # names of W&B, beside paths
        return list(names)
    shared = os.path.commonpath(names) if len(names) > 1 else os.path.dirname(names[0])
    if not all(_without_seed(os.path.relpath(name, shared or ".")) for name in names):
        shared = os.path.dirname(shared)
    return [os.path.relpath(name, shared or ".") for name in names]


def _without_seed(name: str) -> str:
    return _OF_ONE_RUN.sub("", name).strip("/_-.")


def _group_name(members: Sequence[RunRecord]) -> str:
    """That of its first run, without seed and job."""
    first = members[0].name
    return first if len(members) == 1 else _without_seed(first) or first


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _flat(config) if key and not _NOT_COMPARED.fullmatch(key)}


def _flat(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys; the place of a class is its key: model.loss, model.loss.scale."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            inner = key if name in ("class_path", "init_args") and key else f"{key}.{name}".lstrip(".")
            yield from _flat(item, inner)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, f"{key}.{number}")
    else:
        yield key, value


def _integral(value: Any) -> Any:
    """1.0 as 1, also inside of lists and mappings: W&B stores it so, config.yaml does not."""
    if isinstance(value, Mapping):
        return {key: _integral(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_integral(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


MISSING = object()


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Key -> its value in each group (MISSING: not there), of the keys whose values are not all the same; a key that is
    not there is the same as its null."""
    keys = sorted({key for group in groups for key in group.settings})
    values = {key: [group.settings.get(key, MISSING) for group in groups] for key in keys}
    said = {key: [None if one is MISSING else one for one in row] for key, row in values.items()}
    return {key: row for key, row in values.items() if any(one != said[key][0] for one in said[key])}


# -- cost -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a group took. Rates are medians over the logs of a run, sums are those of its last log."""

    steps: Optional[Spread]
    rows: Optional[Spread]
    tokens: Optional[Spread]
    rows_per_s: Optional[Spread]
    tokens_per_s: Optional[Spread]
    wall_s: Optional[Spread]
    gpu_hours: Optional[Spread]
    peak_gib: Optional[Spread]
    device: str


def cost(group: Group) -> Cost:
    runs = group.runs

    def of_last(name: str) -> Optional[Spread]:
        return Spread.of(last(run.rows, name) for run in runs)

    def median(name: str) -> Optional[Spread]:
        found = ([value for row in run.rows if (value := number(row, name)) is not None] for run in runs)
        return Spread.of(statistics.median(values) if values else None for values in found)

    machine = [group.settings.get(f"run.{key}") for key in _MACHINE]
    device, ranks, nodes = (value or "?" for value in machine)
    several = f" ({nodes} nodes)" if nodes not in ("?", 1) else ""
    return Cost(
        steps=of_last("step"),
        rows=of_last("train/rows_seen"),
        tokens=of_last("train/tokens_seen"),
        rows_per_s=median("train/rows_per_s"),
        tokens_per_s=median("train/tokens_per_s"),
        wall_s=of_last("train/wall_s"),
        gpu_hours=of_last("train/gpu_hours"),
        peak_gib=of_last("train/device_peak_gib") or of_last("train/host_peak_gib"),
        device=f"{ranks} x {device}{several}",
    )
