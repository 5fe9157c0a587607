"""ZeRO is DDP with less memory: the same gradients, weights, metrics, log and checkpoints under every stage.

Two real gloo ranks, which the tests of this file may kill. Everything but a resumed run's own past has dropout off.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoTokenizer, BartConfig, BartModel

from tests.batches import norm_of, relative_error
from tests.evaluation.test_informationretrieval import write_set
from tests.tracking.small_run import LiveGroup, make_trainer
from tests.two_ranks import RankError, TwoRanks, message_of
from trainer.batch import Targets
from trainer.checkpoint import DirectoryCheckpointIO
from trainer.data.evalsource import EvalSource
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.distributed import gather
from trainer.distributed.exact import check_exact
from trainer.distributed.strategies import ZeRO, keep_on_first_rank, whole_gradients, whole_weights
from trainer.encoder.spec import EncoderSpec, LoRA
from trainer.evaluation import InformationRetrieval, LabelAccuracy
from trainer.evaluation.runner import Evaluation
from trainer.losses import CosineSimilarity, InfoNCE, Loss, SigLIP, Softmax
from trainer.manifest import read_state
from trainer.module import EmbeddingModule

STEPS, BATCH = 20, 7  # 4 rows on one rank, 3 on the other
CLIP = 0.5
WHOLE, CHUNKED = 16384, 200
LOSSES = {
    "CosineSimilarity": CosineSimilarity,
    "InfoNCE": InfoNCE,
    "Softmax": lambda: Softmax(num_labels=3),
    "SigLIP": SigLIP,
}
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Run:
    """A training run; plain values, shipped to both ranks. Stage 0 is DDP, or one process."""

    folder: str
    stage: int = 0
    offload: bool = False
    loss: str = "CosineSimilarity"
    optimizer: str = "adamw"
    max_tokens: int = CHUNKED
    learning_rate: float = 1e-3
    decay: float = 0.1
    steps: int = STEPS
    dropout: float | None = 0.0
    precision: str = "32-true"
    freeze: int | None = None
    lora: int = 0
    compact: str = "auto"
    compiled: bool = False
    save_at: int = 0
    save_to: str = ""
    resume: str = ""
    kill_at: int = 0


@dataclass
class Result:
    """What rank 0 saw; gradients of the first step, before clipping."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    num_forwards: int = 0


class Watch(Callback):
    """Records into a result, saves and kills where the run says so."""

    def __init__(self, run: Run) -> None:
        self.run, self.result = run, Result()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.run.kill_at and trainer.global_step == self.run.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.result.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 0:
            self.result.gradients = keep_on_first_rank(whole_gradients(trainer.strategy))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.result.norms.append(float(pl_module.last_grad_norm))  # type: ignore[arg-type]
        if trainer.global_step == self.run.save_at:
            trainer.save_checkpoint(self.run.save_to)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.result.weights = keep_on_first_rank(whole_weights(trainer.strategy))
        self.result.optimizer = trainer.strategy.optimizer_state(trainer.optimizers[0])


