"""Every command of docs/comparing.md is run, in its order, and every key it names is logged."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.compare.made_runs import make_runs
from tests.tracking.small_run import read_metrics
from trainer.cli import main
from trainer.demo_data import write_pairs
from trainer.tracking.wandb import RunLogger, Tracking, make_logger

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, tiny_encoder: Path) -> Path:
    """What the commands name: two recipes, offline files of W&B, and a recipe to train."""
    make_runs(tmp_path / "runs", recipes=2)
    (tmp_path / "runs/cosine").rename(tmp_path / "runs/stsb")
    (tmp_path / "runs/cosent").rename(tmp_path / "runs/nli")
    import wandb

    run_dir = tmp_path / "runs/stsb/seed=1"
    logger = make_logger(Tracking(wandb="offline"), run_dir)
    assert isinstance(logger, RunLogger)
    for row in read_metrics(run_dir)[:10]:
        logger.log_metrics({name: value for name, value in row.items() if "histogram" not in name}, row["step"])
    wandb.finish()
    train, dev = write_pairs(tmp_path, num_train=48, num_dev=12, seed=3)
    source = {"columns": {"anchor": "sentence1", "positive": "sentence2", "score": "score"}, "score_range": [0, 5]}
    recipe = {
        "model": {"encoder": {"backbone": str(tiny_encoder), "max_length": 32}, "loss": "CosineSimilarity"},
        "data": {
            "train": [{"path": str(train), **source}],
            "validation": [{"path": str(dev), "name": "dev", "evaluator": "STS", **source}],
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    assert len(COMMANDS) == 4
    printed = []
    for command in COMMANDS:
        program, *args = shlex.split(command)
        assert program == "trainer"
        assert main(args) == 0, command
        printed.append(capsys.readouterr().out)
    assert [text.splitlines()[0] for text in printed[:3]] == [
        "3 runs in 1 group",
        "6 runs in 2 groups",
        "1 run in 1 group",
    ]
    assert (folder / "report.html").stat().st_size > 50_000
    import wandb

    wandb.finish()
    (run_dir,) = (folder / "runs/recipe").iterdir()
    logged = {name for row in read_metrics(run_dir) for name in row}
    for key in re.findall(r"`((?:train|health)/[\w/<>]+)`", TEXT):
        if "<source>" not in key and "device_peak" not in key:  # one source, no CUDA
            assert key.replace("<set>", "dev") in logged
    assert (run_dir / "run.json").exists()


def test_the_picture_is_there() -> None:
    picture = ROOT / "docs/images/report.png"
    assert "(images/report.png)" in TEXT
    assert picture.stat().st_size < 200_000
