"""A data set of a config becomes rows with canonical columns, checked once and cached as Arrow."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, Union

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_dataset
from jsonargparse import lazy_instance

from trainer.data.cache import use
from trainer.data.checks import BadRows, checked_rows
from trainer.data.delimited import read_delimited
from trainer.data.derived import draw, held_out, triplets
from trainer.data.files import JSON_LINES, data_files, data_format, did_you_mean, is_hub_id
from trainer.data.json_lines import read_json_lines
from trainer.data.rows import Rows, read_file, table_rows
from trainer.data.values import rule
from trainer.encoder.spec import EncoderSpec
from trainer.evaluation.base import Evaluator
from trainer.evaluation.search import Search
from trainer.evaluation.sts import STS
from trainer.files import sha256_of

_VERSION = 1  # of the cached rows: raise it when the same files and spec give other rows
_TEXT = re.compile(r"text|anchor|positive|negative(_[1-9]\d*)?")
_CANDIDATE_SCORE = re.compile(r"score_[1-9]\d*")
_LISTS = ("positives", "negatives")
_KNOWN = (
    "text", "anchor", "positive", "negative", "negative_1", *_LISTS, "label", "score", "score_1", "group", "id",
)  # fmt: skip
_BATCH_ROWS = 10_000
# What a set that is searched has: of the queries, of the corpus, of the judgements.
SEARCH_COLUMNS = (
    "query_id", "query", "document_id", "title", "document", "judged_query", "judged_document", "relevance",
)  # fmt: skip


@dataclass
class Source:
    """Rows of paired texts.

    Attributes:
        path: file, glob or folder of JSON lines, CSV, TSV, Parquet or Arrow (also .gz), or a hub data set id.
        columns: canonical name -> column in the data: its name, its position from 0, or a field inside it
            (translation.en, hits.0, passages.text). Texts are text, or anchor, positive, negative, negative_1, ...;
            lists of texts are positives (each makes a row) and negatives; targets are label (class number), score,
            score_1, score_2, ... (a teacher's of each candidate: scores.0, ...) and group (rows with the same value:
            the positive of one is no negative of another). id is kept beside the text, as text.
        score_range: lowest and highest score of the data, mapped linearly to 0..1; unset: left as they are.
        label_map: value in the data -> number; feeds score where columns has score, else label.
        split: of a hub data set, a saved DatasetDict, or a folder whose file names say train, dev, test.
        subset: configuration of a hub data set.
        revision: branch, tag or commit of a hub data set.
        on_bad_row: fail names the bad rows and stops, skip leaves them out and counts them.
        max_bad_rows: most rows that skip leaves out.
        where: column in the data -> the value, the values, or the comparison ('>= 0.7') that a row must meet.
        triplets: [label of a positive, label of a negative]: the rows of one anchor, e.g. NLI's premise with its
            hypotheses, become triplets; columns names anchor, positive (both kinds) and label.
        holdout: share of the rows that a training source leaves out and a validation source of the same path keeps.
        holdout_by: text column whose hash decides, so that equal texts stay together; unset: the first.
        max_rows: most rows, drawn evenly over the whole source.
        max_negatives: most texts taken of a row's negatives, the first ones; a row may have fewer.
        prompts: text column -> what is put before each of its texts (query:, passage:); it is pooled like the text.
        rows_per_label: a batch takes so many rows of each of its labels, for losses whose positives are the rows of a
            label.
        max_lengths: text column -> pieces kept of each of its texts while training, special ones included (anchor: 64);
            unset: model.encoder.max_length.
        loss: which of model.losses trains on this source; unset: model.loss.
        weight: share of the steps under data.mixing weighted.
        streaming: read while training instead of first. Parquet and Arrow files, here, on the hub or at an address of
            fsspec (s3://...), keep an order that resumes anywhere; other files are read from front to back.
    """

    path: str
    columns: dict[str, Union[int, str]]
    score_range: Optional[tuple[float, float]] = None
    label_map: Optional[dict[str, float]] = None
    split: str = "train"
    subset: Optional[str] = None
    revision: Optional[str] = None
    on_bad_row: Literal["fail", "skip"] = "fail"
    max_bad_rows: int = 100
    where: Optional[dict[str, Union[list[Union[bool, int, float, str]], bool, int, float, str]]] = None
    triplets: Optional[tuple[Union[int, str], Union[int, str]]] = None
    holdout: float = 0.0
    holdout_by: Optional[str] = None
    max_rows: Optional[int] = None
    max_negatives: int = 7
    prompts: Optional[dict[str, str]] = None
    rows_per_label: Optional[int] = None
    max_lengths: Optional[dict[str, int]] = None
    loss: Optional[str] = None
    keeps_holdout: ClassVar[bool] = False
    weight: float = 1.0
    streaming: bool = False

    def __post_init__(self) -> None:
        for name in self.columns:
            if not _TEXT.fullmatch(name) and name not in _KNOWN and not _CANDIDATE_SCORE.fullmatch(name):
                raise ValueError(
                    f"{self.path}: columns has '{name}', which is none of text, anchor, positive, negative, "
                    "negative_1, ..., positives, negatives, label, score, score_1, ..., group, id."
                    f"{did_you_mean(name, _KNOWN)}"
                )
        expected = tuple(f"score_{number + 1}" for number in range(len(self.candidate_scores)))
        if self.candidate_scores != expected:
            raise ValueError(
                f"{self.path}: columns has {', '.join(self.candidate_scores)}; number them {', '.join(expected)}"
            )
        self._check_lists()
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
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"{self.path}: max_rows is {self.max_rows}; it must be 1 or more")
        if self.rows_per_label is not None:
            self._check_rows_per_label(self.rows_per_label)
        for values in (self.where or {}).values():
            rule(values)
        self._check_derivation()

    def _check_lists(self) -> None:
        for plural in _LISTS:
            single = [name for name in self.columns if name != plural and name.startswith(plural[:-1])]
            if plural in self.columns and single:
                raise ValueError(f"{self.path}: columns has {plural} and {single[0]}; name one of the two")
        if self.max_negatives < 1:
            raise ValueError(f"{self.path}: max_negatives is {self.max_negatives}; it must be 1 or more")
        if "positives" in self.columns and self.streaming:
            raise ValueError(
                f"{self.path}: positives does not go with streaming: true, for rows are numbered before they are read; "
                "write a row for each positive, with a group, or set streaming: false"
            )

    def _check_rows_per_label(self, rows: int) -> None:
        if rows < 2:
            raise ValueError(f"{self.path}: rows_per_label is {rows}; a positive of a text takes 2 rows or more")
        if "label" not in self.canonical_columns:
            raise ValueError(f"{self.path}: rows_per_label needs a column label; columns has {', '.join(self.columns)}")
        if self.streaming:
            raise ValueError(
                f"{self.path}: rows_per_label does not go with streaming: true, for the label of a row is known when "
                "it is read; set streaming: false"
            )

    def _check_derivation(self) -> None:
        planned = {"where": self.where, "triplets": self.triplets, "holdout": self.holdout, "max_rows": self.max_rows}
        planned |= dict.fromkeys(self.candidate_scores, True)
        if self.streaming and (asked := [name for name, value in planned.items() if value]):
            raise ValueError(
                f"{self.path}: {asked[0]} does not go with streaming: true, for rows are numbered before they are "
                "read; write a data set with these rows, or set streaming: false"
            )
        if self.triplets is not None:
            if set(self.columns) != {"anchor", "positive", "label"} or self.label_map is not None:
                raise ValueError(
                    f"{self.path}: triplets need columns anchor, positive and label, without label_map; "
                    f"columns has {', '.join(self.columns)}"
                )
            if str(self.triplets[0]) == str(self.triplets[1]):
                raise ValueError(f"{self.path}: triplets names '{self.triplets[0]}' as positive and as negative")
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"{self.path}: holdout is {self.holdout:g}; it is a share of the rows, 0 to below 1")
        for key, names in (
            ("holdout_by", [self.holdout_by] if self.holdout_by else []),
            ("prompts", self.prompts or []),
            ("max_lengths", self.max_lengths or []),
        ):
            for name in names:
                if name not in self.text_columns and not (
                    key != "holdout_by" and name in self.columns and name in _LISTS
                ):
                    raise ValueError(
                        f"{self.path}: {key} names '{name}', which is no text column; there are "
                        f"{', '.join(self.text_columns)}"
                    )

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

        made = ["negative"] if self.triplets else []
        if "positives" in self.columns:
            made.append("positive")
        if "negatives" in self.columns:
            made += [f"negative_{number + 1}" for number in range(self.max_negatives)]
        return tuple(sorted((*(name for name in self.columns if _TEXT.fullmatch(name)), *made), key=place))

    @property
    def candidate_scores(self) -> tuple[str, ...]:
        """The columns score_1, score_2, ... in their order."""
        names = (name for name in self.columns if _CANDIDATE_SCORE.fullmatch(name))
        return tuple(sorted(names, key=lambda name: int(name.partition("_")[2])))

    @property
    def canonical_columns(self) -> tuple[str, ...]:
        targets = ("id",) if self.triplets else ("score", "label", *self.candidate_scores, "group", "id")
        made = {"group"} if "positives" in self.columns else set()
        return (*self.text_columns, *(name for name in targets if name in {*self.columns, *made}))

    def key_of(self, name: str) -> str:
        """The key of ``columns`` that a canonical column comes from: one of a list for the texts of lists."""
        if name not in self.columns:
            for plural in _LISTS:
                if plural in self.columns and name.startswith(plural[:-1]):
                    return plural
        return name

    @property
    def may_lack_texts(self) -> bool:
        """Whether a row may have no text in some column."""
        return "negatives" in self.columns

    @property
    def mapped_column(self) -> Optional[str]:
        """The target that label_map feeds."""
        if self.label_map is None:
            return None
        return "score" if "score" in self.columns else "label"

    def prompt_of(self, column: str) -> str:
        """What is put before each text of a column."""
        prompts = self.prompts or {}
        return prompts.get(column, prompts.get(self.key_of(column), ""))

    def max_length_of(self, column: str) -> Optional[int]:
        """Pieces that are kept of each text of a column; None: what the encoder keeps."""
        lengths = self.max_lengths or {}
        return lengths.get(column, lengths.get(self.key_of(column)))

    def prompted(self, column: str, texts: Sequence[str]) -> list[str]:
        """Texts of a column behind its prompt."""
        prompt = self.prompt_of(column)
        return [prompt + text for text in texts]

    @property
    def read_columns(self) -> Optional[set[str]]:
        """Columns of the data to read, None for all: a position has no name before the file is open."""
        asked = [*self.columns.values(), *(self.where or {})]
        if any(isinstance(column, int) for column in asked):
            return None
        return {part for column in asked for part in (str(column), str(column).split(".")[0])}


@dataclass(kw_only=True)
class EvalSource(Source):
    """A set to evaluate on. Where its evaluator searches, path is the queries, or a folder or hub data set that holds
    queries, corpus and qrels of one set or of many; columns names what is not found by its usual name.

    Attributes:
        name: of the set; its metrics are logged as eval/<name>/<metric>.
        evaluator: what to measure.
        corpus: documents to search, where path is a file of queries.
        qrels: which documents are relevant to which query: a table, or lines of TREC.
        corpus_size: search this many documents only, the judged ones among them; for a quick look while training.
        teacher: of an evaluator that compares with one.
    """

    columns: dict[str, Union[int, str]] = field(default_factory=dict, kw_only=False)
    name: str
    # Lazy, because jsonargparse can write only such a default into config.yaml.
    evaluator: Evaluator = field(default_factory=lambda: lazy_instance(STS))
    corpus: Optional[str] = None
    qrels: Optional[str] = None
    corpus_size: Optional[int] = None
    teacher: Optional[EncoderSpec] = None

    keeps_holdout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if lists := [name for name in _LISTS if name in self.columns]:
            raise ValueError(f"{self.path}: {lists[0]} is for data.train; name one text in a validation set")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"validation set name '{self.name}': letters, digits, '.', '_' and '-' are allowed")
        kind = type(self.evaluator).__name__
        if self.evaluator.teacher_column is not None and self.teacher is None:
            raise ValueError(f"{self.path}: {kind} compares with a teacher; name it: teacher: {{backbone: ...}}")
        if self.evaluator.teacher_column is None and self.teacher is not None:
            raise ValueError(f"{self.path}: {kind} compares with no teacher; leave teacher out")
        if self.searches:
            self._check_search()
            return
        super().__post_init__()
        planned = {"corpus": self.corpus, "qrels": self.qrels, "corpus_size": self.corpus_size}
        if asked := [name for name, value in planned.items() if value is not None]:
            raise ValueError(
                f"{self.path}: {asked[0]} is for an evaluator that searches (InformationRetrieval), {kind} does not"
            )

    @property
    def searches(self) -> bool:
        """Whether the set is queries, documents and judgements instead of rows of texts."""
        return isinstance(self.evaluator, Search)

    def _check_search(self) -> None:
        for name in self.columns:
            if name not in SEARCH_COLUMNS:
                raise ValueError(
                    f"{self.path}: columns has '{name}', which is none of {', '.join(SEARCH_COLUMNS)}."
                    f"{did_you_mean(name, SEARCH_COLUMNS)}"
                )
        others = {f.name: f for f in fields(Source)}
        for name in ("score_range", "label_map", "where", "triplets", "holdout", "holdout_by", "loss", "streaming"):
            if getattr(self, name) != others[name].default:
                raise ValueError(f"{self.path}: {name} does not go with an evaluator that searches; leave it out")
        if (self.corpus is None) != (self.qrels is None):
            lacking = "corpus" if self.corpus is None else "qrels"
            raise ValueError(
                f"{self.path}: {lacking} is missing; name queries (path), corpus and qrels, or a folder of them (path)"
            )
        for name, number in (("max_rows", self.max_rows), ("corpus_size", self.corpus_size)):
            if number is not None and number < 1:
                raise ValueError(f"{self.path}: {name} is {number}; it must be 1 or more")
        for name in self.prompts or ():
            if name not in self.text_columns:
                raise ValueError(f"{self.path}: prompts names '{name}'; there are {', '.join(self.text_columns)}")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Canonical names of the texts of a row, in their order; of a set that is searched, its two kinds of text."""
        return Search.text_columns if self.searches else super().text_columns


def load(source: Source, cache_dir: Path, verify: bool = False) -> Dataset:
    """Rows of ``source`` with canonical columns only, memory-mapped; the first call builds ``cache_dir``.

    Args:
        source: what to read.
        cache_dir: where rows lie.
        verify: read rows that are there, and build them again where a file is damaged.

    Returns:
        N rows: texts (str, none empty), then score (float32) and label (int64, from 0) if there are any.

    Raises:
        ValueError: missing file, missing column, bad rows (with file and line), no rows.
    """
    folder = _folder(source, cache_dir)
    base = _base(source)
    use(folder, partial(_build, source) if base is None else partial(_derive, source, base, cache_dir), verify)
    return Dataset.from_file(str(folder / "rows.arrow"))


def _base(source: Source) -> Optional[Source]:
    """The source without what is done to its rows once they are read, or None where nothing is.

    Training and validation sources that share a path, and differ only in that, are read once.
    """
    if not (source.triplets or source.holdout or source.max_rows or source.prompts):
        return None
    spec: dict[str, Any] = {f.name: getattr(source, f.name) for f in fields(Source)}
    spec.update(triplets=None, holdout=0.0, holdout_by=None, max_rows=None, prompts=None, max_lengths=None)
    spec.update(loss=None)
    if source.triplets:
        positive, negative = map(str, source.triplets)
        column = str(source.columns["label"])
        spec.update(label_map={positive: 1, negative: 0}, where={**(source.where or {}), column: [positive, negative]})
    return Source(**spec)


def _derive(source: Source, base: Source, cache_dir: Path, folder: Path) -> None:
    """Writes the rows of ``source`` out of those of its base."""
    rows, skipped = load(base, cache_dir, verify=True), num_skipped(base, cache_dir)
    table: pa.Table = rows.data.table
    columns = {name: table[name] for name in table.column_names}
    picked = {name: np.arange(len(rows)) for name in source.canonical_columns if name in columns}
    if source.triplets:
        anchors, negatives = triplets(columns["anchor"], columns["label"].to_numpy())
        if not len(anchors):
            raise ValueError(
                f"{source.path}: no anchor has both a '{source.triplets[0]}' and a '{source.triplets[1]}'; triplets "
                f"need both. The source has {len(rows):,} rows with one of these labels"
            )
        columns["negative"] = columns["positive"]
        picked = {"anchor": anchors, "positive": anchors, "negative": negatives}
    if source.holdout:
        by = source.holdout_by or source.text_columns[0]
        here = held_out(columns[by], source.holdout)[picked[by]] == source.keeps_holdout
        if not here.any():
            raise ValueError(
                f"{source.path}: a holdout of {source.holdout:g} by '{by}' leaves none of {len(picked[by]):,} rows to "
                f"{'validate' if source.keeps_holdout else 'train'} on"
            )
        picked = {name: numbers[here] for name, numbers in picked.items()}
    if source.max_rows:
        drawn = draw(len(next(iter(picked.values()))), source.max_rows)
        picked = {name: numbers[drawn] for name, numbers in picked.items()}
    num_rows = len(next(iter(picked.values())))
    large = partial(pa.scalar, type=pa.large_string())
    schema = pa.schema([(name, columns[name].type) for name in picked])
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, num_rows, _BATCH_ROWS):
            part = {name: columns[name].take(pa.array(n[start : start + _BATCH_ROWS])) for name, n in picked.items()}
            for name in source.text_columns:
                if prompt := source.prompt_of(name):  # an absent text stays absent
                    part[name] = pc.binary_join_element_wise(large(prompt), part[name], large(""))
            writer.write_table(pa.table(part, schema=schema).combine_chunks())
    report = {"source": source.path, "num_rows": num_rows, "num_skipped": skipped}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def num_skipped(source: Source, cache_dir: Path) -> int:
    """Bad rows that were left out of ``load(source, cache_dir)``."""
    load(source, cache_dir)
    return json.loads((_folder(source, cache_dir) / "report.json").read_text())["num_skipped"]