class Scores(Evaluation):
    """Keeps the metrics of every evaluation."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result

    def _evaluate_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._evaluate_step(trainer, pl_module)
        self.result.metrics.append(self.last_metrics)


def build(run: Run, callbacks: list[Callback], **options: Any) -> tuple[EmbeddingModule, PairData, Trainer]:
    columns = {name: name for name in ("anchor", "positive")}
    wanted = {"CosineSimilarity": {"score": "score"}, "Softmax": {"label": "label"}}.get(run.loss, {})
    lora = LoRA(r=run.lora, dropout=run.dropout or 0.0) if run.lora else None
    spec = EncoderSpec(f"{run.folder}/encoder", dropout=run.dropout, freeze=run.freeze, lora=lora)
    spec.compact_vocabulary = run.compact  # type: ignore[assignment]
    spec.compile_layers = run.compiled
    rows = f"{run.folder}/rows.jsonl"
    dev = f"{run.folder}/dev.jsonl"
    validation = [EvalSource(name="dev", path=dev, columns=columns | {"score": "score"})]
    if run.loss == "Softmax":  # what else an evaluation is: neighbours, and the classes of the head
        search = EvalSource(name="set", path=f"{run.folder}/set", evaluator=InformationRetrieval())
        classes = EvalSource(name="nli", path=dev, columns=columns | {"label": "label"}, evaluator=LabelAccuracy())
        validation += [search, classes]
    data = PairData(
        [Source(rows, columns | wanted)],
        spec,
        validation=validation,
        batch_size=BATCH,
        seed=1,
    )
    module = EmbeddingModule(
        spec,
        LOSSES[run.loss](),
        learning_rate=run.learning_rate,
        weight_decay=run.decay,
        warmup_ratio=0.2,
        optimizer=run.optimizer,  # type: ignore[arg-type]
        max_tokens=run.max_tokens,
    )
    if run.stage:
        # So few live parameters that stage 3 parts with even the smallest matrix.
        options["strategy"] = ZeRO(run.stage, run.offload, live_parameters=3000)  # type: ignore[arg-type]
    live = [LiveGroup()] if gather.world_size() > 1 else []
    options |= {"plugins": [DirectoryCheckpointIO(), *live], "gradient_clip_val": CLIP, "val_check_interval": 10,
                "max_epochs": -1, "max_steps": run.steps, "precision": run.precision}  # fmt: skip
    trainer = make_trainer(Path(run.folder) / "runs", callbacks, **options)
    return module, data, trainer


def train(run: Run) -> Result:
    watch = Watch(run)
    module, data, trainer = build(run, [watch, Scores(watch.result)])
    calls: list[None] = []
    module.on_fit_start = lambda: module.encoder.backbone.register_forward_hook(lambda *_: calls.append(None))  # type: ignore
    trainer.fit(module, datamodule=data, ckpt_path=run.resume or None)
    assert F.linear is torch._C._nn.linear, "stage 3 left its own in the process"
    watch.result.num_forwards = len(calls)
    return watch.result


@pytest.fixture(scope="module")
def ranks() -> Iterator[TwoRanks]:
    ours = TwoRanks()
    yield ours
    ours.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_texts: list[str]) -> Path:
    from trainer.demo_encoder import write_encoder

    folder = tmp_path_factory.mktemp("zero")
    write_encoder(folder / "encoder", demo_texts, hidden=32, layers=2, heads=4, vocab=400)
    for name, num_rows, first in (("rows", STEPS * BATCH, 0), ("dev", 33, 300)):
        lines = []
        for i in range(num_rows):
            anchor, positive = demo_texts[first + 2 * i : first + 2 * i + 2]
            if i % 3 == 0:
                anchor = f"{anchor} {positive}"  # so that the ranks differ in tokens, and in chunks
            lines.append(json.dumps({"anchor": anchor, "positive": positive, "score": i % 8 / 8, "label": i % 3}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    write_set(folder / "set", demo_texts[:100], copies=1, num_documents=40)
    return folder


@pytest.fixture(scope="module")
def results_of(ranks: TwoRanks) -> Any:
    """What both ranks saw of a run; each run happens once."""
    return cache(lambda run: ranks(train, run))


@pytest.fixture(scope="module")
def result_of(results_of: Any) -> Any:
    return lambda run: results_of(run)[0]


def weight_error(result: Result, expected: Result) -> float:
    """Of what is trained; not of the ids of rows and the like."""
    ours, theirs = ({name: one.weights[name] for name in expected.gradients} for one in (result, expected))
    return relative_error(ours, theirs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("loss", "optimizer", "max_tokens"),
    [
        ("CosineSimilarity", "sgd", CHUNKED),
        pytest.param("CosineSimilarity", "adamw", WHOLE, marks=pytest.mark.slow),
        ("InfoNCE", "sgd", WHOLE),
        ("InfoNCE", "adamw", CHUNKED),
        pytest.param("Softmax", "sgd", CHUNKED, marks=pytest.mark.slow),
        pytest.param("Softmax", "adamw", WHOLE, marks=pytest.mark.slow),
        ("SigLIP", "adamw", WHOLE),  # single numbers are trained with it
    ],
)
def test_every_stage_computes_what_ddp_computes(
    result_of: Any, folder: Path, stage: int, loss: str, optimizer: str, max_tokens: int
) -> None:
    """Gradients before clipping, norms, rates, metrics, and weights and moments after 20 steps; the ranks run unequal
    numbers of chunks, and clipping is at work."""
    run = Run(str(folder), loss=loss, optimizer=optimizer, max_tokens=max_tokens)
    run = replace(run, learning_rate=0.03 if optimizer == "sgd" else 1e-3)
    expected, result = result_of(run), result_of(replace(run, stage=stage))
    assert norm_of(expected.gradients) > 1e-2
    assert relative_error(result.gradients, expected.gradients) < 1e-5
    assert len(expected.norms) == STEPS
    assert result.norms == pytest.approx(expected.norms, rel=1e-5)
    assert max(expected.norms) > CLIP
    assert result.rates == expected.rates
    assert len(expected.metrics) == 1 + STEPS // 10
    assert ("eval/nli/accuracy" in expected.metrics[0]) == (loss == "Softmax")
    for ours, theirs in zip(result.metrics, expected.metrics, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert weight_error(result, expected) < 1e-5
    assert result.weights.keys() == expected.weights.keys()
    assert all(torch.equal(result.weights[n], w) for n, w in expected.weights.items() if n not in result.gradients)
    assert result.optimizer["param_groups"] == expected.optimizer["param_groups"]
    states, others = result.optimizer["state"], expected.optimizer["state"]
    assert states.keys() == others.keys()
    assert len(states) == (len(expected.gradients) if optimizer == "adamw" else 0)
    for key in others.get(0, {}):
        ours, theirs = ({str(n): state[key] for n, state in all.items()} for all in (states, others))
        assert relative_error(ours, theirs) < 1e-4, key
        assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in theirs.items()}


@pytest.mark.parametrize(
    ("trained", "stage"),
    [
        pytest.param({"lora": 4}, 2, id="lora-2", marks=pytest.mark.slow),
        pytest.param({"lora": 4}, 3, id="lora-3", marks=pytest.mark.slow),
        pytest.param({"freeze": 1}, 3, id="freeze-3", marks=pytest.mark.slow),
    ],
)
def test_frozen_weights_in_chunks(
    ranks: TwoRanks, result_of: Any, folder: Path, tmp_path: Path, trained: dict[str, Any], stage: int
) -> None:
    """Frozen layers, and adapters beside a frozen backbone, under activation checkpointing: what one process computes
    in one forward. A checkpoint leaves out what is frozen, and a run goes on from it bit for bit, dropout on."""
    run = Run(str(folder), **trained)
    expected = train(replace(run, max_tokens=WHOLE))
    for ours in (result_of(run), result_of(replace(run, stage=stage))):
        assert ours.gradients.keys() == expected.gradients.keys()
        assert relative_error(ours.gradients, expected.gradients) < 1e-5
        assert ours.norms == pytest.approx(expected.norms, rel=1e-5)
        assert weight_error(ours, expected) < 1e-5
    path = str(tmp_path / "step-00000008")
    noisy = replace(run, stage=stage, dropout=0.1)
    undisturbed, _ = ranks(train, replace(noisy, save_at=8, save_to=path))
    assert read_state(Path(path))["state_dict"].keys() == expected.gradients.keys()
    resumed, _ = ranks(train, replace(noisy, resume=path))
    assert resumed.norms == undisturbed.norms[8:]
    assert all(torch.equal(resumed.weights[name], value) for name, value in undisturbed.weights.items())


@pytest.mark.parametrize(("steps", "decay"), [(STEPS, 0.1), pytest.param(50, 0.0, marks=pytest.mark.slow), (50, 0.01)])
@pytest.mark.parametrize("stage", [0, 2], ids=["ddp", "zero-2"])
def test_a_compact_vocabulary_is_the_whole_one(
    result_of: Any, folder: Path, stage: int, steps: int, decay: float
) -> None:
    """The matrix after AdamW steps with clipping and weight decay, which unused rows go through as well: that of the
    same ranks, and that of one process."""
    run = Run(str(folder), max_tokens=WHOLE, decay=decay, steps=steps)
    whole = replace(run, compact="off")
    ours, same, alone = result_of(replace(run, stage=stage)), result_of(replace(whole, stage=stage)), train(whole)
    name = "encoder.backbone.embeddings.word_embeddings"
    expected, trained = same.weights[f"{name}.weight"], ours.weights[f"{name}.weight"]
    used = ours.weights[f"{name}.used_ids"]
    assert trained.shape[0] == len(used) < expected.shape[0]
    base = load_file(folder / "encoder" / "model.safetensors")["embeddings.word_embeddings.weight"]
    matrix = base * ours.weights[f"{name}.decay"].float()
    matrix[used] = trained
    unused = torch.ones(len(base), dtype=torch.bool).index_fill(0, used, False)
    assert (float((base - expected)[unused].abs().max()) > 1e-5) == (decay > 0)
    assert_close(matrix, expected, rtol=0.0, atol=1e-6)
    assert max(ours.norms) > CLIP
    for other in (same, alone):
        theirs = other.weights[f"{name}.weight"]
        # Which is rounded at every step.
        assert_close(matrix[unused], theirs[unused], rtol=1e-6 * steps / STEPS, atol=0.0)
        assert relative_error({name: matrix}, {name: theirs}) < 1e-5
        assert ours.norms == pytest.approx(other.norms, rel=1e-5)


@pytest.mark.slow  # a minute of compiling on each rank
@pytest.mark.parametrize("stage", [0, 2], ids=["ddp", "zero-2"])
def test_compiled_layers_train_the_same_weights(result_of: Any, folder: Path, stage: int) -> None:
    """With the same dropout masks, chunks computed again, and evaluations in between."""
    run = Run(str(folder), stage, loss="InfoNCE", dropout=0.1)
    expected, result = result_of(run), result_of(replace(run, compiled=True))
    assert relative_error(result.gradients, expected.gradients) < 1e-5
    assert result.norms == pytest.approx(expected.norms, rel=1e-4)
    assert weight_error(result, expected) < 1e-4
    assert result.metrics == [pytest.approx(metrics, abs=1e-3) for metrics in expected.metrics]


class Scaled(CosineSimilarity):
    """Of a user, who trains a single number."""

    def build(self, embedding_dimension: int) -> None:
        self.scale = nn.Parameter(torch.tensor(1.0))


def fit_with(run: Run, loss: Loss, losses: dict[str, Loss]) -> None:
    module, data, trainer = build(run, [Scores(Result())])
    module.loss, module.losses = loss, nn.ModuleDict(losses)
    trainer.fit(module, datamodule=data)


def test_what_zero_cannot_share_out_is_refused(ranks: TwoRanks, folder: Path) -> None:
    run = Run(str(folder), 3)
    said = ranks(message_of, fit_with, replace(run, compiled=True), CosineSimilarity(), {})
    assert all("compile_layers is true, but ZeRO stage 3 gathers" in one and "take stage 2" in one for one in said)
    said = ranks(message_of, fit_with, run, CosineSimilarity(), {"classes": Softmax(num_labels=3)})
    assert all(
        "model.losses: Softmax has weights of its own, which ZeRO stage 3 gathers only in" in one for one in said
    )
    said = ranks(message_of, fit_with, replace(run, stage=2), Scaled(), {})
    assert said == ["loss.scale has no length, so ZeRO can't share it out: make it of shape (1,)"] * 2


class Forked(CosineSimilarity):
    """Of a user, whose graph on the second rank is another one from the second step on: its heads come in another
    order, or it leaves out the other one of them."""

    def __init__(self, drops: bool) -> None:
        super().__init__()
        self.drops, self.num_steps = drops, 0

    def build(self, embedding_dimension: int) -> None:
        self.one, self.other = (nn.Linear(embedding_dimension, embedding_dimension, bias=False) for _ in range(2))

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        self.num_steps += 1
        heads = [self.one, self.other]
        if self.num_steps > 1 and gather.rank() == 1:
            heads.reverse()
        if self.drops and self.num_steps > 1:
            heads.pop()
        return super().forward([column + sum(head(column) for head in heads) for column in columns], targets)


class Kept(Callback):
    """The weights before the last step, and those that the run ended with."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.num_steps, self.before = trainer.global_step, keep_on_first_rank(whole_weights(trainer.strategy))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.after = keep_on_first_rank(whole_weights(trainer.strategy))


