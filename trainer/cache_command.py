"""``trainer cache``: what lies in the cache, and how it gets smaller."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from trainer.config_files import ConfigError
from trainer.data.cache import Entry, clean, default_cache_dir, entries

_DAY_S = 86_400


def cache(args: Sequence[str]) -> int:
    """Runs ``trainer cache ls`` or ``trainer cache clean``; the exit status is 0.

    Raises:
        ConfigError: the arguments are none of theirs.
    """
    action, rest = (args[0], list(args[1:])) if args else ("", [])
    if action not in ("ls", "clean"):
        raise ConfigError("say what to do: trainer cache ls, or trainer cache clean --older-than DAYS")
    folder, older_than_s = default_cache_dir(), None
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        rest[:0] = [text] if equals else []
        if not rest and (flag == "--data.cache_dir" or (flag == "--older-than" and action == "clean")):
            raise ConfigError(f"{flag}: expected one argument; see trainer cache --help")
        if flag == "--data.cache_dir":
            folder = Path(os.path.expanduser(rest.pop(0)))  # no shell expands what --key=~/x says
        elif flag in ("--all", "--older-than") and action == "clean":
            if older_than_s is not None:
                raise ConfigError("give --all or --older-than, once: each says what is removed")
            older_than_s = 0.0 if flag == "--all" else _seconds(rest.pop(0))
        else:
            raise ConfigError(f"'{flag}' is not understood here; see trainer cache --help")
    if folder.is_file():
        raise ConfigError(f"--data.cache_dir {folder} is a file; give the folder of the cache")
    if action == "ls":
        _list(folder)
    else:
        _clean(folder, older_than_s)
    return 0


def _seconds(days: str) -> float:
    try:
        seconds = float(days) * _DAY_S
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ConfigError(f"--older-than is '{days}'; it must be a number of days, 0 or more")
    return seconds


def _list(folder: Path) -> None:
    found = entries(folder)
    table = Table("kind", "source", "rows", "size", "last used", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    table.columns[1].overflow = "fold"
    for entry in found:
        rows = "" if entry.num_rows is None else f"{entry.num_rows:,}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        source = entry.source or entry.folder.name
        table.add_row(entry.kind, source if entry.finished else "(unfinished)", rows, decimal(entry.num_bytes), used)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a pipe or a log has no width to fit
        console.width = 200
    if found:
        console.print(table)
    console.print(f"{_summary(found)} in {folder}", soft_wrap=True)


def _clean(folder: Path, older_than_s: float | None) -> None:
    removed, used, foreign = clean(folder, older_than_s)
    print(f"freed {_summary(removed)} in {folder}")
    if used:
        print(f"left {_summary(used)} that a running process builds or uses")
    if foreign:
        print(f"left {_summary(foreign)} that you have no permission to remove: ask who made it")


def _summary(found: Sequence[Entry]) -> str:
    return f"{decimal(sum(entry.num_bytes for entry in found))} ({len(found)} folder{'s' * (len(found) != 1)})"
