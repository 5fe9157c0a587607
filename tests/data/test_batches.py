"""How the rows of a step are dealt to the ranks."""

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.data.batches import share_rows
from trainer.data.order import split_rows
from trainer.data.sources import Source
from trainer.data.table import TokenTable
from trainer.data.tokens import tokenize
from trainer.encoder import EncoderSpec
from trainer.encoder.text import load_text_preparation


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> TokenTable:
    folder = tmp_path_factory.mktemp("lengths")
    lengths = np.random.default_rng(0).integers(1, 40, (200, 2))
    lines = [json.dumps({"anchor": "cat " * int(a), "positive": "dog " * int(b)}) for a, b in lengths]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = load_text_preparation(EncoderSpec(str(tiny_encoder), max_length=64))
    return tokenize(
        Source(str(folder / "train.jsonl"), {"anchor": "anchor", "positive": "positive"}), text, folder / "cache"
    )


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 64, 97])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_get_equal_numbers_of_rows_and_about_equal_tokens(
    table: TokenTable, num_rows: int, num_ranks: int
) -> None:
    """Each row goes to one rank; rows per rank are those of equal slices, and no two ranks of equally many rows differ
    by more tokens than the longest row has over the shortest."""
    rows = np.random.default_rng(num_rows).permutation(table.num_rows)[:num_rows]
    shares = share_rows(rows, table, num_ranks)
    assert tuple(len(share) for share in shares) == split_rows(num_rows, num_ranks)
    assert sorted(np.concatenate(shares)) == sorted(rows)
    tokens = sum(np.array([len(ids) for ids in table.ids(column, rows)]) for column in table.columns)
    spread = tokens.max() - tokens.min()
    totals = [int(tokens[np.isin(rows, share)].sum()) for share in shares]
    for size in {len(share) for share in shares}:
        equal = [total for total, share in zip(totals, shares, strict=True) if len(share) == size]
        assert max(equal) - min(equal) <= spread
    if num_ranks == 1:
        assert shares[0].tolist() == rows.tolist(), "one rank keeps the order of the step"
