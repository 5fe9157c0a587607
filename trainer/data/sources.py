"""A data set of a config becomes rows with canonical columns, checked once and cached as Arrow."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, Optional

import pyarrow as pa
from datasets import Dataset, load_dataset
from jsonargparse import lazy_instance

from trainer.data.cache import build_once
from trainer.data.checks import BadRows, checked_rows
from trainer.data.files import data_files, data_format, did_you_mean, is_hub_id
from trainer.data.rows import Rows, read_file, table_rows
from trainer.evaluation.base import Evaluator
from trainer.evaluation.sts import STS

_VERSION = 1  # of the cached rows: raise it when the same files and spec give other rows
_TEXT = re.compile(r"text|anchor|positive|negative(_[1-9]\d*)?")
_KNOWN = ("text", "anchor", "positive", "negative", "negative_1", "label", "score")
_BATCH_ROWS = 10_000


@dataclass
class Source:
    """Rows of paired texts.

    Attributes:
        path: file, glob or folder of JSON lines, CSV, TSV, Parquet or Arrow (also .gz), or a hub data set id.
        columns: canonical name -> column in the data. Texts are text, or anchor, positive, negative,
            negative_1, ...; targets are label (class number) and score.
        score_range: lowest and highest score of the data, mapped linearly to 0..1; unset: left as they are.
        label_map: value in the data -> number; feeds score where columns has score, else label.
        split: of a hub data set, a saved DatasetDict, or a folder whose file names say train, dev, test.
        subset: configuration of a hub data set.
        revision: branch, tag or commit of a hub data set.
        on_bad_row: fail names the bad rows and stops, skip leaves them out and counts them.
        max_bad_rows: most rows that skip leaves out.
        weight: share of the steps under data.mixing weighted.
        streaming: read while training instead of first. Parquet and Arrow files, here, on the hub or at an address of
            fsspec (s3://...), keep an order that resumes anywhere; other files are read from front to back.
    """

    path: str
    columns: dict[str, str]
    score_range: Optional[tuple[float, float]] = None
    label_map: Optional[dict[str, float]] = None
    split: str = "train"
    subset: Optional[str] = None
    revision: Optional[str] = None
    on_bad_row: Literal["fail", "skip"] = "fail"
    max_bad_rows: int = 100
    weight: float = 1.0
    streaming: bool = False

    def __post_init__(self) -> None:
        for name in self.columns:
            if not _TEXT.fullmatch(name) and name not in ("label", "score"):
                raise ValueError(
                    f"{self.path}: columns has '{name}', which is none of text, anchor, positive, negative, "
                    f"negative_1, ..., label, score.{did_you_mean(name, _KNOWN)}"
                )
        texts = self.text_columns
        if texts != ("text",) and texts[:2] != ("anchor", "positive"):
            raise ValueError(
                f"{self.path}: columns must name either text, or anchor and positive (and negatives); "
                f"it names {', '.join(self.columns) or 'nothing'}"
            )
        if self.score_range is not None:
            low, high = self.score_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"{self.path}: score_range is {low:g}..{high:g}; write [lowest, highest]")
        self._check_label_map()
        if self.max_bad_rows < 0:
            raise ValueError(f"{self.path}: max_bad_rows is {self.max_bad_rows}; it must be 0 or more")

    def _check_label_map(self) -> None:
        if self.label_map is None:
            return
        if not self.label_map or not {"label", "score"} & set(self.columns):
            raise ValueError(f"{self.path}: label_map needs entries, and a score or a label in columns to feed")
        for value, number in self.label_map.items():
            if isinstance(value, bool):
                raise ValueError(
                    f"{self.path}: label_map has the truth value {str(value).lower()} as a key: "
                    "YAML reads yes, no, on, off, true and false so; quote it"
                )
            whole = "score" in self.columns or (float(number).is_integer() and number >= 0)
            if not math.isfinite(number) or not whole:
                raise ValueError(
                    f"{self.path}: label_map gives '{value}' the number {number:g}; "
                    "a label is a class number 0, 1, 2, ...; for fractions name the column score"
                )
        self.label_map = {str(value): float(number) for value, number in self.label_map.items()}

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Canonical names of the texts of a row, in their order."""

        def place(name: str) -> tuple[int, int]:
            base, _, number = name.partition("_")
            return ("text", "anchor", "positive", "negative").index(base), int(number or 0)

        return tuple(sorted((name for name in self.columns if _TEXT.fullmatch(name)), key=place))

    @property
    def canonical_columns(self) -> tuple[str, ...]:
        return (*self.text_columns, *(name for name in ("score", "label") if name in self.columns))


@dataclass(kw_only=True)
class EvalSource(Source):
    """A set to evaluate on.

    Attributes:
        name: of the set; its metrics are logged as eval/<name>/<metric>.
        evaluator: what to measure.
    """

    name: str
    # Lazy, because jsonargparse can write only such a default into config.yaml.
    evaluator: Evaluator = field(default_factory=lambda: lazy_instance(STS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"validation set name '{self.name}': letters, digits, '.', '_' and '-' are allowed")


def load(source: Source, cache_dir: Path) -> Dataset:
    """Rows of ``source`` with canonical columns only, memory-mapped; the first call builds ``cache_dir``.

    Returns:
        N rows: texts (str, none empty), then score (float32) and label (int64, from 0) if there are any.

    Raises:
        ValueError: missing file, missing column, bad rows (with file and line), no rows.
    """
    folder = _folder(source, cache_dir)
    build_once(folder, partial(_build, source))
    return Dataset.from_file(str(folder / "rows.arrow"))


def num_skipped(source: Source, cache_dir: Path) -> int:
    """Bad rows that were left out of ``load(source, cache_dir)``."""
    load(source, cache_dir)
    return json.loads((_folder(source, cache_dir) / "report.json").read_text())["num_skipped"]


def fingerprint(source: Source) -> str:
    """Hash of what ``load`` gives: bytes of the files (or the hub's commit) and the spec, not the path."""
    if source.streaming:
        from trainer.data.streaming import fingerprint as streamed  # it imports the checks of a source

        return streamed(source)
    if is_hub_id(source.path):
        contents = [_hub_rows(source.path, source.subset, source.split, source.revision)._fingerprint]
    else:
        contents = [_hash_file(str(f), *_identity(f)) + data_format(f) for f in data_files(source.path, source.split)]
    columns = sorted(source.columns.items())
    maps = [
        source.score_range and list(source.score_range),
        source.label_map and sorted(source.label_map.items()),
    ]
    budget = [source.on_bad_row, source.max_bad_rows]
    spec = json.dumps([_VERSION, contents, columns, maps, budget], ensure_ascii=True)
    return hashlib.sha256(spec.encode()).hexdigest()[:24]


def _folder(source: Source, cache_dir: Path) -> Path:
    return Path(cache_dir) / "rows" / fingerprint(source)


def _identity(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@cache  # one process asks several times; size and time of change make a changed file a new one
def _hash_file(path: str, size: int, mtime_ns: int) -> str:
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


@cache
def _hub_rows(path: str, subset: Optional[str], split: str, revision: Optional[str]) -> Dataset:
    try:
        return load_dataset(path, name=subset, split=split, revision=revision)
    except Exception as error:  # the hub, the network, the split, the format: each has its own type
        near = did_you_mean(path, os.listdir())
        cause = (str(error) or "no reason given").splitlines()[0]
        raise ValueError(
            f"{path}: neither a file or folder here nor a hub data set that can be read "
            f"({type(error).__name__}: {cause}).{near}"
        ) from error


def _build(source: Source, folder: Path) -> None:
    names = source.canonical_columns
    types = {"score": pa.float32(), "label": pa.int64()}
    schema = pa.schema([(name, types.get(name, pa.large_string())) for name in names])
    bad = BadRows(source)
    cells = chain.from_iterable(checked_rows(source, rows, bad) for rows in _open(source))
    num_rows = 0
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(cells, _BATCH_ROWS)):
            columns = zip(*batch, strict=True)
            writer.write_batch(
                pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
            )
            num_rows += len(batch)
    bad.close()
    if num_rows == 0:
        skipped = f" left after {bad.count} bad ones were skipped; the first: {bad.first[0]}" if bad.count else ""
        raise ValueError(f"{source.path}: there is no row{skipped}")
    (folder / "report.json").write_text(json.dumps({"num_rows": num_rows, "num_skipped": bad.count}))


def _open(source: Source) -> Iterator[Rows]:
    wanted = set(source.columns.values())
    if is_hub_id(source.path):
        rows = _hub_rows(source.path, source.subset, source.split, source.revision)
        here = rows.select_columns([c for c in rows.column_names if c in wanted])
        yield table_rows(source.path, rows.features.arrow_schema, here.with_format("arrow").iter(1000))
    else:
        for file in data_files(source.path, source.split):
            yield read_file(file, wanted)
