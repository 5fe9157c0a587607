"""Long work on data as the terminal shows it: a bar with rate and remaining time, or one line where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Called with what was done since the last call.
Advance = Callable[[float], None]


@contextmanager
def shown_progress(
    what: str, total: float, unit: str, large: bool, console: Console | None = None
) -> Iterator[Advance]:
    """A bar on stderr while the block runs; where that is no terminal one line; nothing for small work.

    Args:
        what: is done, on which file.
        total: of the work.
        unit: rows or bytes.
        large: whether to speak at all.
        console: where to write; stderr by default.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    if not large:
        yield lambda done: None
    elif not console.is_terminal:
        console.print(what, markup=False, highlight=False)
        yield lambda done: None
    else:
        done = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(20), done, TextColumn(unit), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.advance(task, done)
