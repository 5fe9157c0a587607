"""A run that was killed and resumed ends with the weights, bit for bit, of a run that was never stopped.

Real processes through the real command line: CPU, fp32, dropout on. These tests start processes of their own,
because what is tested is the death of a process.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.tiny_recipe import write_recipe
from trainer.demo_data import read_pairs, write_pairs
from trainer.demo_encoder import write_encoder
from trainer.manifest import read_state

TESTS = Path(__file__).parent
SLOW = pytest.mark.slow
ROWS = 44  # 11 steps of 4 rows an epoch, 22 in all


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    pairs = write_pairs(folder, num_train=ROWS, num_dev=12, seed=1)
    texts = [text for path in pairs for pair in read_pairs(path) for text in (pair.sentence1, pair.sentence2)]
    write_encoder(folder / "encoder", texts, hidden=32, layers=2, heads=2, vocab=300)
    return write_recipe(
        folder / "run.yaml",
        folder / "encoder",
        pairs,
        model={"learning_rate": 1e-3, "weight_decay": 0.01, "warmup_ratio": 0.1},
        trainer={"max_epochs": 2, "val_check_interval": 5},
        checkpoint={"save_every_steps": 3, "keep": -1},
    )


def fit(config: Path, run_dir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(config)]
    command += ["--trainer.default_root_dir", str(run_dir), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)


def last_checkpoint(run_dir: Path) -> dict:
    return read_state(run_dir / "checkpoints" / "step-00000022")


def assert_same_end(one: Path, other: Path) -> None:
    left, right = last_checkpoint(one), last_checkpoint(other)
    assert left["global_step"] == right["global_step"] == 22
    assert left["state_dict"].keys() == right["state_dict"].keys()
    for name, tensor in left["state_dict"].items():
        assert torch.equal(tensor, right["state_dict"][name]), name
    moments, others = (end["optimizer_states"][0]["state"] for end in (left, right))
    assert moments.keys() == others.keys()
    for number, moment in moments.items():
        assert all(torch.equal(moment[key], others[number][key]) for key in moment), number


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert len(steps) == len(set(steps)), "a step stands twice in the metrics"
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


Undisturbed = Callable[[int], tuple[tuple[str, ...], Path]]


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Undisturbed:
    """The flags of so many ranks, and their run that was never stopped."""

    @cache
    def run(ranks: int) -> tuple[tuple[str, ...], Path]:
        devices = ("--trainer.devices", str(ranks), *(["--trainer.strategy", "ddp"] * (ranks > 1)))
        run_dir = config.parent / f"undisturbed-{ranks}"
        done = fit(config, run_dir, *devices)
        assert done.returncode == 0, done.stderr
        return devices, run_dir

    return run


@pytest.mark.parametrize(
    ("ranks", "workers", "kills"),
    [
        pytest.param(1, 0, [16], id="1-rank-workers-0", marks=SLOW),
        pytest.param(1, 2, [13], id="1-rank-workers-2", marks=SLOW),
        pytest.param(1, 2, [7, 13], id="1-rank-workers-2-twice", marks=SLOW),
        pytest.param(2, 0, [16], id="2-ranks-workers-0", marks=SLOW),
        pytest.param(2, 2, [13], id="2-ranks-workers-2"),
    ],
)
def test_killed_run_ends_bitwise_equal(
    undisturbed: Undisturbed, config: Path, ranks: int, workers: int, kills: list[int]
) -> None:
    """Killed in the first or in the second epoch, or once in each."""
    devices, reference = undisturbed(ranks)
    run_dir = config.parent / f"killed-{ranks}-{workers}-{len(kills)}"
    flags = (*devices, "--data.num_workers", str(workers))
    for number, step in enumerate(kills):
        again = ("--ckpt_path", "auto") if number else ()
        kill = ("--trainer.callbacks+=kill_at.KillAt", f"--trainer.callbacks.step={step}")
        killed = fit(config, run_dir, *flags, *again, *kill)
        assert killed.returncode != 0
        assert not (run_dir / "checkpoints" / "step-00000022").exists(), killed.stderr
    resumed = fit(config, run_dir, *flags, "--ckpt_path", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(reference, run_dir)
    assert losses(run_dir) == losses(reference)


@SLOW
def test_checkpoint_at_the_end_of_an_epoch(undisturbed: Undisturbed, config: Path) -> None:
    """Step 11 is the last of the first epoch: the resumed run starts the second one, once."""
    devices, reference = undisturbed(1)
    run_dir = config.parent / "epoch-end"
    flags = (*devices, "--checkpoint.save_every_steps", "11")
    kill = ("--trainer.callbacks+=kill_at.KillAt", "--trainer.callbacks.step=13")
    assert fit(config, run_dir, *flags, *kill).returncode != 0
    resumed = fit(config, run_dir, *flags, "--ckpt_path", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(reference, run_dir)


@SLOW  # three runs, 100 seconds
def test_a_run_from_the_checkpoint_of_another_is_one_of_its_own_on_wandb(config: Path) -> None:
    """W&B's files say under which id they would be sent: that of a resume is the first one's, that of a fork is not."""
    base, fork = config.parent / "base", config.parent / "fork"
    flags = ("--tracking.wandb", "offline", "--trainer.max_steps", "4")
    checkpoint = ("--ckpt_path", str(base / "checkpoints" / "step-00000003"))
    allowed = ("--model.learning_rate", "5e-4", "--resume.allow", "learning_rate")
    done = [fit(config, base, *flags), fit(config, fork, *flags, *checkpoint, *allowed)]
    (base / "wandb_id").unlink()  # the checkpoint knows it, too
    done.append(fit(config, base, *flags, *checkpoint))
    assert [one.returncode for one in done] == [0, 0, 0], [one.stderr for one in done]
    sent = {run: {path.stem for path in run.glob("wandb/offline-run-*/*.wandb")} for run in (base, fork)}
    assert len(list(base.glob("wandb/offline-run-*/*.wandb"))) == 2
    assert [len(ids) for ids in sent.values()] == [1, 1]
    assert sent[base].isdisjoint(sent[fork])


@SLOW  # tests/test_checkpoint.py has it on one rank
def test_early_stopped_in_mid_epoch_and_going_on(undisturbed: Undisturbed, config: Path) -> None:
    """Stopped at step 10 of 11 of its first epoch, by itself; with more patience it ends as if nothing had been."""
    devices, reference = undisturbed(2)
    run_dir = config.parent / "early-stopped"
    watch = {"monitor": "eval/dev/spearman_cosine", "mode": "max", "min_delta": 5.0}
    named = (f"--trainer.callbacks.{key}={value}" for key, value in watch.items())
    stop = ("--trainer.callbacks+=EarlyStopping", *named)
    flags = (*devices, "--data.num_workers", "2", *stop)
    stopped = fit(config, run_dir, *flags, "--trainer.callbacks.patience=1")
    assert stopped.returncode == 0, stopped.stderr
    assert list(losses(run_dir)) == list(range(1, 11))
    resumed = fit(config, run_dir, *flags, "--trainer.callbacks.patience=100", "--ckpt_path", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(reference, run_dir)
    assert losses(run_dir) == losses(reference)


@SLOW  # tests/distributed/test_strategies.py has runs that are killed, or go on under another strategy
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_writes_what_ddp_writes(undisturbed: Undisturbed, config: Path, stage: int) -> None:
    """Through the command line, which starts the ranks: the same checkpoint, log and model folder, dropout on."""
    _, reference = undisturbed(2)
    run_dir = config.parent / f"zero{stage}"
    options = {"stage": stage, **({"live_parameters": 3000} if stage == 3 else {})}
    strategy = json.dumps({"class_path": "ZeRO", "init_args": options})
    done = fit(config, run_dir, "--trainer.devices", "2", "--trainer.strategy", strategy)
    assert done.returncode == 0, done.stderr
    assert not re.search("deepspeed|real_accelerator|Warning", done.stdout + done.stderr, re.I)
    ours, theirs = last_checkpoint(run_dir), last_checkpoint(reference)
    assert ours.keys() == theirs.keys()
    assert ours["global_step"] == theirs["global_step"]
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    models = [load_file(folder / "model" / "model.safetensors") for folder in (run_dir, reference)]
    for one, other in ((ours["state_dict"], theirs["state_dict"]), models):
        assert one.keys() == other.keys()
        assert all(torch.allclose(value, other[name], rtol=1e-5, atol=1e-6) for name, value in one.items())
    assert losses(run_dir) == pytest.approx(losses(reference), rel=1e-5)
    names = [{path.relative_to(f / "model") for path in (f / "model").rglob("*")} for f in (run_dir, reference)]
    assert names[0] == names[1]


def rows_by_step(run_dir: Path) -> dict[int, list[int]]:
    """Step -> its rows, rank behind rank, as `kill_at.NoteRows` wrote them."""
    found: dict[int, list[int]] = {}
    for path in sorted(run_dir.glob("rows-*.jsonl")):
        for line in path.read_text().splitlines():
            step, rows = json.loads(line)
            found.setdefault(step, []).extend(rows)
        path.unlink()
    return found


def streamed(config: Path, name: str, path: Path) -> Path:
    """The run, but it reads ``path`` while it trains."""
    content = yaml.safe_load(config.read_text())
    content["data"]["train"][0] |= {"path": str(path), "streaming": True}
    content["data"] |= {"validation": [], "cache_dir": str(config.parent / f"cache-{name}")}
    written = config.parent / f"{name}.yaml"
    written.write_text(json.dumps(content))
    return written


@SLOW  # tests/data/test_streaming.py resumes streams anywhere, in one process
def test_streamed_on_two_ranks_killed_and_resumed_on_one(config: Path) -> None:
    """The rows of every step are those of a run on one rank that was never stopped; slices come from a cold cache."""
    rows = pd.read_json(config.parent / "train.jsonl.gz", lines=True)
    rows.to_parquet(config.parent / "train.parquet", row_group_size=7)
    parquet = streamed(config, "parquet", config.parent / "train.parquet")
    note = ("--trainer.callbacks+=kill_at.NoteRows",)
    done = fit(parquet, config.parent / "parquet-whole", *note)
    assert done.returncode == 0, done.stderr
    assert "the whole vocabulary is trained" in done.stderr
    whole = rows_by_step(config.parent / "parquet-whole")
    for epoch in (0, 1):
        assert sorted(row for step in range(11) for row in whole[11 * epoch + step]) == list(range(ROWS))

    run_dir, cold = config.parent / "parquet-killed", ("--data.cache_dir", str(config.parent / "cache-cold"))
    kill = ("--trainer.callbacks+=kill_at.KillAt", "--trainer.callbacks.step=16")
    killed = fit(parquet, run_dir, *cold, "--trainer.devices", "2", "--trainer.strategy", "ddp", *note, *kill)
    assert killed.returncode != 0
    before = rows_by_step(run_dir)
    assert before == {step: whole[step] for step in before}
    assert len(before) >= 16
    resumed = fit(parquet, run_dir, *cold, "--ckpt_path", "auto", *note)
    assert resumed.returncode == 0, resumed.stderr
    after = rows_by_step(run_dir)
    assert after == {step: whole[step] for step in range(15, 22)}


@SLOW
def test_a_stream_without_an_index_goes_on_at_its_place(config: Path) -> None:
    """From the checkpoint of step 6, with the weights, bit for bit, of the run that wrote it."""
    opaque = streamed(config, "opaque", config.parent / "train.jsonl.gz")
    steps = ("--trainer.max_epochs", "-1", "--trainer.max_steps", "22", "--trainer.callbacks+=kill_at.NoteRows")
    whole, resumed = config.parent / "opaque-whole", config.parent / "opaque-resumed"
    done = fit(opaque, whole, *steps)
    assert done.returncode == 0, done.stderr
    rows = rows_by_step(whole)
    assert sorted(row for step in range(11) for row in rows[step]) == list(range(ROWS))
    again = fit(opaque, resumed, *steps, "--ckpt_path", str(whole / "checkpoints" / "step-00000006"))
    assert again.returncode == 0, again.stderr
    assert rows_by_step(resumed) == {step: rows[step] for step in range(6, 22)}
    assert_same_end(whole, resumed)
