"""The module under Lightning's own loop, against a plain loop over sentence-transformers and torch."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import get_linear_schedule_with_warmup

from trainer.batch import PackedBatch, Targets
from trainer.data.collate import pack_texts
from trainer.data.module import PairData
from trainer.data.parts import SLICE_ROWS
from trainer.data.sources import Source
from trainer.data.streaming import StreamedTable
from trainer.demo_data import MAX_SCORE, read_pairs, write_pairs
from trainer.encoder import EncoderSpec
from trainer.losses import (
    BatchHardTriplet,
    Contrastive,
    CosineSimilarity,
    InfoNCE,
    Loss,
    MarginMSE,
    Matryoshka,
    SigLIP,
    Softmax,
    WeightedSum,
)
from trainer.module import EmbeddingModule

ROWS, BATCH = 44, 8  # 6 steps an epoch, the last of 4 rows
COLUMNS = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
RATE, DECAY = 1e-3, 0.05


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), ROWS, 4, seed=3)[0]


class Watch(Callback):
    """What each step saw and did."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rows: list[list[int]] = []
        self.training: list[bool] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, EmbeddingModule)
        assert pl_module.last_grad_norm is not None
        self.losses.append(float(outputs["loss"]))
        self.norms.append(float(pl_module.last_grad_norm))
        self.rows.append(batch.targets.row_ids_B.tolist())
        self.training.append(all(module.training for module in pl_module.modules()))


@dataclass
class Run:
    module: EmbeddingModule
    data: PairData
    trainer: Trainer
    watch: Watch


def _parts(
    encoder: Path, pairs: Path, module: dict[str, Any] | None = None, columns: dict[str, str] = COLUMNS
) -> tuple[EmbeddingModule, PairData]:
    spec = EncoderSpec(str(encoder), dropout=0.0)
    score_range = (0.0, float(MAX_SCORE)) if "score" in columns else None
    data = PairData([Source(str(pairs), columns, score_range)], spec, batch_size=BATCH, seed=5)
    settings: dict[str, Any] = {
        "loss": CosineSimilarity(),
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "warmup_ratio": 0.25,
    }
    return EmbeddingModule(spec, **(settings | (module or {}))), data


def _fit(module: EmbeddingModule, data: PairData, ckpt_path: Path | None = None, **settings: Any) -> Run:
    watch = Watch()
    quiet = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    settings = {"max_epochs": 2, "gradient_clip_val": 0.05, **dict.fromkeys(quiet, False), **settings}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[watch], use_distributed_sampler=False, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    return Run(module, data, trainer, watch)


# -- a whole run --------------------------------------------------------------------------------------------


