"""Sharded evaluation: every text once, the same metrics on any number of ranks, no rank left waiting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor

from tests.two_ranks import TwoRanks
from trainer.batch import PackedBatch
from trainer.distributed import gather
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.text import TextPreparation
from trainer.evaluation import STS, Evaluator, Triplet
from trainer.evaluation.scoring import evaluate
from trainer.evaluation.sharded import tokenize_set

MAX_TOKENS = 60  # small, so that a few dozen texts take several rounds


@dataclass
class Set:
    name: str
    rows: Dataset
    evaluator: Evaluator
    text: TextPreparation
    suite: str = ""
    teacher: EncoderSpec | None = None
    teacher_prompt: str = ""


@dataclass
class Recorder:
    """Embeds with a real encoder and remembers the texts it saw."""

    encoder: Encoder
    bad: float | None = None

    def __post_init__(self) -> None:
        self.seen: list[list[tuple[int, ...]]] = []

    def __call__(self, batch: PackedBatch) -> Tensor:
        segments = torch.split(batch.input_ids_T, list(batch.lengths))
        self.seen.append([tuple(segment.tolist()) for segment in segments])
        embeddings = self.encoder.embed(batch)
        if self.bad is not None:
            embeddings[0, 0] = self.bad
        return embeddings


def make_rows(texts: list[str], num_rows: int) -> Dataset:
    """Rows in which texts come back in other rows and columns."""
    rng = np.random.default_rng(1)
    pick = lambda: [texts[i] for i in rng.integers(0, len(texts), num_rows)]  # noqa: E731
    return Dataset.from_dict(
        {
            "anchor": pick(),
            "positive": pick(),
            "negative": pick(),
            "score": rng.uniform(size=num_rows).tolist(),
        }
    )


def run(
    folder: Path, rows: dict[str, list], evaluators: list[Evaluator], bad: float | None = None
) -> tuple[dict[str, float] | str, list[list[tuple[int, ...]]]]:
    """Runs on each rank: metrics, or the text of the ValueError, and the texts of each forward."""
    encoder = Encoder(EncoderSpec(str(folder), compact_vocabulary="off"), max_tokens=MAX_TOKENS).eval()
    encode = Recorder(encoder, bad)
    sets = [Set(f"set{i}", Dataset.from_dict(rows), one, encoder.text) for i, one in enumerate(evaluators)]
    try:
        return evaluate(encode, sets, gather.rank(), gather.world_size(), MAX_TOKENS), encode.seen  # type: ignore[arg-type]
    except ValueError as error:
        return str(error), encode.seen


def test_two_ranks_equal_one_process(two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str]) -> None:
    """41 rows on 2 ranks: the same metrics on both ranks and as in one process; each distinct text embedded
    once, the same number of forwards on both ranks."""
    rows = make_rows(demo_texts[:50], 41).to_dict()
    (alone, seen_alone), evaluators = run(tiny_encoder, rows, [STS(), Triplet()]), [STS(), Triplet()]
    (first, seen_first), (second, seen_second) = two_ranks(run, tiny_encoder, rows, evaluators)
    assert isinstance(alone, dict)
    assert first == second
    assert first == pytest.approx(alone, abs=1e-6)
    assert {"eval/set0/spearman_cosine", "eval/set1/cosine_accuracy"} < alone.keys()
    assert len(seen_first) == len(seen_second) > 2
    assert abs(sum(map(len, seen_first)) - sum(map(len, seen_second))) <= len(seen_first)
    # Two sets share texts but are embedded one after the other: each text as often as sets hold it.
    shared_out = sorted(text for forward in seen_first + seen_second for text in forward)
    assert shared_out == sorted(text for forward in seen_alone for text in forward)
    assert len(seen_first) < len(seen_alone)


def test_each_distinct_text_is_embedded_once(tiny_encoder: Path, demo_texts: list[str]) -> None:
    rows = make_rows(demo_texts[:10], 41).to_dict()
    _, seen = run(tiny_encoder, rows, [STS()])
    texts = [text for forward in seen for text in forward]
    assert len(texts) == len(set(texts)) == len({*rows["anchor"], *rows["positive"]}) <= 10


def test_metrics_equal_those_of_sentence_transformers_embeddings(tiny_encoder: Path, demo_texts: list[str]) -> None:
    """Into rounds and back no row gets lost: scores of embeddings that sentence-transformers made."""
    rows = make_rows(demo_texts[:60], 41)
    metrics, _ = run(tiny_encoder, rows.to_dict(), [STS(), Triplet()])
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    for i, evaluator in enumerate([STS(), Triplet()]):
        embeddings = torch.from_numpy(model.encode(evaluator.texts(rows)))
        for name, value in evaluator.score(embeddings, rows).items():
            assert metrics[f"eval/set{i}/{name}"] == pytest.approx(value, abs=1e-5)


def test_a_rank_without_a_text_takes_part(two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str]) -> None:
    """One distinct text on 2 ranks: rank 1's shard is empty, it does a forward all the same."""
    rows = {name: [demo_texts[0]] for name in ("anchor", "positive", "negative")}
    (first, seen_first), (second, seen_second) = two_ranks(run, tiny_encoder, rows, [Triplet()])
    assert first == second == run(tiny_encoder, rows, [Triplet()])[0]
    assert len(seen_first) == len(seen_second) == 1


def test_all_ranks_raise_what_rank_0_found(two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str]) -> None:
    rows = make_rows(demo_texts[:8], 5).to_dict()
    answers = [text for text, _ in two_ranks(run, tiny_encoder, rows, [Triplet()], float("nan"))]
    assert answers[0] == answers[1]
    assert "embeddings are not finite" in answers[0]
    # and the group still works
    assert isinstance(two_ranks(run, tiny_encoder, rows, [Triplet()])[1][0], dict)


def test_a_missing_column_is_named(tiny_encoder: Path) -> None:
    text = Encoder(EncoderSpec(str(tiny_encoder)), max_tokens=10).text
    rows = Dataset.from_dict({"anchor": ["a"], "positive": ["b"], "negative": ["c"]})
    with pytest.raises(ValueError, match="'dev': Triplet needs negative, but the set has anchor, positive"):
        tokenize_set(Set("dev", rows.remove_columns("negative"), Triplet(), text))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'dev' has no rows"):
        tokenize_set(Set("dev", rows.select([]), Triplet(), text))  # type: ignore[arg-type]
