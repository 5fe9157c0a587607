"""What is true of the texts of one column: their pieces, scripts and repetitions."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainer.data.streaming import StreamedTable
from trainer.data.table import TokenTable

if TYPE_CHECKING:
    from trainer.encoder.text import TextPreparation

CHUNK_ROWS = 50_000  # rows whose texts or ids are in memory at once
_SCRIPT_TEXTS = 2000
_BINS = 16


@dataclass(frozen=True)
class ColumnFacts:
    """Of one text column.

    Attributes:
        name: canonical.
        num_texts: rows that have a text here; the numbers below are of these.
        min, median, p95, max: pieces of a text, special tokens included.
        histogram: texts in bins of equal width between 0 and ``max`` pieces.
        num_truncated: texts that lose their end; where not all rows are looked at, that fill max_length.
        unknown_share: of the pieces without special tokens and prompt, those that stand for characters that the
            tokenizer lacks.
        pieces_per_character: of a sample of whole texts, blanks and prompt not counted.
        scripts: script -> share of the letters of that sample without the prompt, the largest first.
        num_distinct: different texts.
        max_length: pieces that are kept of a text.
    """

    name: str
    num_texts: int
    min: int
    median: int
    p95: int
    max: int
    histogram: list[int]
    num_truncated: int
    unknown_share: float
    pieces_per_character: float
    scripts: dict[str, float]
    num_distinct: int
    max_length: int


def column_facts(
    name: str,
    texts: pa.Array,
    before: str,
    table: TokenTable | StreamedTable,
    text: TextPreparation,
    places: NDArray[np.int64],
) -> ColumnFacts:
    """Facts of the texts of some rows, null where a row has none.

    Args:
        before: the part of its prompt that each of ``texts`` begins with.
        table: its tokens.
        text: how these were made, with all of the prompt.
        places: of the rows in the table.
    """
    places, texts = places[texts.is_valid().to_numpy(zero_copy_only=False)], texts.drop_null()
    if not len(places):
        return ColumnFacts(name, 0, 0, 0, 0, 0, [0] * _BINS, 0, 0.0, 0.0, {}, 0, text.max_length)
    unknown_id, num_unknown = text.tokenizer.unk_token_id, 0
    parts = []
    for start in range(0, len(places), CHUNK_ROWS):
        ids = table.ids(name, places[start : start + CHUNK_ROWS])
        parts.append(np.fromiter(map(len, ids), np.int64, len(ids)))
        if unknown_id is not None:
            num_unknown += int(np.count_nonzero(np.concatenate(ids) == unknown_id))
    lengths = np.concatenate(parts)
    num_unknown = max(0, num_unknown - len(lengths) * text.shared.count(unknown_id))
    own_lengths = np.maximum(lengths - text.shortest, 0)
    whole = np.flatnonzero(lengths < text.max_length)
    num_full = len(lengths) - len(whole)
    sample = whole if len(whole) else np.arange(len(lengths))
    sample = sample[:: math.ceil(len(sample) / _SCRIPT_TEXTS)]  # the same at every call
    codes = np.frombuffer("".join(texts.take(pa.array(sample)).to_pylist()).encode("utf-32-le"), dtype="<u4")
    distinct, counts = np.unique(codes, return_counts=True)
    letters = Counter({chr(code): int(count) for code, count in zip(distinct, counts, strict=True)})
    letters.subtract({letter: count * len(sample) for letter, count in Counter(before).items()})
    letters = +letters
    num_characters = sum(count for letter, count in letters.items() if not letter.isspace())
    return ColumnFacts(
        name=name,
        num_texts=len(places),
        min=int(lengths.min()),
        median=int(np.median(lengths)),
        p95=int(np.quantile(lengths, 0.95)),
        max=int(lengths.max()),
        histogram=np.histogram(lengths, bins=_BINS, range=(0, int(lengths.max())))[0].tolist(),
        num_truncated=min(num_full, table.num_truncated(name)) if isinstance(table, TokenTable) else num_full,
        unknown_share=num_unknown / max(1, int(own_lengths.sum())),
        pieces_per_character=int(own_lengths[sample].sum()) / max(1, num_characters),
        scripts=_scripts(letters),
        num_distinct=pc.count_distinct(texts).as_py(),
        max_length=text.max_length,
    )


def _scripts(letters: Mapping[str, int]) -> dict[str, float]:
    """Script -> share of the letters, by the first word of each letter's Unicode name; under 1 % is left out."""
    found: Counter[str] = Counter()
    for letter, count in letters.items():
        if unicodedata.category(letter).startswith("L"):
            words = unicodedata.name(letter, "UNNAMED").replace("-", " ").split()
            word = words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH") else words[0]
            found["Han" if word == "CJK" else word.capitalize()] += count
    return {script: count / found.total() for script, count in found.most_common() if count >= 0.01 * found.total()}
