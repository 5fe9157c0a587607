"""What an evaluator of the user may give as a metric, on one and on two ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from tests.evaluation.test_sharded import MAX_TOKENS, Recorder, Set, make_rows
from tests.two_ranks import TwoRanks, message_of
from trainer.distributed import gather
from trainer.encoder import Encoder, EncoderSpec
from trainer.evaluation import Evaluator
from trainer.evaluation.base import Rows, cosine
from trainer.evaluation.scoring import Observe, evaluate
from trainer.evaluation.sharded import TokenizedSet

KINDS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda cosines_B: cosines_B.numpy().mean(),
    "numpy_0d": lambda cosines_B: np.asarray(cosines_B.numpy().mean()),
    "tensor": lambda cosines_B: cosines_B.mean(),
    "python": lambda cosines_B: float(cosines_B.mean()),
    "many": lambda cosines_B: cosines_B,
    "none": lambda cosines_B: None,
}
NO_MAPPING = "a bare number"


class MeanCosine(Evaluator):
    """Of a user: whatever its arithmetic leaves."""

    columns = text_columns = ("anchor", "positive")
    primary = "mean"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, Any]:
        cosines_B = cosine(*self.split(embeddings_ND, rows))
        if self.kind == NO_MAPPING:
            return float(cosines_B.mean())  # type: ignore[return-value]
        return {"mean": KINDS[self.kind](cosines_B)}


def refuse_to_observe(one: TokenizedSet, embeddings_UD: Tensor, text_N: Tensor) -> None:
    raise ValueError(f"{one.name}: {len(text_N)} texts can't be observed")


def run(folder: Path, texts: list[str], kind: str, observe: Observe | None = None) -> dict[str, float]:
    encoder = Encoder(EncoderSpec(str(folder), compact_vocabulary="off"), max_tokens=MAX_TOKENS).eval()
    one = Set("dev", make_rows(texts[:50], 20), MeanCosine(kind), encoder.text)
    return evaluate(Recorder(encoder), [one], gather.rank(), gather.world_size(), MAX_TOKENS, None, observe)  # type: ignore[list-item]


@pytest.mark.parametrize("kind", ["numpy", "numpy_0d", "tensor", "python"])
def test_any_single_number_becomes_a_float(tiny_encoder: Path, demo_texts: list[str], kind: str) -> None:
    """metrics.jsonl and metrics.json are JSON, which knows no np.float32."""
    rows = make_rows(demo_texts[:50], 20)
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    pairs = [torch.nn.functional.normalize(torch.tensor(model.encode(rows[c][:])), dim=-1) for c in MeanCosine.columns]
    found = run(tiny_encoder, demo_texts, kind)
    assert json.loads(json.dumps(found)) == {"eval/dev/mean": pytest.approx(float((pairs[0] * pairs[1]).sum(1).mean()))}


@pytest.mark.parametrize(("kind", "type_name"), [("many", "Tensor"), ("none", "NoneType")])
def test_what_is_no_number_is_named(
    two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str], kind: str, type_name: str
) -> None:
    message = f"dev: MeanCosine gives {type_name} for the metric mean, which is no single number; return a float"
    with pytest.raises(ValueError, match=message):
        run(tiny_encoder, demo_texts, kind)
    assert all(message in said for said in two_ranks(message_of, run, tiny_encoder, demo_texts, kind))


def test_what_is_no_mapping_is_named(tiny_encoder: Path, demo_texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"dev: score\(\) of MeanCosine gives float; return a dict, metric -> float"):
        run(tiny_encoder, demo_texts, NO_MAPPING)


def test_no_rank_waits_for_one_that_fails_to_observe(
    two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str]
) -> None:
    said = two_ranks(message_of, run, tiny_encoder, demo_texts, "python", refuse_to_observe)
    assert said == ["dev: 40 texts can't be observed"] * 2


def test_a_primary_that_the_score_does_not_return_is_refused(tiny_encoder: Path, demo_texts: list[str]) -> None:
    class Misnamed(MeanCosine):
        primary = "average"

    encoder = Encoder(EncoderSpec(str(tiny_encoder), compact_vocabulary="off"), max_tokens=MAX_TOKENS).eval()
    one = Set("dev", make_rows(demo_texts[:50], 20), Misnamed("python"), encoder.text)
    with pytest.raises(ValueError, match=r"dev: primary of Misnamed is 'average', but its score returns mean"):
        evaluate(Recorder(encoder), [one], 0, 1, MAX_TOKENS)  # type: ignore[list-item]


def test_embeddings_of_other_texts_are_not_split_by_column(tiny_encoder: Path, demo_texts: list[str]) -> None:
    class Distinct(MeanCosine):
        def texts(self, rows: Rows) -> list[str]:
            return [*rows["anchor"], rows["positive"][0]]

    encoder = Encoder(EncoderSpec(str(tiny_encoder), compact_vocabulary="off"), max_tokens=MAX_TOKENS).eval()
    one = Set("dev", make_rows(demo_texts[:50], 20), Distinct("python"), encoder.text)
    message = (
        "Distinct.split got 21 embeddings, but 20 rows of text_columns anchor, positive have 40 texts: give it all "
        "that score() got, or, where Distinct.texts gives others, take them apart in score() as texts() lays them out"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(Recorder(encoder), [one], 0, 1, MAX_TOKENS)  # type: ignore[list-item]