def fingerprint(source: Source) -> str:
    """Hash of what ``load`` gives: bytes of the files (or the hub's commit) and the spec, not the path."""
    base = _base(source)
    if base is not None:
        by = source.holdout_by or source.text_columns[0]
        held = [source.holdout, by, source.keeps_holdout] if source.holdout else []
        prompts = sorted((source.prompts or {}).items())
        spec = json.dumps([_VERSION, fingerprint(base), bool(source.triplets), held, source.max_rows, prompts])
        return hashlib.sha256(spec.encode()).hexdigest()[:24]
    if source.streaming:
        from trainer.data.streaming import fingerprint as streamed  # it imports the checks of a source

        return streamed(source)
    if is_hub_id(source.path):
        contents = [hub_rows(source.path, source.subset, source.split, source.revision)._fingerprint]
    else:
        contents = [content_hash(file) for file in data_files(source.path, source.split)]
    columns = sorted(source.columns.items())
    maps = [
        source.score_range and list(source.score_range),
        source.label_map and sorted(source.label_map.items()),
        source.where and sorted(source.where.items()),
    ]
    budget = [source.on_bad_row, source.max_bad_rows]
    lists = [source.max_negatives] if source.may_lack_texts else []
    spec = json.dumps([_VERSION, contents, columns, maps, budget, *lists], ensure_ascii=True)
    return hashlib.sha256(spec.encode()).hexdigest()[:24]


