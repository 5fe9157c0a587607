"""docs/evaluators.md: each YAML block is a config that evaluates, in one process, and the evaluator in it works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trainer.evaluation
from tests.data.test_retrieval import write_beir, write_lines
from trainer.cli import main as run_cli
from trainer.config_files import read_command
from trainer.lightning_cli import run

DOCUMENT = (Path(__file__).parents[2] / "docs" / "evaluators.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", DOCUMENT, flags=re.DOTALL)
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def write_source(folder: Path, source: dict[str, Any], texts: list[str], backbone: Path) -> None:
    """Rows for a validation source of the document, in the folder that is the working directory."""
    if "teacher" in source:
        source["teacher"]["backbone"] = str(backbone)
    if source["name"] == "nanobeir":
        write_beir(folder / "nanobeir" / "NanoA")
        write_beir(folder / "nanobeir" / "NanoB")
        return
    if "corpus" in source:
        queries = [{"id": f"q{i}", "text": texts[i]} for i in range(6)]
        documents = [{"id": f"d{i}", "title": "", "text": texts[i] if i else ""} for i in range(20)]
        judged = [{"query": f"q{i}", "doc": f"d{i + 1}", "relevance": i} for i in range(6)]
        for name, rows in ((source["path"], queries), (source["corpus"], documents), (source["qrels"], judged)):
            write_lines(folder / name, rows)
        return
    labels = list(source.get("label_map") or (0, 1))
    rows = []
    for i in range(24):
        row: dict[str, Any] = {}
        for name, column in source["columns"].items():
            text = texts[i // 4 if name == "anchor" else 3 * i + len(row)]
            lists = {"positives": [text], "negatives": texts[3 * i + 9 : 3 * i + 10 + i % 3]}
            row[column] = {"score": i % 6, "label": labels[i % len(labels)], **lists}.get(name, text)
        rows.append(row)
    write_lines(folder / source["path"], rows)


@pytest.fixture
def recipe(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """All blocks of the document as one config; the last block that sets a key wins, validation sets are joined."""
    monkeypatch.chdir(tmp_path)
    config: dict[str, Any] = {"model": {"loss": "InfoNCE"}, "data": {"validation": []}}
    for block in BLOCKS:
        content = yaml.safe_load(block)
        sets = content.get("data", {}).get("validation", [])
        for source in sets:
            write_source(tmp_path, source, demo_texts, tiny_encoder)
        config["data"]["validation"] += sets
        config["model"] |= content.get("model", {})
        config |= {key: value for key, value in content.items() if key not in ("model", "data")}
    config["model"]["encoder"] = {"backbone": str(tiny_encoder)}
    config["data"]["train"] = [{"path": "not-there.jsonl", "columns": {"anchor": "a", "positive": "b", "label": "c"}}]
    config["trainer"] = {"accelerator": "cpu", "devices": 1, "default_root_dir": str(tmp_path / "run")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_every_block_evaluates(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`trainer validate` with all of them: the primary metric of each evaluator of the table is in metrics.json and in
    the printed table; the training data is not there."""
    assert run_cli(["validate", "--config", str(recipe)]) == 0
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    metrics = results["metrics"]
    names = re.findall(r"^\| `(\w+)` \| [^|]*\| `([^`]+)`", DOCUMENT, flags=re.MULTILINE)
    documented = {name for name, _ in names}
    assert documented == set(trainer.evaluation.__all__) - {"Evaluator"}
    sources = yaml.safe_load(recipe.read_text())["data"]["validation"]
    primary = dict(names)
    found = set()
    words = ["--config", str(recipe)]
    for built in run(["validate", *words], read_command(words), execute=False).datamodule.validation_sources:
        given = {key.rpartition("/")[2] for key in metrics if key.startswith(f"eval/{built.name}/")}
        assert given == set(built.evaluator.metrics), built.name  # what a monitor is held against before the first step
    for source in sources:
        kind = source["evaluator"] if isinstance(source["evaluator"], str) else source["evaluator"]["class_path"]
        found.add(kind)
        name = "cosine_ndcg@100" if source["name"] == "cranfield" else primary[kind]
        assert metrics[f"eval/{source['name']}/{name}"] is not None, source["name"]
    assert found == documented
    of_sets = [metrics[f"eval/nanobeir/{name}/cosine_ndcg@10"] for name in ("NanoA", "NanoB")]
    assert metrics["eval/nanobeir/cosine_ndcg@10"] == pytest.approx(sum(of_sets) / 2)
    assert metrics["eval/like-teacher/negative_mse"] < 0
    printed = capsys.readouterr().out
    for name in ("spearman_cosine", "cosine_ndcg@10", "negative_mse", "nanobeir/NanoA"):
        assert name in printed
    assert f"{metrics['eval/dev/spearman_cosine']:.4f}" in printed


def test_the_example_of_an_evaluator_works() -> None:
    space: dict[str, Any] = {}
    exec(EXAMPLE, space)
    evaluator = space["MeanSimilarity"]()
    rows = {"anchor": ["a", "b"], "positive": ["c", "d"]}
    assert evaluator.texts(rows) == ["a", "b", "c", "d"]
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 0.0]])
    assert evaluator.score(embeddings, rows) == {"mean_cosine": pytest.approx(0.5)}
