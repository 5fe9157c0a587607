"""Several sources, each with its own loss and number of texts a row: the same run on two ranks and on one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tests.batches import relative_error
from tests.tracking.small_run import make_trainer
from tests.two_ranks import TwoRanks
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.distributed.exact import check_exact
from trainer.encoder.spec import EncoderSpec
from trainer.losses import CosineSimilarity, InfoNCE, Softmax
from trainer.module import EmbeddingModule

STEPS, BATCH = 50, 7  # 4 rows on one rank, 3 on the other
PAIR = {"anchor": "anchor", "positive": "positive"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_texts: list[str], tiny_encoders: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "encoder").symlink_to(tiny_encoders["bert"])
    for name, num_rows, first in (("scored", 150, 0), ("mined", 135, 100), ("labelled", 90, 200)):
        rows = []
        for i in range(num_rows):
            texts = dict(zip(("anchor", "positive", "negative"), demo_texts[first + i : first + i + 3], strict=True))
            rows.append({**texts, "score": i % 8 / 8, "label": i % 3})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def sources(folder: str) -> list[Source]:
    return [
        Source(f"{folder}/scored.jsonl", PAIR | {"score": "score"}, loss="regress"),
        Source(f"{folder}/mined.jsonl", PAIR | {"negative": "negative"}),
        Source(f"{folder}/labelled.jsonl", PAIR | {"label": "label"}, loss="classify"),
    ]


def build(folder: str, train: list[Source], **options: Any) -> tuple[EmbeddingModule, PairData, Trainer]:
    spec = EncoderSpec(f"{folder}/encoder", dropout=0.0)
    module = EmbeddingModule(
        spec,
        InfoNCE(),
        losses={"regress": CosineSimilarity(), "classify": Softmax(num_labels=3)},
        optimizer="sgd",
        learning_rate=0.01,
    )
    trainer = make_trainer(Path(folder) / "runs", [], **{"max_epochs": 1, "max_steps": STEPS, **options})
    return module, PairData(train, spec, batch_size=BATCH, seed=3), trainer


def train(folder: str) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    """Final weights, and of each step the source, the texts a row and this rank's row numbers."""
    module, data, trainer = build(folder, sources(folder))
    seen: list[tuple[int, ...]] = []
    step = module.training_step

    def note(batch: Any, batch_idx: int) -> Tensor:
        seen.append((batch.source, batch.num_columns, *batch.targets.row_ids_B.tolist()))
        return step(batch, batch_idx)

    module.training_step = note  # type: ignore[method-assign]
    trainer.fit(module, datamodule=data)
    return {name: p.detach().clone() for name, p in module.named_parameters()}, seen


def exact(folder: str) -> int:
    module, data, trainer = build(folder, sources(folder), max_steps=-1)
    return check_exact(SimpleNamespace(model=module, datamodule=data, trainer=trainer))


def test_two_ranks_train_what_one_process_trains(two_ranks: TwoRanks, folder: Path) -> None:
    """50 steps over all three sources: the same source on both ranks at every step, each row on one of them."""
    alone, order = train(str(folder))
    (weights, first), (others, second) = two_ranks(train, str(folder))
    assert len(order) == len(first) == len(second) == STEPS
    assert {source for source, *_ in order} == {0, 1, 2}
    for whole, one, other in zip(order, first, second, strict=True):
        assert whole[:2] == one[:2] == other[:2]
        assert sorted(whole[2:]) == sorted(one[2:] + other[2:])
    assert all(torch.equal(weights[name], value) for name, value in others.items())
    assert relative_error(weights, alone) < 1e-5
    assert any(name.startswith("losses.classify") for name in alone), "the head of a source's loss is trained too"


def test_self_check_meets_every_source(two_ranks: TwoRanks, folder: Path) -> None:
    assert two_ranks(exact, str(folder)) == [0, 0]


def test_a_loss_that_is_not_there(folder: Path) -> None:
    wrong = Source(f"{folder}/scored.jsonl", PAIR | {"score": "score"}, loss="regres")
    module, data, trainer = build(str(folder), [wrong])
    text = r"scored.jsonl: loss is 'regres', but model.losses has regress, classify. Did you mean 'regress'\?"
    with pytest.raises(ValueError, match=text):
        trainer.fit(module, datamodule=data)


def test_a_loss_that_no_source_names(folder: Path) -> None:
    module, data, trainer = build(str(folder), [Source(f"{folder}/scored.jsonl", PAIR)])
    text = "model.losses has 'regress', but no source of data.train names it: give one loss: regress, or leave it out"
    with pytest.raises(ValueError, match=text):
        trainer.fit(module, datamodule=data)


def test_columns_are_checked_against_the_loss_of_their_source(folder: Path) -> None:
    wrong = Source(f"{folder}/scored.jsonl", PAIR, loss="classify")
    module, data, trainer = build(str(folder), [wrong])
    with pytest.raises(ValueError, match=r"Softmax needs a column 'label', .*scored.jsonl has anchor, positive"):
        trainer.fit(module, datamodule=data)


@pytest.mark.parametrize("name", ["a.b", "keys"])
def test_names_of_losses(name: str) -> None:
    with pytest.raises(ValueError, match=f"model.losses can't have the name '{name}'"):
        EmbeddingModule(EncoderSpec("x"), InfoNCE(), losses={name: InfoNCE()})
