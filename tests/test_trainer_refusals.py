"""Settings of Lightning's Trainer that a run can't have: one sentence and exit code 2, before anything is written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401 - before any test: its log handler keeps the stderr that it finds
import pytest
import yaml
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry

from tests.tiny_recipe import write_tiny_recipe
from trainer.cli import main
from trainer.config_files import read_command
from trainer.lightning_cli import run
from trainer.trainer_refusals import _zero_instead

ROOT = Path(__file__).parents[1]
SHARED_OUT = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in a folder of its own, as a process that no launcher started."""
    for name in [name for name in os.environ if name.startswith("SLURM_") or name.endswith("RANK")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("recipe"), tiny_encoder, default_root_dir="run")


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, *flags: str, code: int = 2) -> str:
    """What `trainer fit` says on stderr when it refuses; nothing is trained."""
    capsys.readouterr()
    assert main(["fit", "--config", str(recipe), *flags]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert not Path("run").exists()
    return said.strip()


def test_an_empty_group_of_a_file_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text("trainer: {max_epochs: 1}\ncheckpoint:\n")
    said = refused(capsys, recipe, "--config", "x.yaml")
    assert said == "x.yaml:2: checkpoint must be keys (save_every_steps, keep, monitor, ...), found nothing"


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [
        ("deepspeed_stage_2", "zero2"),
        ("lightning.pytorch.strategies.DeepSpeedStrategy", "zero2"),
        ("deepspeed_stage_3_offload", "zero3-offload"),
        ("FSDPStrategy", "zero3"),
    ],
)
def test_lightnings_ways_to_share_memory_out_are_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], strategy: str, instead: str
) -> None:
    Path("x.yaml").write_text(f"trainer: {{strategy: {{class_path: {strategy}}}}}\n")
    cases = [("--trainer.strategy", strategy, "flag --trainer.strategy")]
    if strategy[0].isupper() or "." in strategy:
        cases.append(("--config", "x.yaml", "x.yaml:1"))
    for flag, value, place in cases:
        said = refused(capsys, recipe, flag, value)
        assert said.startswith(f"{place}: trainer.strategy is ")
        assert said.endswith(
            "but here ZeRO shares memory out over the ranks, with checkpoints that DDP reads too: take --config "
            f"configs/hardware/{instead}.yaml"
        )


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ("stage: 3", "zero3"),
        ("stage: 1, offload_optimizer: true", "zero1"),
        ("offload_optimizer: true", "zero2-offload"),
    ],
)
def test_the_settings_of_such_a_class_choose_the_file(
    recipe: Path, capsys: pytest.CaptureFixture[str], settings: str, instead: str
) -> None:
    name = "lightning.pytorch.strategies.DeepSpeedStrategy"
    Path("x.yaml").write_text(f"trainer: {{strategy: {{class_path: {name}, init_args: {{{settings}}}}}}}\n")
    assert refused(capsys, recipe, "--config", "x.yaml").endswith(f"--config configs/hardware/{instead}.yaml")


def test_all_such_names_of_lightning_lead_to_a_file_that_exists() -> None:
    theirs = {name for name, entry in StrategyRegistry.items() if issubclass(entry["strategy"], SHARED_OUT)}
    theirs |= {f"lightning.pytorch.strategies.{strategy.__name__}" for strategy in SHARED_OUT}
    assert len(theirs) > 8
    for name in theirs:
        assert (ROOT / "configs/hardware" / f"{_zero_instead(name, {})}.yaml").is_file(), name
    others = {name for name, entry in StrategyRegistry.items() if not issubclass(entry["strategy"], SHARED_OUT)}
    assert not [name for name in ("auto", "my.FSDPStrategy", *others) if _zero_instead(name, {})]


# -- ranks ------------------------------------------------------------------------------------------------

TASK = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_NODELIST": "n1"}


