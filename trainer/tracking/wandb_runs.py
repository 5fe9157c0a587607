"""Runs read back from Weights & Biases: its offline folders, and its server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.tracking.runs import STEP, Row, RunRecord, joined
from trainer.tracking.wandb_mode import has_key

SERVER_TIMEOUT_S = 10
ONLINE = "wandb:"  # wandb:entity/project[/group]


def offline_folders(folder: Path) -> list[Path]:
    """The offline runs in a folder, or the folder itself; in the order in which they were started."""
    if list(folder.glob("run-*.wandb")):
        return [folder]
    return sorted(path for path in folder.glob("offline-run-*") if list(path.glob("run-*.wandb")))


def read_offline(folders: Sequence[Path]) -> list[RunRecord]:
    """One record for each run id: a requeue writes a folder of its own under the same id.

    Raises:
        ValueError: W&B's reader can't read a file, or it holds no metrics.
    """
    of_run: dict[str, list[tuple[Path, list[dict[str, Any]]]]] = {}
    for folder in sorted(folders, key=lambda one: one.name):
        (file,) = folder.glob("run-*.wandb")
        of_run.setdefault(file.stem.partition("-")[2], []).append((folder, _records(file)))
    found = []
    for parts in of_run.values():
        rows = joined([_rows(_history(records)) for _, records in parts])
        started = [record["run"] for _, records in parts for record in records if "run" in record]
        if not rows or not started:
            raise ValueError(f"{parts[-1][0]} holds no metrics: the run ended before its first log; leave it out")
        config = dict(started[-1].get("config", {}).get("update", {}))
        for record in parts[-1][1]:
            config |= record.get("config", {}).get("update", {})
        found.append(_record(started[-1].get("display_name") or parts[-1][0].name, config, rows))
    return found


def read_online(place: str) -> list[RunRecord]:
    """The runs of ``entity/project`` or of ``entity/project/group`` on the server.

    Raises:
        ValueError: no such place, no key, or no answer.
    """
    parts = place.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{ONLINE}{place}: write {ONLINE}entity/project or {ONLINE}entity/project/group")
    if not has_key():
        raise ValueError(f"{ONLINE}{place}: no key for W&B; set WANDB_API_KEY or run wandb login")
    import wandb

    filters = {"group": parts[2]} if len(parts) == 3 else None
    try:
        found = list(wandb.Api(timeout=SERVER_TIMEOUT_S).runs("/".join(parts[:2]), filters=filters))
        records = [record_of(run) for run in found]
    except Exception as error:  # of W&B, of its transport, of the server: there is no common class
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{ONLINE}{place}: W&B does not answer ({cause}); name run directories or offline folders"
        ) from error
    if not records:
        raise ValueError(f"{ONLINE}{place} has no runs; look at the names, they are case-sensitive")
    return records


def record_of(run: Any) -> RunRecord:
    """A run of W&B's public API; asks for every row of its history."""
    items = sorted(run.scan_history(), key=lambda item: item.get("_step", 0))  # as they were logged
    parts: list[list[Mapping[str, Any]]] = []
    for item in items:
        if item.get(STEP) is None:
            continue
        # Only another process goes back to an earlier step. One that begins with the last step needs no part of its
        # own: of a step's values the later ones count.
        if not parts or item[STEP] < parts[-1][-1][STEP]:
            parts.append([])
        parts[-1].append(item)
    return _record(run.name, run.config, joined(_rows(part) for part in parts))


def _record(name: str, config: Mapping[str, Any], rows: list[Row]) -> RunRecord:
    about = config.get("about") or {"ranks": (config.get("run") or {}).get("world_size", "?")}
    return RunRecord(name, {key: config[key] for key in config if key not in ("run", "about", "_wandb")}, rows, about)


def _records(file: Path) -> list[dict[str, Any]]:
    """What the reader that comes with W&B finds: a program of its own, which starts at once."""
    from wandb.util import get_core_path

    # `wandb leet inspect` calls the same program, after a second of imports.
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json"]
    command += ["--run-file", str(file), str(file.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ValueError(f"{file} can't be read: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _history(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record["history"]["item"] for record in records if "history" in record]


def _rows(items: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row a step: W&B writes what is logged apart, as histograms are, into rows of their own."""
    rows: dict[int, Row] = {}
    for item in items:
        if row := _row(item):
            rows.setdefault(row["step"], {}).update(row)
    return list(rows.values())


def _row(item: Mapping[str, Any]) -> Row:
    """Empty where the item has no step of ours."""
    if item.get(STEP) is None:
        return {}
    row: Row = {"step": int(item[STEP])}
    for key, value in item.items():
        # In the files a histogram is flat: name._type, name.bins, name.values.
        name, of_histogram = key.removesuffix(".values"), key.endswith(".values")
        if isinstance(value, Mapping) and value.get("_type") == "histogram":
            value, of_histogram = value["values"], True
        if not name.startswith(("train/", "eval/", "health/")):
            continue
        if of_histogram or (isinstance(value, int | float) and not isinstance(value, bool)):
            row[name] = value
        elif value is None or value in ("NaN", "Infinity", "-Infinity"):
            row[name] = None
    return row
