"""The promise of the product: two ranks compute what one process computes on the same global batch.

Dropout is off. Parameter gradients are compared before clipping, in value and in norm, for an optimizer such as
Adam would hide a wrong scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.batches import build_batch, gradients_of, largest_difference, norm_of, relative_error
from tests.two_ranks import TwoRanks
from trainer.batch import PackedBatch
from trainer.distributed import gather
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.text import load_text_preparation
from trainer.losses import BatchHardTriplet, CoSENT, CosineSimilarity, InfoNCE, Loss, Softmax

WHOLE, CHUNKED = 16384, 48
LOSSES: dict[str, tuple[Callable[[], Loss], int]] = {  # and the number of text columns
    "CosineSimilarity": (CosineSimilarity, 2),
    "InfoNCE": (InfoNCE, 2),
    "InfoNCE with two negatives": (lambda: InfoNCE(scale=0.05, similarity="dot"), 4),
    "BatchHardTriplet": (BatchHardTriplet, 1),
    "BatchHardTriplet cosine": (lambda: BatchHardTriplet(margin=0.2, distance="cosine"), 1),
    "Softmax": (lambda: Softmax(num_labels=3), 2),
    "CoSENT": (CoSENT, 2),
}
# One row alone has nothing that it could be compared with.
NOTHING_TO_LEARN_FROM_ONE = {"InfoNCE", "BatchHardTriplet", "BatchHardTriplet cosine", "CoSENT"}


@dataclass(frozen=True)
class Run:
    """What to compute; plain values, shipped to both ranks."""

    folder: str
    loss: str
    columns: list[list[list[int]]]
    labels: list[int]
    scores: list[float]
    max_tokens: int = WHOLE
    compact: bool = True

    def batch(self, rows: slice) -> PackedBatch:
        """This rank's share of the global batch of these rows."""
        columns = [column[rows] for column in self.columns]
        world_size, rank = gather.world_size(), gather.rank()
        return build_batch(columns, self.labels[rows], self.scores[rows], world_size, rank)


