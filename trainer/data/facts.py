"""What is true of a source, counted once and cached: the check's rules and its report read nothing else.

Of a source of more than MAX_ROWS rows evenly spread rows are looked at, of a streamed one its first rows;
``num_looked_at`` says how many.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainer.data.cache import build_once, place_of
from trainer.data.columnfacts import ColumnFacts, column_facts
from trainer.data.hashes import NO_TEXT
from trainer.data.loading import fingerprint, load
from trainer.data.sources import Source
from trainer.data.streaming import StreamedTable
from trainer.data.table import TokenTable

if TYPE_CHECKING:
    from trainer.encoder.text import TextPreparation

MAX_ROWS = 1_000_000
STREAMED_ROWS = 4096  # the first of a streamed source
_VERSION = 8  # of the files: raise it when the same source gives other facts
_MAX_LISTED = 20  # distinct scores or classes that are counted one by one
_SEPARATOR = "\x1f"  # between the texts of a row; no text holds it


@dataclass(frozen=True)
class ScoreFacts:
    """Of the scores, as the loss gets them.

    Attributes:
        min, max: of them.
        quartiles: 25, 50 and 75 %.
        num_distinct: different scores.
        counts: score -> rows, where there are few; else None.
    """

    min: float
    max: float
    quartiles: list[float]
    num_distinct: int
    counts: Optional[dict[str, int]]


@dataclass(frozen=True)
class LabelFacts:
    """Of the class numbers.

    Attributes:
        min, max: of them.
        num_classes: different ones.
        smallest, largest: rows of the smallest and of the largest class.
        num_single: classes with one row.
        pair_share: probability that two rows have the same class.
        counts: class -> rows, where there are few; else None.
    """

    min: int
    max: int
    num_classes: int
    smallest: int
    largest: int
    num_single: int
    pair_share: float
    counts: Optional[dict[str, int]]


@dataclass(frozen=True)
class MarginFacts:
    """Of the margins of a teacher: its score of the positive less that of each negative, or what it gives as margins.

    Attributes:
        min, max: of them.
        is_constant: whether all rows have the same.
    """

    min: float
    max: float
    is_constant: bool


@dataclass(frozen=True)
class SourceFacts:
    """Of a training source.

    Attributes:
        num_rows: that a run uses.
        num_looked_at: rows that the shares and counts below are of.
        num_skipped: bad rows of its files that are left out.
        columns: of the texts, in canonical order.
        num_duplicates: rows that say again what another row says, whatever their group; score and label count.
        clash_share: probability that of two rows the positive of one is a positive of the other too, because they
            share a text; each such pair in a batch is a false negative of a loss with in-batch negatives.
        scores, labels: None where it has none.
        margins: None where its scores are not those of its candidates.
        num_right_negatives: rows with a negative that is the text of their anchor or positive.
    """

    num_rows: int
    num_looked_at: int
    num_skipped: int
    columns: list[ColumnFacts]
    num_duplicates: int
    clash_share: float
    scores: Optional[ScoreFacts]
    labels: Optional[LabelFacts]
    margins: Optional[MarginFacts] = None
    num_right_negatives: int = 0


def source_facts(
    source: Source,
    table: TokenTable | StreamedTable,
    text: TextPreparation,
    cache_dir: Path,
    max_rows: Optional[int] = None,
) -> SourceFacts:
    """Facts of ``source``; the first call counts them, later ones read them from ``cache_dir``.

    Args:
        table: its tokens.
        max_rows: only the first rows count.
    """
    num_rows = min(table.num_rows, max_rows or table.num_rows)
    key = facts_key(fingerprint(source), text.fingerprint, num_rows, isinstance(table, TokenTable))
    facts = cached_facts(cache_dir, key, lambda: asdict(_count(source, table, text, cache_dir, num_rows)))
    return SourceFacts(
        **{
            **facts,
            "columns": [ColumnFacts(**column) for column in facts["columns"]],
            "scores": facts["scores"] and ScoreFacts(**facts["scores"]),
            "labels": facts["labels"] and LabelFacts(**facts["labels"]),
            "margins": facts["margins"] and MarginFacts(**facts["margins"]),
        }
    )


def facts_key(*parts: Any) -> str:
    """Of a cache entry: a hash of all that the facts in it follow from."""
    return hashlib.sha256(json.dumps([_VERSION, MAX_ROWS, *parts]).encode()).hexdigest()[:24]


def cached_facts(cache_dir: Path, key: str, count: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``count`` returned at the first call with this key."""
    folder = place_of(cache_dir, "facts", key)
    build_once(folder, partial(_write, count), verify=True)
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def _write(count: Callable[[], dict[str, Any]], folder: Path) -> None:
    (folder / "facts.json").write_text(json.dumps(count(), ensure_ascii=False), encoding="utf-8")


# -- counting ---------------------------------------------------------------------------------------------


