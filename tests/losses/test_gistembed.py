from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests.losses.side_by_side import assert_equals_peer, draw, targets_of
from trainer.losses import GISTEmbed


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


def test_a_text_that_stands_twice_is_left_out_whatever_the_guide_says() -> None:
    """Its similarity is the positive's own, which is not above it."""
    columns = draw(2, 4)
    columns[1][1] = columns[1][0]
    teacher_BCD = torch.stack(columns, dim=1)
    texts = torch.tensor([[0, 10], [1, 10], [2, 12], [3, 13]])
    targets = targets_of(4, texts_BC=texts, extras={"teacher": teacher_BCD})
    loss, unmasked = GISTEmbed(), GISTEmbed(mask_false_negatives=False)
    assert float(loss(columns, targets)) < float(unmasked(columns, targets))
