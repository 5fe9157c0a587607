"""`trainer prepare`: afterwards the same command trains on a machine that has no network at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stub_hub import COMMIT, stub_hub
from tests.tiny_recipe import write_tiny_recipe
from trainer.cli import main
from trainer.demo_data import write_pairs

ROOT = Path(__file__).parents[1]
CONFIG = """\
model:
  encoder: {backbone: org/encoder, max_length: 32}
  loss: {class_path: CosineSimilarity}
data:
  train:
    - {path: org/pairs, columns: &columns {anchor: sentence1, positive: sentence2, score: score}, score_range: [0, 5]}
    - {path: more.jsonl.gz, columns: *columns, score_range: [0, 5]}
  validation: [{name: dev, path: org/pairs, split: validation, columns: *columns, score_range: [0, 5]}]
  batch_size: 20
  cache_dir: cache
trainer: {max_epochs: 1, val_check_interval: 4, devices: 1, default_root_dir: run}
tracking: {wandb: "off"}
"""
# Imported by Python before anything else: no socket of this process reaches anybody.
NO_NETWORK = """
import socket
def refuse(*args, **options):
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def trainer(folder: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *args, "--config", "pairs.yaml"]
    home = {"HF_HOME": str(folder / "huggingface"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    settings = {**os.environ, **home, **environ}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=150, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pairs.yaml").write_text(CONFIG)
    (tmp_path / "no-network").mkdir()
    (tmp_path / "no-network/sitecustomize.py").write_text(NO_NETWORK)
    (tmp_path / "hub").mkdir()
    train, dev = write_pairs(tmp_path / "hub", 60, 20)
    dev.rename(dev.with_name("validation.jsonl.gz"))
    (tmp_path / "more.jsonl.gz").write_bytes(train.read_bytes())
    return tmp_path


def contents(folder: Path) -> dict[Path, int]:
    """When each file was last changed; locks and reports are touched by whoever looks."""
    files = (path for path in folder.rglob("*") if path.suffix != ".lock" and path.name != "report.json")
    return {path: path.stat().st_mtime_ns for path in files}


def test_fit_needs_no_network_afterwards(folder: Path, tiny_encoder: Path) -> None:
    with stub_hub({"org/encoder": tiny_encoder}, {"org/pairs": folder / "hub"}) as hub:
        gpu = ("--trainer.accelerator", "gpu")  # which a login node has not
        prepared = trainer(folder, "prepare", *gpu, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    assert prepared.returncode == 0, prepared.stderr
    lines = prepared.stdout.splitlines()
    snapshot = folder / f"huggingface/hub/models--org--encoder/snapshots/{COMMIT}"
    num_bytes = sum(path.stat().st_size for path in snapshot.rglob("*") if path.is_file())
    assert lines[0] == f"backbone   org/encoder: {num_bytes:,} bytes in {snapshot}"
    assert lines[1].startswith("train      org/pairs: 60 rows, ")
    assert lines[2].startswith("train      more.jsonl.gz: 60 rows, ")
    assert lines[3].startswith("validation dev: 20 rows, ")
    assert "HF_HUB_OFFLINE=1" in lines[4]
    cached = contents(folder / "cache")
    assert not (folder / "run").exists()

    alone = {"PYTHONPATH": f"{folder}/no-network:{ROOT}", "HF_HUB_OFFLINE": "1"}
    checked = trainer(folder, "preflight", **alone)
    assert checked.returncode == 0, checked.stdout
    fitted = trainer(folder, "fit", **alone)
    assert fitted.returncode == 0, fitted.stderr
    assert (folder / "run/model/model.safetensors").exists()
    assert contents(folder / "cache") == cached, "something was built again"


def test_without_it_the_missing_part_is_named(folder: Path) -> None:
    alone = {"PYTHONPATH": f"{folder}/no-network:{ROOT}", "HF_HUB_OFFLINE": "1"}
    checked = trainer(folder, "preflight", **alone)
    assert checked.returncode == 2
    assert "backbone FAILED: 'org/encoder' is no folder here and not in the cache" in checked.stdout
    assert "on a node with a network: trainer prepare" in checked.stdout
    assert "data FAILED: org/pairs: neither a file or folder here nor a hub data set that can be read" in checked.stdout


def test_what_is_damaged_is_made_again(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["prepare", "--config", str(write_tiny_recipe(tmp_path, tiny_encoder)), "--data.cache_dir", "cache"]
    assert main(command) == 0
    said = capsys.readouterr().out
    files = [*Path("cache").glob("tokens/*/ids.int32"), *Path("cache").glob("rows/*/rows.arrow")]
    assert len(files) == 3
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert main(command) == 0
    assert capsys.readouterr().out == said
    assert [file.read_bytes() for file in files] == whole


def test_a_stream_without_an_index_leaves_nothing_to_prepare(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["prepare", "--config", str(write_tiny_recipe(tmp_path, tiny_encoder)), "--data.cache_dir", "cache"]
    assert main([*command, "--data.train.streaming", "true"]) == 0
    said = capsys.readouterr().out
    assert f"train      {tmp_path / 'train.jsonl.gz'}: is read while it trains; nothing to prepare" in said
    assert "validation dev: 6 rows, " in said
    assert not (tmp_path / "cache" / "tokens").exists()