def _folder(source: Source, cache_dir: Path) -> Path:
    return Path(cache_dir) / "rows" / fingerprint(source)


def content_hash(file: Path) -> str:
    """Of the bytes of a file and of how they are read."""
    stat = file.stat()
    return _hash_file(str(file), stat.st_size, stat.st_mtime_ns) + data_format(file)


@cache  # one process asks several times; size and time of change make a changed file a new one
def _hash_file(path: str, size: int, mtime_ns: int) -> str:
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


@cache
def hub_rows(path: str, subset: Optional[str], split: str, revision: Optional[str]) -> Dataset:
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
    bad = BadRows(source)
    with _RowsFile(source, folder / "rows.arrow") as file:
        for rows in _open(source, file.add_batch):
            for cells in checked_rows(source, rows, bad):
                file.add_row(cells)
    bad.close()
    if file.num_rows == 0:
        skipped = f" left after {bad.count} bad ones were skipped; the first: {bad.first[0]}" if bad.count else ""
        raise ValueError(f"{source.path}: there is no row{skipped}")
    report = {"source": source.path, "num_rows": file.num_rows, "num_skipped": bad.count}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


class _RowsFile:
    """Checked rows on their way into an Arrow file, single ones and whole batches, in the order they come."""

    def __init__(self, source: Source, path: Path) -> None:
        types = {"score": pa.float32(), "label": pa.int64(), "group": pa.int64()}
        types |= dict.fromkeys(source.candidate_scores, pa.float32())
        self.schema = pa.schema([(name, types.get(name, pa.large_string())) for name in source.canonical_columns])
        self.path = path
        self.num_rows = 0
        self._waiting: list[list[Any]] = []

    def __enter__(self) -> "_RowsFile":
        self._file = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_stream(self._file, self.schema)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        self._file.close()

    def add_row(self, cells: list[Any]) -> None:
        self._waiting.append(cells)
        if len(self._waiting) == _BATCH_ROWS:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        self._flush()
        self._writer.write_batch(batch)
        self.num_rows += len(batch)

    def _flush(self) -> None:
        if self._waiting:
            columns = zip(*self._waiting, strict=True)
            arrays = [pa.array(cells, f.type) for cells, f in zip(columns, self.schema, strict=True)]
            self._waiting = []
            self.add_batch(pa.record_batch(arrays, schema=self.schema))


def _open(source: Source, accept: Callable[[pa.RecordBatch], None]) -> Iterator[Rows]:
    """The rows to check, file by file; ``accept`` gets those of text files that Arrow has read and found good."""
    wanted = source.read_columns
    if is_hub_id(source.path):
        rows = hub_rows(source.path, source.subset, source.split, source.revision)
        here = rows.select_columns([c for c in rows.column_names if wanted is None or c in wanted])
        yield table_rows(source.path, rows.features.arrow_schema, here.with_format("arrow").iter(1000))
    else:
        for file in data_files(source.path, source.split):
            if data_format(file) in JSON_LINES:
                yield read_json_lines(file, source, accept)
            elif data_format(file) in (".csv", ".tsv"):
                yield read_delimited(file, source, accept)
            else:
                yield read_file(file, wanted)
