"""A folder of the cache is written by one process, appears whole or not at all, and never changes after.

Its ``report.json`` names size and sha256 of every file in it; what else stands there is the builder's. A folder of
blocks grows and shrinks instead: its report names no files, and is there to be held.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

from filelock import FileLock, Timeout

from trainer.files import flush_folder, sha256_of, writing

logger = logging.getLogger(__name__)

_REPORT = "report.json"
_UNFINISHED = ".unfinished"
Kind = Literal["rows", "tokens", "facts", "retrieval", "teacher", "blocks"]
# As keys are written; `clean` may be pointed at a folder that holds other things too.
_NAME = re.compile(rf"[0-9a-f]{{24}}({re.escape(_UNFINISHED)})?")
# Descriptors, open for as long as this process lives: folders that `clean` of another must leave.
_held: dict[Path, int] = {}


def default_cache_dir() -> Path:
    """$TRAINER_CACHE, or a folder of the user."""
    return Path(os.environ.get("TRAINER_CACHE") or Path.home() / ".cache" / "siamese-trainer")


def place_of(cache_dir: Path, kind: Kind, key: str) -> Path:
    """Where the folder of a key lies; a key is 24 hexadecimal digits."""
    return Path(cache_dir) / kind / key


def use(folder: Path, build: Callable[[Path], None], verify: bool = False) -> None:
    """``build_once``, and note the use: while this process lives, `clean` of another leaves ``folder`` alone."""
    build_once(folder, build, verify)
    while not _hold(folder):  # it was removed in between, or has lost its report
        build_once(folder, build, verify=True)


def keep_open(folder: Path, report: Mapping[str, Any]) -> None:
    """``use`` of a folder that grows while it is in use: it is made where it is missing, with ``report`` alone."""
    while not _hold(folder):
        with _locked(folder):  # whoever removes it holds this one
            folder.mkdir(exist_ok=True)
            unfinished = folder / f"{_REPORT}{_UNFINISHED}"
            if not (folder / _REPORT).exists():
                unfinished.write_text(json.dumps(report), encoding="utf-8")
                unfinished.rename(folder / _REPORT)


def build_once(folder: Path, build: Callable[[Path], None], verify: bool = False) -> None:
    """Make sure that ``folder`` exists: the first process to come calls ``build(unfinished)``, others wait.

    A build that fails or is killed leaves no ``folder`` behind, and the next caller starts again.

    Args:
        folder: to be there.
        build: writes files into the folder it is given, and may write a ``report.json``, a JSON object.
        verify: read all files first; a damaged folder is named, dropped and built again.
    """
    # Before the lock, so that a cache may lie on a read-only disk.
    if folder.exists() and not (verify and damage(folder)):
        return
    with _locked(folder):
        unfinished = folder.with_name(folder.name + _UNFINISHED)
        # We hold the lock, so whoever left this was killed.
        shutil.rmtree(unfinished, ignore_errors=True)
        if folder.exists():  # another process may have built or mended it meanwhile
            fault = damage(folder) if verify else None
            if fault is None:
                return
            logger.warning("%s: %s; it is made again", folder, fault)
            folder.rename(unfinished)
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        try:
            with writing(folder):
                build(unfinished)
                _seal(unfinished)
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        flush_folder(folder.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone with a folder of the cache, which need not be there yet."""
    lock = FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ValueError(
            f"{error.filename or folder.parent}: {error.strerror}; the environment variable TRAINER_CACHE, or "
            "data.cache_dir of the config, names another place for the cache"
        ) from error
    try:
        yield
    finally:
        lock.release()


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a finished folder: cause and numbers, or None. Reads them all."""
    try:
        files = json.loads((folder / _REPORT).read_bytes()).get("files", {})
    except (OSError, ValueError, AttributeError):
        return f"{_REPORT} is missing or damaged"
    for name, (size, digest) in files.items():
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes of {size:,}"
            if sha256_of(folder / name) != digest:
                return f"{name} is damaged (its sha256 is another)"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def _seal(folder: Path) -> None:
    """Name all files in the report and bring them to the disk."""
    report = folder / _REPORT
    said: dict[str, Any] = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    files = sorted(file for file in folder.iterdir() if file.name != _REPORT)
    said["files"] = {file.name: [file.stat().st_size, sha256_of(file)] for file in files}
    report.write_text(json.dumps(said), encoding="utf-8")
    for file in [*files, report]:
        with file.open("rb") as written:
            os.fsync(written.fileno())
    flush_folder(folder)


def _hold(folder: Path) -> bool:
    """Note the time of use and tell `clean` of other processes to stay away; False where there is no whole folder."""
    try:
        file = os.open(folder / _REPORT, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # about to be removed
        os.close(file)
        return False
    except OSError:  # a file system without locks
        pass
    if not (folder / _REPORT).exists():  # removed between the two
        os.close(file)
        return False
    try:
        os.utime(folder / _REPORT)
    except OSError:  # a read-only disk, or another user's cache
        pass
    before = _held.pop(folder, None)  # a stream builds in two threads
    if before is not None:
        os.close(before)
    _held[folder] = file
    return True


@dataclass
class Entry:
    """A folder of the cache.

    Attributes:
        folder: where it lies.
        kind: rows, tokens, ...
        source: what it was made from, as the config wrote it; empty where it is not known.
        num_rows: None where it is not known.
        num_bytes: of its files.
        last_used: seconds since 1970.
        finished: False for a folder whose build is under way or was killed.
    """

    folder: Path
    kind: str
    source: str
    num_rows: int | None
    num_bytes: int
    last_used: float
    finished: bool


def entries(cache_dir: Path) -> list[Entry]:
    """Every folder that the cache wrote into ``cache_dir``, the last used first."""
    folders = (folder for kind in get_args(Kind) for folder in (Path(cache_dir) / kind).glob("*"))
    found = [_entry(folder) for folder in folders if _NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted((entry for entry in found if entry is not None), key=lambda entry: -entry.last_used)


def _entry(folder: Path) -> Entry | None:
    sizes: list[int] = []
    report: dict[str, Any] = {}
    try:
        last_used = folder.stat().st_mtime
        sizes = [file.stat().st_size for file in folder.iterdir()]
        if (folder / _REPORT).exists():
            last_used = (folder / _REPORT).stat().st_mtime
            report = json.loads((folder / _REPORT).read_bytes())
    except FileNotFoundError:  # it goes away at this moment
        return None
    except (ValueError, PermissionError):  # another user's
        pass
    finished = not folder.name.endswith(_UNFINISHED)
    source, num_rows = report.get("source", ""), report.get("num_rows")
    return Entry(folder, folder.parent.name, source, num_rows, sum(sizes), last_used, finished)


def clean(cache_dir: Path, older_than_s: float | None = None) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Remove the leftovers of killed builds, and finished folders that nobody used for a while.

    Args:
        cache_dir: the cache.
        older_than_s: seconds since the last use; None leaves all finished folders.

    Returns:
        What was removed; what would have been, had no living process it in use; and what this user may not remove.
    """
    removed: list[Entry] = []
    used: list[Entry] = []
    foreign: list[Entry] = []
    for entry in entries(cache_dir):
        if entry.finished and (older_than_s is None or time.time() - entry.last_used < older_than_s):
            continue
        try:
            (removed if _remove(entry) else used).append(entry)
        except PermissionError:
            foreign.append(entry)
    return removed, used, foreign


def _remove(entry: Entry) -> bool:
    """False where a living process builds or uses it. The lock file stays: another may be waiting at it.

    Raises:
        PermissionError: it is another user's.
    """
    folder = entry.folder.with_name(entry.folder.name.removesuffix(_UNFINISHED))
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            if not entry.finished:
                shutil.rmtree(entry.folder, ignore_errors=True)
                return True
            if folder in _held or not (reserved := _reserve(folder)):
                return False
            with reserved:
                unfinished = folder.with_name(folder.name + _UNFINISHED)
                shutil.rmtree(unfinished, ignore_errors=True)
                folder.rename(unfinished)
                shutil.rmtree(unfinished)
            return True
    except Timeout:
        return False


def _reserve(folder: Path) -> IO[bytes] | None:
    """Holds a finished folder alone: None where another process has it in use."""
    try:
        file = (folder / _REPORT).open("r+b")
    except FileNotFoundError:  # half of a folder, which nobody can open
        return (folder.with_name(folder.name + ".lock")).open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