def _count(
    source: Source, table: TokenTable | StreamedTable, text: TextPreparation, cache_dir: Path, num_rows: int
) -> SourceFacts:
    # A tokenizer made for the prompt's language says nothing of the texts behind it.
    of_column = {name: text.of_column(name) for name in table.columns}
    behind = {name: replace(own, prompt=own.prompt + source.prompt_of(name)) for name, own in of_column.items()}
    if isinstance(table, TokenTable):
        before = {name: source.prompt_of(name) for name in table.columns}
        places = np.arange(0, num_rows, math.ceil(num_rows / MAX_ROWS))
        rows = load(source, cache_dir, verify=True).with_format("arrow")  # a start verifies the tokens alone
        chosen = rows[0:num_rows] if len(places) == num_rows else rows[places]
        texts = {name: chosen[name].combine_chunks() for name in table.columns}
        whole: dict[str, Any] = {"score": table.scores, "label": table.labels}
        targets: dict[str, Any] = {name: values[places] for name, values in whole.items() if values is not None}
    else:  # streamed: to read all of it would take as long as an epoch, and its texts are known as pieces alone
        places = np.arange(min(num_rows, STREAMED_ROWS))
        tokenizers: Any = {name: own.tokenizer for name, own in of_column.items()}
        decode = {name: partial(one.batch_decode, skip_special_tokens=True) for name, one in tokenizers.items()}
        before = {name: decode[name]([own.shared])[0] for name, own in behind.items()}
        absent = table.hashes(places) == NO_TEXT
        texts = {
            name: pa.array(decode[name](table.ids(name, places)), pa.large_string(), mask=absent[:, i])
            for i, name in enumerate(table.columns)
        }
        targets = {name: values for name, values in table.targets(places).items() if name != "group"}
    candidate_scores = _candidate_scores(table, targets, places)
    numbers = [*targets.values(), *candidate_scores]
    keys = [*texts.values(), *(pa.array(values).cast(pa.large_string()) for values in numbers)]
    return SourceFacts(
        num_rows=num_rows,
        num_looked_at=len(places),
        num_skipped=getattr(table, "num_skipped", 0),
        columns=[column_facts(name, texts[name], before[name], table, behind[name], places) for name in table.columns],
        num_duplicates=len(places) - pc.count_distinct(joined(keys)).as_py(),
        clash_share=_clash_share(list(texts.values())),
        scores=_scores(targets["score"]) if "score" in targets else None,
        labels=_labels(targets["label"]) if "label" in targets else None,
        margins=_margins(candidate_scores, len(table.columns) - 1),
        num_right_negatives=_num_right_negatives(texts),
    )


def joined(columns: Sequence[pa.Array]) -> pa.Array:
    """One string a row."""
    if len(columns) == 1:
        return columns[0]
    separator = pa.scalar(_SEPARATOR, pa.large_string())
    return pc.binary_join_element_wise(*columns, separator, null_handling="replace", null_replacement="")


def _clash_share(texts: Sequence[pa.Array]) -> float:
    """Share of the ordered pairs of rows with the same anchor or the same positive."""
    num_rows = len(texts[0])
    if num_rows < 2 or len(texts) < 2:
        return 0.0

    def num_pairs(values: pa.Array) -> int:
        counts = pc.value_counts(values).field("counts").to_numpy()
        return int((counts * (counts - 1)).sum())

    anchor, positive = texts[:2]
    clashes = num_pairs(anchor) + num_pairs(positive) - num_pairs(joined([anchor, positive]))
    return clashes / (num_rows * (num_rows - 1))


def _num_right_negatives(texts: Mapping[str, pa.Array]) -> int:
    negatives = [text for name, text in texts.items() if name.startswith("negative")]
    same = [
        pc.fill_null(pc.equal(one, negative), False)
        for name, one in texts.items()
        if name in ("anchor", "positive")
        for negative in negatives
    ]
    return int(np.logical_or.reduce([mask.to_numpy(zero_copy_only=False) for mask in same]).sum()) if same else 0


def _scores(scores: NDArray[np.float32]) -> ScoreFacts:
    distinct, counts = np.unique(scores, return_counts=True)
    few = len(distinct) <= _MAX_LISTED
    return ScoreFacts(
        min=float(distinct[0]),
        max=float(distinct[-1]),
        quartiles=[float(q) for q in np.quantile(scores, (0.25, 0.5, 0.75))],
        num_distinct=len(distinct),
        counts={f"{d:.6g}": int(c) for d, c in zip(distinct, counts, strict=True)} if few else None,
    )


def _candidate_scores(
    table: TokenTable | StreamedTable, targets: Mapping[str, Any], places: NDArray[np.int64]
) -> list[NDArray[np.float32]]:
    """score_1, score_2, ..., or score alone, which a loss takes for the margin of one negative."""
    if isinstance(table, TokenTable) and table.candidate_scores:
        return [values[places] for values in table.candidate_scores]
    return [targets["score"]] if "score" in targets else []


def _margins(scores: Sequence[NDArray[np.float32]], num_candidates: int) -> Optional[MarginFacts]:
    if num_candidates < 2 or len(scores) not in (num_candidates - 1, num_candidates):
        return None
    margins = [scores[0] - other for other in scores[1:]] if len(scores) == num_candidates else scores
    return MarginFacts(
        min=float(min(one.min() for one in margins)),
        max=float(max(one.max() for one in margins)),
        is_constant=all(bool((one == one[0]).all()) for one in margins),
    )


def _labels(labels: NDArray[np.int64]) -> LabelFacts:
    classes, counts = np.unique(labels, return_counts=True)
    few = len(classes) <= _MAX_LISTED
    return LabelFacts(
        min=int(classes[0]),
        max=int(classes[-1]),
        num_classes=len(classes),
        smallest=int(counts.min()),
        largest=int(counts.max()),
        num_single=int(np.count_nonzero(counts == 1)),
        pair_share=float((counts * (counts - 1)).sum() / max(1, len(labels) * (len(labels) - 1))),
        counts={str(k): int(c) for k, c in zip(classes, counts, strict=True)} if few else None,
    )
