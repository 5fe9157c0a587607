"""Token ids of a source, made once and memory-mapped: no text is tokenised while a model trains.

A table is a folder: ``tokens.arrow`` (one record batch: a large_list<int32> per text column, score, label),
``used_ids.npy`` and ``report.json``. Ranks and loader workers map the same file and share its pages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from trainer.data.cache import build_once
from trainer.data.order import Permutation
from trainer.data.sources import Source, fingerprint, load, num_skipped
from trainer.interruption import received, shielded, stop_if_asked

if TYPE_CHECKING:
    from trainer.encoder.text import TextPreparation

logger = logging.getLogger(__name__)

_VERSION = 1  # of the files: raise it when the same source and tokenizer give another folder
_SPAN = 2000  # texts per task
_TEXTS_PER_PROCESS = 20_000  # fewer are tokenised before another process has started

# Column, first row, first row behind.
_Span = tuple[str, int, int]
# Ids of all texts of a span, pieces per text, texts that were cut.
_Tokens = tuple[NDArray[np.int32], NDArray[np.int32], int]


class TokenTable:
    """Token ids and targets of N rows, read in place from a memory-mapped file.

    Attributes:
        num_rows: N.
        columns: the text columns, in canonical order.
        labels: class numbers, int64 (N,), or None.
        scores: float32 (N,), or None.
        num_skipped: bad rows of the source that were left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        batch = pa.ipc.open_file(pa.memory_map(str(folder / "tokens.arrow"))).get_batch(0)
        report = json.loads((folder / "report.json").read_text())
        self.num_rows: int = batch.num_rows
        self.num_skipped: int = report["num_skipped"]
        self._num_truncated: dict[str, int] = report["num_truncated"]
        self.columns = tuple(self._num_truncated)
        self._values = {c: batch.column(c).values.to_numpy(zero_copy_only=True) for c in self.columns}
        self._offsets = {c: batch.column(c).offsets.to_numpy(zero_copy_only=True) for c in self.columns}
        targets = {c: batch.column(c).to_numpy() for c in ("label", "score") if c in batch.schema.names}
        self.labels: NDArray[np.int64] | None = targets.get("label")
        self.scores: NDArray[np.float32] | None = targets.get("score")

    def __reduce__(self) -> tuple[type[TokenTable], tuple[Path]]:
        return TokenTable, (self.folder,)  # another process maps the file itself

    def ids(self, column: str, rows: NDArray[np.integer]) -> list[NDArray[np.int32]]:
        """Token ids of the texts of ``rows``: read-only views into the file, one (length,) array per row."""
        values, offsets = self._values[column], self._offsets[column]
        starts, stops = offsets[rows].tolist(), offsets[rows + 1].tolist()
        return [values[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def targets(self, rows: NDArray[np.integer]) -> dict[str, NDArray[np.generic]]:
        """What the rows have of label (int64) and score (float32): name -> one value per row."""
        targets = {"label": self.labels, "score": self.scores}
        return {name: values[rows] for name, values in targets.items() if values is not None}

    def shuffle(self, max_rows: int | None) -> Permutation:
        """The order of its rows, or of the first ``max_rows`` of them."""
        return Permutation(min(self.num_rows, max_rows or self.num_rows))

    def lengths(self, column: str) -> NDArray[np.int32]:
        """Pieces of each text, special tokens included: (N,)."""
        return np.diff(self._offsets[column]).astype(np.int32)

    def num_truncated(self, column: str) -> int:
        """Texts that were longer than the encoder's max_length and lost their end."""
        return self._num_truncated[column]

    def used_ids(self) -> NDArray[np.int64]:
        """Ids that any text of the table uses, ascending."""
        return np.load(self.folder / "used_ids.npy")


def tokenize(source: Source, text: TextPreparation, cache_dir: Path) -> TokenTable:
    """The token table of ``source``; the first call builds it in ``cache_dir``, a large one on all cores.

    Raises:
        ValueError: as ``load``, or a text without a single token.
    """
    key = hashlib.sha256(f"{_VERSION} {fingerprint(source)} {text.fingerprint}".encode()).hexdigest()[:24]
    folder = Path(cache_dir) / "tokens" / key
    build_once(folder, partial(_build, source, text, Path(cache_dir)))
    return TokenTable(folder)


def _build(source: Source, text: TextPreparation, cache_dir: Path, folder: Path) -> None:
    rows = load(source, cache_dir)
    lengths: dict[str, list[NDArray[np.int32]]] = {c: [] for c in source.text_columns}
    num_truncated = dict.fromkeys(source.text_columns, 0)
    spans = [(c, i, min(i + _SPAN, len(rows))) for c in source.text_columns for i in range(0, len(rows), _SPAN)]
    with ExitStack() as stack:
        # The ids may be larger than memory: they go to a plain file first, and Arrow maps that.
        raw = {c: stack.enter_context((folder / f"{c}.raw").open("wb")) for c in source.text_columns}
        for (column, start, _), (ids, pieces, cut) in zip(spans, _tokenize_spans(rows, text, spans), strict=True):
            if not pieces.all():
                row = start + int(np.argmin(pieces))
                raise ValueError(f"{source.path}: column '{column}', row {row + 1}: the text has no token")
            raw[column].write(ids.tobytes())
            lengths[column].append(pieces)
            num_truncated[column] += cut
    _write(rows, {c: np.concatenate(parts) for c, parts in lengths.items()}, folder)
    report = {"num_truncated": num_truncated, "num_skipped": num_skipped(source, cache_dir)}
    (folder / "report.json").write_text(json.dumps(report))


def _write(rows: Dataset, lengths: dict[str, NDArray[np.int32]], folder: Path) -> None:
    arrays: dict[str, pa.Array] = {}
    used = np.zeros(1, dtype=bool)
    for column, pieces in lengths.items():
        offsets = np.concatenate([[0], np.cumsum(pieces, dtype=np.int64)])
        values = np.memmap(folder / f"{column}.raw", dtype=np.int32, mode="r")
        assert len(values) == offsets[-1], (column, len(values), offsets[-1])
        used = np.pad(used, (0, max(0, int(values.max()) + 1 - len(used))))
        used[values] = True
        flat = pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
        arrays[column] = pa.LargeListArray.from_arrays(pa.array(offsets), flat)
    for target in ("score", "label"):
        if target in rows.column_names:
            arrays[target] = rows.with_format("arrow")[target].combine_chunks()
    batch = pa.record_batch(list(arrays.values()), names=list(arrays))
    with pa.OSFile(str(folder / "tokens.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    np.save(folder / "used_ids.npy", np.flatnonzero(used))
    for column in lengths:
        (folder / f"{column}.raw").unlink()


def _tokenize_spans(rows: Dataset, text: TextPreparation, spans: list[_Span]) -> Iterator[_Tokens]:
    """Tokens of the spans, in their order.

    Processes instead of the tokenizer's own threads: with those, turning the result into Python lists stays
    on one core and takes longer than the threads save.
    """
    num_texts = sum(stop - start for _, start, stop in spans)
    num_processes = min(_num_cores(), num_texts // _TEXTS_PER_PROCESS)
    if num_processes < 2:
        for span in spans:
            yield _tokenize_span(rows, text, span)
        return
    logger.info("Tokenising %d texts with %d processes", num_texts, num_processes)
    with ProcessPoolExecutor(num_processes, worker_context(), _start_worker, (rows, text)) as pool:
        with shielded():
            results = pool.map(_work, spans)
        for result in results:
            if received():
                pool.shutdown(cancel_futures=True)
                stop_if_asked()
            yield result


def worker_context() -> SpawnContext:
    """How worker processes start: as new interpreters, never by a fork of this one.

    Torch, gloo and loggers keep threads. A fork while one of them holds CPython's list of threads leaves a child that
    waits for ever before its first line (seen in 1 of 8 starts of two ranks with two workers each). A fork server
    would start faster, but it and its children outlive a parent that is killed.
    """
    return multiprocessing.get_context("spawn")


def _num_cores() -> int:
    """Cores that this process may use: Slurm often gives fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenize_span(rows: Dataset, text: TextPreparation, span: _Span) -> _Tokens:
    column, start, stop = span
    texts: list[str] = rows.with_format("arrow")[start:stop][column].to_pylist()
    ids = text(texts)
    pieces = np.fromiter(map(len, ids), np.int32, len(ids))
    flat = np.fromiter(chain.from_iterable(ids), np.int32, int(pieces.sum()))
    # Only a text that fills max_length may have been cut: ask whether one more place would be filled too.
    full = [texts[i] for i in np.flatnonzero(pieces >= text.max_length)]
    longer = replace(text, max_length=text.max_length + 1)
    cut = sum(len(t) > text.max_length for t in longer(full)) if full else 0
    return flat, pieces, cut


# Of a worker process: what all its spans share.
_shared: tuple[Dataset, TextPreparation] | None = None


def _start_worker(rows: Dataset, text: TextPreparation) -> None:
    global _shared
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
    _shared = rows, text


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone: a killed parent can't say so, and the queue stays open."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(span: _Span) -> _Tokens:
    assert _shared is not None
    return _tokenize_span(*_shared, span)
