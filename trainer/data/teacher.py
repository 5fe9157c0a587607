"""A teacher's embeddings of a source, read in place; light to import, for loader workers do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.table import TokenTable


class TeacherTable:
    """Embeddings of the texts of N rows, memory-mapped; each distinct text is embedded and stored once.

    Attributes:
        folder: of ``embeddings.float32``, (num_texts, D), in the order of the numbers of the texts.
        tokens: of the same texts, for the teacher's tokenizer; it knows which texts a row has.
        num_texts: distinct ones.
    """

    def __init__(self, folder: Path, tokens: TokenTable) -> None:
        self.folder = folder
        self.tokens = tokens
        self.num_texts = len(tokens.distinct_texts())
        values: NDArray[np.float32] = np.memmap(folder / "embeddings.float32", np.float32, "r")
        self._embeddings = np.asarray(values).reshape(self.num_texts, -1)

    def __reduce__(self) -> tuple[type[TeacherTable], tuple[Path, TokenTable]]:
        return TeacherTable, (self.folder, self.tokens)  # another process maps the files itself

    def embeddings(self, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Of the texts of ``rows``, (B, C, D), in the order of the columns."""
        texts = np.stack([self.tokens.text_ids(column)[rows] for column in self.tokens.columns], axis=1)
        return self._embeddings[texts]
