"""The promise of the product: two ranks compute what one process computes on the same global batch.

Dropout is off. Parameter gradients are compared before clipping, in value and in norm, for an optimizer such as
Adam would hide a wrong scale. With TRAINER_EXACTNESS_TABLE=FILE the errors of all cases are written there as a table.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
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
from trainer.encoder import Encoder, EncoderSpec, attention, encoder
from trainer.encoder.text import load_text_preparation
from trainer.losses import (
    MSE,
    AnglE,
    BatchHardTriplet,
    BatchTriplet,
    Contrastive,
    CoSENT,
    CosineSimilarity,
    DistillKLDiv,
    EmbedDistill,
    GISTEmbed,
    GlobalOrthogonalRegularization,
    InfoNCE,
    Loss,
    MarginMSE,
    Matryoshka,
    OnlineContrastive,
    SigLIP,
    Softmax,
    Triplet,
    WeightedSum,
)
from trainer.losses.infonce import Direction

WHOLE, CHUNKED = 16384, 48
DIMENSION = 32  # of the tiny encoders
ALL_DIRECTIONS: tuple[Direction, ...] = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def _in_tiles() -> Loss:
    loss = InfoNCE(directions=ALL_DIRECTIONS)
    loss.max_whole = 1
    return loss


LOSSES: dict[str, tuple[Callable[[], Loss], int]] = {  # and the number of text columns
    "CosineSimilarity": (CosineSimilarity, 2),
    "CoSENT": (CoSENT, 2),
    "AnglE": (AnglE, 2),
    "Softmax": (lambda: Softmax(num_labels=3), 2),
    "Contrastive": (lambda: Contrastive(margin=1.0), 2),
    "OnlineContrastive": (lambda: OnlineContrastive(margin=1.0), 2),
    "Triplet": (Triplet, 3),
    "Triplet manhattan": (lambda: Triplet(distance="manhattan"), 3),
    "BatchHardTriplet": (BatchHardTriplet, 1),
    "BatchHardTriplet cosine": (lambda: BatchHardTriplet(margin=0.2, distance="cosine"), 1),
    "BatchHardTriplet soft": (lambda: BatchHardTriplet(margin="soft"), 1),
    "BatchTriplet all": (lambda: BatchTriplet("all", margin=0.5), 1),
    "BatchTriplet semi_hard": (lambda: BatchTriplet("semi_hard"), 1),
    "InfoNCE": (InfoNCE, 2),
    "InfoNCE with two negatives": (lambda: InfoNCE(scale=0.05, similarity="dot"), 4),
    "InfoNCE symmetric": (
        lambda: InfoNCE(directions=("query_to_doc", "doc_to_query"), partition="per_direction"),
        3,
    ),
    "InfoNCE all directions": (lambda: InfoNCE(directions=ALL_DIRECTIONS), 3),
    "InfoNCE in tiles": (_in_tiles, 3),
    "InfoNCE hardness": (lambda: InfoNCE(hardness="all_negatives", hardness_strength=5.0), 3),
    "SigLIP": (SigLIP, 3),
    "GISTEmbed": (lambda: GISTEmbed(scale=20.0), 3),
    "EmbedDistill": (EmbedDistill, 2),
    "EmbedDistill projected": (lambda: EmbedDistill("l2", projection_dim=DIMENSION), 2),
    "MSE": (MSE, 2),
    "MarginMSE": (MarginMSE, 4),
    "DistillKLDiv": (DistillKLDiv, 4),
    "GlobalOrthogonalRegularization": (GlobalOrthogonalRegularization, 2),
    "WeightedSum": (lambda: WeightedSum([InfoNCE(), GlobalOrthogonalRegularization()], [1.0, 0.5]), 2),
}
# One row alone has nothing that it could be compared with.
NOTHING_TO_LEARN_FROM_ONE = {
    "InfoNCE",
    "BatchHardTriplet",
    "CoSENT",
    "GlobalOrthogonalRegularization",
    "OnlineContrastive",
}


@dataclass(frozen=True)
class Run:
    """What to compute; plain values, shipped to both ranks."""

    folder: str
    loss: str
    columns: list[list[list[int]]]
    labels: list[int]
    scores: list[float]
    used: list[int]
    max_tokens: int = WHOLE
    matryoshka: bool = False

    def batch(self, rows: slice) -> PackedBatch:
        """This rank's share of the global batch of these rows."""
        columns = [column[rows] for column in self.columns]
        world_size, rank = gather.world_size(), gather.rank()
        labels = self.labels[rows]
        if self.loss.startswith(("Contrastive", "OnlineContrastive")):
            labels = [label % 2 for label in labels]
        # Equal texts have equal numbers. Some rows form groups, and some have no last text, where a loss allows that.
        numbers: dict[tuple[int, ...], int] = {}
        texts = [[numbers.setdefault(tuple(column[i]), len(numbers)) for column in columns] for i in range(len(labels))]
        known = {"texts_BC": torch.tensor(texts), "groups_B": torch.arange(len(labels)) % 11}
        if len(columns) > 2:
            known["present_BC"] = torch.ones(len(labels), len(columns), dtype=torch.bool)
            known["present_BC"][::4, -1] = False
        generator = torch.Generator().manual_seed(len(labels))
        extras = {
            "teacher": torch.randn(len(labels), len(columns), DIMENSION, generator=generator),
            "scores": torch.randn(len(labels), max(1, len(columns) - 1), generator=generator),
        }
        return build_batch(columns, labels, self.scores[rows], world_size, rank, known, extras)