def _plain_run(encoder: Path, pairs: Path, run: Run) -> tuple[Any, list[float], list[float]]:
    """The same rows in the same order: padded forward over the whole vocabulary, stock AdamW."""
    rows = read_pairs(pairs)
    model: Any = SentenceTransformer(str(encoder), device="cpu").eval()  # no dropout
    loss = CosineSimilarityLoss(model)
    exempt = {"bias", "LayerNorm.weight", "norm.weight"}
    named = [(n, p) for n, p in model.named_parameters() if "pooler" not in n]
    groups = [
        {"params": [p for n, p in named if not n.endswith(tuple(exempt))], "weight_decay": DECAY},
        {"params": [p for n, p in named if n.endswith(tuple(exempt))], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=12)
    losses, norms = [], []
    for step in range(12):
        batch = [rows[i] for i in run.data.order.step(*divmod(step, 6)).rows]
        features = [model.preprocess([getattr(pair, key) for pair in batch]) for key in ("sentence1", "sentence2")]
        value = loss(features, torch.tensor([pair.score / MAX_SCORE for pair in batch]))
        optimizer.zero_grad()
        value.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        schedule.step()
        losses.append(float(value))
    return model, losses, norms


@pytest.mark.parametrize("kind", ["bert", "mpnet", "distilbert", "modernbert", "qwen3", "deberta-v2"])
def test_a_run_equals_a_plain_loop(tiny_encoders: dict[str, Path], pairs: Path, kind: str) -> None:
    """Losses, gradient norms before clipping and the exported weights after two epochs of AdamW with warm-up,
    linear decay, weight decay (not on biases and norms) and clipping; rows that no text uses decay too."""
    run = _fit(*_parts(tiny_encoders[kind], pairs))
    model, losses, norms = _plain_run(tiny_encoders[kind], pairs, run)
    assert [len(rows) for rows in run.watch.rows] == [8, 8, 8, 8, 8, 4] * 2
    assert sorted(row for rows in run.watch.rows[:6] for row in rows) == list(range(ROWS))
    assert run.watch.losses == pytest.approx(losses, rel=1e-4)
    assert run.watch.norms == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.05, "clipping that does not cut"
    assert losses[-1] < 0.9 * losses[0]
    vocabulary = run.module.encoder.vocabulary
    assert vocabulary is not None
    assert float(vocabulary.decay) < 1.0
    assert len(vocabulary.used_ids) < len(vocabulary.frozen_VH) - 20
    exported: Any
    with run.module.encoder.as_sentence_transformer() as exported:
        theirs = dict(model[0].model.named_parameters())
        for name, parameter in exported[0].model.named_parameters():
            if name.endswith(("key.bias", "k_lin.bias")):
                continue  # its gradient is a rounding error, which AdamW blows up to a step
            assert_close(parameter, theirs[name], rtol=0.0, atol=2e-5, msg=name)


class _MakesTensorsElsewhere(SingleDeviceStrategy):
    """Lets configure_model make tensors on a device that is not the host's, as Lightning does on a GPU."""

    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        return torch.device("meta")


def test_the_model_is_made_on_the_host(tiny_encoder: Path, pairs: Path) -> None:
    run = _fit(*_parts(tiny_encoder, pairs), strategy=_MakesTensorsElsewhere())
    assert run.module.encoder.parts[""].vocabulary is not None
    assert run.watch.losses == _fit(*_parts(tiny_encoder, pairs)).watch.losses


def test_prompts_of_columns_need_a_pooling_that_takes_them(tiny_encoder: Path, pairs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "instructor")
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "include_prompt": False}))
    module, data = _parts(folder, pairs)
    data.train_sources[0].prompts = {"anchor": "query: "}
    with pytest.raises(ValueError, match=r"'.*instructor' leaves its prompt out of the embedding: give one prompt"):
        _fit(module, data)


