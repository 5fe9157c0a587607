"""What the command line refuses and how it says so, where runs live, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401 - before any test: its log handler keeps the stderr that it finds
import pytest
import torch
import yaml
from sentence_transformers.sentence_transformer import evaluation as st_evaluation
from sentence_transformers.sentence_transformer import losses as st_losses

from tests.compare.made_runs import make_run
from tests.tiny_recipe import write_tiny_recipe
from trainer import evaluation, lightning_cli, losses
from trainer.cli import main
from trainer.config_errors import _dotted_keys
from trainer.config_files import Flag, read_command
from trainer.config_migration import CLASS_HERE, KEY_HERE, class_here
from trainer.help_text import live_parsers
from trainer.lightning_cli import GROUPS, LINKS, run
from trainer.manifest import read_manifest, read_state, write_checkpoint
from trainer.run_dir import is_first_rank, name_run, rank_name
from trainer.tracking.metrics import run_id_in

CONFIG = """\
seed_everything: 42
model:
  encoder: {backbone: some/model, max_length: 32}
  loss: {class_path: InfoNCE, init_args: {scale: 20.0}}
  learning_rate: 1.0e-3
data:
  train:
    - path: train.jsonl.gz
      columns: {anchor: sentence1, positive: sentence2, score: score}
      score_range: [0, 5]
  validation:
    - {name: dev, path: dev.jsonl.gz, columns: {anchor: sentence1, positive: sentence2}, evaluator: STS}
  batch_size: 16
trainer:
  max_epochs: 1
  default_root_dir: run
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in a folder of its own, as a process that no launcher started."""
    for name in [name for name in os.environ if name.startswith("SLURM_") or name.endswith("RANK")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("TRAINER_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], args: Sequence[str], code: int = 2) -> str:
    """What a command says on stderr when it ends with ``code``; no traceback, no usage, nothing trained."""
    capsys.readouterr()
    assert main(list(args)) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "usage:" not in said
    assert not Path("run").exists()
    return said.strip()


def test_keys_of_other_trainers_lead_to_keys_that_exist() -> None:
    known = {"ckpt_path", "seed_everything", *_dotted_keys(GROUPS)} - LINKS.keys()
    assert {here for here, _ in KEY_HERE.values()} <= known
    assert not {key for key in KEY_HERE if any(name.endswith(f".{key}") for name in known)}


def test_classes_of_sentence_transformers_lead_to_classes_that_exist() -> None:
    """Each loss and evaluator of the installed version is led somewhere, or is known to be nowhere."""
    for there, here in ((st_losses, losses), (st_evaluation, evaluation)):
        known = [name for name in here.__all__ if name not in ("Loss", "Evaluator")]
        theirs = {name for name in there.__all__ if re.search("(Loss|Evaluator)(FromDataFrame)?$", name)}
        for name in theirs - {"BaseEvaluator", "SentenceEvaluator"}:
            assert class_here(name, known) is not None, name
            assert bool(class_here(name, known)) == bool(CLASS_HERE.get(name, "same")), name
    for name, here in CLASS_HERE.items():
        assert not here or class_here(name, [*losses.__all__, *evaluation.__all__]), name
        options = dict(re.findall(r"(\w+): (\[.*?\]|\w+)", here))
        if options and here.startswith(("BatchTriplet", "InfoNCE")):
            cls = getattr(losses, here.split()[0])
            cls(**{option: yaml.safe_load(value) for option, value in options.items()})
    assert class_here("TripletLoss", ["STS"]) is None
    for name in ("multiplenegativesranking", "MultipleNegativesRanking", "infonce", "InfoNCELoss"):
        assert class_here(name, losses.__all__) == "; here it is InfoNCE"


# -- keys and values --------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "unknown key": (
        "learning_rate:",
        "learning_rat:",
        "x.yaml:5: unknown key 'model.learning_rat'; did you mean 'model.learning_rate'?",
    ),
    "unknown group": (
        "batch_size: 16",
        "batch_size: 16\nmodle: {x: 1}",
        "x.yaml:14: unknown key 'modle'; did you mean 'model'?",
    ),
    "wrong level": (
        "seed_everything: 42",
        "learning_rate: 42",
        "x.yaml:1: unknown key 'learning_rate'; did you mean 'model.learning_rate'?",
    ),
    "nothing near": (
        "batch_size: 16",
        "zzz: 16",
        "x.yaml:13: unknown key 'data.zzz'; keys here: train, encoder, validation, batch_size, no_duplicates, "
        "mixing, num_workers, max_rows, cache_dir, stream_cache_gib",
    ),
    "key of another trainer": (
        "batch_size: 16",
        "per_device_train_batch_size: 16",
        "x.yaml:13: unknown key 'data.per_device_train_batch_size'; here it is data.batch_size (rows over all ranks)",
    ),
    "in a dataclass": (
        "max_length: 32",
        "max_len: 32",
        "x.yaml:3: unknown key 'model.encoder.max_len'; did you mean 'model.encoder.max_length'?",
    ),
    "in a list": (
        "      score_range",
        "      score_rang",
        "x.yaml:10: unknown key 'data.train[0].score_rang'; did you mean 'data.train[0].score_range'?",
    ),
    "in an inline list item": (
        "name: dev",
        "nam: dev",
        "x.yaml:12: unknown key 'data.validation[0].nam'; did you mean 'data.validation[0].name'?",
    ),
    "keys for a list": (
        "    - path: train.jsonl.gz\n",
        "      path: train.jsonl.gz\n",
        "x.yaml:8: data.train must be a list (keys (path, columns, score_range, ...) each), "
        "found keys (path, columns, score_range); put '- ' before path",
    ),
    "keys for a list that may be left out": (
        "    - {name: dev, path",
        "      {name: dev, path",
        "x.yaml:12: data.validation must be a list (keys (path, columns, score_range, ...) each), "
        "found keys (name, path, columns, evaluator); put '- ' before name",
    ),
    "of a class": (
        "{scale: 20.0}",
        "{scal: 20.0}",
        "x.yaml:4: unknown key 'model.loss.init_args.scal'; did you mean 'model.loss.init_args.scale'?",
    ),
    "beside class_path": (
        "init_args: {scale: 20.0}",
        "scale: 20.0",
        "x.yaml:4: unknown key 'model.loss.scale' beside class_path; what the class takes goes below "
        "'model.loss.init_args'",
    ),
    "class": (
        "class_path: InfoNCE",
        "class_path: InfoNC",
        "x.yaml:4: model.loss.class_path: 'InfoNC' is no Loss; did you mean 'InfoNCE'?",
    ),
    "missing in a list": (
        "    - path: train.jsonl.gz\n      c",
        "    - c",
        "x.yaml:8: data.train[0] has no 'path'",
    ),
    "missing": (
        "  loss: {class_path: InfoNCE, init_args: {scale: 20.0}}\n",
        "",
        "no value for 'model.loss': set it in a --config file or as a flag",
    ),
    "number": (
        "1.0e-3",
        "fast",
        "x.yaml:5: model.learning_rate must be a number, found 'fast' (text)",
    ),
    "number of a class": (
        "scale: 20.0",
        "scale: [1]",
        "x.yaml:4: model.loss.init_args.scale must be a number, found a list of 1",
    ),
    "tuple": (
        "[0, 5]",
        "[0, 3, 5]",
        "x.yaml:10: data.train[0].score_range must be a list of 2: a number, a number, found a list of 3",
    ),
    "choice": (
        "max_length: 32",
        "pooling: meen",
        "x.yaml:3: model.encoder.pooling must be one of auto, mean, cls, max, last, found 'meen' (text)",
    ),
    "yaml no": (
        "backbone: some/model",
        "backbone: no",
        'x.yaml:3: model.encoder.backbone must be text, but YAML reads no as false; quote it: "no"',
    ),
    "yaml on in a dict": (
        "positive: sentence2, score",
        "positive: on, score",
        "x.yaml:9: data.train[0].columns.positive must be a whole number or text, but YAML reads on as true; "
        'quote it: "on"',
    ),
    "yaml on as a key": (
        "{anchor: sentence1, positive: sentence2, score",
        "{on: sentence1, positive: sentence2, score",
        'x.yaml:9: the key data.train[0].columns.on is not text: YAML reads on as true or false; quote it: "on"',
    ),
    "yaml off": (
        "trainer:\n",
        "tracking: {wandb: off}\ntrainer:\n",
        "x.yaml:14: tracking.wandb must be one of auto, online, offline, off, but YAML reads off as false; "
        'quote it: "off"',
    ),
    "a number for text": (
        "path: train.jsonl.gz",
        "path: 5",
        "x.yaml:8: data.train[0].path must be text, found '5' (a whole number); quote it: \"5\"",
    ),
    "a word for a group": (
        "trainer:\n",
        "tracking: off\ntrainer:\n",
        "x.yaml:14: tracking must be keys (wandb, project, entity, ...), found 'off' (true or false)",
    ),
    "a key twice": (
        "  learning_rate: 1.0e-3",
        "  learning_rate: 1.0e-3\n  learning_rate: 2.0e-3",
        "x.yaml:6: key 'model.learning_rate' was already set in line 5; keep one of the two",
    ),
    "a group twice": (
        "trainer:\n",
        "model: {learning_rate: 3}\ntrainer:\n",
        "x.yaml:14: key 'model' was already set in line 2; keep one of the two",
    ),
    "a linked key": (
        "batch_size: 16",
        "seed: 3",
        "x.yaml:13: 'data.seed' always follows 'seed_everything'; set that one",
    ),
    "the encoder of the data": (
        "batch_size: 16",
        "encoder: {max_length: 7}",
        "x.yaml:13: 'data.encoder.max_length' always follows 'model.encoder.max_length'; set that one",
    ),
    "accumulation": (
        "max_epochs: 1",
        "accumulate_grad_batches: 4",
        "x.yaml:15: trainer.accumulate_grad_batches stays 1: data.batch_size is the global batch of one "
        "optimizer step, and model.max_tokens bounds the memory of one forward: set these two instead",
    ),
    "nothing behind a key": (
        "batch_size: 16",
        "batch_size:",
        "x.yaml:13: data.batch_size must be a whole number, found nothing",
    ),
    "nothing behind a key that may be a word": (
        "max_epochs: 1",
        "strategy:",
        "x.yaml:15: trainer.strategy must be text or a Strategy, found nothing",
    ),
    "nothing behind a key of a source": (
        "score_range: [0, 5]",
        "holdout: null",
        "x.yaml:10: data.train[0].holdout must be a number, found nothing",
    ),
    "nothing behind a key that must be given": (
        "name: dev",
        "name: null",
        "x.yaml:12: data.validation[0].name must be text, found nothing",
    ),
    "a word for keys of which none must be given": (
        "max_length: 32",
        "lora: true",
        "x.yaml:3: model.encoder.lora must be keys (r, alpha, dropout, ...), found true",
    ),
    "a seed that is none": (
        "seed_everything: 42",
        "seed_everything: true",
        "x.yaml:1: seed_everything must be a whole number, found true",
    ),
    "not YAML": (
        "max_epochs: 1",
        "max_epochs: [1",
        "x.yaml:16: not valid YAML: expected ',' or ']', but got ':'",
    ),
    "a tab": (
        "  max_epochs: 1",
        "\tmax_epochs: 1",
        "x.yaml:15: not valid YAML: found character '\\t' that cannot start any token; indent by spaces",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_is_refused(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Cause, file, line and remedy, and nothing else."""
    old, new, sentence = BAD_CONFIGS[case]
    assert CONFIG.count(old) == 1
    Path("x.yaml").write_text(CONFIG.replace(old, new))
    assert refused(capsys, ["fit", "--config", "x.yaml"]) == sentence


