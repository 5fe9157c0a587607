"""A file that holds no weights is named with its size, and only files that are loaded are looked at."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import AutoModel

from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.weights import refuse_broken_weights, refuse_missing_weights, weight_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 12345\n"


def _copy(tiny_encoder: Path, tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """A folder of a kind, and one of its weight files."""
    folder = tmp_path / "encoder"
    whole = shutil.copytree(tiny_encoder, folder) / "model.safetensors"
    if kind == "shard":
        model = AutoModel.from_pretrained(folder)
        whole.unlink()
        model.save_pretrained(folder, max_shard_size="40KB")
        return folder, sorted(folder.glob("model-*.safetensors"))[1]
    if kind == "pickle":
        torch.save(load_file(whole), folder / "pytorch_model.bin")
        whole.unlink()
        return folder, folder / "pytorch_model.bin"
    if kind == "head":
        projected = SentenceTransformer(str(tiny_encoder), device="cpu")
        projected.append(Dense(32, 16))
        projected.save(str(folder))
        return folder, folder / "2_Dense" / "model.safetensors"
    return folder, whole


@pytest.mark.parametrize("kind", ["whole", "shard", "pickle", "head"])
def test_a_pointer_in_place_of_weights(tiny_encoder: Path, tmp_path: Path, kind: str) -> None:
    folder, path = _copy(tiny_encoder, tmp_path, kind)
    refuse_broken_weights(EncoderSpec(str(folder)))
    path.write_text(POINTER)
    with pytest.raises(ValueError) as refused:
        Encoder(EncoderSpec(str(folder)), 100)
    assert str(refused.value) == (
        f"{path} is no weight file ({len(POINTER)} bytes, a git-lfs pointer); run git lfs pull there, or copy it again"
    )


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("whole", 90_000), ("whole", 50), ("whole", 0), ("shard", 900), ("pickle", 90_000), ("pickle", 0)],
)
def test_weights_that_were_cut_short(tiny_encoder: Path, tmp_path: Path, kind: str, kept: int) -> None:
    folder, path = _copy(tiny_encoder, tmp_path, kind)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{path} is no weight file \({kept:,} bytes, cut short or damaged\); "):
        Encoder(EncoderSpec(str(folder)), 100)


def test_a_folder_without_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    folder, path = _copy(tiny_encoder, tmp_path, "whole")
    path.unlink()
    for refused_by in (refuse_broken_weights, lambda spec: Encoder(spec, 100)):
        with pytest.raises(ValueError) as refused:
            refused_by(EncoderSpec(str(folder)))
        assert str(refused.value) == (
            f"model.encoder.backbone '{folder}' is a folder without weights: neither model.safetensors nor "
            "pytorch_model.bin lies beside its config.json; copy the whole folder"
        )


def test_of_a_hub_id_the_blob_is_named(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its link alone the cache would link the broken blob again."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home, revision = tmp_path / "models--some--model", "0" * 40
    path = shutil.copytree(tiny_encoder, home / "snapshots" / revision) / "model.safetensors"
    path.unlink()
    (home / "blobs").mkdir()
    (home / "blobs/7d").write_bytes(b"cut")
    path.symlink_to("../../blobs/7d")
    (home / "refs").mkdir()
    (home / "refs/main").write_text(revision)
    with pytest.raises(ValueError) as refused:
        refuse_broken_weights(EncoderSpec("some/model"))
    assert str(refused.value) == (
        f"{path} is no weight file (3 bytes, cut short or damaged); remove {home}/blobs/7d, and fetch it again with "
        "trainer prepare"
    )


def test_only_what_is_loaded_is_looked_at(tiny_encoder: Path, tmp_path: Path) -> None:
    """Other variants of the weights may lie beside it, broken or not."""
    folder, path = _copy(tiny_encoder, tmp_path, "whole")
    (folder / "pytorch_model.bin").write_text(POINTER)
    (folder / "model.fp16.safetensors").write_text(POINTER)
    assert weight_files(EncoderSpec(str(folder))) == [[path], []]
    Encoder(EncoderSpec(str(folder)), 100)


@pytest.mark.parametrize("lacking", ["layer.1", "embeddings.LayerNorm.bias"])
def test_weights_that_are_not_there(tiny_encoder: Path, tmp_path: Path, lacking: str) -> None:
    """transformers tells what it has drawn; the pooler is no part of an embedding."""
    folder, path = _copy(tiny_encoder, tmp_path, "whole")
    weights = {name: weight for name, weight in load_file(path).items() if "pooler" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    spec = EncoderSpec(str(folder))
    refuse_missing_weights(spec, Encoder(spec, 100).backbone)
    save_file({n: weight for n, weight in weights.items() if lacking not in n}, path, metadata={"format": "pt"})
    _, said = AutoModel.from_pretrained(folder, output_loading_info=True)
    missing = [name for name in said["missing_keys"] if "pooler" not in name]
    with pytest.raises(ValueError) as refused:
        refuse_missing_weights(spec, Encoder(spec, 100).backbone)
    told = re.fullmatch(r".*: its files lack (\d+) of 39 weights \((\S+?)(, \.\.\.)?\), which .*", str(refused.value))
    assert told is not None
    assert int(told[1]) == len(missing) == (16 if lacking == "layer.1" else 1)
    assert told[2] in missing


def test_of_other_backbones_nothing_is_missing(tiny_encoders: dict[str, Path]) -> None:
    for kind in ("roberta", "mpnet", "distilbert", "modernbert", "qwen3"):
        spec = EncoderSpec(str(tiny_encoders[kind]))
        refuse_missing_weights(spec, Encoder(spec, 100).backbone)
