"""Hostile input: refused in a sentence, nothing executed. Secrets: in no file and no line that a run leaves behind.

Every trap here would create the file ``owned`` in the working directory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.stub_hub import stub_hub
from tests.test_manifest import plant
from trainer.cli import main
from trainer.config_files import Flag
from trainer.demo_data import write_pairs
from trainer.manifest import newest
from trainer.run_dir import name_run

ROOT = Path(__file__).parents[1]
CONFIG = """\
model:
  encoder: {backbone: encoder, max_length: 32}
  loss: {class_path: CosineSimilarity}
data:
  train:
    - path: train.jsonl.gz
      columns: &columns {anchor: sentence1, positive: sentence2, score: score}
      score_range: [0, 5]
  validation: [{name: dev, path: dev.jsonl.gz, columns: *columns, score_range: [0, 5]}]
  batch_size: 20
trainer: {accelerator: cpu, max_epochs: 1, val_check_interval: 2, log_every_n_steps: 1, default_root_dir: run}
tracking: {wandb: "off"}
"""
FIT = ["fit", "--config", "pairs.yaml"]
CODE = "import os\nos.system('touch owned')\n"


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM", "WANDB"))]:
        monkeypatch.delenv(name)
    write_pairs(tmp_path, 60, 20)
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    (tmp_path / "pairs.yaml").write_text(CONFIG)
    yield tmp_path
    assert not (tmp_path / "owned").exists(), "it was executed"


def refused(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    """The sentence that a command ends with, and where it comes from if a library says it."""
    capsys.readouterr()
    assert main(args) in (1, 2)
    last = capsys.readouterr().err.strip().splitlines()[-2:]
    return "\n".join(last if last[-1].startswith("  raised in ") else last[-1:])


# -- pickles ----------------------------------------------------------------------------------------------


def bomb_checkpoint(run_dir: Path) -> Path:
    """In place of what a real run saved, behind a manifest that fits."""
    assert main(FIT) == 0
    path = newest(run_dir)
    assert path is not None
    plant(path, {"state_dict": {}, "global_step": 3, "callbacks": Bomb()})
    return path


def test_a_checkpoint_that_runs_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, found by auto, and as what validate and export read."""
    path = bomb_checkpoint(folder / "run")
    sentence = "holds more than tensors and plain types, which could run code"
    assert sentence in refused(capsys, [*FIT, "--ckpt_path", str(path)])
    assert sentence in refused(capsys, [*FIT, "--ckpt_path", "auto"])
    assert sentence in refused(capsys, ["validate", "--config", "pairs.yaml", "--ckpt_path", str(path)])
    assert sentence in refused(capsys, ["export", str(path), "out"])
    assert not (folder / "out").exists()


def test_weights_that_run_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file("encoder/model.safetensors")
    os.remove("encoder/model.safetensors")
    torch.save({**weights, "bomb": Bomb()}, "encoder/pytorch_model.bin")
    said = refused(capsys, FIT)
    assert "model.encoder.backbone 'encoder': its weights are a pickle that holds more than tensors" in said