def test_sgd_in_chunks_without_schedule(tiny_encoder: Path, pairs: Path) -> None:
    """Chunks, the whole vocabulary and no limit on the norm change nothing but the memory."""
    settings = {"optimizer": "sgd", "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.5}
    whole = _fit(*_parts(tiny_encoder, pairs, settings), gradient_clip_val=None)
    module, data = _parts(tiny_encoder, pairs, {**settings, "max_tokens": 40})
    module.encoder_spec.compact_vocabulary = "off"
    chunked = _fit(module, data, gradient_clip_val=None)
    assert chunked.module.encoder.vocabulary is None
    vocabulary = whole.module.encoder.vocabulary
    assert vocabulary is not None
    assert float(vocabulary.decay) < 0.999, "a decay that does nothing"
    assert_close(chunked.module.encoder.backbone.get_input_embeddings().weight, vocabulary.full_weight())
    assert chunked.watch.losses == pytest.approx(whole.watch.losses, rel=1e-5)
    assert chunked.watch.norms == pytest.approx(whole.watch.norms, rel=1e-5)
    weights = whole.module.state_dict()
    for name, value in chunked.module.state_dict().items():
        if "word_embeddings" not in name:
            assert_close(value, weights[name], rtol=0.0, atol=1e-6, msg=name)


def test_dropout_is_on_and_drawn_from_the_seed(tiny_encoder: Path, pairs: Path) -> None:
    """The state of the generator before a step does not matter; another seed draws other masks."""

    def losses(seed: int, before: int) -> list[float]:
        module, data = _parts(tiny_encoder, pairs)
        module.encoder_spec.dropout = 0.1
        data.seed = seed
        torch.manual_seed(before)
        run = _fit(module, data, max_steps=2)
        assert all(run.watch.training)
        return run.watch.losses

    assert losses(seed=5, before=1) == losses(seed=5, before=2)
    module, data = _parts(tiny_encoder, pairs)
    without = _fit(module, data, max_steps=2).watch.losses
    assert losses(seed=5, before=1)[0] != pytest.approx(without[0], rel=1e-6)


# -- the optimizer ------------------------------------------------------------------------------------------


def _decayed(module: EmbeddingModule, trainer: Trainer) -> set[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = trainer.optimizers[0].param_groups
    held = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(held) == sorted(name for name, p in module.named_parameters() if p.requires_grad)
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_no_decay_on_biases_and_norms_unless_asked(tiny_encoders: dict[str, Path], pairs: Path, kind: str) -> None:
    """They are the parameters with one dimension."""
    run = _fit(*_parts(tiny_encoders[kind], pairs), max_steps=1)
    trained = {name: p for name, p in run.module.named_parameters() if p.requires_grad}
    assert _decayed(run.module, run.trainer) == {name for name, p in trained.items() if p.dim() > 1}
    assert not any("pooler" in name for name in trained)
    everywhere = _fit(*_parts(tiny_encoders[kind], pairs, {"decay_all": True}), max_steps=1)
    assert _decayed(everywhere.module, everywhere.trainer) == set(trained)


def test_heads_are_trained(tiny_encoder: Path, pairs: Path) -> None:
    columns = {"anchor": "sentence1", "positive": "sentence2", "label": "score"}
    module, data = _parts(tiny_encoder, pairs, {"loss": Softmax(num_labels=6)}, columns)
    run = _fit(module, data, max_steps=3)
    assert {"loss.classifier.weight", "loss.classifier.bias"} <= dict(run.module.named_parameters()).keys()
    assert "loss.classifier.weight" in _decayed(run.module, run.trainer)
    head = dict(run.module.named_parameters())["loss.classifier.weight"]
    assert float(run.trainer.optimizers[0].state[head]["exp_avg"].abs().max()) > 0.0


def test_scale_and_bias_of_a_loss_are_trained_without_decay(tiny_encoder: Path, pairs: Path) -> None:
    module, data = _parts(tiny_encoder, pairs, {"loss": SigLIP()}, PAIR)
    run = _fit(module, data, max_steps=3)
    trained = {name for name, p in run.module.named_parameters() if p.requires_grad}
    assert {"loss.log_scale", "loss.logit_bias"} <= trained - _decayed(run.module, run.trainer)
    assert float(run.module.loss.logit_bias.detach()) != -10.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 3}, 18),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 9}, 9),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6),
    ],
)
def test_number_of_steps(tiny_encoder: Path, pairs: Path, settings: dict[str, Any], expected: int) -> None:
    """What the schedule was made for is what was done: the rate ends at 0."""
    run = _fit(*_parts(tiny_encoder, pairs), **settings)
    assert run.trainer.global_step == run.module.num_training_steps == expected
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_clipping_by_value(tiny_encoder: Path, pairs: Path, precision: Any) -> None:
    clipped: list[float] = []

    class Look(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            gradients = [p.grad.abs().max() for p in pl_module.parameters() if p.grad is not None]
            clipped.extend(float(g) for g in gradients)

    module, data = _parts(tiny_encoder, pairs)
    trainer = Trainer(
        accelerator="cpu", max_steps=2, callbacks=[Look()], logger=False, enable_checkpointing=False,
        gradient_clip_val=1e-3, gradient_clip_algorithm="value", enable_progress_bar=False, precision=precision,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert max(clipped) == pytest.approx(1e-3)


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_ratio": 1.0}, "model.warmup_ratio is 1.0; it is a share of the steps, 0 to below 1"),
        ({"warmup_ratio": -0.1}, "model.warmup_ratio is -0.1; it is a share of the steps, 0 to below 1"),
        ({"max_tokens": 0}, "model.max_tokens is 0; it must be 1 or more"),
        ({"learning_rate": 0.0}, "model.learning_rate is 0; it must be above 0, and finite"),
        ({"learning_rate": -0.1}, "model.learning_rate is -0.1; it must be above 0, and finite"),
        ({"learning_rate": math.nan}, "model.learning_rate is nan; it must be above 0, and finite"),
        ({"weight_decay": -10.0}, "model.weight_decay is -10; it must be 0 or more, and finite"),
        ({"weight_decay": math.inf}, "model.weight_decay is inf; it must be 0 or more, and finite"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EmbeddingModule(EncoderSpec("x"), CosineSimilarity(), **settings)


PAIR = {"anchor": "sentence1", "positive": "sentence2"}


class OwnLoss(CosineSimilarity):
    """Of a user: one value for each row."""

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        return torch.cosine_similarity(columns[0], columns[1])


class Misspelt(OwnLoss):
    needs = frozenset({"score"})


class NotInitialised(OwnLoss):
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Misspelt(), "Misspelt.needs has 'score', which is none of scores, candidate_scores, labels, teacher; these"),
        (NotInitialised(), "NotInitialised was not initialised; call super().__init__() first in NotInitialised."),
        (WeightedSum([InfoNCE(), Misspelt()]), "Misspelt.needs has 'score', which is none of scores"),
        (Matryoshka(NotInitialised(), [8]), "NotInitialised was not initialised; call super().__init__() first in"),
    ],
)
def test_a_loss_that_keeps_less_than_the_contract(loss: Loss, message: str) -> None:
    for settings in ({"loss": loss}, {"loss": InfoNCE(), "losses": {"other": loss}}):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            EmbeddingModule(EncoderSpec("x"), **settings)  # type: ignore[arg-type]


