"""`trainer preflight`: every check passes on a whole node, and fails with numbers and remedy on one that is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from trainer.cli import main
from trainer.config_files import read_command
from trainer.demo_data import write_pairs
from trainer.lightning_cli import Parts
from trainer.manifest import newest, num_bytes, read_state
from trainer.preflight import check_devices, check_space, preflight

CONFIG = """\
model:
  encoder: {{backbone: {encoder}}}
  loss: {{class_path: CosineSimilarity}}
data:
  train: [{{path: train.jsonl.gz, columns: {columns}, score_range: [0, 5]}}]
  validation: [{{name: dev, path: dev.jsonl.gz, columns: {columns}, score_range: [0, 5]}}]
trainer: {{accelerator: cpu, devices: 2, default_root_dir: run}}
tracking: {{wandb: "off"}}
"""


@pytest.fixture
def config(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    write_pairs(tmp_path, 30, 10)
    columns = "{anchor: sentence1, positive: sentence2, score: score}"
    (tmp_path / "pairs.yaml").write_text(CONFIG.format(encoder=tiny_encoder, columns=columns))
    return "pairs.yaml"


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, str]]:
    """Exit code, and check -> verdict."""
    code = preflight(args)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("preflight n7: ") for line in lines)
    said = [line.removeprefix("preflight n7: ") for line in lines[1:]]
    return code, {line.partition(": ")[0].rpartition(" ")[0]: line for line in said}


def test_a_whole_node(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "--config", config)
    assert code == 0
    assert list(said) == ["imports", "config", "devices", "run directory", "backbone", "space", "data"]
    assert all(" ok: " in line for line in said.values())
    assert said["devices"].startswith("devices ok: 2 x cpu, ")
    files = [Path("train.jsonl.gz"), Path("dev.jsonl.gz")]
    assert said["data"] == f"data ok: 2 files of {sum(file.stat().st_size for file in files):,} bytes"
    assert list(Path("run").iterdir()) == [], "a check leaves nothing behind"


def test_the_command_is_shown_without_secrets(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    preflight(["--config", config, "--tracking.tags", "[https://bob:SECRET@example.com]", "--hub_token=SECRET"])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("preflight n7: trainer fit --config pairs.yaml ")
    assert "unknown key 'hub_token'" in rest[-1]
    assert "SECRET" not in first


@pytest.mark.parametrize(
    ("flags", "check", "sentence"),
    [
        (["--model.learning_rat", "1"], "config", "did you mean"),
        (["--config", "nowhere.yaml"], "config", "there is no config file nowhere.yaml"),
        (["--data.batch_size", "0"], "config", "data.batch_size is 0"),
        (["--trainer.accelerator", "gpu"], "devices", "GPUs are visible, 2 are wanted; compare with nvidia-smi"),
        (["--trainer.default_root_dir", "dev.jsonl.gz/run"], "run directory", "run can't be written: Not a dir"),
        (["--data.train.path", "gone.jsonl"], "data", "gone.jsonl: no such file or folder"),
        (["--model.encoder.backbone", "nobody/nothing"], "backbone", "not in the cache, and HF_HUB_OFFLINE is set"),
        (
            ["--model.loss", "MSE", "--model.teacher.backbone", "nobody/teacher"],
            "backbone",
            "'nobody/teacher' is no folder here and not in the cache",
        ),
        (["--model.encoder.max_length", "9999"], "backbone", "max_length is 9999, but"),
    ],
)
def test_what_is_wrong_is_named(
    config: str, capsys: pytest.CaptureFixture[str], flags: list[str], check: str, sentence: str
) -> None:
    code, said = run(capsys, "--config", config, *flags)
    assert code == 2
    failed = {name: line for name, line in said.items() if " FAILED: " in line}
    assert list(failed) == [check]
    assert sentence in failed[check]


def test_a_path_with_credentials(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = "https://bob:SECRET1@host/x.jsonl?token=SECRET2"
    code = preflight(["--config", config, "--data.train.path", place])
    said = capsys.readouterr().out
    assert code == 2
    assert "data FAILED: https://[redacted]@host/x.jsonl" in said
    assert "SECRET" not in said


def test_tasks_and_devices_differ(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(["fit", "--config", config], read_command(["--config", config]), execute=False)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    with pytest.raises(ValueError, match=r"Slurm starts 4 tasks on a node, trainer.devices is 2; make them equal"):
        check_devices(parts)


def test_a_small_disk(config: str, tmp_path: Path, tiny_encoder: Path) -> None:
    """A real file system of 64 KiB; the numbers are those of the weights."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, timeout=20
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        args = ["--config", config, "--trainer.default_root_dir", str(small / "run")]
        parts = Parts(["fit", *args], read_command(args), execute=False)
        pooler = 32 * 32 + 32  # saved, but not trained: without moments
        weights = load_file(tiny_encoder / "model.safetensors")
        number, pieces = sum(map(torch.numel, weights.values())), weights["embeddings.word_embeddings.weight"].numel()
        with pytest.raises(ValueError) as refused:
            check_space(parts)
        text = str(refused.value)
        assert text.startswith(f"{small} has {shutil.disk_usage(small).free:,} bytes free, ")
        saved = 3 * (number - pieces) - 2 * pooler  # the texts may use none of them
        assert f"two checkpoints of {saved:,} numbers and the export of {number:,} need " in text
        assert f" need {4 * (2 * saved + number):,}; free them" in text
    finally:
        subprocess.run(["umount", small], timeout=20, check=True)