# -- configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.loss", "os.system", "--model.loss.command", "touch owned"],
        ["--trainer.callbacks", "subprocess.Popen", "--trainer.callbacks.args", "[touch, owned]"],
        ["--trainer.callbacks+=subprocess.Popen", "--trainer.callbacks.args=[touch, owned]"],
        ["--trainer.logger", "subprocess.Popen", "--trainer.logger.args", "[touch, owned]"],
        ["--trainer.plugins", '{"class_path": "os.system", "init_args": {"command": "touch owned"}}'],
        ["--trainer.strategy.class_path", "os.system", "--trainer.strategy.init_args.command", "touch owned"],
        ["--model.learning_rate", "!!python/object/apply:os.system [touch owned]"],
        ["--model.encoder", "!!python/object/apply:os.system [touch owned]"],
        ["--tracking.name", "!!python/object/apply:os.system [touch owned]", "--model.learning_rate", "x"],
    ],
)
def test_flags_that_run_code(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "flag --" in refused(capsys, [*FIT, *flags])


@pytest.mark.parametrize(
    "trainer",
    [
        # A parameter that takes any callable: only the list of denied modules stands before it.
        "callbacks: [{class_path: LambdaCallback, init_args: {setup: os.system}}]",
        "callbacks: [{class_path: LambdaCallback, init_args: {setup: subprocess.call}}]",
        "callbacks: [{class_path: LambdaCallback, init_args: {setup: {class_path: subprocess.Popen, "
        "init_args: {args: [touch, owned]}}}}]",
        "strategy: {class_path: DDPStrategy, init_args: {ddp_comm_hook: posix.system}}",
        "strategy: {class_path: DDPStrategy, init_args: {ddp_comm_hook: torch.os.system}}",
        "logger: {class_path: lightning.pytorch.loggers.CSVLogger, dict_kwargs: {x: {class_path: os.system}}}",
        "plugins: [{class_path: builtins.eval}]",
        "profiler: {class_path: importlib.import_module, init_args: {name: antigravity}}",
    ],
)
def test_callables_that_run_code(folder: Path, trainer: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "more.yaml").write_text(f"trainer: {{{trainer}}}\n")
    refused(capsys, [*FIT, "--config", "more.yaml"])


def test_names_stay_in_their_folder() -> None:
    flags = [Flag("data.train.path", "../../../etc"), Flag("model.encoder.prompt", "/../.. ")]
    path = name_run(["../../..yaml"], flags, 1, {"SLURM_JOB_ID": "../../x"})
    assert path.parts[0] == "runs"
    assert len(path.parts) == 3
    assert not {"..", "."} & set(path.parts)


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "..", ""])
def test_a_name_of_a_set_is_no_path(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, [*FIT, "--data.validation.name", name]) == (
        f"error: validation set name '{name}': letters, digits, '.', '_' and '-' are allowed"
    )


def test_the_name_on_the_tracker_is_no_path(folder: Path) -> None:
    assert main([*FIT, "--tracking.name", "../../x", "--tracking.wandb", "offline"]) == 0
    import wandb

    wandb.finish()
    outside = {path.name for path in folder.iterdir()} - {"run"}
    assert outside == {"encoder", "pairs.yaml", "train.jsonl.gz", "dev.jsonl.gz"}
    assert not (folder.parent / "x").exists()
    assert not (folder.parent.parent / "x").exists()


# -- code of others ---------------------------------------------------------------------------------------


MODEL_CODE = {"AutoConfig": "modeling_x.C", "AutoModel": "modeling_x.M"}


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def model_code(encoder: Path) -> str:
    (encoder / "modeling_x.py").write_text(CODE)
    change(
        encoder / "config.json", model_type="x", auto_map={"AutoConfig": "modeling_x.C", "AutoModel": "modeling_x.M"}
    )
    return "modeling_x.C, modeling_x.M"


def model_code_of_a_known_type(encoder: Path) -> str:
    (encoder / "modeling_x.py").write_text(CODE)
    change(encoder / "config.json", auto_map={"AutoModel": "modeling_x.M"})
    return "modeling_x.M"