def test_a_loss_of_many_numbers(tiny_encoder: Path, pairs: Path) -> None:
    message = "OwnLoss gives a tensor of shape (8,), but a loss is a single number: return targets.weight times the sum"
    with pytest.raises(ValueError, match=re.escape(message)):
        _fit(*_parts(tiny_encoder, pairs, {"loss": OwnLoss()}), max_steps=1)


@pytest.mark.parametrize(
    ("make_loss", "columns", "message"),
    [
        (CosineSimilarity, PAIR, "CosineSimilarity needs a column 'score', {path} has anchor, positive; map it in"),
        (Softmax, PAIR, "Softmax needs a column 'label', {path} has anchor, positive; map it in"),
        (
            BatchHardTriplet,
            PAIR | {"label": "score"},
            "BatchHardTriplet takes 1 text column, {path} has anchor, label, positive; change data.train columns",
        ),
        (
            InfoNCE,
            {"text": "sentence1"},
            "InfoNCE takes 2 or more text columns, {path} has text; change data.train columns",
        ),
        (
            CosineSimilarity,
            COLUMNS | {"negative": "sentence1"},
            "CosineSimilarity takes 2 text columns, {path} has anchor, negative, positive, score; change",
        ),
        (
            lambda: Softmax(num_labels=3),
            PAIR | {"label": "score"},
            "{path} has labels 0 to 5, but Softmax has 3 classes 0 to 2; set num_labels or a label_map",
        ),
        (
            Contrastive,
            PAIR | {"label": "score"},
            "{path} has labels 0 to 5, but Contrastive has 2 classes 0 to 1; set a label_map",
        ),
        (
            MarginMSE,
            PAIR | {"negative": "sentence1"},
            "MarginMSE needs a column 'score_1' or 'score', {path} has anchor, negative, positive; map it in",
        ),
    ],
)
def test_columns_that_the_loss_does_not_take(
    tiny_encoder: Path, pairs: Path, make_loss: Callable[[], Any], columns: dict[str, str], message: str
) -> None:
    module, data = _parts(tiny_encoder, pairs, {"loss": make_loss()}, columns)
    with pytest.raises(ValueError, match=re.escape(message.format(path=pairs))):
        _fit(module, data, max_steps=1)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("make_loss", "classes"), [(Contrastive, 2), (lambda: Softmax(num_labels=3), 3)])