class Siamese(nn.Module):
    """Encoder and loss as the strategy sees them: one module with one forward."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.encoder = Encoder(EncoderSpec(backbone=run.folder, dropout=0.0), run.max_tokens)
        with torch.no_grad():
            # Fresh weights are so small that attention is even and all texts lie together, where a rounding error
            # decides which of them is the hardest.
            for parameter in self.encoder.backbone.parameters():
                parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
        if run.compact:
            used = {piece for column in run.columns for ids in column for piece in ids}
            self.encoder.compact_vocabulary(torch.tensor(sorted(used)))
        # Another draw on each rank: heads are equal only if the strategy knows them.
        torch.manual_seed(gather.rank())
        self.loss = LOSSES[run.loss][0]()
        self.loss.build(self.encoder.embedding_dimension)
        self.train()

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.loss(self.encoder(batch), batch.targets)


def _distributed(model: Siamese) -> nn.Module:
    return DistributedDataParallel(model) if gather.world_size() > 1 else model


def gradients(run: Run) -> tuple[float, dict[str, Tensor]]:
    """Loss of the global batch and the gradients that the optimizer would see."""
    model = Siamese(run)
    wrapped = _distributed(model)  # held until the backward is done: DDP's hooks die with it
    value = wrapped(run.batch(slice(None)))
    value.backward()
    return float(gather.reduce_sum(value.detach()) / gather.world_size()), gradients_of(model)


def weights_after(run: Run, steps: Sequence[slice], learning_rate: float) -> tuple[float, dict[str, Tensor]]:
    """How far SGD went, relative to the largest weight, and the weights in the end."""
    model = Siamese(run)
    wrapped = _distributed(model)  # DDP gives every rank the weights of rank 0
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for rows in steps:
        optimizer.zero_grad()
        wrapped(run.batch(rows)).backward()
        optimizer.step()
    end = {name: p.detach() for name, p in model.named_parameters()}
    return largest_difference(end, start), end


def _run(folder: Path, loss: str, texts: Sequence[str], num_rows: int, **kwargs: object) -> Run:
    """Rows whose columns differ in length, with repeated texts, three classes and scores with ties."""
    num_columns = LOSSES[loss][1]
    texts = [*texts[: num_rows * num_columns]]
    texts[::5] = [f"{text} {texts[0]}" for text in texts[::5]]
    texts[3::7] = [texts[-1]] * len(texts[3::7])
    ids = load_text_preparation(EncoderSpec(backbone=str(folder)))(texts)
    columns = [ids[c * num_rows : (c + 1) * num_rows] for c in range(num_columns)]
    draws = torch.randint(0, 3, (num_rows,), generator=torch.Generator().manual_seed(num_rows)).tolist()
    scores = [((5 * row + draw) % 8) / 8 for row, draw in enumerate(draws)]
    return Run(str(folder), loss, columns, draws, scores, **kwargs)  # type: ignore[arg-type]


def _assert_same_gradients(two_ranks: TwoRanks, run: Run, reference: Run) -> None:
    expected_loss, expected = gradients(reference)
    (loss, one), (other_loss, other) = two_ranks(gradients, run)
    assert loss == other_loss == pytest.approx(expected_loss, rel=1e-5)
    assert one.keys() == other.keys() == expected.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), "the ranks differ"
    if len(run.labels) == 1 and run.loss in NOTHING_TO_LEARN_FROM_ONE:
        assert max(norm_of(one), norm_of(expected)) < 1e-5  # 0, but for the rounding of a text's cosine with itself
        return
    assert norm_of(expected) > 1e-2, "a gradient of nothing"
    assert norm_of(one) / norm_of(expected) == pytest.approx(1.0, abs=1e-5)
    assert relative_error(one, expected) < 1e-5
    heads = {name for name in expected if name.startswith("loss.")}
    if heads:  # alone too, whatever their size beside the encoder's gradient
        assert relative_error({n: one[n] for n in heads}, {n: expected[n] for n in heads}) < 1e-5


@pytest.mark.parametrize("max_tokens", [WHOLE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("num_rows", [16, 15, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_two_ranks_are_those_of_one_process(
    two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str], loss: str, num_rows: int, max_tokens: int
) -> None:
    """Under DDP, with a compact vocabulary; chunks on the ranks against one forward in the one process."""
    run = _run(tiny_encoder, loss, demo_texts, num_rows, max_tokens=max_tokens)
    _assert_same_gradients(two_ranks, run, _run(tiny_encoder, loss, demo_texts, num_rows))


@pytest.mark.parametrize("num_rows", [16, 1])
@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_other_backbones_with_the_whole_vocabulary(
    two_ranks: TwoRanks, tiny_encoders: dict[str, Path], demo_texts: list[str], kind: str, num_rows: int
) -> None:
    run = _run(tiny_encoders[kind], "Softmax", demo_texts, num_rows, compact=False)
    _assert_same_gradients(two_ranks, run, run)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_after_20_steps(two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str], loss: str) -> None:
    """Of SGD on batches of 16, 15 and 1 rows; the ranks are equal bit for bit."""
    bounds = [0, 1, *range(17, 17 + 16 * 9, 16)]
    bounds += [bounds[-1] + 15 * (i + 1) for i in range(10)]
    steps = [slice(first, last) for first, last in itertools.pairwise(bounds)]
    assert sorted({rows.stop - rows.start for rows in steps}) == [1, 15, 16]
    assert len(steps) == 20
    run = _run(tiny_encoder, loss, demo_texts * 3, bounds[-1], max_tokens=400)
    # Rates at which the weights move by percents; with much higher ones a rounding error doubles at each step.
    rate = 0.1 if loss in ("InfoNCE with two negatives", "BatchHardTriplet cosine") else 0.01
    moved, expected = weights_after(run, steps, rate)
    assert moved > 5e-3, "weights that hardly moved"
    (_, one), (_, other) = two_ranks(weights_after, run, steps, rate)
    assert all(torch.equal(one[name], other[name]) for name in one), "the ranks differ"
    assert largest_difference(one, expected) < 1e-5
