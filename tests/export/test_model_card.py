"""The rendered README.md of an exported folder, against the run it tells about."""

from __future__ import annotations

import json
import random
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

from tests.data.test_retrieval import write_beir, write_lines
from trainer.demo_data import read_pairs
from trainer.encoder import EncoderSpec
from trainer.export.model_card import _set_base
from trainer.export.record import training_logs
from trainer.export.sentence_transformers import export_run
from trainer.losses import InfoNCE

SECTIONS = [
    "# SentenceTransformer based on tiny-encoder",
    "## Model Details",
    "### Model Description",
    "### Model Sources",
    "### Full Model Architecture",
    "## Usage",
    "### Direct Usage (Sentence Transformers)",
    "## Evaluation",
    "### Metrics",
    "#### Semantic Similarity",
    "### Against the Untouched Base",
    "## Training Details",
    "### Training Dataset",
    "#### train.jsonl.gz",
    "### Evaluation Dataset",
    "#### dev (dev.jsonl.gz)",
    "### Training Hyperparameters",
    "#### Non-Default Hyperparameters",
    "#### All Hyperparameters",
    "### Training Logs",
    "### Exported Checkpoint",
    "### Config",
    "### Framework Versions",
    "## Additional Resources",
    "## Citation",
    "### BibTeX",
    "#### Sentence Transformers",
    "#### InfoNCE",
]


def export(run: Any, out: Path) -> str:
    export_run(run.folder, out)
    return (out / "README.md").read_text(encoding="utf-8")


def headings(card: str) -> list[str]:
    """What a reader sees as headings: no comments, no code."""
    card = card.split("---\n", 2)[2]
    visible = re.sub(r"<!--.*?-->|```.*?```", "", card, flags=re.DOTALL)
    return re.findall(r"^#+ .*", visible, flags=re.MULTILINE)


def section(card: str, heading: str) -> str:
    """From a heading to the next of the same level."""
    rest = card.split(f"\n{heading}\n", 1)[1]
    return rest.split(f"\n{heading.split(' ')[0]} ", 1)[0]


@pytest.fixture(scope="module")
def card(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return export(bench.write_run("card"), tmp_path_factory.mktemp("card") / "model")


def test_all_sections_render(card: str) -> None:
    assert headings(card) == SECTIONS
    assert "Undefined" not in card
    assert "{{" not in card


def test_front_matter_for_the_hub(card: str) -> None:
    front = yaml.safe_load(card.split("---\n")[1])
    assert {"generated_from_trainer", "siamese-trainer", "dataset_size:64", "loss:InfoNCE"} <= set(front["tags"])
    assert "base_model" not in front  # a local folder is no hub id
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["name"] == "dev"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        "spearman_cosine": 0.875,
        "pearson_cosine": 0.75,
    }


def test_base_model_and_chosen_checkpoint(card: str) -> None:
    assert "- **Base model:** `tiny-encoder` (a local folder)\n" in card
    told = section(card, "### Exported Checkpoint").strip()
    assert told == "`step-00000003`, step 3: the newest of the run; no metric chose a best one."


def test_statistics_and_samples_are_those_of_the_data(bench: Any, card: str) -> None:
    training = section(card, "### Training Dataset")
    assert "* Size: 64 training samples" in training
    assert "<code>anchor</code>, <code>positive</code>, and <code>score</code>" in training
    for pair in bench.pairs[:3]:
        cells = [f"<code>{x}</code>" for x in (pair.sentence1, pair.sentence2, round(pair.score / 5, 4))]
        assert re.search(r"\s*\|\s*".join(map(re.escape, cells)), training), pair
    tokenizer = SentenceTransformer(str(bench.backbone), device="cpu").tokenizer
    lengths = [len(ids) for ids in tokenizer([pair.sentence1 for pair in bench.pairs])["input_ids"]]
    expected = f"min: {min(lengths)} tokens</li><li>mean: {round(np.mean(lengths), 2)} tokens</li>"
    assert expected in training
    scores = [pair.score / 5 for pair in bench.pairs]
    assert f"mean: {round(np.mean(scores), 2)}</li><li>max: 1.0" in training
    assert "* Size: 16 evaluation samples" in section(card, "### Evaluation Dataset")


def test_loss_with_parameters_and_evaluator(card: str) -> None:
    training, evaluation = section(card, "### Training Dataset"), section(card, "### Evaluation Dataset")
    name, parameters = re.search(r"\* Loss: <code>(.*?)</code>.*?```json\n(.*?)```", training, re.DOTALL).groups()
    assert name == "trainer.losses.infonce.InfoNCE"
    assert json.loads(parameters) == InfoNCE(scale=12.5).describe()
    assert "* Evaluator: <code>trainer.evaluation.sts.STS</code>" in evaluation
    assert "Loss" not in evaluation


def test_metrics_are_those_of_the_exported_step(card: str) -> None:
    table = section(card, "### Metrics")
    assert re.search(r"\*\*spearman_cosine\*\* *\| \*\*0.875\*\*", table)
    assert re.search(r"pearson_cosine *\| 0.75 ", table)
    assert "pearson_dot" not in table  # null: it was not finite