def test_labels_of_a_stream_that_the_loss_does_not_have(
    tiny_encoder: Path, tmp_path: Path, pairs: Path, suffix: str, make_loss: Callable[[], Any], classes: int
) -> None:
    """One of two steps brings one; Contrastive would train on it."""
    rows = [{"a": pair.sentence1, "b": pair.sentence2, "label": 0} for pair in read_pairs(pairs)[:BATCH]]
    rows.append(rows[0] | {"label": 3})
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module, data = _parts(tiny_encoder, pairs, {"loss": make_loss()})
    data.train_sources = [Source(str(path), {"anchor": "a", "positive": "b", "label": "label"}, streaming=True)]
    message = rf"row {BATCH} \(from 0\) has label 3, but its loss has {classes} classes 0 to {classes - 1}; set num_l"
    with pytest.raises(ValueError, match=message):
        _fit(module, data, max_steps=2)


def test_nothing_to_train(tiny_encoder: Path, pairs: Path) -> None:
    module, data = _parts(tiny_encoder, pairs)
    module.encoder_spec = EncoderSpec(str(tiny_encoder), dropout=0.0, freeze=2)
    message = "nothing is left to train: model.encoder.freeze 2 is all layers, and CosineSimilarity has no weights of"
    with pytest.raises(ValueError, match=re.escape(message)):
        _fit(module, data, max_steps=1)
    columns = {"anchor": "sentence1", "positive": "sentence2", "label": "score"}
    module, data = _parts(tiny_encoder, pairs, {"loss": Softmax(num_labels=6)}, columns)
    module.encoder_spec = EncoderSpec(str(tiny_encoder), dropout=0.0, freeze=2)
    run = _fit(module, data, max_steps=1)
    assert {name.split(".")[0] for name, p in run.module.named_parameters() if p.requires_grad} == {"loss"}


def test_a_run_without_an_end(tiny_encoder: Path, pairs: Path) -> None:
    with pytest.raises(ValueError, match=r"max_epochs is -1 and trainer.max_steps is not set: give one of them"):
        _fit(*_parts(tiny_encoder, pairs), max_epochs=-1)


@pytest.mark.parametrize(
    ("steps", "ratio", "trains"), [(1, 0.1, False), (1, 0.0, True), (2, 0.99, True), (2, 0.1, True)]
)
def test_a_warm_up_that_is_the_whole_run(
    tiny_encoder: Path, pairs: Path, caplog: pytest.LogCaptureFixture, steps: int, ratio: float, trains: bool
) -> None:
    """transformers' schedule starts at 0, so a single step of it moves no weight; that is said."""
    weights = SentenceTransformer(str(tiny_encoder), device="cpu")[0].model.state_dict()
    run = _fit(*_parts(tiny_encoder, pairs, {"warmup_ratio": ratio}), max_steps=steps)
    with run.module.encoder.as_sentence_transformer() as exported:
        after = exported[0].model.state_dict()  # type: ignore[operator, union-attr]
        assert all(torch.equal(after[name], weights[name]) for name in after) != trains
    assert ("the run has 1 step, the first of the warm-up, at a learning rate of 0" in caplog.text) != trains


