"""Facts of the texts of a column, against plain Python over the same rows."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from trainer.data.facts import source_facts
from trainer.data.sources import Source
from trainer.data.streaming import StreamedTable
from trainer.data.tokens import tokenize
from trainer.encoder import EncoderSpec
from trainer.encoder.text import load_text_preparation

COLUMNS = {"anchor": "a", "positive": "b"}
WORDS = ["the", "cat", "bought", "a", "ring", "in", "garden", "고양이", "漢字", "שלום"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """Few words, so that texts repeat."""
    rng = random.Random(3)
    return [{name: " ".join(rng.choices(WORDS, k=rng.choice([1, 1, 2, 9]))) for name in "ab"} for _ in range(180)]


def test_texts(rows: list[dict[str, str]], tiny_encoder: Path, tmp_path: Path) -> None:
    text = load_text_preparation(EncoderSpec(str(tiny_encoder), max_length=12))
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    source = Source(str(tmp_path / "train.parquet"), COLUMNS)
    facts = source_facts(source, tokenize(source, text, tmp_path), text, tmp_path)
    for column, key in zip(facts.columns, "ab", strict=True):
        ids = text([row[key] for row in rows])
        lengths = [len(i) for i in ids]
        assert (column.min, column.max) == (min(lengths), max(lengths))
        assert column.median == int(statistics.median(lengths))
        assert sum(column.histogram) == 180
        unknown = sum(i == text.tokenizer.unk_token_id for one in ids for i in one)
        assert 0 < column.unknown_share == pytest.approx(unknown / (sum(lengths) - 2 * 180))
        assert column.num_distinct == len({row[key] for row in rows})
        assert column.num_truncated > 0
        whole = [row[key] for row, length in zip(rows, lengths, strict=True) if length < 12]
        letters = Counter("".join(whole).replace(" ", ""))
        pieces = sum(length - 2 for length in lengths if length < 12)
        assert column.pieces_per_character == pytest.approx(pieces / letters.total())
        korean = sum(letters[c] for c in "고양이") / letters.total()
        assert column.scripts["Hangul"] == pytest.approx(korean)
        assert set(column.scripts) == {"Latin", "Hangul", "Han", "Hebrew"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("of_source", ["", "passage: the cat 漢 "])
@pytest.mark.parametrize("of_encoder", ["", "query: the ring in the garden "])
def test_prompts_are_no_part_of_the_texts(
    of_encoder: str, of_source: str, streaming: bool, rows: list[dict[str, str]], tiny_encoder: Path, tmp_path: Path
) -> None:
    """What a tokenizer makes of the texts is the same behind any prompt."""
    path = tmp_path / "train.parquet"
    pd.DataFrame(rows).to_parquet(path)
    plain = load_text_preparation(EncoderSpec(str(tiny_encoder), max_length=64))
    prompted = replace(plain, prompt=of_encoder)
    prompts = {"anchor": of_source} if of_source else None
    found = []
    for text, source in (
        (plain, Source(str(path), COLUMNS, streaming=streaming)),
        (prompted, Source(str(path), COLUMNS, streaming=streaming, prompts=prompts)),
    ):
        table = StreamedTable(source, text, tmp_path) if streaming else tokenize(source, text, tmp_path)
        found.append(source_facts(source, table, text, tmp_path))
    for with_prompt, without in zip(found[1].columns, found[0].columns, strict=True):
        assert with_prompt.unknown_share == pytest.approx(without.unknown_share) != 0
        assert with_prompt.pieces_per_character == pytest.approx(without.pieces_per_character)
        assert with_prompt.scripts == pytest.approx(without.scripts)
