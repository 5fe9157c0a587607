"""docs/extending.md: its module, format and config train a tiny model through the command line."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
STOPPING, LOGGER, RECIPE = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page has written by its end: mine.py, pairs/ and mine.yaml."""
    monkeypatch.chdir(tmp_path)
    (conversion,) = (block for block in PYTHON if "from_generator" in block)
    (tmp_path / "mine.py").write_text("\n".join(block for block in PYTHON if block != conversion))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    draw = random.Random(0)
    lines = [f"{text} ||| {draw.choice(demo_texts)} ||| {draw.randint(0, 5)}\n" for text in demo_texts[:80]]
    (tmp_path / "pairs.txt").write_text("".join(lines))
    exec(conversion, {})
    recipe = RECIPE.replace("sentence-transformers/all-MiniLM-L6-v2", f"{tiny_encoder}, max_length: 32")
    (tmp_path / "mine.yaml").write_text(recipe)
    return tmp_path


def test_the_page_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--config", "mine.yaml", "--trainer.accelerator", "cpu"]
    assert main(["check", *command]) == 0
    assert "\n0 errors" in capsys.readouterr().out
    assert main(["fit", *command, "--model.loss.delta", "0.1", "--trainer.default_root_dir", "run"]) == 0
    assert re.search(r"^\d steps$", capsys.readouterr().out, re.MULTILINE), "the callback did not speak"
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [-2 < row["eval/dev/gap"] < 2 for row in rows if "eval/dev/gap" in row] == [True, True]
    assert json.loads((folder / "run/run.json").read_text())["primary_metrics"] == ["eval/dev/gap"]
    assert "Huber" in (folder / "run/model/README.md").read_text()

    assert main(["fit", *command, "--model.loss.delt", "0.1"]) == 2
    assert "did you mean" in capsys.readouterr().err
    without_range = (folder / "mine.yaml").read_text().replace("score_range: [0, 5], ", "")
    (folder / "mine.yaml").write_text(without_range)
    assert main(["check", *command]) == 1
    assert "scores go from 0 to 5, but Huber reaches -1 to 1" in " ".join(capsys.readouterr().out.split())


def test_early_stopping_finds_the_metric(folder: Path) -> None:
    """Nothing is better by 9: as many evaluations as its patience follow that of step 1, its first one."""
    (folder / "stop.yaml").write_text(STOPPING.replace("mode: max", "mode: max, min_delta: 9"))
    (folder / "logger.yaml").write_text(LOGGER)
    flags = ["--trainer.accelerator", "cpu", "--trainer.val_check_interval", "1", "--trainer.max_epochs", "3"]
    num_evaluations = []
    for name, configs in {"whole": ["mine.yaml"], "stopped": ["mine.yaml", "stop.yaml", "logger.yaml"]}.items():
        command = [word for config in configs for word in ("--config", config)]
        assert main(["fit", *command, *flags, "--trainer.default_root_dir", name]) == 0
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        num_evaluations.append(sum("eval/dev/gap" in row for row in rows))
    assert num_evaluations[0] > num_evaluations[1] == len([0, 1, 2, 3, 4])
    (logged,) = (folder / "logs").rglob("metrics.csv")
    assert "eval/dev/gap" in logged.read_text()


def test_the_loss_is_that_of_the_global_batch(folder: Path) -> None:
    """Mean over two ranks of 4 and 3 rows = PyTorch's mean over the 7; the same of the evaluator's formula by hand."""
    mine = importlib.import_module("mine")
    columns = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    scores_B = torch.linspace(0, 1, 7)
    values, first = [], 0
    for rank, rows in enumerate((4, 3)):
        part = slice(first, first + rows)
        targets = Targets((4, 3), torch.arange(rows), scores_B=scores_B[part], rank=rank)
        values.append(mine.Huber(delta=0.2)(list(columns[:, part]), targets))
        first += rows
    cosine_B = F.cosine_similarity(columns[0], columns[1])
    torch.testing.assert_close(sum(values) / 2, F.huber_loss(cosine_B, scores_B, delta=0.2))

    embeddings_ND = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    rows_of = {"anchor": ["a", "b"], "positive": ["c", "d"]}
    assert mine.Gap().score(embeddings_ND, rows_of) == {"gap": pytest.approx(1.0)}