def test_all_problems_at_once_in_all_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text(CONFIG.replace("learning_rate", "lerning_rate").replace("name: dev", "nme: dev"))
    Path("y.yaml").write_text("trainer: {max_epoch: 2}\n")
    said = refused(capsys, ["fit", "--config", "x.yaml", "--config", "y.yaml", "--data.batchsize", "3"])
    places = ["x.yaml:5", "x.yaml:12", "y.yaml:1", "flag --data.batchsize"]
    assert [line.partition(": ")[0] for line in said.splitlines()] == places


def test_nothing_behind_a_key_is_filled_by_what_stands_behind_it() -> None:
    Path("x.yaml").write_text(CONFIG.replace("batch_size: 16", "batch_size:").replace("score_range: [0, 5]", "weight:"))
    args = ["--config", "x.yaml", "--data.batch_size", "4", "--data.train.weight", "1", "--trainer.accelerator", "cpu"]
    assert run(["fit", *args], read_command(args), execute=False).datamodule.batch_size == 4


BAD_FLAGS = {
    "--model.learning_rat=1": "flag --model.learning_rat: unknown key 'model.learning_rat'; "
    "did you mean 'model.learning_rate'?",
    "--trainer.max_step 2": "flag --trainer.max_step: unknown key 'trainer.max_step'; "
    "did you mean 'trainer.max_steps'?",
    "--model.loss.scal 3": "flag --model.loss.scal: unknown key 'model.loss.scal'; did you mean 'model.loss.scale'?",
    "--data.train.holdout x": "flag --data.train.holdout must be a number, found 'x'",
    "--data.validation.holdout x": "flag --data.validation.holdout must be a number, found 'x'",
    "--data.validation.colums x": "flag --data.validation.colums: unknown key 'data.validation.colums'; "
    "did you mean 'data.validation.columns'?",
    "--data.validation.evaluator STSS": "flag --data.validation.evaluator: 'STSS' is no Evaluator; did you mean 'STS'?",
    "--model.loss contrastiv": "flag --model.loss: 'contrastiv' is no Loss; did you mean 'Contrastive'?",
    "--model.loss.num_labels 3": "flag --model.loss.num_labels: InfoNCE takes no 'num_labels'; it takes scale, "
    "similarity, directions, partition, hardness, hardness_strength, mask_false_negatives",
    "--model.loss.scale x": "flag --model.loss.scale must be a number, found 'x'",
    "--model.loss CosineSimilarity --model.loss.scale 3": "flag --model.loss.scale: CosineSimilarity takes no 'scale'; "
    "it takes nothing",
    "--seed 1": "flag --seed: unknown key 'seed'; here it is seed_everything",
    "--learning-rate 1e-4": "flag --learning-rate: unknown key 'learning-rate'; did you mean 'model.learning_rate'?",
    "--model.per-device-eval-batch-size 8": "flag --model.per-device-eval-batch-size: unknown key "
    "'model.per-device-eval-batch-size'; here it is model.max_tokens (in tokens, of training and evaluation)",
    "--allow x": "flag --allow: unknown key 'allow'; did you mean 'resume.allow' or 'check.allow'?",
    "--batch_size 3": "flag --batch_size: unknown key 'batch_size'; did you mean 'data.batch_size'?",
    "--model.learning_rate fast": "flag --model.learning_rate must be a number, found 'fast'",
    "--model.learning_rate": "flag --model.learning_rate must be a number, found nothing",
    "--model.loss InfoNC": "flag --model.loss: 'InfoNC' is no Loss; did you mean 'InfoNCE'?",
    "--model.loss MultipleNegativesRankingLoss": "flag --model.loss: 'MultipleNegativesRankingLoss' is no Loss; "
    "here it is InfoNCE",
    "--model.loss BatchSemiHardTripletLoss": "flag --model.loss: 'BatchSemiHardTripletLoss' is no Loss; "
    "here it is BatchTriplet with mining: semi_hard",
    "--model.loss sentence_transformers.losses.GISTEmbedLoss": "flag --model.loss: "
    "'sentence_transformers.losses.GISTEmbedLoss' is no Loss; here it is GISTEmbed",
    "--data.validation.evaluator EmbeddingSimilarityEvaluator": "flag --data.validation.evaluator: "
    "'EmbeddingSimilarityEvaluator' is no Evaluator; here it is STS",
    "--tracking.wandb of": "flag --tracking.wandb must be one of auto, online, offline, off, found 'of'",
    "--data.seed 3": "flag --data.seed: 'data.seed' always follows 'seed_everything'; set that one",
    "--trainer.accumulate_grad_batches 2": "flag --trainer.accumulate_grad_batches: "
    "trainer.accumulate_grad_batches stays 1: data.batch_size is the global batch of one optimizer step, and "
    "model.max_tokens bounds the memory of one forward: set these two instead",
    "--trainer.overfit_batches 3": "flag --trainer.overfit_batches: trainer.overfit_batches stays 0: data decides "
    "which rows form a step: to see whether a few rows can be learnt, set data.max_rows",
    **{
        f"--trainer.fast_dev_run {value}": "flag --trainer.fast_dev_run: trainer.fast_dev_run stays false: the few "
        "steps would stay as a run that the true one goes on from: to try a config, add --config "
        "configs/hardware/debug.yaml, whose run has a directory of its own (once more: --trainer.default_root_dir "
        "OTHER)"
        for value in ("1", "true")
    },
    "--trainer.enable_checkpointing false": "flag --trainer.enable_checkpointing: trainer.enable_checkpointing stays "
    "true: a run goes on, and exports its model, from its checkpoints: to keep few, set checkpoint.save_every_steps "
    "and checkpoint.keep",
    "--trainer.limit_train_batches 0": "flag --trainer.limit_train_batches: trainer.limit_train_batches is 0; it must "
    "be above 0: to evaluate without training, run trainer validate",
    "--trainer.limit_train_batches=-1": "flag --trainer.limit_train_batches: trainer.limit_train_batches is -1; it "
    "must be above 0: to evaluate without training, run trainer validate",
    **{
        f"--trainer.{key}={value}": f"flag --trainer.{key}: trainer.{key} is {value}; it must be 1 or more, or -1 for "
        "no limit: to evaluate without training, run trainer validate"
        for key, value in (("max_epochs", 0), ("max_steps", 0), ("max_epochs", -2), ("max_steps", -5))
    },
    "--trainer.val_check_interval 0": "flag --trainer.val_check_interval: trainer.val_check_interval is 0; it must be "
    "above 0: to never evaluate, set trainer.limit_val_batches: 0",
    "--trainer.val_check_interval 0.0": "flag --trainer.val_check_interval: trainer.val_check_interval is 0.0; it must "
    "be above 0: to never evaluate, set trainer.limit_val_batches: 0",
    **{
        f"--trainer.limit_{which}_batches {value}": f"flag --trainer.limit_{which}_batches: "
        f"trainer.limit_{which}_batches is {value}, but whole sets are scored: take 0 (nothing) or 1.0 (all); for "
        "fewer rows set max_rows of the set in data.validation"
        for which, value in (("val", "2"), ("val", "1"), ("val", "0.5"), ("val", "-1"), ("test", "2"))
    },
    "--trainer.gradient_clip_val -1": "flag --trainer.gradient_clip_val: trainer.gradient_clip_val is -1; it must be "
    "above 0, or 0 to clip nothing",
    "--trainer.gradient_clip_val .nan": "flag --trainer.gradient_clip_val: trainer.gradient_clip_val is nan; it must "
    "be above 0, or 0 to clip nothing",
    "--seed_everything=-1": "flag --seed_everything: seed_everything is -1; it must be 0 to 4294967295",
    "--seed_everything 4294967296": "flag --seed_everything: seed_everything is 4294967296; it must be 0 to 4294967295",
    "--trainer.barebones true": "flag --trainer.barebones: trainer.barebones stays false: it takes away the "
    "checkpoints, which a run exports its model from, and the log",
    **{
        f"--trainer.{key}={value}": f"flag --trainer.{key}: trainer.{key} is {value}; it must be {value + 1} or more"
        for key, value in (("log_every_n_steps", -1), ("min_steps", -1), ("min_epochs", -1))
    },
    "--trainer.num_sanity_val_steps=-2": "flag --trainer.num_sanity_val_steps: trainer.num_sanity_val_steps is -2; it "
    "must be -1 or more",
    "--trainer.val_check_interval 00:00:01:00": "flag --trainer.val_check_interval: trainer.val_check_interval is a "
    "time, but clocks differ between ranks. Give a number of steps (500) or a fraction of an epoch (0.5).",
    **{
        f'--trainer.max_steps 1 --trainer.max_time {{"{unit}":{number}}}': "flag --trainer.max_time: trainer.max_time "
        f"is {{'{unit}': {number}}}; give a number of days, hours, minutes or seconds"
        for unit, number in (("hour", 1), ("hours", 10**12))
    },
    **{
        f"--trainer.strategy {name}": f"flag --trainer.strategy: trainer.strategy is '{name}'; take auto or ddp, or a "
        "class with class_path, as configs/hardware/zero2.yaml does for ZeRO"
        for name in ("ZeRO", "zero2", "null")
    },
    "--trainer.precision bf16-true": "flag --trainer.precision: trainer.precision is bf16-true, but weights stay in "
    "float32: take one of 32-true, bf16-mixed, 16-mixed",
    "--checkpoint null": "flag --checkpoint must be keys (save_every_steps, keep, monitor, ...), found 'null': it "
    "can't be switched off",
    "--watch 60": "flag --watch must be keys (timeout_s, ...), found '60'",
    **{
        f"--trainer.devices {value}": f"flag --trainer.devices: trainer.devices is '{said or value}'; it must be the "
        "number on each node, 1 or more, or auto"
        for value, said in (("many", ""), ("0", ""), ("-1", ""), ("[0,1]", "[0, 1]"), ("1.5", ""))
    },
    "--trainer.accelerator gpu --trainer.devices 1,x": "flag --trainer.devices: trainer.devices is '1,x'; it must be "
    "the number on each node, 1 or more, or auto, -1 for all, or the ids of GPUs in a list",
    "--trainer.accelerator blah": "flag --trainer.accelerator: trainer.accelerator is 'blah'; take one of auto, cpu, "
    "gpu, cuda, mps",
    "--trainer.num_nodes 0": "flag --trainer.num_nodes: trainer.num_nodes is 0; it must be 1 or more",
    '--trainer.max_time {"hours":-1}': "flag --trainer.max_time: this gives the training -3600 seconds; it must be "
    "more than 0",
    "--trainer.check_val_every_n_epoch 0": "flag --trainer.check_val_every_n_epoch: trainer.check_val_every_n_epoch "
    "is 0; it must be above 0: to never evaluate, set trainer.limit_val_batches: 0",
    "--trainer.logger CSVLogger": "trainer.logger: Problem with given class_path "
    "'lightning.pytorch.loggers.CSVLogger': the following arguments are required: save_dir",
    "--data.train nope.jsonl": "flag --data.train must be a list (keys (path, columns, score_range, ...) each), found "
    "'nope.jsonl'; did you mean --data.train.path?",
    "-config y.yaml": "'-config' belongs to no flag; did you mean '--config'?",
    "y.yaml": "'y.yaml' belongs to no flag; did you mean --config y.yaml?",
    "--trainer.max_epochs null --trainer.max_time 00:00:01:00": "flag --trainer.max_time: trainer.max_time alone does "
    "not say how long the schedule of the learning rate is: give trainer.max_epochs or trainer.max_steps too",
    '--data.train [{"path":"a","colums":{}}]': "flag --data.train: unknown key 'data.train[0].colums'; did you mean "
    "'data.train[0].columns'?",
    '--model.loss {"class_path":"InfoNCE","init_args":{"scale":"x"}}': "flag --model.loss: model.loss.init_args.scale "
    "must be a number, found 'x' (text)",
    "--ckpt_path runs/x": "--ckpt_path runs/x: no such checkpoint (a folder); auto takes the newest of run",
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_flag_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text(CONFIG)
    args = ["fit", "--config", "x.yaml", "--trainer.accelerator", "cpu", *flag.split()]
    assert refused(capsys, args) == BAD_FLAGS[flag]


def test_one_batch_stays_one_behind_an_import_of_sentence_transformers() -> None:
    """It asks typing for float | int, and typing keeps that order for all who ask for the two behind it."""
    Path("x.yaml").write_text(CONFIG)
    flag = "--trainer.limit_val_batches 1"
    command = ["fit", "--config", "x.yaml", "--trainer.accelerator", "cpu", *flag.split()]
    script = f"import sys, sentence_transformers; from trainer.cli import main; sys.exit(main({command}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (2, BAD_FLAGS[flag])


@pytest.mark.parametrize(
    ("flag", "kind", "known"),
    [
        ("model.loss", "Loss", losses.__all__),
        ("data.validation.evaluator", "Evaluator", evaluation.__all__),
    ],
)
@pytest.mark.parametrize("name", ["Zzz", "MegaBatchMarginLoss", "SequentialEvaluator"])
def test_all_classes_are_named_where_none_is_meant(
    flag: str, kind: str, known: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("x.yaml").write_text(CONFIG)
    said = refused(capsys, ["fit", "--config", "x.yaml", f"--{flag}", name])
    start = f"flag --{flag}: '{name}' is no {kind}; there are: "
    assert said.startswith(start)
    named = said.removeprefix(start).split(", ")
    assert set(known) - {kind} <= set(named)
    assert not [name for name in named if name.startswith(("_", "LazyInstance"))]


OWN_CLASSES = {
    "own_broken.Huber": "can't import module own_broken: No module named 'not_installed'",
    "own_away.Cb": "can't import module own_away: No module named 'own_away'; is its folder on PYTHONPATH?",
    "own_away.losses.Cb": "can't import module own_away.losses: No module named 'own_away'; is its folder on "
    "PYTHONPATH?",
    "own.Hubr": "module own has no Hubr; did you mean 'own.Huber'?",
    "own.Zzz": "module own has no Zzz",
    "own.Cb": "'own.Cb' is no Loss; make it a class that inherits from trainer.losses.base.Loss",
    "sentence_transformers.losses.TripletLos": "module sentence_transformers.losses has no TripletLos; did you mean "
    "'sentence_transformers.losses.TripletLoss'?",
}


@pytest.fixture
def own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules as a user writes them beside a recipe, before anything has imported them."""
    (place / "own_broken.py").write_text("import not_installed\n")
    (place / "own.py").write_text(
        "from lightning.pytorch import Callback\nfrom trainer.losses import Loss\n"
        "class Huber(Loss): ...\nclass Cb(Callback): ...\n"
    )
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "own", raising=False)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", OWN_CLASSES)
def test_why_a_class_of_ones_own_is_not_found(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The right callback behind it, which the parser has not come to, is accused of nothing."""
    old = "{class_path: InfoNCE, init_args: {scale: 20.0}}"
    Path("x.yaml").write_text(
        f"{CONFIG.replace(old, f'{{class_path: {name}}}')}  callbacks: [{{class_path: own.Cb}}]\n"
    )
    assert refused(capsys, ["fit", "--config", "x.yaml"]) == f"x.yaml:4: model.loss.class_path: {OWN_CLASSES[name]}"


@pytest.mark.parametrize("flag", ["trainer.strategy.stage", "model.losses.a.scale"])
def test_keys_of_a_class_that_is_not_named(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text(CONFIG)
    said = refused(capsys, ["fit", "--config", "x.yaml", f"--{flag}", "3"])
    key = ".".join(flag.split(".")[:2])
    assert said == f"{key}: no class is named for these keys; name it in front of them, as class_path"


# -- commands and files -----------------------------------------------------------------------------------

BAD_COMMANDS = {
    "--config configs/x.yaml fit": "the subcommand comes first: trainer fit --config configs/x.yaml",
    "--config=configs/x.yaml": "the subcommand comes first: trainer fit --config=configs/x.yaml",
    "configs/x.yaml": "'configs/x.yaml' is no subcommand; did you mean: trainer fit --config configs/x.yaml",
    "fitt": "'fitt' is no subcommand; did you mean 'fit'?",
    "zzz": "'zzz' is no subcommand; there are: fit, validate, test, predict, mine, export, compare, check, prepare, "
    "preflight, cache, demo",
    "fit": "a recipe is needed: trainer fit --config configs/X.yaml",
    "fit configs/x.yaml": "'configs/x.yaml' belongs to no flag; did you mean --config configs/x.yaml?",
    "fit --config configs": "configs is a directory; name one file in it: --config configs/nli.yaml "
    "(there are: configs/nli.yaml, configs/x.yaml)",
    "fit --config configs/nlii.yaml": "there is no config file configs/nlii.yaml; did you mean configs/nli.yaml?",
    "fit --config nli": "there is no config file nli; did you mean configs/nli.yaml?",
    "fit --config configs/zzzzzz.yaml": "there is no config file configs/zzzzzz.yaml (looked from {cwd})",
    "check": "a recipe is needed: trainer check --config configs/X.yaml",
    "export run": "two paths are needed: trainer export RUN_OR_CHECKPOINT OUT [--legacy] [--format onnx] "
    "[--push OWNER/NAME]",
    "export run model --legcy": "'--legcy' is no flag of trainer export. Did you mean '--legacy'?",
    "export configs model --private": "--private is about a repository: give --push OWNER/NAME too",
    "export configs model --push mine": "--push mine: a repository has an owner and a name, --push OWNER/NAME",
    "export nowhere model": "there is no run or checkpoint nowhere; give the folder that a fit wrote",
    "validate --config configs/x.yaml --ckpt_path auto": "--ckpt_path auto: there is no checkpoint in run",
    "test --config configs/x.yaml --ckpt_path best": "--ckpt_path best: there is no checkpoint in run",
    "validate --config configs/x.yaml --data.validation null": "flag --data.validation: data.validation is empty: "
    "trainer validate has nothing to evaluate; name a set in the recipe",
    "test --config configs/none.yaml": "data.validation is empty: trainer test has nothing to evaluate; name a set in "
    "the recipe",
    "test --config configs/x.yaml --trainer.limit_test_batches 0": "flag --trainer.limit_test_batches: "
    "trainer.limit_test_batches is 0: trainer test has nothing to evaluate; leave it out",
    "fit --config configs/x.yaml --ckpt_path best": "--ckpt_path best: there is no checkpoint in run",
    "test --config configs/x.yaml --ckpt_path=": "--ckpt_path '': no such checkpoint (a folder); auto takes the newest "
    "of run",
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_command_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("configs").mkdir()
    Path("configs/x.yaml").write_text(CONFIG)
    Path("configs/nli.yaml").write_text(CONFIG)
    if "none.yaml" in command:  # not there for the others, which list the folder
        Path("configs/none.yaml").write_text("".join(CONFIG.splitlines(True)[:10] + CONFIG.splitlines(True)[13:]))
    assert refused(capsys, command.split()) == BAD_COMMANDS[command].format(cwd=Path.cwd())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "x.yaml is empty; it needs keys such as model: and data:"),
        (b"- 1\n- 2\n", "x.yaml:1: expected keys such as model: and data:, found a list of 2"),
        (
            b"data: {batch_size: {{ rows }}}",
            "x.yaml:1: keys (rows) in place of a key below data.batch_size; quote what is text",
        ),
        (b"model: \xff\n", "x.yaml is not UTF-8 text (invalid start byte at byte 7)"),
    ],
)
def test_file_is_refused(content: bytes, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_bytes(content)
    assert refused(capsys, ["fit", "--config", "x.yaml"]) == sentence


# -- hostile input ----------------------------------------------------------------------------------------

BUILDS = "{class_path: os.system, init_args: {command: touch owned}}"


@pytest.mark.parametrize(
    "hostile",
    [
        f"model: {{loss: {BUILDS}}}",
        f"data: {{validation: [{{name: x, path: x, columns: {{a: b}}, evaluator: {BUILDS}}}]}}",
        *(f"trainer: {{{key}: {BUILDS}}}" for key in ("strategy", "logger", "plugins", "profiler", "accelerator")),
        f"trainer: {{callbacks: [{BUILDS}]}}",
        "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [touch, owned]}}]}",
        "trainer: {callbacks: [{class_path: builtins.exec}]}",
        "model: {loss: !!python/object/apply:os.system [touch owned]}",
        "model: {learning_rate: !owned 3}",
    ],
)
def test_hostile_config_runs_nothing(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text(CONFIG)
    Path("y.yaml").write_text(hostile + "\n")
    assert refused(capsys, ["fit", "--config", "x.yaml", "--config", "y.yaml"]).startswith("y.yaml:1: ")
    assert not Path("owned").exists()


def test_no_key_takes_any_value() -> None:
    """A key of type Any would build whatever class a config names."""

    def parts(hint: Any) -> set[Any]:
        return {hint}.union(*(parts(arg) for arg in typing.get_args(hint)))

    for parser in live_parsers().values():
        hints = {action.dest: getattr(action, "_typehint", str) for action in parser._actions}
        assert len(hints) > 60
        assert [key for key, hint in hints.items() if Any in parts(hint) or object in parts(hint)] == []


# -- run directories --------------------------------------------------------------------------------------


def test_run_name_depends_on_the_overrides_the_seed_and_the_job() -> None:
    flags = [Flag("model.learning_rate", "1e-3"), Flag("data.batch_size", "8")]
    config = ["configs/stsb.yaml", "configs/hardware/ddp.yaml"]
    assert name_run(config, [], 42, {}) == Path("runs/stsb/seed=42")
    name = Path("runs/stsb/batch_size=8_learning_rate=1e-3_seed=7_job=99")
    ranks = {"SLURM_PROCID": "3", "LOCAL_RANK": "1", "SLURM_RESTART_COUNT": "2"}
    assert name_run(config, flags, 7, {"SLURM_JOB_ID": "99"}) == name
    assert name_run(config, flags[::-1], 7, {"SLURM_JOB_ID": "99", **ranks}) == name


def test_run_name_tells_files_by_their_own_names() -> None:
    flags = [
        Flag("data.train.path", "/data/set/a.jsonl.gz"),
        Flag("data.validation.path", "b.jsonl"),
        Flag("model.encoder.backbone", "sentence-transformers/all-MiniLM-L6-v2/"),
    ]
    name = name_run(["a.yaml"], flags, 1, {}).name
    said = "train.path=a.jsonl.gz_validation.path=b.jsonl_backbone=all-MiniLM-L6-v2"
    assert re.fullmatch(rf"{re.escape(said)}-[0-9a-f]{{8}}_seed=1", name)
    flags[0] = Flag("data.train.path", "/other/a.jsonl.gz")
    assert name_run(["a.yaml"], flags, 1, {}).name != name


def test_run_name_shows_the_files_of_the_first_command_in_the_readme() -> None:
    """How they are read is in the hash, whatever the spaces; another range is another run."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (said,) = re.findall(r"trainer fit (--config configs/stsb.*?)\n```", readme, re.S)
    words = shlex.split(said.replace("\\\n", ""))

    def name(words: list[str]) -> str:
        written = read_command(words)
        return name_run(["configs/stsb.yaml"], written.flags, 42, {}).name

    words = [word for word in words if not word.endswith(".yaml") and word != "--config"]
    assert re.fullmatch("train.path=pairs.jsonl.gz_validation.path=dev.jsonl.gz-[0-9a-f]{8}_seed=42", name(words))
    assert name([word.replace("[0, 5]", "[0,5]") for word in words]) == name(words)
    assert name([word.replace("[0, 5]", "[1, 5]") for word in words]) != name(words)
    columns = ["--data.train.columns.anchor", "question"]
    assert re.fullmatch("[0-9a-f]{8}_seed=42", name(columns))
    assert name(columns) != name([*columns[:1], "query"])
    whole = "--data.train.columns={%s}"
    assert name([whole % "anchor: q, positive: a"]) == name([whole % '"anchor":  "q", "positive": a'])


def test_run_name_holds_no_secret() -> None:
    """It goes wherever the run is watched. Two that differ only there are two."""
    texts = [f"https://me:SECRET{i}@host/x.parquet?token=SECRET{i}" for i in range(2)]
    flags = [[Flag("data.train.path", text), Flag("x.api_key", "SECRET3")] for text in texts]
    names = [str(name_run(["a.yaml"], each, 1, {})) for each in flags]
    assert "SECRET" not in "".join(names)
    assert "path=x.parquet" in names[0]
    assert names[0] != names[1]


def test_recipes_in_any_script_have_names_of_their_own() -> None:
    names = {str(name_run([f"{stem}.yaml"], [], 1, {})) for stem in ("日本", "한국", "a b", "a-b")}
    assert len(names) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._=/-]+", name) for name in names)


def test_run_name_is_kept_on_other_hardware_and_when_resumed() -> None:
    same = [
        Flag("trainer.devices", "4"),
        Flag("trainer.num_nodes", "2"),
        Flag("trainer.strategy", "ddp"),
        Flag("data.num_workers", "3"),
        Flag("ckpt_path", "auto"),
        Flag("tracking.wandb", "off"),
        Flag("seed_everything", "42"),
        # as the refusals say
        Flag("resume.allow", "learning_rate"),
        Flag("model.max_tokens", "8192"),
        Flag("checkpoint.keep", "2"),
    ]
    assert name_run(["a/b.yaml"], same, 42, {}) == Path("runs/b/seed=42")


def test_a_later_file_is_in_the_name_where_it_decides_what_is_trained(tmp_path: Path) -> None:
    """A hardware file says where: the run goes on under its name elsewhere."""
    hardware = sorted((Path(__file__).parents[1] / "configs/hardware").glob("*.yaml"))
    texts = {
        "rate.yaml": "model: {learning_rate: 1e-3}",
        "rows.yaml": "data: {train: [{path: x.csv}]}",
        "sets.yaml": "data: {validation: []}",  # another evaluation of the same run
        "site.yaml": "seed_everything: 7\ntracking: {wandb: 'off'}\ndata: {num_workers: 4}\nmodel: {max_tokens: 9}",
        "a b.yaml": "trainer: {max_steps: 3}",
    }
    for name, text in texts.items():
        Path(name).write_text(text)
    Path("base.yaml").write_text("model: {learning_rate: 1e-4}")
    names = {}
    for later in [*map(str, hardware), *texts]:
        written = read_command(["--config", "base.yaml", "--config", later, "--data.batch_size", "8"])
        found = name_run(written.paths, written.flags, 42, {"SLURM_JOB_ID": "9"}, written.files)
        names[Path(later).stem] = str(found.relative_to("runs/base"))
    spaced = names.pop("a b")
    assert re.fullmatch("a-b_batch_size=8-[0-9a-f]{8}_seed=42_job=9", spaced)
    changed = {stem: name for stem, name in names.items() if name != "batch_size=8_seed=42_job=9"}
    assert changed == {stem: f"{stem}_batch_size=8_seed=42_job=9" for stem in ("debug", "rate", "rows")}
    written = read_command(["--config", "base.yaml", "--config", "rate.yaml"])
    assert name_run(written.paths, written.flags, 42, {}, written.files) == Path("runs/base/rate_seed=42")


def test_run_name_stays_inside_runs() -> None:
    def names(value: str) -> Path:
        return name_run(["../../x.yaml"], [Flag("model.encoder.backbone", value)], 1, {"SLURM_JOB_ID": "../1"})

    hostile = ["../../x", "/etc/passwd", "a" * 500, "a" * 501, "a/b", "a-b", "a\nb", "", "..", "ü"]
    hostile += ["2024-13-45", "[", "[&a [*a]]", "{0: a}", '{"0": a}', "{a: 1, 0: 2, 2024-01-01: 3, [1]: 4}", "\x00"]
    found = [names(value) for value in hostile]
    assert len(set(found)) == len(hostile)  # two runs never share a folder
    for path in found:
        assert re.fullmatch(r"runs/x/[A-Za-z0-9._=-]{1,150}", str(path))
    assert name_run(["..yaml"], [], 1, {}).resolve().is_relative_to(Path("runs").resolve())


def test_first_rank_is_known_before_any_process_group() -> None:
    assert is_first_rank({})
    assert is_first_rank({"SLURM_PROCID": "0", "LOCAL_RANK": "0"})
    assert not is_first_rank({"SLURM_PROCID": "1", "LOCAL_RANK": "0"})
    assert not is_first_rank({"LOCAL_RANK": "1"})
    assert not is_first_rank({"LOCAL_RANK": "0", "NODE_RANK": "1"})
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "SLURM_PROCID": "1", "GROUP_RANK": "0"}  # began on the second node
    assert is_first_rank({**torchrun, "RANK": "0"})
    assert not is_first_rank({**torchrun, "RANK": "1"})
    assert rank_name({"RANK": "5", "LOCAL_RANK": "1"}) == "5"


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints/step-00000001/manifest.json"])
def test_fresh_fit_into_a_used_directory_is_refused(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = Path("used", trace)
    used.parent.mkdir(parents=True)
    used.write_text("")
    Path("x.yaml").write_text(CONFIG)
    args = ["fit", "--config", "x.yaml", "--trainer.default_root_dir", "used", "--trainer.accelerator", "cpu"]
    assert refused(capsys, args) == (
        "used already holds a run; go on with it: --ckpt_path auto · or start anew beside it: "
        "--trainer.default_root_dir used-2"
    )
    # The ranks that the first one starts find its directory in use: they go on, here to the count of the ranks.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert refused(capsys, args, code=1).startswith("error (rank 1): LOCAL_RANK=1 says that this process is not rank 0")


# -- a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("recipe"), tiny_encoder)


def logged_steps(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "train/loss" in row]


def test_a_misspelt_monitor_is_refused_before_step_0(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", str(recipe), "--trainer.default_root_dir", "misspelt"]
    said = refused(capsys, [*args, "--checkpoint.monitor", "eval/dev/spearman_cosin"], code=1)
    assert said.startswith("error: checkpoint.monitor 'eval/dev/spearman_cosin' is not measured; there are: eval/dev/")
    assert said.endswith("Did you mean 'eval/dev/spearman_cosine'?")
    assert not Path("misspelt/metrics.jsonl").exists()
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=dev/loss"]
    said = refused(capsys, [*args[:-1], "stopping", *stop], code=1)
    assert said.startswith("error: EarlyStopping: monitor 'dev/loss' is of no set in data.validation; there are: ")
    assert not Path("stopping/metrics.jsonl").exists()


@pytest.mark.parametrize("command", ["fit", "check", "compare"])
def test_a_place_that_cannot_be_written(command: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("")
    flags = {
        "fit": ["--config", str(recipe), "--trainer.default_root_dir", "taken"],
        "check": ["--config", str(recipe), "--data.cache_dir", "taken/cache"],
        "compare": ["seen", "--out", "taken/x.html"],
    }[command]
    if command == "compare":
        make_run(Path("seen"))
    said = refused(capsys, [command, *flags], code=1)
    remedy = "; name another place, or mend this one (--debug shows where)"
    if command == "check":
        remedy = (
            "; the environment variable TRAINER_CACHE, or data.cache_dir of the config, names another place for the "
            "cache"
        )
    assert re.fullmatch(rf"error: .*taken.*: (File exists|Not a directory){re.escape(remedy)}", said)


def test_fit_repeat_resume_and_validate(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run through its life: named, repeated from its own config, refused, resumed, evaluated."""
    secret = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    flags = ["--model.learning_rate", "1e-3", "--checkpoint.save_every_steps", "2"]
    assert main(["fit", "--config", str(recipe), *flags, "--tracking.name", secret]) == 0
    first = Path("runs/tiny/learning_rate=1e-3_seed=42")
    assert logged_steps(first) == [1, 2, 3]
    assert (first / "model" / "modules.json").is_file()
    text = (first / "config.yaml").read_text()
    assert secret not in text
    assert "#" not in text
    config = yaml.safe_load(text)
    assert config["model"]["learning_rate"] == 1e-3
    assert config["trainer"]["gradient_clip_val"] == 1.0
    assert config["trainer"]["max_epochs"] == 1
    assert "encoder" not in config["data"]

    again = ["fit", "--config", str(first / "config.yaml"), "--trainer.default_root_dir", "again"]
    assert main(again) == 0
    repeated = yaml.safe_load(Path("again/config.yaml").read_text())
    assert repeated["trainer"].pop("default_root_dir") == "again"
    config["trainer"].pop("default_root_dir")
    assert repeated == config
    weights = [read_state(folder / "checkpoints/step-00000003")["state_dict"] for folder in (first, Path("again"))]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    assert "--ckpt_path auto" in refused(capsys, again)
    # Hyper-parameters inside a checkpoint never win over the command line.
    path = Path("again/checkpoints/step-00000003")
    about = {key: value for key, value in read_manifest(path).items() if key not in ("format", "files")}
    write_checkpoint({**read_state(path), "hyper_parameters": {"learning_rate": 9.0}}, path, about)
    capsys.readouterr()
    longer = [*again, "--ckpt_path", "auto", "--trainer.max_epochs", "2"]
    assert refused(capsys, longer) == (
        f"this run is not the one that saved {path}: trainer.max_epochs was 1, now 2\n"
        "  go on with the new values: --resume.allow max_epochs · or start anew: --trainer.default_root_dir OTHER"
    )
    assert main([*longer, "--resume.allow", "max_epochs"]) == 0
    out = capsys.readouterr().out
    assert f"checkpoint: {path}" in out
    assert "resume: trainer.max_epochs was 1, now 2 (allowed)" in out
    assert logged_steps(Path("again")) == [1, 2, 3, 4, 5, 6]
    assert yaml.safe_load(Path("again/config.yaml").read_text())["model"]["learning_rate"] == 1e-3

    assert main(["validate", "--config", "again/config.yaml", "--ckpt_path", "auto"]) == 0
    rows = [json.loads(line) for line in Path("again/metrics.jsonl").read_text().splitlines()]
    last = [row["eval/dev/spearman_cosine"] for row in rows if "eval/dev/spearman_cosine" in row][-1]
    assert f"{last:.4f}"[:5] in capsys.readouterr().out
    # The score of another set, under its name, stands beside that of the set that chose the checkpoint.
    validated = Path("again/metrics.json").read_text()
    args = ["test", "--config", "again/config.yaml", "--ckpt_path", "auto", "--data.validation.name", "held_out"]
    args += ["--data.validation.max_rows", "9"]
    assert main([*args, "--data.validation.path", config["data"]["train"][0]["path"]]) == 0
    assert Path("again/metrics.json").read_text() == validated
    tested = json.loads(Path("again/test.json").read_text())
    assert "eval/held_out/spearman_cosine" in tested["metrics"]
    printed = capsys.readouterr().out
    assert "held_out" in printed
    assert "note: held_out: 9 rows are scored at most (max_rows); all: --data.validation.max_rows null" in printed


def test_a_debug_run_leaves_the_directory_of_the_true_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    debug = str(Path(__file__).parents[1] / "configs/hardware/debug.yaml")
    flags = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", str(recipe), "--config", debug, *flags]) == 0
    assert main(["fit", "--config", str(recipe), *flags]) == 0
    found = {path.name: logged_steps(path) for path in Path("runs/tiny").iterdir()}
    assert found == {"debug_max_steps=2_seed=42": [1, 2], "max_steps=2_seed=42": [1, 2]}
    said = refused(capsys, ["fit", "--config", str(recipe), "--config", debug, *flags])
    assert said.endswith("start anew beside it: --trainer.default_root_dir runs/tiny/debug_max_steps=2_seed=42-2")


def test_a_logger_in_the_place_of_tracking_is_said(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "csv"]
    args = ["fit", "--config", str(recipe), "--trainer.max_steps", "1", *logger]
    assert main([*args, "--trainer.default_root_dir", "a", "--tracking.wandb", "offline"]) == 0
    note = (
        "note: trainer.logger takes the place of tracking: tracking.wandb offline has no effect; leave trainer.logger"
    )
    assert note in capsys.readouterr().out
    assert not Path("a/wandb").exists()
    assert run_id_in(Path("a/checkpoints/step-00000001")) is None  # the logger's is 0, in every folder
    assert main([*args, "--trainer.default_root_dir", "b"]) == 0  # it is off
    assert "takes the place of tracking" not in capsys.readouterr().out


def test_auto_starts_fresh_where_there_is_no_checkpoint(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also for a job that Slurm has requeued before its first checkpoint: nobody types the flag there."""
    assert main(["fit", "--config", str(recipe), "--ckpt_path", "auto", "--trainer.max_steps", "1"]) == 0
    assert "no checkpoint in runs/tiny/max_steps=1_seed=42: starting fresh" in capsys.readouterr().out


def test_denormal_numbers_are_flushed_on_every_thread(recipe: Path) -> None:
    script = (
        "import sys, torch; from trainer.config_files import read_command; from trainer.lightning_cli import run\n"
        "args = ['--config', sys.argv[1]]; run(['fit', *args], read_command(args), execute=False)\n"
        "assert torch.get_num_threads() == 2\n"
        "assert not (torch.full((4_000_000,), 1e-39) * 1.0).any()"
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script, str(recipe)], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 32 KiB, 4 of them free."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    (folder / "filler").write_bytes(bytes(28 << 10))
    yield folder
    subprocess.run(["umount", folder], timeout=20, check=True)


@pytest.mark.parametrize(
    ("flag", "folder", "named"),
    [("trainer.default_root_dir", "r", r"small/r/"), ("data.cache_dir", "", r"small/rows/")],
)
def test_a_full_disk_is_one_sentence(
    recipe: Path, capsys: pytest.CaptureFixture[str], small: Path, flag: str, folder: str, named: str
) -> None:
    """Which file, how much room, what now."""
    said = refused(capsys, ["fit", "--config", str(recipe), f"--{flag}", str(small / folder)], code=1)
    place = rf"error: \S+{named}\S+: .*No space left on device \([\d,]+ bytes free in \S+{named.rstrip('/')}\S*\); "
    assert re.search(place + "make room; a fit", said)
    assert "--ckpt_path auto" in said


def test_a_disk_without_room_for_the_export_is_named(
    recipe: Path, capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    run = ["--trainer.default_root_dir", "done", "--trainer.max_steps", "1"]
    assert main(["fit", "--config", str(recipe), *run]) == 0
    said = refused(capsys, ["export", "done", str(small / "model")], code=1)
    place = rf"error: {small / 'model'}: No space left on device \([\d,]+ bytes free in {small}\); make room"
    assert re.search(place, said)
    assert [path.name for path in small.iterdir()] == ["filler"]


def test_no_room_for_the_locks_of_workers_is_one_sentence(recipe: Path) -> None:
    """/dev/shm of a container is small; Lightning's clean-up fails then, too. Mounted for this process alone."""
    script = 'mount -t tmpfs -o size=4k tmpfs /dev/shm || exit 77; head -c 4096 /dev/zero > /dev/shm/filler; exec "$@"'
    fit = [sys.executable, "-m", "trainer", "fit", "--config", str(recipe), "--data.num_workers", "1"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *fit], capture_output=True, text=True, timeout=100
    )
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("mounting needs root")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = "error: /dev/shm/sem.mp-*: No space left on device (0 bytes free in /dev/shm); make room; a fit goes on"
    assert said in done.stderr


def test_errors_hold_no_credentials(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = "https://bob:SECRET1@host/x.jsonl?token=SECRET2"
    said = refused(capsys, ["fit", "--config", str(recipe), "--data.train.path", place], code=1)
    assert "host/x.jsonl" in said
    assert "SECRET" not in said


def test_requeued_job_goes_on(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", "--config", str(recipe), "--trainer.default_root_dir", "job"]
    assert main([*args, "--trainer.max_steps", "1"]) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert main([*args, "--trainer.max_steps", "2", "--resume.allow", "max_steps"]) == 0
    assert "checkpoint: job/checkpoints/step-00000001" in capsys.readouterr().out
    assert logged_steps(Path("job")) == [1, 2]


def test_damaged_checkpoints_are_named_and_the_previous_one_is_taken(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where none is left, the run does not start anew in silence."""
    args = ["fit", "--config", str(recipe), "--trainer.default_root_dir", "d", "--checkpoint.save_every_steps", "1"]
    assert main([*args, "--trainer.max_steps", "2", "--checkpoint.keep", "-1"]) == 0
    first, second = (Path(f"d/checkpoints/step-0000000{n}") for n in (1, 2))
    os.truncate(second / "state.ckpt", 100)
    capsys.readouterr()
    longer = [*args, "--resume.allow", "max_steps", "--ckpt_path"]
    assert "state.ckpt has 100 bytes" in refused(capsys, [*longer, str(second)])
    assert main([*longer, "auto", "--trainer.max_steps", "3", "--checkpoint.keep", "-1"]) == 0
    out = capsys.readouterr().out
    assert f"checkpoint {second} is left out: state.ckpt has 100 bytes" in out
    assert f"checkpoint: {first}" in out
    assert logged_steps(Path("d")) == [1, 2, 3]
    for path in Path("d/checkpoints").glob("step-*/state.ckpt"):
        path.unlink()
    said = refused(capsys, [*longer, "auto"])
    assert said.startswith("no checkpoint of d can be trusted: step-00000003: state.ckpt is missing; step-00000002:")
    assert "start anew: --trainer.default_root_dir d-2" in said


@pytest.mark.parametrize("command", ["validate", "test", "fit"])
def test_best_checkpoint_is_taken(recipe: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is not the newest; a fit goes on behind it."""
    args = ["--config", str(recipe), "--trainer.default_root_dir", "b", "--checkpoint.save_every_steps", "1"]
    assert main(["fit", *args, "--checkpoint.keep", "-1"]) == 0
    Path("b/checkpoints/best.json").write_text('{"step": 1}')
    capsys.readouterr()
    assert main([command, *args, "--ckpt_path", "best"]) == 0
    assert "checkpoint: b/checkpoints/step-00000001\n" in capsys.readouterr().out
    assert logged_steps(Path("b")) == [1, 2, 3]
    assert Path("b/checkpoints/abandoned/step-00000003").exists() == (command == "fit")
    if command == "validate":
        assert json.loads(Path("b/metrics.json").read_text())["checkpoint"] == "b/checkpoints/step-00000001"


@pytest.mark.parametrize(("command", "file"), [("validate", "metrics.json"), ("test", "test.json")])
def test_figures_of_a_checkpoint_are_not_replaced_by_those_of_the_untouched_model(
    recipe: Path, command: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--config", str(recipe), "--trainer.default_root_dir", "c"]
    backbone = yaml.safe_load(recipe.read_text())["model"]["encoder"]["backbone"]
    assert main([command, *args]) == 0
    untouched = Path("c", file).read_text()
    said = capsys.readouterr().out
    assert f"model: {backbone}, untouched\nmetric" in said
    assert "this is the untouched model" not in said  # there is no other
    assert main(["fit", *args, "--model.learning_rate", "1e-2"]) == 0
    first = json.loads(Path("c/metrics.jsonl").read_text().splitlines()[0])
    capsys.readouterr()

    assert main([command, *args]) == 0
    note = "note: this is the untouched model, not the run in c; that one: --ckpt_path best, or auto for its newest"
    assert f"{note}\n" in capsys.readouterr().out
    assert Path("c", file).read_text() == untouched
    assert main([command, *args, "--ckpt_path", "auto"]) == 0
    assert f"model: {backbone}, checkpoint c/checkpoints/step-00000003\nmetric" in capsys.readouterr().out
    trained = Path("c", file).read_text()
    name = "eval/dev/spearman_cosine"
    assert json.loads(trained)["metrics"][name] != pytest.approx(first[name], abs=1e-3)
    assert json.loads(untouched)["metrics"][name] == pytest.approx(first[name], abs=1e-3)
    assert main([command, *args]) == 0
    assert f"{note}; c/{file} keeps the figures of c/checkpoints/step-00000003\n" in capsys.readouterr().out
    assert Path("c", file).read_text() == trained


def test_what_cannot_be_written_was_printed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The evaluation of a large set may have taken an hour."""
    Path("v/metrics.json").mkdir(parents=True)
    assert main(["validate", "--config", str(recipe), "--trainer.default_root_dir", "v"]) == 1
    said = capsys.readouterr()
    assert re.search(r"spearman_cosine +-?0\.\d{4}\n", said.out)
    assert "metrics.json" in said.err


def test_best_checkpoint_is_missing_or_damaged(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--config", str(recipe), "--trainer.default_root_dir", "b", "--trainer.max_steps", "1"]
    assert main(["fit", *args, "--checkpoint.monitor", "null"]) == 0
    best = [*args, "--ckpt_path", "best"]
    assert refused(capsys, ["test", *best]) == (
        "--ckpt_path best: no checkpoint of b is marked as the best (checkpoint.monitor watched nothing there); "
        "auto takes the newest"
    )
    Path("b/checkpoints/best.json").write_text('{"step": 1}')
    Path("b/checkpoints/step-00000001/state.ckpt").unlink()
    said = refused(capsys, ["test", *best])
    assert said.startswith("--ckpt_path best (b/checkpoints/step-00000001): state.ckpt is missing; auto takes")


@pytest.mark.parametrize("chosen", [1, None])
def test_steps_saved_between_the_choice_and_the_lock_are_not_abandoned(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, chosen: int | None
) -> None:
    """Another process of this run saves steps 2 and 3, and ends, after this one chose where to go on from."""
    args = ["fit", "--config", str(recipe), "--checkpoint.save_every_steps", "1", "--checkpoint.keep", "-1"]
    args += ["--trainer.default_root_dir", "g"]
    assert main(args) == 0
    others = [Path(f"g/checkpoints/step-0000000{step}") for step in (1, 2, 3) if step > (chosen or 0)]
    for folder in others:
        folder.rename(folder.name)
    take = lightning_cli.take_lock

    def take_late(*arguments: Any) -> str | None:
        for folder in others:
            Path(folder.name).rename(folder)
        return take(*arguments)

    monkeypatch.setattr(lightning_cli, "take_lock", take_late)
    capsys.readouterr()
    assert main([*args, "--ckpt_path", "auto"]) == 2
    assert capsys.readouterr().err == (
        "another process has written g while this one started: its newest checkpoint is step-00000003, "
        f"was {'step-00000001' if chosen else 'none'}; start again\n"
    )
    assert len(list(Path("g/checkpoints").glob("step-*"))) == 3
    assert not Path("g/checkpoints/abandoned").exists()
    assert not Path("g/run.lock").exists()


def test_other_settings_are_refused_and_count_where_they_are_allowed(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An allowed learning rate takes the place of the one in the checkpoint, in the schedule as well."""
    args = ["fit", "--config", str(recipe), "--trainer.default_root_dir", "o", "--trainer.max_epochs", "2"]
    assert main([*args, "--trainer.max_steps", "3", "--model.learning_rate", "1e-3"]) == 0
    changed = [*args, "--ckpt_path", "auto", "--trainer.max_steps", "6", "--model.learning_rate", "4e-3"]
    said = refused(capsys, changed)
    assert "model.learning_rate was 0.001, now 0.004; trainer.max_steps was 3, now 6" in said
    assert "--resume.allow learning_rate,max_steps ·" in said
    assert main([*changed, "--resume.allow", "learning_rate,max_steps"]) == 0
    rows = [json.loads(line) for line in Path("o/metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    assert rates[3] == pytest.approx(1e-3 / 3)
    assert [rates[4], rates[6]] == pytest.approx([4e-3 * 3 / 6, 4e-3 / 6])  # linear to 0 over 6 steps


def test_a_class_that_cannot_be_built_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words come among those of a list, a bool and None, and go over several lines."""
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    Path("x.yaml").write_text(CONFIG)
    logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "tb"]
    said = refused(capsys, ["fit", "--config", "x.yaml", "--trainer.accelerator", "cpu", *logger], code=1)
    assert "TensorBoardLogger': Neither `tensorboard` nor `tensorboardX` is available." in said
    assert "Expected a" not in said
    assert "Given value" not in said


def test_later_list_replaces_the_earlier_and_says_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = "trainer:\n  callbacks: [LearningRateMonitor]\n"
    Path("a.yaml").write_text(lists)
    Path("b.yaml").write_text("# another\n" + lists)
    args = ["validate", "--config", str(recipe), "--config", "a.yaml", "--config", "b.yaml"]
    assert main([*args, "--trainer.default_root_dir", "run"]) == 0
    assert "note: b.yaml:3: 'trainer.callbacks' replaces the list of a.yaml:2" in capsys.readouterr().out


def test_nothing_of_a_replaced_list_is_left(recipe: Path, tmp_path: Path) -> None:
    """Of the same length as the new one; its entries have keys that those of the new one leave to the default."""
    columns = {"anchor": "a", "positive": "b", "score": "c"}
    old = {
        "path": "old.jsonl",
        "columns": columns,
        "max_rows": 5,
        "prompts": {"anchor": "x "},
        "score_range": None,
    }
    new = {"path": "new.jsonl", "columns": columns}
    Path("old.yaml").write_text(yaml.safe_dump({"data": {"train": [old], "validation": [old | {"name": "dev"}]}}))
    Path("new.yaml").write_text(yaml.safe_dump({"data": {"train": [new], "validation": [new | {"name": "dev"}]}}))
    alone = ["--config", str(recipe), "--config", "new.yaml"]
    as_files = [*alone[:2], "--config", "old.yaml", *alone[2:]]
    as_flags = [
        *as_files[:4],
        f"--data.train={json.dumps([new])}",
        "--data.validation",
        json.dumps([new | {"name": "dev"}]),
    ]
    built = [
        run(["fit", *args], read_command(args), execute=False).options.data for args in (alone, as_files, as_flags)
    ]
    assert built[0].train[0].path == "new.jsonl"
    assert built[0].train[0].max_rows is None
    assert built[1:] == built[:1] * 2
    # Single keys of an entry are still set in place.
    args = [*as_files[:4], "--data.train.path", "new.jsonl"]
    (one,) = run(["fit", *args], read_command(args), execute=False).options.data.train
    assert (one.path, one.max_rows) == ("new.jsonl", 5)


def test_nothing_of_a_replaced_class_is_left(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SigLIP, GISTEmbed and InfoNCE have arguments of the same names, Matryoshka takes a loss of its own."""

    def settings(*args: str, old: Any = "InfoNCE") -> Any:
        tuned = {"class_path": "InfoNCE", "init_args": {"scale": 77, "mask_false_negatives": False}}
        loss = tuned if old == "InfoNCE" else {"class_path": old, "init_args": {"loss": tuned, "dims": [8]}}
        Path("old.yaml").write_text(yaml.safe_dump({"model": {"loss": loss, "losses": {"second": tuned}}}))
        words = ["--config", str(recipe), "--config", "old.yaml", *args]
        return run(["fit", *words], read_command(words), execute=False).effective_config()["model"]

    def file(text: str) -> tuple[str, str]:
        path = Path(f"{len(list(Path().glob('*.yaml')))}.yaml")
        path.write_text(f"model: {text}")
        return "--config", str(path)

    theirs = {"scale": 10.0, "bias": -10.0, "mask_false_negatives": True}  # of Zhai et al., eq. 1: t' = log 10, b = -10
    for words in (
        ["--model.loss", "SigLIP"],
        ["--model.loss.class_path", "SigLIP"],
        file("{loss: SigLIP}"),
        file("{loss: {class_path: SigLIP}}"),
    ):
        assert settings(*words)["loss"] == {"class_path": "trainer.losses.SigLIP", "init_args": theirs}
    later = settings("--model.loss", "SigLIP", "--model.loss.scale", "30")["loss"]["init_args"]
    assert later == theirs | {"scale": 30.0}
    assert settings(*file("{loss: {class_path: SigLIP, init_args: {bias: -5}}}"))["loss"]["init_args"] == theirs | {
        "bias": -5.0
    }
    for words in (["--model.losses.second", "SigLIP"], file("{losses: {second: SigLIP}}")):
        assert settings(*words)["losses"]["second"]["init_args"] == theirs
    nested = settings(*file("{loss: {class_path: Matryoshka, init_args: {loss: SigLIP}}}"), old="Matryoshka")["loss"]
    assert nested["init_args"]["loss"]["init_args"] == theirs
    assert nested["init_args"]["dims"] == [8]
    for same in ("InfoNCE", "trainer.losses.InfoNCE", "trainer.losses.infonce.InfoNCE"):
        for words in (
            ["--model.loss", same],
            file(f"{{loss: {{class_path: {same}, init_args: {{similarity: dot}}}}}}"),
        ):
            kept = settings(*words)["loss"]["init_args"]
            assert (kept["scale"], kept["mask_false_negatives"]) == (77.0, False)
    said = refused(capsys, ["fit", "--config", str(recipe), "--model.loss.scale", "30", "--model.loss", "SigLIP"])
    assert said == "flag --model.loss.scale stands before --model.loss, which takes its place: put it behind"


def test_flags_win_over_files_wherever_they_stand(recipe: Path) -> None:
    """Also over a later file, and over an earlier flag; the values are those that were typed."""
    Path("later.yaml").write_text(
        "seed_everything: 1\nckpt_path: null\nmodel: {learning_rate: 0.5}\n"
        "data: {train: [{path: later.csv, columns: {anchor: a, positive: b}, max_rows: 9}]}\n"
    )
    files = ["--config", str(recipe), "--config", "later.yaml"]
    flags = ["--seed_everything=3", "--ckpt_path", "auto", "--model.learning_rate", "4", "--model.learning_rate", "5"]
    flags += ["--data.train.path", "typed.csv"]
    for args in ([*flags, *files], [*files[:2], *flags, *files[2:]], [*files, *flags]):
        options = run(["fit", *args], read_command(args), execute=False).options
        (source,) = options.data.train
        assert (options.seed_everything, options.ckpt_path, options.model.learning_rate) == (3, "auto", 5.0)
        assert (source.path, source.max_rows) == ("typed.csv", 9)


def test_error_of_our_own_is_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", "--config", str(recipe), "--data.train.path", "nowhere.csv"]
    said = refused(capsys, args, code=1)
    assert said.startswith("error: nowhere.csv: no such file")
    assert len(said.splitlines()) == 1
    monkeypatch.setenv("TRAINER_DEBUG", "1")
    with pytest.raises(ValueError, match=r"nowhere\.csv"):
        main([*args, "--trainer.default_root_dir", "debug1"])
    monkeypatch.delenv("TRAINER_DEBUG")
    with pytest.raises(ValueError, match=r"nowhere\.csv"):
        main([*args, "--debug", "--trainer.default_root_dir", "debug2"])


def test_bad_row_is_named_through_every_library(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our reader runs inside datasets, which wraps what it raises."""
    rows = [
        {"sentence1": "a b", "sentence2": "b c", "score": 3},
        {"sentence1": None, "sentence2": "d", "score": 1},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(capsys, ["fit", "--config", str(recipe), "--data.train.path", "rows.jsonl"], code=1)
    assert said.startswith("error: ")
    assert "rows.jsonl:2" in said
    assert "raised in" not in said


@pytest.mark.parametrize(
    ("environ", "speaks"),
    [
        ({"RANK": "3", "LOCAL_RANK": "1"}, False),  # rank 2 of its node says it
        ({"RANK": "3", "LOCAL_RANK": "0"}, True),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),  # a rank that another one has started
    ],
)
def test_a_file_that_only_another_node_lacks_is_named_with_the_node(
    environ: dict[str, str], speaks: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in environ.items():
        monkeypatch.setenv(name, number)
    said = refused(capsys, ["fit", "--config", "missing.yaml"])
    sentence = f"rank 3 on host {platform.node()}: there is no config file missing.yaml (looked from {Path.cwd()})"
    assert said == (sentence if speaks else "")


@pytest.mark.slow  # tests/check/test_callback.py has an error that all ranks find
def test_only_the_failing_rank_speaks(recipe: Path) -> None:
    """Two real ranks, in processes of their own: Lightning starts the second from the first's command."""
    args = ["fit", "--config", str(recipe), "--data.train.path", "nowhere.csv"]
    args += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *args], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = re.findall(r"^error.*", done.stderr, re.MULTILINE)
    assert len([line for line in errors if line.startswith("error: nowhere.csv")]) == 1
    assert all("nowhere.csv" in line or "another rank has ended" in line for line in errors)
