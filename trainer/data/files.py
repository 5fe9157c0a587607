"""Which files the ``path`` of a source means: a file, a glob, a folder of files or a saved Arrow data set."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.messages import cause_of, did_you_mean

JSON_LINES = (".jsonl", ".ndjson", ".json")
FORMATS = (*JSON_LINES, ".csv", ".tsv", ".parquet", ".arrow")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Words in file names that say which split a file belongs to.
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "dev": "validation", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


def data_format(path: Path) -> str:
    """The suffix that says how to read a file, without ``.gz``; empty where it is none of FORMATS."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in FORMATS else ""


def is_hub_id(path: str) -> bool:
    """Whether ``path`` can only mean a data set of the hub: nothing local has its name or its folder."""
    local = Path(path).expanduser()
    if local.exists() or not _HUB_ID.fullmatch(path) or data_format(local) or path.endswith(".gz"):
        return False
    return str(local.parent) == "." or not local.parent.exists()


def refuse_empty(path: str, key: str = "path") -> None:
    """Raises ValueError for a path as of a variable of the shell that is not set: it would be the current folder."""
    if not path.strip():
        raise ValueError(f"{key} is empty; name a file, a glob, a folder or a data set of the hub")


def data_files(path: str, split: str) -> list[Path]:
    """The files that ``path`` names, in the order of their names.

    Args:
        path: file, glob or folder.
        split: of a saved DatasetDict, or of a folder where a file name says train, dev, test, ...

    Raises:
        ValueError: nothing is there, or nothing of a known format.
    """
    refuse_empty(path)
    local = Path(path).expanduser()
    if local.is_dir():
        files = _folder_files(local, split)
    elif os.path.lexists(local):
        files = [local]
    elif "://" in path:
        raise ValueError(
            f"{path}: an address is read by a source of data.train with streaming: true alone; set that, or copy the "
            "files to this machine and name them in path"
        )
    elif glob.has_magic(path):
        files = [Path(p) for p in sorted(glob.glob(os.path.expanduser(path), recursive=True))]
        files = [f for f in files if not f.is_dir()]
        if not files:
            raise ValueError(f"{path}: no file matches this pattern")
    else:
        raise ValueError(_missing(local))
    for file in files:
        if file.is_symlink() and not file.exists():  # as git-annex and DVC leave it: its rows would be left out
            raise ValueError(f"{file}: is a link to {os.readlink(file)}, where nothing is; fetch that file first")
        if not data_format(file):
            raise ValueError(
                f"{file}: unknown format '{file.suffix}'; known are {', '.join(FORMATS)}, each also with .gz"
            )
    return files


def _missing(path: Path) -> str:
    first = path  # of its parts that does not exist
    while not first.parent.exists():
        first = first.parent
    what = "no such file or folder." if first == path else f"there is no folder {first}."
    return f"{path}: {what}{did_you_mean(first.name, os.listdir(first.parent) if first.parent.is_dir() else [])}"


def _listed(path: Path, names_in: Callable[[Any], list[str]]) -> list[str]:
    """Names in a file beside the rows of a saved data set."""
    try:
        return names_in(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what save_to_disk writes ({cause_of(error)}): save the data set again, or name its .arrow "
            "files in path"
        ) from error


def _folder_files(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        splits = _listed(folder / "dataset_dict.json", lambda saved: list(saved["splits"]))
        if split not in splits:
            raise ValueError(f"{folder}: no split '{split}'; found: {', '.join(splits)}.{did_you_mean(split, splits)}")
        folder = folder / split
    if (folder / "state.json").exists():  # written by datasets' save_to_disk
        names = _listed(folder / "state.json", lambda saved: [file["filename"] for file in saved["_data_files"]])
        return [folder / name for name in names]
    files = sorted(f for f in folder.iterdir() if not f.is_dir() and data_format(f) and not f.name.startswith("."))
    if not files:
        raise ValueError(f"{folder}: the folder holds no data file ({', '.join(FORMATS)}, also with .gz)")
    return [folder / name for name in names_of_split(folder, [f.name for f in files], split)]


def names_of_split(folder: Path | str, files: Sequence[str], split: str) -> list[str]:
    """Those of the files in a folder, called by their way from there, that belong to a split, in the order of names.

    Raises:
        ValueError: there is none.
    """
    files = sorted(files)
    by_split = {f: {_SPLIT_WORDS[w] for w in re.findall("[a-z]+", f.lower()) if w in _SPLIT_WORDS} for f in files}
    named = set().union(*by_split.values())
    if not named or (split == "train" and len(named) == 1 and all(by_split.values())):
        return files  # train is what a source asks for that says nothing, and this is a folder of one split
    # A folder with a dev or test file: training on it would spoil the evaluation.
    meant = _SPLIT_WORDS.get(split, split)
    wanted = {f for f, words in by_split.items() if meant in words}
    if meant == "train" and (not wanted or named == {"train"}):
        wanted |= {f for f, words in by_split.items() if not words}
    if not wanted:
        raise ValueError(
            f"{folder}: no file of split '{split}'; the file names say {', '.join(sorted(named))}: set split to one of "
            "them, or name the files in path"
        )
    return sorted(wanted)
