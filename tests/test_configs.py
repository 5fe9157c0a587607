"""Every shipped config runs a real step, and the published ones say what was published."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.cli import main as run_cli
from trainer.config_files import read_command
from trainer.data.order import Order
from trainer.data.parts import Permutation
from trainer.demo import write_encoder, write_pairs
from trainer.demo_data import read_pairs
from trainer.lightning_cli import run
from trainer.losses import InfoNCE

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("published/*.yaml")])
HARDWARE = sorted(CONFIGS.glob("hardware/*.yaml"))
TEXT_COLUMNS = {"anchor", "positive", "negative", "text"}
NUM_ROWS = 48
# The scores of the published sets.
PUBLISHED_VALUES = {"ja-en-financial": (1.0,), "hebrew-nli": (0, 1, 2), "korean-terms": (0.5, 0.7, 0.9, 1.0)}


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pairs = read_pairs(write_pairs(tmp_path_factory.mktemp("texts"), NUM_ROWS, 1, seed=0)[0])
    return [text for pair in pairs for text in (pair.sentence1, pair.sentence2)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), texts, hidden=32, max_positions=64)


def write_rows(path: Path, source: dict[str, Any], texts: Sequence[str], apart: int = 1) -> Path:
    """Rows with the columns, values and range that ``source`` of a recipe speaks of; ``apart``, another number makes
    other pairs of the same texts."""
    low, high = source.get("score_range") or (0, 2)
    published = PUBLISHED_VALUES.get(Path(source["path"]).name.split(".")[0], ())
    values = list(source.get("label_map") or source.get("triplets") or published)
    values = values or ([low, high] if "score" in source["columns"] else [0, 1])
    rows = []
    for i in range(NUM_ROWS):
        row = {}
        for place, (canonical, column) in enumerate(source["columns"].items()):
            is_text = canonical in TEXT_COLUMNS
            number = i - i % 2 if canonical == "anchor" and source.get("triplets") else i  # one with both labels
            row[column] = texts[(2 * number + apart * place) % len(texts)] if is_text else values[i % len(values)]
        rows.append(json.dumps(row) + "\n")
    path.write_bytes(gzip.compress("".join(rows).encode()))
    return path


def fit_args(recipe: Path, hardware: Path, folder: Path, backbone: Path, texts: Sequence[str]) -> list[str]:
    """The command of a recipe on a hardware, its data and backbone replaced by tiny ones."""
    config = yaml.safe_load(recipe.read_text())
    flags = {
        "model.encoder.backbone": backbone,
        "model.encoder.max_length": 64,
        "data.cache_dir": folder / "cache",
        "trainer.default_root_dir": folder / "run",
        "trainer.log_every_n_steps": 1,
        "tracking.wandb": "off",
    }
    if "document_encoder" in config["model"]:
        flags |= {"model.document_encoder.backbone": backbone, "model.document_encoder.max_length": 48}
    for part, apart in (("train", 1), ("validation", 3)):
        tiny = []
        for number, source in enumerate(config["data"].get(part, [])):
            path = write_rows(folder / f"{part}{number}.jsonl.gz", source, texts, apart)
            few = {"holdout": 0.3} if "holdout" in source else {}  # of few rows a small share may be none
            tiny.append({**source, "path": str(path), **few})
        if tiny:
            flags[f"data.{part}"] = json.dumps(tiny)
    args = ["fit", "--config", str(recipe), "--config", str(hardware)]
    return args + [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def assert_ran(folder: Path, num_steps: int, has_validation: bool) -> None:
    log = read_log(folder)
    losses = {line["step"]: line["train/loss"] for line in log if "train/loss" in line}
    assert max(losses) == num_steps
    assert all(0.0 < loss < 100.0 for loss in losses.values())
    assert any(key.startswith("eval/") for line in log for key in line) == has_validation
    assert (folder / "run" / "model" / "modules.json").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipe_takes_a_step(recipe: Path, tmp_path: Path, backbone: Path, texts: list[str]) -> None:
    args = fit_args(recipe, CONFIGS / "hardware" / "cpu.yaml", tmp_path, backbone, texts)
    assert run_cli([*args, "--trainer.max_steps", "1"]) == 0
    assert_ran(tmp_path, 1, "validation" in yaml.safe_load(recipe.read_text())["data"])


@pytest.mark.parametrize("hardware", HARDWARE, ids=name)
def test_hardware_takes_a_step(
    hardware: Path, tmp_path: Path, backbone: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = fit_args(CONFIGS / "stsb.yaml", hardware, tmp_path, backbone, texts)
    kind = hardware.stem
    if "accelerator: gpu" in hardware.read_text():  # no GPU here: the rest of the file is real
        args += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    if kind != "debug":
        args += ["--trainer.max_steps", "1"]
    if "strategy" in hardware.read_text():  # ranks and a process group are not for the process of the tests
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "trainer", *args], check=True, env=environment, timeout=240)
    else:
        assert run_cli(args) == 0
    assert_ran(tmp_path, 20 if kind == "debug" else 1, has_validation=True)
    if kind == "debug":
        printed = re.findall(r"^row (\d+) score ([01]\.000): (.*) \| (.*)$", capsys.readouterr().out, re.M)
        assert len({row for row, *_ in printed}) == len(printed) == 16
        for row, score, *columns in printed:
            assert float(score) == int(row) % 2  # as write_rows made them
            assert all(text.split()[0].lower() in " ".join(columns) for text in texts[2 * int(row) :][:2])


PUBLISHED = {
    "ja-en-financial": {
        "backbone": "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        "max_length": 128,
        "loss": ("CosineSimilarity", {}),
        "num_rows": 3725,
        "batch_size": 16,
        "epochs": 2,
        "steps": 466,
    },
    "sinhala-qa": {
        "backbone": "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        "max_length": 128,
        "loss": ("InfoNCE", InfoNCE(scale=20.0, similarity="cosine", mask_false_negatives=False).describe()),
        "num_rows": 5099,
        "batch_size": 32,
        "epochs": 1,
        "steps": 160,
    },
    "korean-nutrition": {
        "backbone": "sentence-transformers/all-MiniLM-L6-v2",
        "max_length": 256,
        "loss": ("BatchHardTriplet", {"mining": "hard", "margin": 5.0, "distance": "euclidean"}),
        "num_rows": 81,
        "batch_size": 16,
        "epochs": 3,
        "steps": 18,
    },
    "hebrew-nli": {
        "backbone": "google-bert/bert-base-multilingual-cased",
        "max_length": 512,
        "loss": ("CosineSimilarity", {}),
        "num_rows": 300_067,
        "batch_size": 16,
        "epochs": 1,
        "steps": 18_755,
        "val_check_interval": 1000,
    },
    "korean-terms": {
        "backbone": "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        "max_length": 128,
        "loss": ("CosineSimilarity", {}),
        "num_rows": 7,
        "batch_size": 8,
        "epochs": 50,
        "steps": 50,
    },
}


def test_all_published_recipes_are_in_the_table() -> None:
    assert {path.stem for path in CONFIGS.glob("published/*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_hyper_parameters(recipe: str) -> None:
    """What the parser makes of the file, defaults included, is what was published."""
    want = PUBLISHED[recipe]
    args = ["--config", str(CONFIGS / "published" / f"{recipe}.yaml"), "--trainer.accelerator", "cpu"]
    cli = run(["fit", *args], read_command(args), execute=False)
    options, model = cli.options, cli.model
    assert options.seed_everything == 42
    encoder = options.model.encoder
    assert (encoder.backbone, encoder.max_length) == (want["backbone"], want["max_length"])
    assert encoder.pooling == "mean"
    assert (encoder.normalize is True) == (recipe == "korean-nutrition")
    assert (type(model.loss).__name__, model.loss.describe()) == want["loss"]
    assert (model.optimizer_name, model.learning_rate, model.schedule) == ("adamw", 5e-5, "linear")
    assert (model.warmup_ratio, model.weight_decay) == (0.0, 0.0)
    assert (options.trainer.gradient_clip_val, options.trainer.gradient_clip_algorithm) == (1.0, None)
    assert cli.datamodule.batch_size == want["batch_size"]
    assert len(cli.datamodule.train_sources) == 1
    assert options.trainer.max_epochs == want["epochs"]
    assert options.trainer.max_steps == -1
    steps_per_epoch = Order([Permutation(want["num_rows"])], want["batch_size"], 42).steps_per_epoch
    assert steps_per_epoch * want["epochs"] == want["steps"]
    if recipe == "hebrew-nli":
        source, dev = cli.datamodule.train_sources[0], cli.datamodule.validation_sources[0]
        assert (source.columns["score"], source.score_range, source.label_map) == ("label", None, None)
        assert type(dev.evaluator).__name__ == "STS"
        assert options.trainer.val_check_interval == want["val_check_interval"]
    else:
        assert cli.datamodule.validation_sources == []


def test_every_published_recipe_names_its_columns_and_its_mistake() -> None:
    for path in CONFIGS.glob("published/*.yaml"):
        lines = path.read_text().splitlines()
        assert sum("Known mistake:" in line for line in lines) == 1, path
        sources = yaml.safe_load(path.read_text())["data"]
        for source in [*sources["train"], *sources.get("validation", [])]:
            assert source["path"].startswith("data/")
            comment = next(line.split("#")[1] for line in lines if source["path"] in line and "#" in line)
            assert all(f"{column}:" in comment for column in source["columns"].values()), path


def test_list_overrides_of_the_readme(tmp_path: Path) -> None:
    """The flags that configs/README.md shows do what it says."""
    base = ["--config", str(CONFIGS / "stsb.yaml"), "--trainer.accelerator", "cpu"]

    def sources(*flags: str) -> list[Any]:
        return run(["fit", *base, *flags], read_command([*base, *flags]), execute=False).datamodule.train_sources

    (one,) = sources("--data.train.path", "my.jsonl.gz", "--data.train.columns.anchor", "question")
    assert one.path == "my.jsonl.gz"
    assert one.columns == {"anchor": "question", "positive": "sentence2", "score": "score"}
    first, second = sources("--data.train+={path: more.csv, columns: {anchor: q, positive: a}}")
    assert (first.path, second.path) == ("sentence-transformers/stsb", "more.csv")
    (only,) = sources("--data.train=[{path: my.csv, columns: {anchor: q, positive: a}}]")
    assert (only.path, only.columns) == ("my.csv", {"anchor": "q", "positive": "a"})
