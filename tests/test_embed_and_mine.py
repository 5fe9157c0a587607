"""Every command and every snippet of docs/embed-and-mine.md is run, in its order."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from trainer.cli import main
from trainer.data.loading import load
from trainer.data.sources import Source
from trainer.encoder import Encoder, EncoderSpec

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "embed-and-mine.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str]) -> Path:
    """What the commands name: a run with its model, a corpus, questions with answers."""
    encoder = Encoder(EncoderSpec(str(tiny_encoder)), max_tokens=1000)
    with torch.no_grad():  # words alone decide: with random weights as they are all texts are alike
        encoder.backbone.get_input_embeddings().weight *= 20.0
    with encoder.as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path / "runs/qa/seed=42/model"))
    texts = list(dict.fromkeys(demo_texts))
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts[:200]))
    rows = ({"question": f"is it true that {text}", "answer": f"yes, {text}"} for text in texts[200:260])
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_commands_and_snippets_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    elsewhere = (ROOT / "tests/slurm/test_predict.py").read_text(encoding="utf-8")
    num_commands = 0
    for kind, block in BLOCKS:
        if kind == "python":
            exec(block, names)
            continue
        for command in block.splitlines():
            if command.startswith(("sbatch", "srun")):
                assert command.split()[0] in elsewhere, f"nothing runs {command}"
                continue
            program, *args = shlex.split(command)
            assert program == "trainer"
            assert main([*args, "--accelerator", "cpu"]) == 0, command
            num_commands += 1
    assert num_commands == 6

    embeddings = np.asarray(names["embeddings"])
    assert embeddings.shape == (200, 32)
    assert names["rows"][7]["id"] == "7"  # type: ignore[index]
    assert (names["rows"][7]["embedding"] == embeddings[7]).all()  # type: ignore[index]
    assert names["index"].ntotal == 200  # type: ignore[attr-defined]
    (source,) = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)[0])["data"]["train"]
    assert len(load(Source(**source), folder / "cache")) > 100