def with_head(encoder: Path, folder: Path) -> str:
    model = SentenceTransformer(str(encoder), device="cpu")
    model.append(Dense(32, 16))
    model.save(str(folder))
    return str(folder)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--model.optimizer", "sgd"],
        ["--model.encoder.freeze", "1"],
        ["--model.encoder.lora.r", "4"],
        ["--model.encoder.backbone", "head", "--model.encoder.lora.r", "4", "--model.encoder.freeze", "1"],
    ],
)
def test_the_space_is_that_of_what_a_fit_writes(
    config: str, tmp_path: Path, tiny_encoder: Path, flags: list[str]
) -> None:
    """Weights and moments of a real checkpoint, and the export, to the number."""
    with_head(tiny_encoder, tmp_path / "head")
    args = ["--config", config, "--trainer.devices", "1", "--model.encoder.compact_vocabulary", "off", *flags]
    parts = Parts(["fit", *args], read_command(args), execute=False)
    said = check_space(parts)
    headers = 200 if "head" in flags else 0  # the head is counted by its file
    assert abs(int(said.split()[-2].replace(",", "")) - _written_by(args)) <= 7 * headers


def test_of_a_compact_vocabulary_the_space_has_two_bounds(config: str) -> None:
    args = ["--config", config, "--trainer.devices", "1"]
    said = check_space(Parts(["fit", *args], read_command(args), execute=False))
    found = re.search(r" ([\d,]+) needed, and up to ([\d,]+) for the pieces that the texts use$", said)
    assert found
    least, more = (int(number.replace(",", "")) for number in found.groups())
    assert least < _written_by(args) < least + more


def _written_by(args: list[str]) -> int:
    """Bytes of two checkpoints and the export of a fit."""
    assert main(["fit", *args]) == 0
    checkpoint = newest(Path("run"))
    assert checkpoint is not None
    state = read_state(checkpoint)
    moments = [[one[name] for name in one if name != "step"] for one in state["optimizer_states"][0]["state"].values()]
    exported = [load_file(path) for path in Path("run/model").rglob("*.safetensors")]
    return 2 * num_bytes([state["state_dict"], moments]) + num_bytes(exported)


def test_other_variants_of_the_weights_take_no_space(config: str, tmp_path: Path, tiny_encoder: Path) -> None:
    folder = with_head(tiny_encoder, tmp_path / "head")
    args = ["--config", config, "--model.encoder.backbone", folder]
    parts = Parts(["fit", *args], read_command(args), execute=False)
    needed = [check_space(parts).partition(", ")[2]]
    for path in sorted((tmp_path / "head").rglob("model.safetensors")):
        weights = load_file(path)
        save_file({name: tensor.half() for name, tensor in weights.items()}, path.with_suffix(".fp16.safetensors"))
        torch.save(weights, path.with_name("pytorch_model.bin"))
        needed.append(check_space(parts).partition(", ")[2])
    assert len(needed) == 3
    assert set(needed) == {needed[0]}


def test_a_backbone_that_was_not_fetched_whole(
    config: str, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_encoder, "cut")
    Path("cut/model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    code, said = run(capsys, "--config", config, "--model.encoder.backbone", "cut")
    assert code == 2
    assert [name for name, line in said.items() if " FAILED: " in line] == ["backbone"]
    assert said["backbone"].startswith(
        "backbone FAILED: cut/model.safetensors is no weight file (42 bytes, a git-lfs pointer); run git lfs pull"
    )


def test_a_library_that_is_not_there(config: str, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/lightning.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "preflight", "--config", config],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}/broken:{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert "n7: imports FAILED: lightning: libcudart.so.12: cannot open; is this the environment" in done.stdout
    assert "Traceback" not in done.stderr
