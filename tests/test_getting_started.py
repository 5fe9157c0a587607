"""docs/getting-started.md from top to bottom: every command in its order, with few pairs and a tiny encoder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
SETUP = ["make demo", "source .venv/bin/activate"]  # .ci/run does both


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_page_runs(
    tmp_path: Path,
    tiny_encoder: Path,
    demo_texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    commands, names = [], dict[str, Any]()
    for kind, block in BLOCKS:
        if kind == "json":  # the pairs: as many as there are texts for, with the keys of those that are shown
            assert [list(json.loads(line)) for line in block.splitlines()] == [["question", "answer"]] * 2
            texts = list(dict.fromkeys(demo_texts))[:240]
            pairs = [{"question": text, "answer": other} for text, other in zip(texts[::2], texts[1::2], strict=True)]
            (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        elif kind == "yaml":
            assert "sentence-transformers/all-MiniLM-L6-v2, max_length: 128" in block
            tiny = f"{tiny_encoder}, max_length: 32"
            recipe = block.replace("sentence-transformers/all-MiniLM-L6-v2, max_length: 128", tiny)
            (tmp_path / "faq.yaml").write_text(recipe)
        elif kind == "python":
            exec(block, names)
        else:
            for command in block.splitlines():
                commands.append(command)
                if command in SETUP:
                    continue
                program, *args = shlex.split(command)
                assert program == "trainer"
                assert main(args) == 0, command
    assert [command for command in commands if command in SETUP] == SETUP
    printed = capsys.readouterr().out
    assert "3 runs in 2 groups" in printed
    assert (tmp_path / "report.html").stat().st_size > 50_000

    run = tmp_path / "runs/faq/seed=1"
    left = set(re.findall(r"^\| `([\w.]+)/?` \|", TEXT, flags=re.MULTILINE))
    assert {path.name for path in run.iterdir()} == left
    assert {path.name for path in (tmp_path / "runs/faq").iterdir()} >= {"seed=1", "learning_rate=2e-5_seed=1"}
    rows = read_rows(run)
    assert next(row["step"] for row in rows if "eval/held-out/mean_accuracy" in row) == 0
    assert f"checkpoint: {run.relative_to(tmp_path)}/checkpoints/step-" in printed, "it did not go on"
    assert (tmp_path / "runs/faq/backbone=faq-model_seed=1/metrics.json").is_file()
    assert (tmp_path / "faq-model-legacy/modules.json").is_file()
    assert names["scores"].shape == (1, 2)
    assert torch.isfinite(names["scores"]).all()
    card = (tmp_path / "faq-model/README.md").read_text(encoding="utf-8")
    for part in ("InfoNCE", "@inproceedings", "learning_rate", "Training Logs", "mean_accuracy", "Framework Versions"):
        assert part in card, part


def test_the_pairs_that_are_shown_are_too_few_to_hold_some_out(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "a hundred different questions or more" in TEXT
    monkeypatch.chdir(tmp_path)
    blocks = dict(BLOCKS)
    (tmp_path / "pairs.jsonl").write_text(blocks["json"])
    recipe = blocks["yaml"].replace("sentence-transformers/all-MiniLM-L6-v2", str(tiny_encoder))
    (tmp_path / "faq.yaml").write_text(recipe)
    assert main(["check", "--config", "faq.yaml"]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: pairs.jsonl: a holdout of 0.1 by 'anchor' leaves none of 2 rows to validate on")
    assert said.endswith("raise holdout, for training and validation alike, or bring more rows")


def test_a_directory_that_holds_a_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the page says of the same command without --ckpt_path auto; neither data nor backbone is read."""
    monkeypatch.chdir(tmp_path)
    (recipe,) = (block for kind, block in BLOCKS if kind == "yaml")
    (tmp_path / "faq.yaml").write_text(recipe)
    (tmp_path / "runs/faq/seed=1").mkdir(parents=True)
    (tmp_path / "runs/faq/seed=1/metrics.jsonl").write_text("{}\n")
    assert main(["fit", "--config", "faq.yaml"]) == 2
    assert "runs/faq/seed=1 already holds a run; go on with it: --ckpt_path auto" in capsys.readouterr().err