@functools.cache
def load_once(folder: str, used: tuple[int, ...]) -> tuple[Encoder, dict[str, Tensor]]:
    """Loaded once in each process, for that takes longer than a case; and its weights."""
    encoder = Encoder(EncoderSpec(backbone=folder, dropout=0.0), WHOLE)
    with torch.no_grad():
        # Fresh weights are so small that attention is even and all texts lie together, where a rounding error
        # decides which of them is the hardest.
        for parameter in encoder.backbone.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    if used:
        encoder.compact_vocabulary(torch.tensor(used))
    return encoder, {name: value.clone() for name, value in encoder.state_dict().items()}


class Siamese(nn.Module):
    """Encoder and loss as the strategy sees them: one module with one forward."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.encoder, start = load_once(run.folder, tuple(run.used))
        self.encoder.load_state_dict(start)
        self.encoder.max_tokens = run.max_tokens
        # Another draw on each rank: heads are equal only if the strategy knows them.
        torch.manual_seed(gather.rank())
        loss = LOSSES[run.loss][0]()
        self.loss = Matryoshka(loss, [DIMENSION, 16, 7], [1.0, 0.5, 2.0]) if run.matryoshka else loss
        self.loss.build(self.encoder.embedding_dimension)
        self.zero_grad()
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
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    return largest_difference(end, start), end


def make_run(
    folder: Path, loss: str, texts: Sequence[str], num_rows: int, compact: bool = True, **kwargs: object
) -> Run:
    """Rows whose columns differ in length, with repeated texts, three classes and scores with ties."""
    num_columns = LOSSES[loss][1]
    prepare = load_text_preparation(EncoderSpec(backbone=str(folder)))
    used = sorted({piece for ids in prepare(texts) for piece in ids}) if compact else []
    texts = [*texts[: num_rows * num_columns]]
    texts[::5] = [f"{text} {texts[0]}" for text in texts[::5]]
    if loss != "BatchTriplet semi_hard":  # where a negative is as far as the positive, its choice hangs on a rounding
        texts[3::7] = [texts[-1]] * len(texts[3::7])
    ids = prepare(texts)
    columns = [ids[c * num_rows : (c + 1) * num_rows] for c in range(num_columns)]
    draws = torch.randint(0, 3, (num_rows,), generator=torch.Generator().manual_seed(num_rows)).tolist()
    scores = [((5 * row + draw) % 8) / 8 for row, draw in enumerate(draws)]
    return Run(str(folder), loss, columns, draws, scores, used, **kwargs)  # type: ignore[arg-type]


# (loss, variant) -> relative error of the loss, of the gradient, and of its norm.
Errors = dict[tuple[str, str], tuple[float, float, float]]


@pytest.fixture(scope="module")
def errors() -> Iterator[Errors]:
    found: Errors = {}
    yield found
    if path := os.environ.get("TRAINER_EXACTNESS_TABLE"):
        lines = ["| loss | variant | loss value | gradient | norm of the gradient |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(case)} | {' | '.join(f'{e:.1e}' for e in of)} |" for case, of in found.items()]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _assert_same_gradients(two_ranks: TwoRanks, run: Run, reference: Run) -> tuple[float, float, float]:
    """The relative errors: of the loss, of the gradient, of its norm."""
    expected_loss, expected = gradients(reference)
    (loss, one), (other_loss, other) = two_ranks(gradients, run)
    assert loss == other_loss == pytest.approx(expected_loss, rel=1e-5)
    assert one.keys() == other.keys() == expected.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), "the ranks differ"
    if len(run.labels) == 1 and run.loss in NOTHING_TO_LEARN_FROM_ONE:
        assert max(norm_of(one), norm_of(expected)) < 1e-5  # 0, but for the rounding of a text's cosine with itself
        return 0.0, 0.0, 0.0
    assert norm_of(expected) > 1e-2, "a gradient of nothing"
    ratio, error = norm_of(one) / norm_of(expected), relative_error(one, expected)
    assert ratio == pytest.approx(1.0, abs=1e-5)
    assert error < 1e-5
    heads = {name for name in expected if name.startswith("loss.")}
    if heads:  # alone too, whatever their size beside the encoder's gradient
        assert relative_error({n: one[n] for n in heads}, {n: expected[n] for n in heads}) < 1e-5
    return abs(loss / expected_loss - 1.0), error, abs(ratio - 1.0)


@pytest.mark.parametrize("variant", ["plain", "Matryoshka", "chunked"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_two_ranks_are_those_of_one_process(
    two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str], errors: Errors, loss: str, variant: str
) -> None:
    """Of 8 and 7 rows, under DDP, with a compact vocabulary; chunks on the ranks against one forward in the one."""
    options = {"matryoshka": variant == "Matryoshka"}
    run = make_run(tiny_encoder, loss, demo_texts, 15, max_tokens=CHUNKED if variant == "chunked" else WHOLE, **options)
    errors[loss, variant] = _assert_same_gradients(
        two_ranks, run, make_run(tiny_encoder, loss, demo_texts, 15, **options)
    )


@pytest.mark.parametrize("num_rows", [16, 1])
@pytest.mark.parametrize(
    "loss",
    ["CosineSimilarity", "Softmax", "SigLIP", "EmbedDistill", *sorted(NOTHING_TO_LEARN_FROM_ONE)],
)
def test_even_shares_and_a_rank_without_rows(
    two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str], loss: str, num_rows: int
) -> None:
    run = make_run(tiny_encoder, loss, demo_texts, num_rows)
    _assert_same_gradients(two_ranks, run, run)


@pytest.mark.parametrize("num_rows", [16, 1])
@pytest.mark.parametrize("kind", ["roberta", "mpnet", "deberta-v2"])
def test_other_backbones_with_the_whole_vocabulary(
    two_ranks: TwoRanks, tiny_encoders: dict[str, Path], demo_texts: list[str], kind: str, num_rows: int
) -> None:
    run = make_run(tiny_encoders[kind], "Softmax", demo_texts, num_rows, compact=False)
    _assert_same_gradients(two_ranks, run, run)


# SGD's rate, at which the weights move by percents; with a much higher one a rounding error doubles at each step.
RATES = {
    "CosineSimilarity": 0.01,
    "InfoNCE with two negatives": 0.1,
    "BatchHardTriplet cosine": 0.1,
    "CoSENT": 0.01,
    "Softmax": 0.01,
}


@pytest.mark.parametrize("loss", RATES)
def test_weights_after_20_steps(two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str], loss: str) -> None:
    """Of SGD on batches of 16, 15 and 1 rows; the ranks are equal bit for bit."""
    bounds = [0, 1, *range(17, 17 + 16 * 9, 16)]
    bounds += [bounds[-1] + 15 * (i + 1) for i in range(10)]
    steps = [slice(first, last) for first, last in itertools.pairwise(bounds)]
    assert sorted({rows.stop - rows.start for rows in steps}) == [1, 15, 16]
    assert len(steps) == 20
    run = make_run(tiny_encoder, loss, demo_texts * 3, bounds[-1], max_tokens=400)
    moved, expected = weights_after(run, steps, RATES[loss])
    assert moved > 5e-3, "weights that hardly moved"
    (_, one), (_, other) = two_ranks(weights_after, run, steps, RATES[loss])
    assert all(torch.equal(one[name], other[name]) for name in one), "the ranks differ"
    assert largest_difference(one, expected) < 1e-5


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_attention_of_a_gpu_gives_the_same(
    tiny_encoders: dict[str, Path], demo_texts: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jagged tensors, and buckets for windows, beside the attention of a CPU."""
    run = make_run(tiny_encoders[kind], "InfoNCE", demo_texts, 15)
    monkeypatch.setattr(encoder, "_TOKEN_STEP", 1)  # a GPU's stream has no padding
    expected_loss, expected = gradients(run)
    monkeypatch.setattr(attention, "_GPUS", {"cpu"})
    monkeypatch.setattr(attention.Packing, "takes_host", lambda *_: False)
    loss, found = gradients(run)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_error(found, expected) < 1e-5
