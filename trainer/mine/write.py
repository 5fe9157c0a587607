"""Mined negatives as JSON lines that a training source reads, and what is to be said about them.

Shape suffixes: K positives of a chunk's anchors, n negatives of an anchor.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.files import whole_file
from trainer.mine.pairs import Pairs
from trainer.mine.search import Chunk

OutputFormat = Literal["list", "n-tuple", "triplet"]


@dataclass
class Report:
    """What was mined.

    Attributes:
        num_rows: written.
        num_anchors: with how many negatives each -> anchors.
        removed: rule -> candidates that it removed.
        positive_scores, negative_scores, differences: of the rows, float32, a part for each chunk; a difference belongs
            to each written (anchor, positive, negative).
    """

    num_rows: int = 0
    num_anchors: Counter[int] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    positive_scores: list[NDArray[np.float32]] = field(default_factory=list)
    negative_scores: list[NDArray[np.float32]] = field(default_factory=list)
    differences: list[NDArray[np.float32]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A screen of text: similarities, how many anchors got how many, what the rules removed."""
        columns = [np.concatenate(part) for part in (self.positive_scores, self.negative_scores, self.differences)]
        rows = [f"{'similarity':<12}{'positive':>12}{'negative':>12}{'difference':>12}"]
        rows.append(f"{'count':<12}" + "".join(f"{len(values):>12,}" for values in columns))
        measures: dict[str, Any] = {"mean": np.mean, "std": np.std, "min": np.min, "median": np.median, "max": np.max}
        for name, measure in measures.items():
            cells = [f"{measure(values):>12.4f}" if len(values) else f"{'-':>12}" for values in columns]
            rows.append(f"{name:<12}" + "".join(cells))
        found = ", ".join(f"{count:,} with {num}" for num, count in sorted(self.num_anchors.items(), reverse=True))
        rows.append(f"anchors by their negatives: {found}")
        for rule, count in self.removed.items():
            rows.append(f"--{rule} removed {count:,} candidates")
        return rows


class NoRowsError(ValueError):
    """Nothing was mined; ``report`` says why."""

    def __init__(self, report: Report) -> None:
        super().__init__("no row to write")
        self.report = report


def write_rows(
    out: Path,
    chunks: Iterable[Chunk],
    pairs: Pairs,
    rows: pa.Table,
    corpus: pa.Table | None,
    output_format: OutputFormat,
    with_scores: bool,
) -> Report:
    """Write the rows of all chunks; ``out`` appears whole. Keys are anchor, positive and the negatives.

    A row for each (anchor, positive): ``list`` gives all that were found in ``negatives``, ``n-tuple`` gives
    negative_1, negative_2, ... and leaves out rows that lack one; ``triplet`` is a row for each ``negative``.

    Args:
        out: gzipped where it ends so.
        chunks: of the search.
        pairs: their numbers.
        rows: anchor and positive of each pair.
        corpus: the texts of the corpus, if there is one.
        output_format: of the rows.
        with_scores: add ``scores``, similarities to the positive and to each negative, for distillation.

    Raises:
        ValueError: ``out`` can't be written.
        NoRowsError: there is none; what stood at ``out`` before stays.
    """
    report = Report()
    try:
        with ExitStack() as stack:
            file: Any = stack.enter_context(whole_file(out))
            if out.suffix == ".gz":  # without a time: the same negatives are the same bytes
                file = stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0))
            for chunk in chunks:
                for row in _rows(chunk, pairs, rows, corpus, output_format, with_scores, report):
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    report.num_rows += 1
            if not report.num_rows:
                raise NoRowsError(report)
    except OSError as error:
        raise ValueError(f"{out} can't be written: {error.strerror}; the same command writes it again") from error
    return report


def _rows(
    chunk: Chunk,
    pairs: Pairs,
    rows: pa.Table,
    corpus: pa.Table | None,
    output_format: OutputFormat,
    with_scores: bool,
    report: Report,
) -> Iterator[dict[str, Any]]:
    negatives, here = chunk.negatives, pairs.positives_of(chunk.anchors)
    is_found = np.isfinite(negatives.scores_Qn)
    report.num_anchors.update(is_found.sum(axis=1).tolist())
    report.removed.update(negatives.removed)
    texts = iter(_documents(pairs.places_M[negatives.ids_Qn[is_found]], rows, corpus))
    found = [[next(texts) for _ in range(num)] for num in is_found.sum(axis=1).tolist()]
    pairs_K = pa.array(pairs.pairs_K[here])
    anchors, positives = (rows[name].take(pairs_K).to_pylist() for name in ("anchor", "positive"))
    query_K = pairs.query_of_positives(chunk.anchors).tolist()
    written_K = np.zeros(len(query_K), dtype=bool)
    for k, (query, positive_score) in enumerate(zip(query_K, chunk.positive_scores_K.tolist(), strict=True)):
        if not found[query] or (output_format == "n-tuple" and len(found[query]) < is_found.shape[1]):
            continue
        written_K[k] = True
        base = {"anchor": anchors[k], "positive": positives[k]}
        scores = negatives.scores_Qn[query][is_found[query]].tolist()
        if output_format == "triplet":
            for text, score in zip(found[query], scores, strict=True):
                yield {**base, "negative": text, **({"scores": [positive_score, score]} if with_scores else {})}
            continue
        if output_format == "n-tuple":
            row = {**base, **{f"negative_{i}": text for i, text in enumerate(found[query], 1)}}
        else:
            row = {**base, "negatives": found[query]}
        yield {**row, **({"scores": [positive_score, *scores]} if with_scores else {})}
    scores_Kn = np.where(written_K[:, None], negatives.scores_Qn[query_K], -np.inf)
    kept = np.isfinite(scores_Kn)
    report.positive_scores.append(chunk.positive_scores_K)
    report.negative_scores.append(scores_Kn[kept])
    report.differences.append((chunk.positive_scores_K[:, None] - scores_Kn)[kept])


def _documents(places: NDArray[np.int64], rows: pa.Table, corpus: pa.Table | None) -> list[str]:
    """Texts of documents, whose places count the corpus first, then the positives of the pairs."""
    num_corpus = 0 if corpus is None else len(corpus)
    in_corpus = places < num_corpus
    texts = np.empty(len(places), dtype=object)
    if corpus is not None:
        texts[in_corpus] = corpus["text"].take(pa.array(places[in_corpus])).to_pylist()
    texts[~in_corpus] = rows["positive"].take(pa.array(places[~in_corpus] - num_corpus)).to_pylist()
    return texts.tolist()
