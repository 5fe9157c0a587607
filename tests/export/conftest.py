"""Run directories made by hand: a real encoder's state and the files a fit leaves, without a fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainer.data.collate import pack_texts
from trainer.demo_data import Pair, read_pairs, write_pairs
from trainer.demo_encoder import write_encoder
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.spec import LoRA
from trainer.manifest import write_checkpoint

# The second half has pieces of the vocabulary that no training text uses.
TEXTS = [
    "The doctor bought the car at the shop at dawn.",
    "A physician purchased an automobile.",
    "it was the monarch who hid that diamond after dark in the hostel",
    "zebra xylophone quartz jukebox",
    "jukebox " * 40,
    "zebra",
]
LOG = [
    {"step": 0, "eval/dev/spearman_cosine": 0.1, "eval/dev/pearson_cosine": 0.15},
    {"step": 2, "train/loss": 0.5, "train/lr": 1e-3},
    {
        "step": 3,
        "eval/dev/spearman_cosine": 0.875,
        "eval/dev/pearson_cosine": 0.75,
        "eval/dev/pearson_dot": None,
    },
    {"step": 4, "train/loss": 0.25, "train/lr": 1e-3},
]


# sentence-transformers 5 with what it imports, where that is another version than ours or is not installed.
VERSION_5 = [
    "sentence-transformers==5.1.2",
    "transformers==4.57.1",
    "tokenizers==0.22.1",
    "datasets==3.6.0",
    "huggingface_hub==0.36.2",
    "fsspec==2025.3.0",
    "pillow==13.0.0",
]


def install(site: Path, packages: list[str]) -> Path:
    """Packages without what they need, in a folder for PYTHONPATH."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*command, *packages], check=True, timeout=200)
    return site


@dataclass
class CraftedRun:
    """A run directory and the encoder whose weights its checkpoint holds."""

    folder: Path
    encoder: Encoder

    @torch.no_grad()
    def embed(self, texts: list[str]) -> torch.Tensor:
        return self.encoder.eval().embed(pack_texts(self.encoder.text(texts)))


@dataclass
class Bench:
    """Data, a backbone and a writer of runs.

    Attributes:
        folder: private, its path must never show in an export.
        backbone: a plain mean-pooling encoder.
    """

    folder: Path
    pairs: list[Pair]
    backbone: Path

    def write_run(
        self, name: str, spec: dict[str, Any] | None = None, compact: bool = True, **config: Any
    ) -> CraftedRun:
        """Config, metrics and one checkpoint `step-00000003` of weights far from the backbone's."""
        encoder_spec = {"backbone": str(self.backbone), "dropout": 0.0, **(spec or {})}
        lora = LoRA(**encoder_spec["lora"]) if "lora" in encoder_spec else None
        encoder = Encoder(EncoderSpec(**{**encoder_spec, "lora": lora}), max_tokens=4096)
        if compact:
            texts = [text for pair in self.pairs for text in (pair.sentence1, pair.sentence2)]
            used = sorted({i for ids in encoder.text(texts) for i in ids})
            encoder.compact_vocabulary(torch.tensor(used))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.requires_grad or not encoder.base_names:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = self.folder / name
        (folder / "checkpoints").mkdir(parents=True)
        checkpoint: dict[str, Any] = {
            "state_dict": {f"encoder.{key}": value for key, value in encoder.state_dict().items()},
            "global_step": 3,
        }
        if encoder.vocabulary is not None:
            encoder.vocabulary.decay_unused(0.75)
            checkpoint["base_vocabulary"] = encoder.vocabulary.base_checksum()
        if encoder.base_names:
            checkpoint["base_weights"] = encoder.base_checksum()
            for key in encoder.base_names:
                del checkpoint["state_dict"][f"encoder.{key}"]
        write_checkpoint(checkpoint, folder / "checkpoints" / "step-00000003", {})
        columns = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
        data = {"columns": columns, "score_range": [0.0, 5.0]}
        content = {
            "seed_everything": 7,
            "model": {
                "encoder": encoder_spec,
                "loss": {"class_path": "trainer.losses.InfoNCE", "init_args": {"scale": 12.5}},
                "learning_rate": 3e-4,
                "max_tokens": 4096,
            },
            "data": {
                "train": [{"path": str(self.folder / "data" / "train.jsonl.gz"), **data}],
                "validation": [{"name": "dev", "path": str(self.folder / "data" / "dev.jsonl.gz"), **data}],
                "batch_size": 16,
                "cache_dir": str(self.folder / "cache"),
            },
            "trainer": {"max_epochs": 1, "precision": "bf16-mixed", "default_root_dir": str(folder)},
            "checkpoint": {"monitor": "auto", "mode": "max"},
            "tracking": {"project": "confidential-project"},
        }
        for section, changes in config.items():
            content[section] |= changes  # type: ignore[operator]
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
        return CraftedRun(folder, encoder)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("private")
    train, _ = write_pairs(folder / "data", 64, 16, seed=1)
    pairs = read_pairs(train)
    texts = [text for pair in pairs for text in (pair.sentence1, pair.sentence2)]
    backbone = write_encoder(folder / "tiny-encoder", [*texts, *TEXTS * 5], hidden=32, seed=3, max_positions=48)
    return Bench(folder, pairs, backbone)


@pytest.fixture
def refuse_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts attempts to reach any host; each fails at once. The hub library believes that it is online."""
    import socket

    attempts: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(args)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return lambda: len(attempts)
