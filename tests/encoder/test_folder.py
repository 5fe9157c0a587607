"""What the small files of a folder say, and which of them is damaged."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from trainer.encoder import EncoderSpec
from trainer.encoder.text import load_text_preparation

FILES = (
    "modules.json",
    "config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "1_Pooling/config.json",
)


@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["empty", "half"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(tiny_encoder: Path, tmp_path: Path, name: str, kept: float) -> None:
    path = shutil.copytree(tiny_encoder, tmp_path / "model") / name
    size = int(kept * path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))} is no JSON file \({size:,} bytes, .*; copy it again$"
    ):
        load_text_preparation(EncoderSpec(str(tmp_path / "model")))


def test_of_a_hub_id_the_blob_is_named(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its link alone the cache would link the broken blob again."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home, revision = tmp_path / "models--some--model", "0" * 40
    path = shutil.copytree(tiny_encoder, home / "snapshots" / revision) / "config.json"
    path.unlink()
    (home / "blobs").mkdir()
    (home / "blobs/7d").write_bytes(b"\xff\xfe")
    path.symlink_to("../../blobs/7d")
    (home / "refs").mkdir()
    (home / "refs/main").write_text(revision)
    told = rf"^{path} is no JSON file \(2 bytes, .*; remove {home}/blobs/7d, and fetch it again with trainer prepare$"
    with pytest.raises(ValueError, match=told):
        load_text_preparation(EncoderSpec("some/model"))