def fork(run: Run, drops: bool) -> tuple[str, int, bool]:
    """What the run ends with, the steps that it has taken, and whether the refused one has left the weights alone."""
    kept = Kept()
    module, data, trainer = build(run, [kept])
    module.loss = Forked(drops)
    said = message_of(partial(trainer.fit, module, datamodule=data))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())
    return said, kept.num_steps, all(torch.equal(kept.after[name], value) for name, value in kept.before.items())


@pytest.mark.parametrize(("stage", "drops"), [(2, False), (1, True), (2, True)])
def test_gradients_of_different_weights_are_not_added_up(
    ranks: TwoRanks, folder: Path, stage: int, drops: bool
) -> None:
    """Of the same sizes, so that the collectives see no difference."""
    first, second = ranks(fork, Run(str(folder), stage), drops)
    assert first == second
    said, num_steps, kept = first
    assert said.startswith("step 2: ZeRO adds up the gradient of loss.o")
    assert re.search(r"of loss\.(one|other)\.weight on rank 0 and that of loss\.(?!\1)\w+\.weight on rank 1, for", said)
    assert said.endswith("no weight was changed. Take DDP (configs/hardware/ddp.yaml)")
    assert (num_steps, kept) == (1, True)


def test_stage_1_takes_gradients_in_any_order(ranks: TwoRanks, folder: Path) -> None:
    """It walks over the weights in an order of its own."""
    ours, alone = ranks(fit_forked, Run(str(folder), 1, steps=4)), fit_forked(Run(str(folder), steps=4))
    assert weight_error(ours[0], alone) < 1e-5


