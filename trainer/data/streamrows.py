"""What streams of both kinds, with an index and without, do to rows they have just read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from trainer.data.checks import BadRows
from trainer.data.hashes import NO_TEXT, hash_tokens

if TYPE_CHECKING:
    from trainer.data.sources import Source
    from trainer.encoder.text import TextPreparation


@dataclass(frozen=True)
class ColumnTokens:
    """The texts of a column as pieces.

    Attributes:
        ids: pieces of all texts, one behind the other, int32.
        lengths: pieces of each text, int64.
        is_absent: whether a row has no text here, bool; a placeholder stands in its place.
        hash_seed: of their hashes.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    is_absent: NDArray[np.bool_]
    hash_seed: int = 0

    def hashes(self) -> NDArray[np.int64]:
        """Of each text; NO_TEXT where there is none."""
        return np.where(self.is_absent, NO_TEXT, hash_tokens(self.ids, self.lengths, self.hash_seed))


def tokenize_column(source: Source, name: str, texts: Sequence[str | None], text: TextPreparation) -> ColumnTokens:
    """The texts of a column of ``source`` behind its prompt."""
    own = text.of_column(name)
    ids = own(source.prompted(name, [one or "" for one in texts]))
    is_absent = np.fromiter((one is None for one in texts), bool, len(texts))
    for place in np.flatnonzero(is_absent).tolist():
        ids[place] = text.no_text
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
    return ColumnTokens(flat, lengths, is_absent, own.hash_seed)


class StreamedBadRows(BadRows):
    """Refuses bad rows; none can be skipped, for nobody knows the rows behind them."""

    def _refuse(self, count: str) -> NoReturn:
        quoted = "\n".join(self.first)
        raise ValueError(
            f"{quoted}\n{self.source.path}: {count} among those just read; mend them, or set streaming: false"
            f"{self._scale_remedy()}"
        )
