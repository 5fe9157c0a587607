from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer import losses as peers
from torch import Tensor, nn

from tests.losses.side_by_side import D, assert_equals_peer, draw, targets_of
from trainer.losses import MSE, CoSENT, EmbedDistill, GISTEmbed, InfoNCE, Loss, Matryoshka, Softmax, WeightedSum


class _Model(nn.Module):
    """In place of a SentenceTransformer: its input features already are the embeddings."""

    device = torch.device("cpu")

    def get_embedding_dimension(self) -> int:
        return D

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)


TEACHER_BCD = torch.stack(draw(2, 12, seed=5), dim=1)
CASES: dict[str, tuple[Loss, Callable[[Any], Any], dict[str, Any], Tensor | None]] = {
    "InfoNCE": (InfoNCE(), peers.MultipleNegativesRankingLoss, {}, None),
    "CoSENT": (CoSENT(), peers.CoSENTLoss, {"scores": torch.linspace(0.0, 1.0, 12)}, None),
    # The goal is cut too.
    "MSE": (MSE(), peers.MSELoss, {"extras": {"teacher": TEACHER_BCD}}, TEACHER_BCD[:, 0]),
}


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0], [1.0, 2.0, 0.0]])
@pytest.mark.parametrize("name", CASES)
def test_equals_sentence_transformers(name: str, weights: list[float] | None) -> None:
    loss, make_peer, known, labels = CASES[name]
    ours, model = Matryoshka(loss, [8, D, 3], weights), _Model()
    ours.build(D)
    peer = peers.MatryoshkaLoss(model, make_peer(model), [8, D, 3], weights)
    columns = draw(2, 12, spread=1.0)
    assert_equals_peer(ours, peer, columns, targets_of(12, **known), peer_labels=labels)


@pytest.mark.parametrize("dims", [[16, 8], [8], [D, 8], [D]])
def test_a_whole_that_is_not_trained_is_said(dims: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Once, where sentence-transformers warns too."""
    Matryoshka(InfoNCE(), dims).build(D)
    ours = [record.message for record in caplog.records if record.name == "trainer.losses.matryoshka"]
    caplog.clear()
    peers.MatryoshkaLoss(_Model(), peers.MultipleNegativesRankingLoss(_Model()), dims)
    theirs = [record.message for record in caplog.records]
    assert len(ours) == len(theirs) == (D not in dims)
    for message in ours:
        assert message == (
            f"Matryoshka dims are {dims}, but embeddings have 24 dimensions: the whole of them is not trained; add 24, "
            f"or use no more than the first {max(dims)} values"
        )


def test_heads_are_made_for_each_dimension() -> None:
    loss = Matryoshka(Softmax(num_labels=3), [8, 4])
    loss.build(D)
    assert [p.shape[1] for name, p in loss.named_parameters() if name.endswith("weight")] == [24, 12]
    loss(draw(2, 12), targets_of(12, labels=[0, 1, 2] * 4)).backward()
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


def test_it_is_what_it_wraps() -> None:
    """What the check and the module ask of a loss, they learn of the one inside."""
    loss = Matryoshka(InfoNCE(scale=5.0), [8])
    assert (loss.max_columns, loss.in_batch_negatives, loss.absent_texts) == (None, True, True)
    assert [type(part).__name__ for part in loss.parts()] == ["Matryoshka", "InfoNCE"]
    assert loss.describe()["loss"]["InfoNCE"]["scale"] == 5.0
    texts = torch.tensor([[0, 1], [0, 1], [2, 3], [4, 5]])
    loss.build(D)
    loss(draw(2, 4), targets_of(4, texts_BC=texts))
    assert float(loss.last_metrics["false_negative_rate"]) == pytest.approx(2 / 12)


@pytest.mark.parametrize("order", [1, -1])
def test_a_head_learns_the_whole_teacher_beside_a_loss_that_cuts_it(order: int) -> None:
    summed = WeightedSum([EmbedDistill("mse", projection_dim=D), MSE()][::order])
    loss = Matryoshka(summed, [D, 8])
    loss.build(D)
    columns = draw(2, 12)
    teacher_BCD = TEACHER_BCD.double().numpy()
    heads = {weight.shape[1]: weight for weight in loss.parameters() if weight.dim() == 2}
    biases = [bias for bias in loss.parameters() if bias.dim() == 1]
    expected = 0.0
    for dimension, bias in zip(loss.dims, biases, strict=True):
        texts_BCd = torch.stack(columns, dim=1).double().numpy()[..., :dimension]
        texts_BCd = texts_BCd / np.linalg.norm(texts_BCd, axis=-1, keepdims=True)
        projected = texts_BCd @ heads[dimension].detach().double().numpy().T + bias.detach().double().numpy()
        expected += np.mean((projected - teacher_BCD) ** 2)
        expected += np.mean((texts_BCd - teacher_BCD[:, :1, :dimension]) ** 2)
    value = loss(columns, targets_of(12, extras={"teacher": TEACHER_BCD}))
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [EmbedDistill(), MSE(), WeightedSum([GISTEmbed(), MSE()]), Matryoshka(MSE(), [8])])
def test_a_larger_teacher_is_not_cut_to_size(loss: Loss) -> None:
    targets = targets_of(12, extras={"teacher": torch.randn(12, 2, 2 * D)})
    wanted = f"compares embeddings of {D} dimensions with a teacher's of {2 * D}; set projection_dim to {2 * D}"
    with pytest.raises(ValueError, match=wanted):
        Matryoshka(loss, [D, 8])(draw(2, 12), targets)
    Matryoshka(loss, [D, 8])(draw(2, 12), targets_of(12, extras={"teacher": TEACHER_BCD}))


def test_a_guide_is_not_cut_where_a_goal_is() -> None:
    loss = WeightedSum([EmbedDistill("mse"), GISTEmbed()])
    targets = loss.truncated(targets_of(12, extras={"teacher": TEACHER_BCD}), 8)
    assert targets.extras["teacher"].shape == (12, 2, D)
    assert targets.extras["truncated_teacher"].shape == (12, 2, 8)


@pytest.mark.parametrize(
    ("dims", "weights", "text"),
    [
        ([], None, r"dims are \[\]"),
        ([8, 8], None, r"dims are \[8, 8\]; name different dimensions"),
        ([8, 4], [1.0], "has 2 dims and 1 weights; give one for each"),
        ([8, 4], [1.0, -1.0], "^Matryoshka: a weight is -1; it must be 0 or more, and finite$"),
        ([8, 4], [1.0, float("nan")], "^Matryoshka: a weight is nan; it must be 0 or more, and finite$"),
        ([8, 4], [0.0, 0.0], "^Matryoshka has no weight above 0; give one$"),
        ([25], None, "dims has 25, but embeddings have 24 dimensions; take 24 and smaller ones"),
    ],
)
def test_dims_that_cannot_be(dims: list[int], weights: list[float] | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Matryoshka(InfoNCE(), dims, weights).build(D)