def fit_forked(run: Run) -> Result:
    watch = Watch(run)
    module, data, trainer = build(run, [watch])
    module.loss = Forked(drops=False)
    trainer.fit(module, datamodule=data)
    return watch.result


def test_less_than_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^trainer.strategy: ZeRO live_parameters is -1; it must be 0 or more$"):
        ZeRO(3, live_parameters=-1)


def dropping_layers(folder: Path, of: Path, **rates: float) -> Run:
    """A run of a BART that leaves out layers in training and has no other dropout, on the rows and pieces ``of``."""
    sizes = {"d_model": 32, "vocab_size": 400, "max_position_embeddings": 200, "pad_token_id": 0, "bos_token_id": 2}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 32}
    folder.mkdir()
    torch.manual_seed(0)
    BartModel(BartConfig(dropout=0.0, **sizes, **rates)).save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(of / "encoder").save_pretrained(folder / "encoder")
    for name in ("rows.jsonl", "dev.jsonl"):
        (folder / name).symlink_to(of / name)
    return Run(str(folder), dropout=None, steps=4)


def test_weights_that_a_step_leaves_out(ranks: TwoRanks, folder: Path, tmp_path: Path) -> None:
    """Under DDP as in one process: they have no gradient and do not decay. ZeRO sums gradients in the order in which
    they come, and refuses ranks that may leave out different layers."""
    always = dropping_layers(tmp_path / "always", folder, encoder_layerdrop=1.0)
    alone, (first, second) = train(always), ranks(train, always)
    idle = {name for name in alone.weights if ".encoder.layers." in name}
    assert idle
    assert not idle & (alone.gradients.keys() | first.gradients.keys())
    assert weight_error(first, alone) < 1e-5
    assert all(torch.equal(alone.weights[name], first.weights[name]) for name in idle)
    often = dropping_layers(tmp_path / "often", folder, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    first, second = ranks(train, often)
    assert first.norms == second.norms
    assert len(first.norms) == often.steps
    said = ranks(message_of, train, replace(often, stage=2))
    assert all("'bart' drops whole layers in training (layerdrop" in one and "dropout to 0" in one for one in said)
    alone, (first, _) = train(replace(often, dropout=0.0)), ranks(train, replace(often, dropout=0.0, stage=2))
    assert weight_error(first, alone) < 1e-5


def test_ranks_with_few_chunks_wait_for_those_with_more(results_of: Any, folder: Path) -> None:
    """Under DDP the ranks run as many forwards as they have chunks; under stage 3 a forward is a collective."""
    run = Run(str(folder), loss="InfoNCE")
    one, other = results_of(run)
    assert one.num_forwards != other.num_forwards
    one, other = results_of(replace(run, stage=3))
    assert one.num_forwards == other.num_forwards


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_evaluation_in_the_middle_of_training(result_of: Any, folder: Path, stage: int) -> None:
    """At a rate below what float32 tells apart the weights stay, so all evaluations of all stages are one."""
    run = Run(str(folder), learning_rate=1e-30)
    (expected, *others) = result_of(run).metrics
    assert expected
    assert all(other == pytest.approx(expected, abs=1e-6) for other in others)
    for metrics in result_of(replace(run, stage=stage)).metrics:
        assert metrics == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_bf16(result_of: Any, folder: Path, stage: int) -> None:
    """Weights stay fp32 and autocast rounds as it does under DDP; a float64 count stays what it is."""
    run = Run(str(folder), precision="bf16-mixed")
    expected, result = result_of(run), result_of(replace(run, stage=stage))
    assert {n: w.dtype for n, w in result.weights.items()} == {n: w.dtype for n, w in expected.weights.items()}
    assert result.norms[0] != result_of(replace(run, precision="32-true", stage=stage)).norms[0], "no autocast"
    assert relative_error(result.gradients, expected.gradients) < 1e-2
    assert weight_error(result, expected) < 1e-2


@pytest.mark.slow  # a step of either is taken in test_configs
@pytest.mark.parametrize("stage", [2, 3])
def test_offload(result_of: Any, folder: Path, stage: int) -> None:
    expected, result = (result_of(Run(str(folder), stage=stage, offload=offload)) for offload in (False, True))
    assert result.norms == pytest.approx(expected.norms, rel=1e-5)
    assert weight_error(result, expected) < 1e-5


@pytest.mark.slow  # quick enough: a run that goes on under any strategy, and DDP killed (tests/test_resume.py)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_run_ends_bitwise_equal(ranks: TwoRanks, folder: Path, tmp_path: Path, stage: int) -> None:
    """Saved behind step 8, killed with SIGKILL before step 12, dropout on."""
    run = Run(str(folder), stage=stage, dropout=0.1)
    expected, _ = ranks(train, run)
    path = str(tmp_path / "step-00000007")
    with pytest.raises(RankError, match="exit code -9"):
        ranks(train, replace(run, save_at=8, save_to=path, kill_at=11))
    result, _ = ranks(train, replace(run, resume=path))
    assert result.norms == expected.norms[8:]
    assert result.rates == expected.rates[8:]
    assert all(torch.equal(result.weights[name], value) for name, value in expected.weights.items())
    for number, state in expected.optimizer["state"].items():
        assert all(torch.equal(result.optimizer["state"][number][key], value) for key, value in state.items())


def test_a_run_goes_on_under_any_strategy(ranks: TwoRanks, result_of: Any, folder: Path, tmp_path: Path) -> None:
    """Saved by DDP, one process, or any stage; gone on with by another: as if nothing had changed."""
    run = Run(str(folder), max_tokens=WHOLE)
    expected = result_of(run)
    saved: dict[int | str, str] = {}
    for stage in (0, 2, 3):
        saved[stage] = str(tmp_path / f"stage-{stage}")
        ranks(train, replace(run, stage=stage, save_at=8, save_to=saved[stage]))
    saved["alone"] = str(tmp_path / "alone")
    train(replace(run, save_at=8, save_to=saved["alone"]))
    moves: list[tuple[int | str, Any]] = [(2, 0), (2, "alone"), (2, 3), (0, 2), ("alone", 3), (3, 2), (3, 1)]
    for source, target in moves:
        resumed = replace(run, resume=saved[source], stage=0 if target == "alone" else target)
        result = train(resumed) if target == "alone" else ranks(train, resumed)[0]
        assert len(result.norms) == STEPS - 8
        assert weight_error(result, expected) < 1e-5, (source, target)
    contents = [read_state(Path(path)) for path in saved.values()]
    for content in contents:
        assert content.keys() == contents[0].keys()
        assert list(content["state_dict"]) == list(contents[0]["state_dict"])
        assert content["optimizer_states"][0]["param_groups"] == contents[0]["optimizer_states"][0]["param_groups"]


class StopAt(Callback):
    """Spoils the loss of one step, and raises when the norm is seen, before the optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        self.norms: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.before = keep_on_first_rank(whole_weights(trainer.strategy))
            pl_module.loss.scale = math.nan  # type: ignore[union-attr]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert isinstance(trainer.strategy, ZeRO)
        norm = float(trainer.strategy.gradient_norm())
        self.norms.append((norm, norm_of(dict(whole_gradients(trainer.strategy)))))
        if not math.isfinite(norm):
            raise ArithmeticError("stop")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.after = keep_on_first_rank(whole_weights(trainer.strategy))


def stop(run: Run) -> tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, Tensor]]:
    callback = StopAt(3)
    module, data, trainer = build(run, [callback])
    with pytest.raises(ArithmeticError, match="stop"):
        trainer.fit(module, datamodule=data)
    return callback.norms, callback.before, callback.after


@pytest.mark.parametrize("stage", STAGES)
def test_norm_is_known_before_the_step(ranks: TwoRanks, folder: Path, stage: int) -> None:
    """It is that of the gradients, equal on all ranks, not finite if they are not; whoever raises then keeps the
    weights as they were."""
    (norms, before, after), (others, *_) = ranks(stop, Run(str(folder), stage=stage, loss="InfoNCE"))
    assert [norm for norm, _ in norms] == [norm for norm, _ in others]
    assert len(norms) == 4
    for norm, expected in norms[:3]:
        assert norm == pytest.approx(expected, rel=1e-5)
    assert norms[3][0] == math.inf
    assert len(before) > 10
    assert all(torch.equal(after[name], value) for name, value in before.items())


def exact(run: Run) -> int:
    module, data, trainer = build(run, [])
    return check_exact(SimpleNamespace(model=module, datamodule=data, trainer=trainer))


@pytest.mark.parametrize("stage", STAGES)
def test_exactness_check(ranks: TwoRanks, folder: Path, stage: int) -> None:
    """The self-check passes under every stage, with dropout configured and the ranks in unequal chunks."""
    assert ranks(exact, Run(str(folder), stage=stage, dropout=0.1, loss="Softmax")) == [0, 0]


def test_half_precision_without_masters_is_refused(folder: Path) -> None:
    module, data, trainer = build(Run(str(folder), stage=2, precision="bf16-true"), [])
    with pytest.raises(ValueError, match=r"trainer\.precision is bf16-true; ZeRO runs in 32-true or bf16-mixed"):
        trainer.fit(module, datamodule=data)