@pytest.mark.parametrize("limits", [{"max_epochs": 1, "limit_train_batches": 1}, {"max_epochs": -1, "max_steps": 1}])
def test_no_rows_are_fetched_for_steps_behind_the_last(
    tiny_encoder: Path, tmp_path: Path, limits: dict[str, Any]
) -> None:
    """Of a stream of 24 slices, where a window has eight, the only step builds those that its own rows are in."""
    num_rows = 24 * SLICE_ROWS
    texts = [f"text {row}" for row in range(num_rows)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": texts, "b": texts}), path, row_group_size=8 * SLICE_ROWS)
    spec = EncoderSpec(str(tiny_encoder), dropout=0.0, max_length=8)
    source = Source(str(path), {"anchor": "a", "positive": "b"}, streaming=True)
    data = PairData([source], spec, batch_size=BATCH, cache_dir=str(tmp_path / "cache"), num_workers=0)
    run = _fit(EmbeddingModule(spec, InfoNCE()), data, **limits)
    assert run.trainer.global_step == 1
    (table,) = data.tables
    assert isinstance(table, StreamedTable)
    if table._ahead is not None:
        table._ahead.join()
    built = {path.name for path in table.folder.glob("slice-*.arrow")}
    assert built == {table._path(slice_).name for slice_ in table._slices(np.array(run.watch.rows[0]))[0]}


# -- checkpoints --------------------------------------------------------------------------------------------


def _checkpoint(run: Run, folder: Path) -> Path:
    path = folder / "run.ckpt"
    run.trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_of_other_data_is_refused(tiny_encoder: Path, pairs: Path, tmp_path: Path) -> None:
    path = _checkpoint(_fit(*_parts(tiny_encoder, pairs), max_steps=2), tmp_path)
    other = write_pairs(tmp_path, 9, 2, seed=8)[0]
    module, data = _parts(tiny_encoder, other)
    with pytest.raises(ValueError, match=r"trained on texts with \d+ distinct pieces, this data has \d+ others"):
        _fit(module, data, ckpt_path=path)


def test_a_checkpoint_on_another_base_is_refused(tiny_encoder: Path, pairs: Path, tmp_path: Path) -> None:
    path = _checkpoint(_fit(*_parts(tiny_encoder, pairs), max_steps=2), tmp_path)
    changed: Any = SentenceTransformer(str(tiny_encoder), device="cpu")
    with torch.no_grad():
        changed[0].model.get_input_embeddings().weight[-1] += 1.0
    changed.save_pretrained(str(tmp_path / "changed"))
    module, data = _parts(tmp_path / "changed", pairs)
    with pytest.raises(ValueError, match=r"the embedding matrix of '.*changed' is not the one the checkpoint was"):
        _fit(module, data, ckpt_path=path)


def test_a_checkpoint_brings_its_vocabulary_where_nothing_is_trained(
    tiny_encoder: Path, pairs: Path, tmp_path: Path
) -> None:
    """``validate`` and ``test`` know no training texts; they embed as the run did."""
    run = _fit(*_parts(tiny_encoder, pairs), max_steps=4)
    path = _checkpoint(run, tmp_path)
    module, data = _parts(tiny_encoder, pairs)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(module, datamodule=data, ckpt_path=path, weights_only=False)
    ours, theirs = (m.encoder.eval() for m in (module, run.module))
    assert ours.vocabulary is not None
    assert theirs.vocabulary is not None
    assert torch.equal(ours.vocabulary.full_weight(), theirs.vocabulary.full_weight())
    texts = ["The tourist lost a ring in the garden.", "wholly other words"]
    assert torch.equal(_embed(module, texts), _embed(run.module, texts))


def _embed(module: EmbeddingModule, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return module.encoder.embed(pack_texts(module.encoder.text(texts)))


def test_the_first_batch_is_printed(tiny_encoder: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _fit(*_parts(tiny_encoder, pairs, {"print_first_batch": True}), max_steps=2)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    rows = read_pairs(pairs)
    first = run.data.order.step(0, 0).rows
    assert len(printed) == len(first) == BATCH
    for line, row in zip(printed, first, strict=True):
        start, one, other = re.fullmatch(r"(row \d+ score [\d.]+): (.*) \| (.*)", line).groups()  # type: ignore[union-attr]
        assert start == f"row {row} score {rows[row].score / MAX_SCORE:.3f}"
        for text, said in ((one, rows[row].sentence1), (other, rows[row].sentence2)):
            assert re.sub(r"\W|cls|sep", "", text.lower()) == re.sub(r"\W", "", said.lower())
