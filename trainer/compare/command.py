"""``trainer compare``: reads runs, folds seeds, prints tables, writes the report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from trainer.compare.fold import fold
from trainer.compare.report import render_report
from trainer.compare.table import print_comparison
from trainer.config_files import ConfigError
from trainer.files import write_whole
from trainer.predict.flags import Flags
from trainer.tracking.runs import METRICS_FILE, RunRecord, read_run_dir
from trainer.tracking.wandb_runs import ONLINE, offline_folders, read_offline, read_online

_DEPTH = 3  # folders below a named one in which runs are looked for: runs/<recipe>/<run>


def flags() -> Flags:
    parser = Flags("compare")
    parser.add_argument("--out", metavar="FILE", help="also a report: one HTML file, to open in a browser")
    return parser


def compare(args: Sequence[str]) -> int:
    """Runs the command; the exit status is 0.

    Raises:
        ConfigError: the command line names no runs, or a flag that is not there.
        ValueError: what it names can't be read.
    """
    parser = flags()
    named, rest = parser.parse_known_args(list(args))
    for word in rest:
        if word.startswith("-"):
            raise ConfigError(f"'{word}' is no flag of trainer compare; see trainer compare --help")
    if not rest:
        raise ConfigError("runs are needed: trainer compare RUN [RUN...] [--out report.html]")
    if named.out is not None and Path(named.out).suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {named.out}: the report is a page; give it a name that ends in .html")
    groups = fold(read_runs(rest))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a pipe or a log has no width to fit
        console.width = 200
    print_comparison(groups, console)
    if named.out is not None:
        write_whole(Path(named.out), render_report(groups))
        console.print(f"report: {named.out}", soft_wrap=True)
    return 0


def read_runs(places: Sequence[str]) -> list[RunRecord]:
    """The runs that the words of a command line name, each once, in their order.

    Raises:
        ValueError: there is nothing of the name, or no run in it.
    """
    found: list[RunRecord] = []
    offline: list[Path] = []
    seen: set[Path] = set()
    for place in places:
        if place.startswith(ONLINE):
            found += read_online(place.removeprefix(ONLINE))
            continue
        folder = Path(place)
        if not folder.is_dir():
            raise ValueError(
                f"there is no run {place}: name a run directory, a folder of them, or an offline W&B folder"
            )
        runs = _run_dirs(folder)
        for run in runs:
            if run.resolve() in seen:
                continue
            seen.add(run.resolve())
            try:
                found.append(read_run_dir(run))
            except ValueError as error:
                if run == folder or len(runs) == 1:
                    raise
                print(f"note: {error}", file=sys.stderr)  # one of a folder may have only just begun
        if not runs:
            fragments = offline_folders(folder)
            if not fragments:
                os.listdir(folder)  # without the permission it would seem to be empty
                raise ValueError(f"{place} holds no run: neither metrics.jsonl nor an offline-run-* of W&B")
            offline += fragments
    found += read_offline(list(dict.fromkeys(offline)))
    if not found:
        raise ValueError(f"none of the runs in {', '.join(places)} has metrics yet; wait for their first log")
    return found


def _run_dirs(folder: Path) -> list[Path]:
    """The folder if it is a run directory, else those below it; what lies in a run directory is part of that run."""
    found: list[Path] = []
    for depth in range(_DEPTH + 1):
        level = sorted(path.parent for path in folder.glob("/".join(["*"] * depth + [METRICS_FILE])))
        found += [run for run in level if not any(above in found for above in run.parents)]
    return found
