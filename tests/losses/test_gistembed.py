from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests.losses.side_by_side import assert_equals_peer, draw, targets_of
from trainer.losses import GISTEmbed, logsumexp


class _Precomputed(nn.Module):
    """In place of a model: its input features hold the embeddings under ``key``."""

    device = torch.device("cpu")
    max_seq_length = 8

    def __init__(self, key: str) -> None:
        super().__init__()
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        self.key = key
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))

    def __getitem__(self, _: int) -> Any:
        return None

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": features[self.key]}


@pytest.mark.parametrize("max_whole", [2**24, 1], ids=["whole", "tiled"])
@pytest.mark.parametrize("num_columns", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin_strategy": "relative", "margin": 0.1},
        {"margin": 0.05, "contrast_anchors": False, "contrast_positives": False},
    ],
    ids=["absolute", "relative", "positives and negatives only"],
)
def test_equals_sentence_transformers(options: dict[str, Any], num_columns: int, max_whole: int) -> None:
    columns = draw(num_columns, 12, spread=1.0)
    teacher_BCD = torch.stack(draw(num_columns, 12, seed=5, spread=1.0), dim=1)[..., :7]
    peer = GISTEmbedLoss(_Precomputed("student"), _Precomputed("teacher"), temperature=0.05, **options)

    def theirs(features: list[dict[str, Tensor]], labels: Any) -> Any:
        both = [{"student": f["sentence_embedding"], "teacher": teacher_BCD[:, c]} for c, f in enumerate(features)]
        return peer(both, labels)

    loss = GISTEmbed(scale=20.0, **options)
    loss.max_whole = max_whole
    targets = targets_of(12, extras={"teacher": teacher_BCD})
    assert_equals_peer(loss, theirs, columns, targets)
    assert 0.0 < float(loss.last_metrics["false_negative_rate"]) < 0.5


@pytest.mark.parametrize("tile", [2048, 16, 7], ids=["whole", "tiles of 16", "tiles of 7"])
@pytest.mark.parametrize("dimension", [32, 384, 1024])
@pytest.mark.parametrize("seed", [1, 2])  # seed 0 draws two other texts whose similarities differ by 6e-7
def test_a_tie_stays_in(dimension: int, tile: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth positive stands twice: sentence-transformers takes bound and candidates from one matrix, so that
    both are equal; ours round each on its own, and a matrix and its tiles apart from each other."""
    generator = torch.Generator().manual_seed(seed)
    anchors, guide_anchors = torch.randn(2, 64, dimension, generator=generator).unbind()
    positives = anchors + 0.8 * torch.randn(64, dimension, generator=generator)
    guide_positives = guide_anchors + 0.8 * torch.randn(64, dimension, generator=generator)
    positives[1::4], guide_positives[1::4] = positives[0::4], guide_positives[0::4]
    peer = GISTEmbedLoss(_Precomputed("student"), _Precomputed("teacher"), temperature=0.05)
    both = [{"student": anchors, "teacher": guide_anchors}, {"student": positives, "teacher": guide_positives}]

    loss = GISTEmbed(scale=20.0, mask_false_negatives=False)
    if tile < 64:
        monkeypatch.setattr(logsumexp, "TILE", tile)
        loss.max_whole = 1
    targets = targets_of(64, extras={"teacher": torch.stack([guide_anchors, guide_positives], dim=1)})
    assert float(loss([anchors, positives], targets)) == pytest.approx(float(peer(both, None)), rel=1e-5)


def test_a_text_that_stands_twice_is_left_out_whatever_the_guide_says() -> None:
    """Its similarity is the positive's own, which is not above it."""
    columns = draw(2, 4)
    columns[1][1] = columns[1][0]
    teacher_BCD = torch.stack(columns, dim=1)
    texts = torch.tensor([[0, 10], [1, 10], [2, 12], [3, 13]])
    targets = targets_of(4, texts_BC=texts, extras={"teacher": teacher_BCD})
    loss, unmasked = GISTEmbed(), GISTEmbed(mask_false_negatives=False)
    assert float(loss(columns, targets)) < float(unmasked(columns, targets))
