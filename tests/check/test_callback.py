"""The report at the start of a fit: what stops it, what stands in its files, on one rank and on two."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.tracking.small_run import LiveGroup
from tests.two_ranks import TwoRanks, message_of
from trainer import manifest
from trainer.check.callback import Check, refuse_ranks_elsewhere
from trainer.cli import main
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.demo_data import read_pairs, write_pairs
from trainer.distributed import gather
from trainer.distributed.gather import SharedError
from trainer.encoder import EncoderSpec
from trainer.losses import CosineSimilarity
from trainer.module import EmbeddingModule

COLUMNS = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}


@pytest.fixture
def config(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fit of two steps on 16 pairs that all score 1.0."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "TRAINER_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    pairs = read_pairs(write_pairs(tmp_path, 16, 4)[0])
    rows = [{"sentence1": pair.sentence1, "sentence2": pair.sentence2, "score": 1.0} for pair in pairs]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content: dict[str, Any] = {
        "model": {"encoder": {"backbone": str(tiny_encoder)}, "loss": {"class_path": "CosineSimilarity"}},
        "data": {"train": [{"path": "train.jsonl", "columns": COLUMNS}], "batch_size": 8, "cache_dir": "cache"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "default_root_dir": "run"},
        "tracking": {"wandb": "off"},
    }
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_error_stops_before_the_weights_are_read(
    config: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_encoder.rglob("*"):
        if file.is_file():
            target = broken / file.relative_to(tiny_encoder)
            target.parent.mkdir(exist_ok=True, parents=True)
            target.write_bytes(b"no weights" if file.suffix == ".safetensors" else file.read_bytes())
    assert main(["fit", "--config", str(config), "--model.encoder.backbone", str(broken)]) == 1
    said = capsys.readouterr()
    assert "data: train.jsonl: 16 rows · anchor" in said.out
    assert "warning: no_validation: there is no validation set" in said.out
    assert "error: the data does not suit this run\n  constant_labels: train.jsonl: all 16 scores are 1" in said.err
    assert "run it all the same: --check.allow constant_labels" in said.err
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    assert (report["errors"], report["findings"][0]["name"]) == (1, "constant_labels")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_allowed_error_stands_in_the_run_and_in_the_card(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    allow = ["--check.allow", "constant_labels"]
    assert main(["fit", "--config", str(config), *allow]) == 0
    assert "allowed: constant_labels: train.jsonl: all 16 scores are 1: CosineSimilarity" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    assert report["errors"] == 0
    finding = report["findings"][0]
    assert (finding["name"], finding["severity"], finding["allowed"]) == ("constant_labels", "error", True)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"### Known Mistakes of the Training Data\n\n- `constant_labels` (train.jsonl): {finding['cause']}\n" in card
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["check"]["allow"] == "constant_labels"
    # A run that goes on looks at nothing again.
    monkeypatch.setattr("trainer.check.callback.make_report", None)
    again = ["--ckpt_path", "auto", "--trainer.max_epochs", "2", "--resume.allow", "max_epochs"]
    assert main(["fit", "--config", str(config), *allow, *again]) == 0


class Loaded(Callback):
    """Notes whether the module got as far as its weights."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise AssertionError("the fit began")


def fit_on_rank(path: str, encoder: str, folder: str) -> str:
    spec = EncoderSpec(encoder)
    data = PairData([Source(path, COLUMNS)], spec, batch_size=8, cache_dir=f"{folder}/cache")
    trainer = Trainer(
        accelerator="cpu", devices=1, num_nodes=2, strategy="ddp", plugins=[LiveGroup()], logger=False, max_epochs=1,
        enable_checkpointing=False, enable_progress_bar=False, callbacks=[Check(), Loaded()], default_root_dir=folder,
    )  # fmt: skip
    with pytest.raises(SharedError) as stopped:
        trainer.fit(EmbeddingModule(spec, CosineSimilarity()), datamodule=data)
    return str(stopped.value)


def test_all_ranks_stop_with_the_same_words(config: Path, tiny_encoder: Path, tmp_path: Path, two_ranks) -> None:
    said = two_ranks(fit_on_rank, str(tmp_path / "train.jsonl"), str(tiny_encoder), str(tmp_path / "two"))
    assert said[0] == said[1]
    assert "constant_labels: " in said[0]
    assert json.loads((tmp_path / "two" / "check.json").read_text())["plan"]["num_ranks"] == 2


def _compare(found: list[Path | None]) -> None:
    refuse_ranks_elsewhere(found[gather.rank()])


def test_ranks_have_found_the_same(tmp_path: Path, two_ranks: TwoRanks) -> None:
    paths = [tmp_path / name / "checkpoints/step-00000001" for name in ("first", "copy", "other")]
    for path, value in zip(paths, (1.0, 1.0, 2.0), strict=True):
        manifest.write_checkpoint({"w": torch.full((2,), value)}, path, {"step": 1})
    first, copy, other = paths
    for same in ([None, None], [first, first], [first, copy]):  # the same files may lie at two paths
        assert two_ranks(message_of, _compare, same) == ["", ""]
    for apart in ([first, None], [None, first], [first, other]):
        refused = two_ranks(message_of, _compare, apart)
        one, two = (path or "no checkpoint" for path in apart)
        host = socket.gethostname()
        assert f"rank 0 on {host} has found {one}, but rank 1 on {host} {two}: the run directory" in refused[0]
        assert refused[0] == refused[1]
