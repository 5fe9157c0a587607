"""Token ids and targets of a source, memory-mapped.

A table is a folder of plain arrays whose suffix is their type. ``ids.int32`` holds the pieces of the distinct texts,
one behind the other, ``offsets.int64`` where each begins, ``hashes.int64`` a hash of each, and a file per text column
which of them each row has (``anchor.int64``): a text that repeats is tokenised and stored once. ``score.float32``,
``label.int64`` and ``group.int64`` are the targets, ``used_ids.npy`` the pieces that occur (those of documents with an
encoder of their own in ``used_document_ids.npy``). Where rows may lack texts, text 0 stands in their place. Ranks and
loader workers map the same files and share their pages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.collate import TokenSpans
from trainer.data.parts import Permutation

USED_IDS = {"query": "used_ids.npy", "document": "used_document_ids.npy"}


class TokenTable:
    """Token ids and targets of N rows, read in place from memory-mapped files.

    Attributes:
        num_rows: N.
        columns: the text columns, in canonical order.
        labels: class numbers, int64 (N,), or None.
        scores: float32 (N,), or None.
        num_skipped: bad rows of the source that were left out.
        may_lack_texts: whether a row may have no text in some column.
        has_towers: whether documents have pieces of their own, for another encoder than that of the anchors.
        candidate_scores: of each candidate, float32 (N,), or none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        self.num_rows: int = report["num_rows"]
        self.num_skipped: int = report["num_skipped"]
        self._num_truncated: dict[str, int] = report["num_truncated"]
        self.columns = tuple(self._num_truncated)
        self._values: NDArray[np.int32] = map_array(folder / "ids.int32")
        self._offsets: NDArray[np.int64] = map_array(folder / "offsets.int64")
        self._hashes: NDArray[np.int64] = map_array(folder / "hashes.int64")
        self.may_lack_texts: bool = report["may_lack_texts"]
        self.has_towers: bool = report["has_towers"]
        self._text_ids: dict[str, NDArray[np.int64]] = {c: map_array(folder / f"{c}.int64") for c in self.columns}
        files = [folder / name for name in ("label.int64", "score.float32", "group.int64")]
        self._targets: dict[str, NDArray[Any]] = {file.stem: map_array(file) for file in files if file.exists()}
        self.labels: NDArray[np.int64] | None = self._targets.get("label")
        self.scores: NDArray[np.float32] | None = self._targets.get("score")
        names = [f"score_{number + 1}" for number in range(report["num_candidate_scores"])]
        self.candidate_scores = [map_array(folder / f"{name}.float32") for name in names]

    def __reduce__(self) -> tuple[type[TokenTable], tuple[Path]]:
        return TokenTable, (self.folder,)  # another process maps the files itself

    def ids(self, column: str, rows: NDArray[np.integer]) -> TokenSpans:
        """Token ids of the texts of ``rows``: a sequence of read-only views into the file, (length,) int32 per row.

        Where a row has no text, those of an empty one.
        """
        texts = self._text_ids[column][rows]
        starts = self._offsets[texts]
        return TokenSpans(self._values, starts, self._offsets[texts + 1] - starts)

    def num_tokens(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Pieces of all texts of each row, (B,)."""
        return np.stack([self.ids(column, rows).lengths_S for column in self.columns]).sum(axis=0)

    def targets(self, rows: NDArray[np.integer]) -> dict[str, NDArray[np.generic]]:
        """What the rows have of label, group (int64) and score (float32): name -> one value per row."""
        return {name: values[rows] for name, values in self._targets.items()}

    def hashes(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Hash of each text of ``rows``, (B, C): equal where the pieces are; NO_TEXT where a row has none."""
        return np.stack([self._hashes[texts[rows]] for texts in self._text_ids.values()], axis=1)

    def shuffle(self, max_rows: int | None) -> Permutation:
        """The order of its rows, or of the first ``max_rows`` of them."""
        return Permutation(min(self.num_rows, max_rows or self.num_rows))

    def lengths(self, column: str) -> NDArray[np.int32]:
        """Pieces of each text, special tokens included: (N,)."""
        return np.diff(self._offsets).astype(np.int32)[self._text_ids[column]]

    def text_ids(self, column: str) -> NDArray[np.int64]:
        """Number of each row's text, (N,), over all columns: rows with the same number have the same text.

        Where rows may lack texts, 0 is that of none. The reverse holds among some million neighbouring rows, and
        columns of one max_length: beyond that a text may get a second number.
        """
        return self._text_ids[column]

    def distinct_texts(self) -> TokenSpans:
        """Token ids of all distinct texts, in the order of their numbers."""
        return TokenSpans(self._values, self._offsets[:-1], np.diff(self._offsets))

    def num_truncated(self, column: str) -> int:
        """Texts that were longer than the encoder's max_length and lost their end."""
        return self._num_truncated[column]

    def used_ids(self, tower: str = "query") -> NDArray[np.int64]:
        """Ids that any text of the table uses, ascending; where it has towers, any text of that one."""
        return np.load(self.folder / USED_IDS[tower])


def map_array(path: Path) -> NDArray[Any]:
    """The file in place, read-only; its suffix is its type."""
    return np.asarray(np.memmap(path, dtype=path.suffix[1:], mode="r"))
