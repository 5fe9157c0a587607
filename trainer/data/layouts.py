"""Where a retrieval set lies: three files, a folder as BEIR or NanoBEIR has it, or such a data set on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional, Union

from datasets import load_dataset

from trainer.data.evalsource import EvalSource
from trainer.data.files import data_files, data_format, is_hub_id, refuse_empty
from trainer.data.sources import Source
from trainer.messages import cause_of


class HubTable(NamedTuple):
    """A split of one configuration of a hub data set."""

    path: str
    subset: str
    split: str
    revision: Optional[str]


# Where the rows of a part lie.
Part = Union[list[Path], HubTable]


@dataclass(frozen=True)
class Parts:
    """Where a set lies.

    Attributes:
        name: of the set among others; empty where it is the only one.
    """

    name: str
    queries: Part
    corpus: Part
    qrels: Part


def find_parts(source: EvalSource) -> list[Parts]:
    """The sets of a source whose evaluator searches.

    Raises:
        ValueError: a file, or a whole set, is not there.
    """
    for key, path in (("path", source.path), ("corpus", source.corpus), ("qrels", source.qrels)):
        if path is not None:
            refuse_empty(path, f"{source.name}: {key}")
    if source.corpus is not None and source.qrels is not None:
        split = source.split
        queries, corpus = data_files(source.path, split), data_files(source.corpus, split)
        return [Parts("", queries, corpus, _judgement_files(Path(source.qrels).expanduser(), split))]
    if is_hub_id(source.path):
        names = _hub_sets(source.path, source.revision)
        tables = {kind: partial(HubTable, source.path, kind) for kind in ("queries", "corpus", "qrels")}
        return [Parts(name, *(table(name, source.revision) for table in tables.values())) for name in names]
    folder = Path(source.path).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder}: corpus and qrels are missing; name them beside path, or a folder of all three")
    if not folder.is_dir():
        data_files(source.path, source.split)  # says what is not there
    if (found := _beir(folder, "", source.split)) is not None:
        return [found]
    if found_sets := _nano(folder):
        return found_sets
    nested = [_beir(inner, inner.name, source.split) for inner in sorted(folder.iterdir()) if inner.is_dir()]
    if not any(nested):
        raise ValueError(
            f"{folder}: neither a set (corpus.jsonl, queries.jsonl, qrels/test.tsv), nor a folder of such sets, nor "
            "folders corpus, queries and qrels with a table for each set; name three files: path, corpus, qrels"
        )
    return [one for one in nested if one is not None]


def source_files(source: Source) -> list[Path]:
    """The files that a source reads; none of the hub."""
    if not isinstance(source, EvalSource) or not source.searches:
        return data_files(source.path, source.split)
    sets = [part for parts in find_parts(source) for part in (parts.queries, parts.corpus, parts.qrels)]
    return [file for part in sets if not isinstance(part, HubTable) for file in part]


def _hub_sets(path: str, revision: Optional[str]) -> list[str]:
    try:
        # Not their names alone: those can't be had from the cache, without a network.
        return list(load_dataset(path, "queries", revision=revision))
    except Exception as error:  # the hub, the network, the format: each has its own type
        raise ValueError(
            f"{path}: neither a folder here nor a hub data set with corpus, queries and qrels "
            f"({type(error).__name__}: {cause_of(error)})"
        ) from error


def _beir(folder: Path, name: str, split: str) -> Optional[Parts]:
    """The set that lies in a folder as BEIR has it, or None."""
    files = {kind: _files_named(folder, kind) for kind in ("queries", "corpus")}
    judgements = next((p for p in (folder / "qrels", *_files_named(folder, "qrels")) if p.exists()), None)
    if not all(files.values()) or judgements is None:
        return None
    return Parts(name, files["queries"], files["corpus"], _judgement_files(judgements, split))


def _files_named(folder: Path, kind: str) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and f.name.split(".")[0] == kind)


def _judgement_files(path: Path, split: str) -> list[Path]:
    """A file of judgements, or that of a split in a folder of them."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        data_files(str(path), split)  # says what is not there
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    if len(files) > 1:
        # "train" is what a source that names no split has; who means it names the file under qrels.
        named = {f.name.split(".")[0]: f for f in files}
        wanted = ["test", "dev", "train"] if split == "train" else [split]
        files = [named[one] for one in wanted if one in named][:1]
        if not files:
            raise ValueError(f"{path}: no judgements of split '{split}'; found: {', '.join(named)}")
    if not files:
        raise ValueError(f"{path}: the folder holds no judgements")
    return files


def _nano(folder: Path) -> list[Parts]:
    """The sets of folders corpus, queries and qrels that hold a table for each, as NanoBEIR has them; or none."""
    tables: dict[str, dict[str, list[Path]]] = {}
    for kind in ("queries", "corpus", "qrels"):
        if not (folder / kind).is_dir():
            return []
        by_name = tables.setdefault(kind, {})
        for file in sorted(f for f in (folder / kind).iterdir() if data_format(f)):
            by_name.setdefault(re.sub(r"-\d+-of-\d+$", "", file.name.split(".")[0]), []).append(file)
    names = sorted(set.union(*(set(by_name) for by_name in tables.values())))
    for name in names:
        if lacking := [kind for kind, by_name in tables.items() if name not in by_name]:
            raise ValueError(f"{folder}: {lacking[0]}/ has no table of '{name}', which other folders have")
    return [Parts(name, *(tables[kind][name] for kind in ("queries", "corpus", "qrels"))) for name in names]