def test_hyperparameters(card: str) -> None:
    part = section(card, "### Training Hyperparameters")
    changed, everything = (
        dict(re.findall(r"^- `(\w+)`: (.*)$", text, re.M)) for text in part.split("#### All Hyperparameters")
    )
    wanted = {
        "batch_size": "16", "learning_rate": "0.0003", "schedule": "linear", "warmup_ratio": "0.0",
        "weight_decay": "0.0", "precision": "bf16-mixed", "seed": "7", "max_epochs": "1",
        "max_tokens": "4096", "max_length": "48",
    }  # fmt: skip
    assert wanted.items() <= changed.items()
    assert changed.items() <= everything.items()
    assert {
        "optimizer",
        "pooling",
        "normalize",
        "prompt",
        "compact_vocabulary",
    } <= everything.keys() - changed.keys()


def test_training_logs_mark_the_exported_step(card: str) -> None:
    rows = re.findall(r"^\| (.*) \|$", section(card, "### Training Logs"), re.M)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert cells[0] == ["Epoch", "Step", "Training Loss", "dev_spearman_cosine"]
    assert cells[1:] == [
        ["0.0", "0", "-", "0.1"],
        ["0.5", "2", "0.5", "-"],
        ["**0.75**", "**3**", "**-**", "**0.875**"],
        ["1.0", "4", "0.25", "-"],
    ]


def test_long_logs_are_thinned_but_keep_evaluations_and_the_end() -> None:
    log: list[dict[str, Any]] = [{"step": s, "train/loss": 1 / s} for s in range(10, 50_001, 10)]
    log += [{"step": s, "train/loss": None} for s in (50_001, 50_002)]
    lines = training_logs(log, [], steps_per_epoch=10_000)
    assert 90 <= len(lines) <= 101
    assert lines[-1] == {"Epoch": 5.0, "Step": 50_000, "Training Loss": 1 / 50_000}
    assert [line["Step"] for line in lines] == sorted({line["Step"] for line in lines})
    assert "Epoch" not in training_logs(log, [], steps_per_epoch=None)[0]


def test_versions(card: str) -> None:
    part = section(card, "### Framework Versions")
    for name, distribution in (
        ("Lightning", "lightning"),
        ("siamese-trainer", "siamese-trainer"),
        ("Sentence Transformers", "sentence-transformers"),
        ("Transformers", "transformers"),
        ("Datasets", "datasets"),
    ):
        assert f"- {name}: {version(distribution)}\n" in part
    assert re.search(r"- Accelerate: \S+", part)


def test_usage_snippet_runs_and_gives_what_it_says(bench: Any, tmp_path: Path) -> None:
    text = export(bench.write_run("snippet"), tmp_path / "model")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    code = code.replace("sentence_transformers_model_id", str(tmp_path / "model")).replace("print(", "shown.append(")
    names: dict[str, Any] = {"shown": []}
    exec(code, names)
    dev = read_pairs(bench.folder / "data" / "dev.jsonl.gz")
    known = {text for pair in dev for text in (pair.sentence1, pair.sentence2)}
    assert set(names["sentences"]) <= known
    shape, similarities = names["shown"]
    assert shape == (3, 32)
    said = re.findall(r"-?\d\.\d{4}", code.split("shown.append(similarities)")[1])
    torch.testing.assert_close(torch.tensor([float(x) for x in said]).view(3, 3), similarities, atol=1e-4, rtol=0)


def test_each_paper_is_cited_once(bench: Any, tmp_path: Path, card: str) -> None:
    assert card.count("@inproceedings{reimers-2019-sentence-bert,") == 1
    assert card.count("@misc{oord2019") == 1
    run = bench.write_run("cosine", model={"loss": {"class_path": "CosineSimilarity"}})
    text = export(run, tmp_path / "model")
    assert text.count("reimers-2019-sentence-bert") == 1
    assert "#### Sentence Transformers and CosineSimilarity\n" in text
    assert "loss:CosineSimilarity" in text


def test_same_export_twice_gives_the_same_card(bench: Any, tmp_path: Path) -> None:
    run = bench.write_run("twice")
    random.seed(5)
    state = random.getstate()
    first = export(run, tmp_path / "model")
    assert random.getstate() == state
    random.seed(6)
    assert export(run, tmp_path / "model") == first


def test_card_of_the_backbone_is_not_copied(bench: Any, tmp_path: Path) -> None:
    base = SentenceTransformer(str(bench.backbone), device="cpu")
    base.save_pretrained(str(tmp_path / "tiny-encoder"), create_model_card=False)
    (tmp_path / "tiny-encoder" / "README.md").write_text("# The card of the backbone\n")
    text = export(bench.write_run("copy", {"backbone": str(tmp_path / "tiny-encoder")}), tmp_path / "model")
    assert headings(text) == SECTIONS


