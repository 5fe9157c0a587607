"""LabelAccuracy: the classes of a Softmax head, on one and on two ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tests.evaluation.test_sharded import MAX_TOKENS, Recorder, Set, make_rows
from tests.two_ranks import TwoRanks, message_of
from trainer.distributed import gather
from trainer.encoder import Encoder, EncoderSpec
from trainer.evaluation import LabelAccuracy
from trainer.evaluation.scoring import evaluate
from trainer.losses import InfoNCE, Softmax
from trainer.module import EmbeddingModule


def make_head(dimension: int) -> Softmax:
    head = Softmax(num_labels=3)
    head.build(dimension)
    weights = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(head.classifier.weight, generator=weights)
    torch.nn.init.normal_(head.classifier.bias, generator=weights)
    return head


def run(folder: Path, rows: dict[str, list]) -> dict[str, float]:
    encoder = Encoder(EncoderSpec(str(folder), compact_vocabulary="off"), max_tokens=MAX_TOKENS).eval()
    module = EmbeddingModule(EncoderSpec(str(folder)), InfoNCE(), losses={"nli": make_head(32)})
    one = Set("nli", Dataset.from_dict(rows), LabelAccuracy(loss="nli"), encoder.text)
    rank, world_size = gather.rank(), gather.world_size()
    return evaluate(Recorder(encoder), [one], rank, world_size, MAX_TOKENS, module.classify)  # type: ignore[list-item]


def test_accuracy_of_the_head(two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str]) -> None:
    """The share of rows whose argmax of softmax(W [u, v, |u - v|] + c), by NumPy, is the label."""
    data = make_rows(demo_texts[:50], 41)
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    u, v = model.encode(data["anchor"][:]), model.encode(data["positive"][:])
    head = make_head(32).classifier
    logits = np.concatenate([u, v, np.abs(u - v)], axis=1) @ head.weight.detach().numpy().T
    classes = (logits + head.bias.detach().numpy()).argmax(axis=1)
    assert len(set(classes.tolist())) > 1
    labels = classes.copy()
    labels[:13] = (labels[:13] + 1) % 3
    rows = data.add_column("label", labels).to_dict()
    expected = {"eval/nli/accuracy": pytest.approx((41 - 13) / 41)}
    assert run(tiny_encoder, rows) == expected
    first, second = two_ranks(run, tiny_encoder, rows)
    assert first == second == expected


def test_a_loss_without_classes_is_refused(tiny_encoder: Path) -> None:
    module = EmbeddingModule(EncoderSpec(str(tiny_encoder)), InfoNCE(), losses={"nli": make_head(4)})
    columns = [torch.zeros(2, 4), torch.zeros(2, 4)]
    assert module.classify("nli", columns).shape == (2, 3)
    with pytest.raises(ValueError, match="asks InfoNCE for classes, which it does not tell; train with Softmax"):
        module.classify(None, columns)
    with pytest.raises(ValueError, match=r"loss is 'nil', but model\.losses has nli"):
        module.classify("nil", columns)


@pytest.mark.parametrize(("first", "said"), [(1, "1 to 3"), (-1, "-1 to 1")])
def test_labels_that_the_head_does_not_have(
    two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str], first: int, said: str
) -> None:
    """Rows of such a label could never be right; all ranks stop together."""
    data = make_rows(demo_texts[:50], 12)
    rows = data.add_column("label", [first + i % 3 for i in range(12)]).to_dict()
    of_head = "the head has 3 classes, 0 to 2. Set label_map of this validation set"
    message = f"nli: LabelAccuracy: the 12 rows have labels {said}, {of_head}"
    with pytest.raises(ValueError, match=message):
        run(tiny_encoder, rows)
    assert all(message in said for said in two_ranks(message_of, run, tiny_encoder, rows))