def test_a_job_script_without_srun_has_one_rank(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would train on one device and leave the others idle."""
    for name, value in {**TASK, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert refused(capsys, recipe, "--trainer.devices", "2", "--trainer.strategy", "ddp").endswith(
        "trainer.devices 2 x trainer.num_nodes 1 is 2 rank(s), but Slurm has started 1: start it with slurm/train.sh, "
        "or with srun --nodes 1 --ntasks-per-node 2; or set the two to what is started"
    )


def test_the_shell_of_salloc_waits_for_no_other_node(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody starts the ranks there. Who starts one on each node by hand numbers the nodes."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    two = ("--trainer.num_nodes", "2", "--trainer.devices", "3", "--trainer.accelerator", "cpu")
    assert refused(capsys, recipe, *two).endswith(
        "trainer.devices 3 x trainer.num_nodes 2 is 6 rank(s), but this shell of a Slurm job has started 3: start it "
        "with slurm/train.sh, or with srun --nodes 2 --ntasks-per-node 3; or set the two to what is started"
    )
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "none")  # and so it comes as far as the meeting of the ranks
    assert main(["fit", "--config", str(recipe), *two]) == 1
    assert "invalid literal for int() with base 10: 'none'" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_tasks_under_salloc_are_no_two_runs(
    recipe: Path, rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both refuse: one that goes on alone would be another run than the one asked for."""
    step = {"SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
    for name, value in {**TASK, **step, **task}.items():
        monkeypatch.setenv(name, value)
    said = refused(capsys, recipe)
    assert ("is 1 rank(s), but Slurm has started 2: start it with" in said) == (rank == "0")  # the first one speaks


def test_a_rank_that_does_not_count_itself_as_one_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert refused(capsys, recipe, code=1) == (
        "error (rank 0): NODE_RANK=1 says that this process is not rank 0, but trainer.devices 1 x trainer.num_nodes 1 "
        "makes it rank 0: set the two to what the launcher starts, or unset these variables"
    )


def test_torchrun_inside_a_job_script_starts_one_run_of_two_ranks(recipe: Path) -> None:
    job = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "trainer"]
    flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "1"]
    done = subprocess.run(
        [*command, "fit", "--config", str(recipe), *flags],
        env={**os.environ, **TASK, **job},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (manifest,) = Path("run/checkpoints").glob("step-*/manifest.json")
    assert json.loads(manifest.read_text())["ranks"] == 2


@pytest.mark.slow  # what is compared: tests/check/test_callback.py
def test_ranks_whose_hosts_have_disks_of_their_own_do_not_go_on_apart(recipe: Path) -> None:
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "1"]) == 0
    flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "1", "--ckpt_path", "auto"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(recipe), *flags, "--trainer.default_root_dir"]
    ranks = [
        subprocess.Popen(
            [*command, folder],
            env={**os.environ, **meeting, "LOCAL_RANK": str(rank), "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(("run", "own"))
    ]
    try:
        said = [rank.communicate(timeout=150)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert "has found run/checkpoints/step-00000001, but rank 1" in said[0]
    assert "no checkpoint: the run directory must lie where all nodes see the same files" in said[0]
    assert "Traceback" not in said[0] + said[1]


# -- check ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--trainer.accelerator blah",
        "--trainer.devices many",
        "--trainer.strategy ZeRO",
        "--trainer.precision 16-true",
        "--trainer.profiler blah",
        "--trainer.max_time 00:00:00:00",
        "--trainer.callbacks+=LearningRateFinder",
        "--trainer.gradient_clip_algorithm blah",
    ],
)
def test_check_refuses_what_fit_would(recipe: Path, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, recipe, *flags.split())
    assert main(["check", "--config", str(recipe), *flags.split()]) == 2
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("precision 16-mixed", "trainer.precision is 16-mixed; ZeRO runs in 32-true or bf16-mixed"),
        ("precision 16", "trainer.precision is 16-mixed; ZeRO runs in 32-true or bf16-mixed"),
        ("gradient_clip_algorithm value", "trainer.gradient_clip_algorithm stays norm under ZeRO, which clips by"),
    ],
)
@pytest.mark.parametrize("command", ["check", "fit"])
def test_zero_without_its_settings_is_refused(
    recipe: Path, command: str, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--trainer.strategy ZeRO --trainer.strategy.stage 2 --trainer.{setting}".split()
    assert main([command, "--config", str(recipe), *flags]) == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert not Path("run").exists()
    assert main(["check", "--config", str(recipe), *flags[:-2], "--trainer.precision", "32"]) == 0


@pytest.mark.parametrize("place", ["ddp", "zero3-offload"])
def test_a_run_on_gpus_is_checked_where_there_is_none(
    recipe: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a task of another job too: the run does not start here."""
    for name, value in {**TASK, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    words = ["--config", str(ROOT / f"configs/hardware/{place}.yaml"), "--trainer.num_nodes", "2"]
    for devices, ranks in {"auto": 2, "-1": 2, "2": 4, "0,1": 4, "[0, 1]": 4}.items():
        assert main(["check", "--config", str(recipe), *words, "--trainer.devices", devices]) == 0
        said = capsys.readouterr()
        assert f"on {ranks} ranks" in said.out
        assert said.err == ""


# -- folders ----------------------------------------------------------------------------------------------


def test_an_object_store_is_no_folder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, recipe, "--trainer.default_root_dir", "s3://bucket/run")
    assert "flag --trainer.default_root_dir: trainer.default_root_dir is s3://bucket/run, but a run is written" in said
    assert list(Path().iterdir()) == []


def test_a_tilde_is_the_home_in_every_path_of_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning expands its own reading of it: checkpoints would lie in one folder, lock and config in another."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    flags = ["--trainer.default_root_dir=~/there", "--data.cache_dir=~/cache", "--trainer.max_steps=1"]
    assert main(["fit", "--config", str(recipe), *flags]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert {path.name for path in (tmp_path / "home/there").iterdir()} >= {"checkpoints", "config.yaml", "model"}
    assert any((tmp_path / "home/cache").iterdir())


# -- callbacks and strategies -----------------------------------------------------------------------------

CALLBACKS = {
    "GradientAccumulationScheduler --trainer.callbacks.scheduling={0: 2}": "data.batch_size is the global batch of one",
    "EMAWeightAveraging --trainer.callbacks.decay=0.9": "the weights that are saved would not be those that were",
    "StochasticWeightAveraging --trainer.callbacks.swa_lrs=0.001": "the weights that are saved would not be those",
    "LearningRateFinder": "try --model.learning_rate in short runs of their own",
    "BatchSizeFinder": "data.batch_size is the global batch of one optimizer step",
    "BackboneFinetuning": "model.encoder.freeze holds layers still",
    "RichProgressBar": "a run has a bar of its own",
    "TQDMProgressBar --trainer.enable_progress_bar=false": "a run has a bar of its own",
}


@pytest.mark.parametrize("written", CALLBACKS)
def test_a_callback_that_trains_or_saves_something_else_is_refused(
    written: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *flags = written.split(" ", 1)
    said = refused(capsys, recipe, f"--trainer.callbacks+={name}", *flags)
    assert not said.startswith(": ")  # where no place is known
    assert f"{name} can't be one of trainer.callbacks: " in said
    assert CALLBACKS[written] in said


@pytest.mark.parametrize("name", ["LearningRateMonitor", "DeviceStatsMonitor"])
def test_a_callback_that_has_nowhere_to_write(
    name: str, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning says it of the first step, in its own words. Evaluation alone needs no logger."""
    words = ["--config", str(recipe), f"--trainer.callbacks+={name}"]
    for command in ("check", "fit"):
        assert main([command, *words]) == 2
        said = capsys.readouterr().err
        assert f"trainer.callbacks: {name} writes to a logger, but tracking.wandb is off and trainer.logger is" in said
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "but WANDB_MODE is disabled and" in refused(capsys, recipe, *words[2:], "--tracking.wandb", "auto")
    remedy = json.dumps(yaml.safe_load(said[said.index("{") :]))
    for command, *more in (["check", "--tracking.wandb", "offline"], ["fit", "--trainer.logger", remedy], ["validate"]):
        assert main([command, *words, *more]) == 0


def test_who_numbers_the_ranks(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Outside Slurm its environment is a KeyError of Lightning's. What another cluster needs is checked on one CPU."""
    for command in ("check", "fit", "validate"):
        assert main([command, "--config", str(recipe), "--trainer.plugins", "SLURMEnvironment"]) == 2
        said = capsys.readouterr().err
        assert "flag --trainer.plugins: SLURMEnvironment can't be one of trainer.plugins: a run sees by itself" in said
    assert main(["check", "--config", str(recipe), "--trainer.plugins", "TorchElasticEnvironment"]) == 0


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_ranks_that_are_no_commands_are_refused(
    strategy: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, recipe, "--trainer.strategy", strategy, "--trainer.devices", "2")
    assert "flag --trainer.strategy: this trainer.strategy forks or spawns its ranks" in said


def test_a_run_without_a_progress_bar(recipe: Path) -> None:
    assert main(["fit", "--config", str(recipe), "--trainer.enable_progress_bar", "false"]) == 0
    assert Path("run/model/model.safetensors").exists()


def test_a_monitor_that_no_set_measures_is_one_sentence(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's own error of it is a traceback, at the first evaluation that is due."""
    watched = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/loss"]
    assert main(["fit", "--config", str(recipe), *watched, "--trainer.limit_val_batches", "0"]) == 1
    said = capsys.readouterr().err
    assert "error: EarlyStopping: monitor 'train/loss' is not measured, for no set is: only eval/... can be" in said
    assert "Traceback" not in said


def test_a_monitor_of_a_run_that_measures_nothing_is_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint.monitor", "eval/dev/spearman_cosine", "--trainer.limit_val_batches", "0"]
    assert main(["fit", "--config", str(recipe), *words]) == 0
    said = capsys.readouterr().out
    assert "note: checkpoint.monitor eval/dev/spearman_cosine has no effect: trainer.limit_val_batches is 0" in said


def test_a_wrong_path_leaves_no_folder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.csv: no such file" in refused(capsys, recipe, "--data.train.path", "nowhere.csv", code=1)


def test_a_misspelt_callback_in_place_of_the_list(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, recipe, "--trainer.callbacks", "EarlyStoping")
    assert said == "flag --trainer.callbacks: 'EarlyStoping' is no Callback; did you mean 'EarlyStopping'?"


def test_a_module_of_the_user_that_fails(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("broken_module.py").write_text("raise RuntimeError('no key')\n")
    monkeypatch.syspath_prepend(os.getcwd())
    said = refused(capsys, recipe, "--model.loss", "broken_module.Mine")
    assert said == "flag --model.loss: can't import module broken_module: RuntimeError: no key"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("patience=-1", "EarlyStopping patience is -1; it must be 0 or more, and finite"),
        ("min_delta=.nan", "EarlyStopping min_delta is nan; it must be a finite number"),
    ],
)
def test_a_patience_that_means_nothing_is_refused(
    recipe: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is better by NaN: the run would stop at the first evaluations."""
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=eval/dev/spearman_cosine"]
    stop += ["--trainer.callbacks.mode=max", f"--trainer.callbacks.{setting}"]
    assert refused(capsys, recipe, *stop, code=1).endswith(f"error: {message}")


def test_stopping_because_it_gets_better_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's mode is min where none is given; every metric of ours is better when it is higher."""
    metric = "eval/dev/spearman_cosine"
    stop = ["--trainer.callbacks+=EarlyStopping", f"--trainer.callbacks.monitor={metric}"]
    said = refused(capsys, recipe, *stop)
    assert f"EarlyStopping has mode min (what Lightning takes by default), but more of {metric} is better" in said
    lower = ["--checkpoint.monitor", metric, "--checkpoint.mode", "min"]
    for allowed in (["--trainer.callbacks.mode=max"], lower):
        words = ["--config", str(recipe), *stop, *allowed]
        run(["fit", *words], read_command(words), execute=False)