def tokenizer_code(encoder: Path) -> str:
    (encoder / "tokenizer_x.py").write_text(CODE)
    change(encoder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenizer_x.T", None]})
    return "tokenizer_x.T"


def module_code(encoder: Path) -> str:
    (encoder / "module_x.py").write_text(CODE)
    modules = json.loads((encoder / "modules.json").read_text())
    modules[1]["type"] = "module_x.Pool"
    (encoder / "modules.json").write_text(json.dumps(modules))
    return "module_x.Pool"


@pytest.mark.parametrize("kind", [model_code, model_code_of_a_known_type, tokenizer_code, module_code])
def test_a_model_with_code_of_its_own(kind: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = kind(folder / "encoder")
    assert refused(capsys, FIT) == (
        f"error: model.encoder.backbone 'encoder' brings Python code of its own ({names}), which is not run: "
        "read it, then set model.encoder.trust_remote_code to true"
    )


def test_a_model_of_the_hub_with_code_of_its_own(folder: Path) -> None:
    names = model_code(folder / "encoder")
    with stub_hub({"org/encoder": folder / "encoder"}, {}) as hub:
        done = trainer(folder, [*FIT, "--model.encoder.backbone", "org/encoder"], HF_ENDPOINT=hub, HF_HUB_OFFLINE="0")
    assert done.returncode == 1
    assert f"'org/encoder' brings Python code of its own ({names}), which is not run" in done.stderr
    assert "Traceback" not in done.stderr


def test_code_that_was_allowed_runs(folder: Path) -> None:
    """Model, config, tokenizer and module, each with a class of its own."""
    encoder = folder / "encoder"
    mark = "from pathlib import Path\nprint('ran', Path(__file__).stem)\n"
    (encoder / "modeling_x.py").write_text(
        mark + "from transformers import BertConfig, BertModel\n"
        "class C(BertConfig):\n    model_type = 'x'\nclass M(BertModel):\n    config_class = C\n"
    )
    (encoder / "tokenizer_x.py").write_text(
        mark + "from transformers import PreTrainedTokenizerFast\nclass T(PreTrainedTokenizerFast):\n    pass\n"
    )
    (encoder / "module_x.py").write_text(
        mark
        + "from sentence_transformers.sentence_transformer.modules import Pooling\nclass Pool(Pooling):\n    pass\n"
    )
    change(
        encoder / "config.json", model_type="x", auto_map={"AutoConfig": "modeling_x.C", "AutoModel": "modeling_x.M"}
    )
    change(encoder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenizer_x.T"]})
    modules = json.loads((encoder / "modules.json").read_text())
    modules[1]["type"] = "module_x.Pool"
    (encoder / "modules.json").write_text(json.dumps(modules))
    args = ["validate", "--config", "pairs.yaml", "--model.encoder.trust_remote_code", "true"]
    done = trainer(folder, args)
    assert done.returncode == 0, done.stderr
    assert {line for line in done.stdout.splitlines() if line.startswith("ran ")} == {
        "ran modeling_x",
        "ran tokenizer_x",
        "ran module_x",
    }


def test_a_data_set_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "scripted").mkdir()
    (folder / "scripted" / "scripted.py").write_text(CODE)
    said = refused(capsys, [*FIT, "--data.train.path", "scripted"])
    assert said.startswith("error: scripted: the folder holds no data file")
    with stub_hub({}, {"org/scripted": folder / "scripted"}) as hub:
        done = trainer(folder, [*FIT, "--data.train.path", "org/scripted"], HF_ENDPOINT=hub, HF_HUB_OFFLINE="0")
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("error: org/scripted: neither a file")
    assert "Dataset scripts are no longer supported, but found scripted.py" in said


# -- secrets ----------------------------------------------------------------------------------------------


def trainer(folder: Path, args: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    settings = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "hf"),
        "NO_PROXY": "127.0.0.1",
        **environ,
    }
    command = [sys.executable, "-m", "trainer", *args]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=150, check=False)


def test_no_secret_is_left_behind(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the environment, in a flag, in an address; in a run that ends well and in one that fails."""
    secrets = {"WANDB_API_KEY": "k3y" * 14, "HF_TOKEN": "hf_" + "t0k" * 10, "MY_PASSWORD": "pa55w0rd-of-mine"}
    flags = ["--tracking.wandb", "offline", "--tracking.tags", "[https://bob:FLAGSECRET@example.com/x]"]
    flags += ["--model.encoder.prompt", f"token={secrets['HF_TOKEN']} "]
    done = trainer(folder, [*FIT, *flags], **secrets)
    assert done.returncode == 0, done.stderr
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    sentence = refused(capsys, [*FIT, *flags, "--ckpt_path", "auto", "--data.train.path", "gone.jsonl"])
    left = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    names = {path.name for path in left}
    assert {"config.yaml", "metrics.jsonl", "README.md", "model.safetensors"} <= names
    assert any(name.endswith(".wandb") for name in names)
    for secret in (*secrets.values(), "FLAGSECRET"):
        assert [str(path) for path, data in left.items() if secret.encode() in data] == []
        assert secret not in done.stdout + done.stderr + sentence