def test_data_that_moved_costs_its_samples_not_the_export(
    bench: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"anchor": "a", "positive": "b"}
    train = [{"path": str(tmp_path / "gone" / "moved.jsonl"), "columns": columns}]
    text = export(bench.write_run("moved", data={"train": train, "validation": None}), tmp_path / "model")
    assert "shows no samples of" in caplog.text
    part = section(text, "### Training Dataset")
    assert "#### moved.jsonl" in part
    assert "* Columns: <code>anchor</code> and <code>positive</code>" in part
    assert "Samples" not in part
    assert "Epoch" not in section(text, "### Training Logs")
    assert "### Metrics" not in text
    assert str(tmp_path) not in text


def test_run_without_metrics_file(bench: Any, tmp_path: Path) -> None:
    run = bench.write_run("unlogged")
    (run.folder / "metrics.jsonl").unlink()
    missing = {"## Evaluation", "### Metrics", "#### Semantic Similarity", "### Training Logs"}
    missing.add("### Against the Untouched Base")
    assert headings(export(run, tmp_path / "model")) == [name for name in SECTIONS if name not in missing]


def test_several_sources_sets_and_a_cut_line(bench: Any, tmp_path: Path) -> None:
    config = yaml.safe_load((bench.write_run("one").folder / "config.yaml").read_text())
    source = config["data"]["train"][0]
    (dev,) = config["data"]["validation"]
    data = {"train": [source, source], "validation": [dev, {**dev, "name": "second"}], "max_rows": 40}
    run = bench.write_run("several", data=data)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "eval/second/spearman_cosine": 0.625, "eval/second/pearson_cosine": 0.5}\n')
        file.write('{"step": 5, "train/lo')
    text = export(run, tmp_path / "model")
    assert text.count("* Size: 40 training samples") == 2
    assert "dataset_size:80" in text
    assert re.search(r"spearman_cosine\*\* *\| \*\*0.875\*\* *\| \*\*0.625\*\*", section(text, "### Metrics"))
    assert re.search(r"\*\*0.875\*\* *\| \*\*0.625\*\* *\|\n", section(text, "### Training Logs"))


def test_labelled_texts(bench: Any, tmp_path: Path) -> None:
    train = [
        {
            "path": str(bench.folder / "data" / "train.jsonl.gz"),
            "columns": {"text": "sentence1", "label": "score"},
        }
    ]
    loss = {"class_path": "BatchHardTriplet", "init_args": {"margin": 2.0}}
    text = export(bench.write_run("labels", data={"train": train}, model={"loss": loss}), tmp_path / "model")
    training = section(text, "### Training Dataset")
    assert "* Columns: <code>text</code> and <code>label</code>" in training
    labels = [pair.score for pair in bench.pairs]
    assert f"<li>0: ~{labels.count(0) / 64:.2%}</li>" in training
    assert '"margin": 2.0' in training
    assert "@misc{hermans2017defense" in text


def test_base_model_of_the_hub_is_named() -> None:
    card = SentenceTransformerModelCardData()
    _set_base(card, [EncoderSpec(backbone="some-org/some-model", revision="v2")])
    assert (card.base_model, card.base_model_revision) == ("some-org/some-model", "v2")


def test_a_set_that_is_searched(bench: Any, tmp_path: Path) -> None:
    """Its metrics of the exported step, its queries as samples, its evaluator with what it was told; no path."""
    folder = write_beir(bench.folder / "cranfield")
    evaluator = {"class_path": "trainer.evaluation.InformationRetrieval", "init_args": {"similarity": "dot"}}
    validation = [{"name": "cran", "path": str(folder), "evaluator": evaluator}]
    run = bench.write_run("search", data={"validation": validation})
    row = {"step": 3, "eval/cran/dot_ndcg@10": 0.4375, "eval/cran/dot_map@100": 0.3125}
    (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    card = export(run, tmp_path / "out")
    assert "#### Information Retrieval" in card
    assert re.search(r"\| \**dot_ndcg@10\** +\| \**0\.4375\** +\|", card)
    assert re.search(r"\| dot_map@100 +\| 0\.3125 +\|", card)
    assert "* Evaluator: <code>trainer.evaluation.informationretrieval.InformationRetrieval</code>" in card
    assert "what is thing 0 ?" in card
    assert str(bench.folder) not in card


def test_lists_of_negatives(bench: Any, tmp_path: Path) -> None:
    """Of training and of a validation set: the columns that every row has are shown."""
    records = [
        {"query": pair.sentence1, "pos": [pair.sentence2], "neg": [pair.sentence1] * (1 + i % 3)}
        for i, pair in enumerate(bench.pairs[:12])
    ]
    write_lines(bench.folder / "lists.jsonl", records)
    columns = {"anchor": "query", "positives": "pos", "negatives": "neg"}
    source = {"path": str(bench.folder / "lists.jsonl"), "columns": columns, "max_negatives": 3}
    validation = {"name": "lists", **source, "evaluator": {"class_path": "trainer.evaluation.Reranking"}}
    card = export(bench.write_run("lists", data={"train": [source], "validation": [validation]}), tmp_path / "out")
    assert "<code>negative_1</code>" in card
    assert "<code>negative_2</code>" not in card
    assert str(bench.folder) not in card
