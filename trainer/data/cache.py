"""A folder of the cache is written by one process, appears whole or not at all, and never changes after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Make sure that ``folder`` exists: the first process to come calls ``build(unfinished)``, others wait.

    A build that fails or is killed leaves no ``folder`` behind, and the next caller starts again.
    """
    if folder.exists():  # before the lock, so that a cache may lie on a read-only disk
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        # We hold the lock, so whoever left this was killed.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            build(unfinished)
            for file in unfinished.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
