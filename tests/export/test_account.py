"""What a card says of its run is what the files of the run say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.export.conftest import Bench
from tests.export.test_model_card import export, section
from trainer.compare.plots import WIDTH
from trainer.export.account import _public
from trainer.export.curves import FILE, training_curves
from trainer.export.record import read_findings
from trainer.manifest import read_state, write_checkpoint

SVG = "{http://www.w3.org/2000/svg}"
LOG: list[dict[str, Any]] = [
    {"step": 0, "eval/dev/spearman_cosine": 0.125, "eval/dev/pearson_cosine": 0.25, "eval/far/spearman_cosine": 0.5},
    {"step": 2, "train/loss": 0.5, "train/rows_seen": 32, "train/wall_s": 30.0},
    {"step": 3, "eval/dev/spearman_cosine": 0.875, "eval/dev/pearson_cosine": 0.75, "eval/far/spearman_cosine": 0.25},
    {"step": 4, "train/loss": 0.25, "train/rows_seen": 64, "train/tokens_seen": 1234, "train/wall_s": 3723.4}
    | {"train/gpu_hours": 4.1371, "eval/dev/spearman_cosine": 0.625, "eval/dev/pearson_cosine": None},
]
FINDING = {"severity": "error", "remedy": "mend them", "recipe": ""}
FINDINGS = [
    {"name": "constant_labels", "where": "/private/pairs.jsonl", "cause": "all 64 labels are 1", "allowed": True},
    {"name": "leak", "where": "dev", "cause": "3 of 16 texts are trained on", "allowed": False},
]
ABOUT = {"device": "NVIDIA H100", "ranks": 8, "nodes": 2}
ABOUT["primary_metrics"] = ["eval/dev/spearman_cosine", "eval/far/spearman_cosine"]


def write_files(folder: Path, log: list[dict[str, Any]] = LOG, **identity: str) -> None:
    """What `fit` leaves beside the config."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "run.json").write_text(json.dumps(ABOUT))
    (folder / "check.json").write_text(json.dumps({"findings": [FINDING | one for one in FINDINGS]}))
    path = folder / "checkpoints" / "step-00000003"
    write_checkpoint(read_state(path), path, {"identity": identity})


@pytest.fixture(scope="module")
def exported(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = bench.write_run("account", {"revision": "hf_abcdefghijklmnopqrstuvwxyz"})
    write_files(run.folder, **{"data.train.0.rows": "0123abcd", "data.batch_size": "16"})
    out = tmp_path_factory.mktemp("account") / "model"
    return out, export(run, out)


@pytest.mark.parametrize("text", ["{}", '{"findings": [', "[]"])
def test_a_damaged_check_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "check.json").write_text(text)
    with pytest.raises(ValueError, match=r"check.json can't be read: .*; remove it"):
        read_findings(tmp_path / "check.json")


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (.*) \|$", text, re.M)]


def test_metrics_stand_beside_those_of_the_base(exported: tuple[Path, str]) -> None:
    main, every = section(exported[1], "### Against the Untouched Base").split("<details>")
    head, *rows = table(main)
    assert head == ["Set", "Metric", "Base, step 0", "Exported, step 3", "Last, step 4", "Difference"]
    assert rows == [
        ["dev", "spearman_cosine", "0.1250", "0.8750", "0.6250", "+0.7500"],
        ["far", "spearman_cosine", "0.5000", "0.2500", "–", "-0.2500"],
    ]
    assert table(every) == [head, *rows, ["dev", "pearson_cosine", "0.2500", "0.7500", "–", "+0.5000"]]


def test_without_a_first_evaluation_it_says_so(bench: Bench, tmp_path: Path) -> None:
    run = bench.write_run("no-base")
    write_files(run.folder, LOG[1:])
    said = section(export(run, tmp_path / "model"), "### Against the Untouched Base").split("\n## ")[0].strip()
    assert said == "The base was not evaluated: the log of the run has no metric of step 0."


def test_a_step_that_was_not_evaluated_is_not_shown(bench: Bench, tmp_path: Path) -> None:
    run = bench.write_run("unevaluated")
    write_files(run.folder, [row for row in LOG if row["step"] != 3])
    card = export(run, tmp_path / "model")
    assert card.count("\n## Evaluation\n") == 1
    head, row, *_ = table(section(card, "### Against the Untouched Base"))
    assert head == ["Set", "Metric", "Base, step 0", "Last, step 4", "Difference"]
    assert row == ["dev", "spearman_cosine", "0.1250", "0.6250", "+0.5000"]


def read_line(plot: ElementTree.Element, line: ElementTree.Element) -> list[tuple[float, float]]:
    """Pixels back to steps and values, by the ranges that the plot names."""
    scales = [list(map(float, plot.attrib[name].split())) for name in ("data-x", "data-y")]
    return [
        tuple(low + (pixel - start) / (end - start) * (high - low)  # type: ignore[misc]
              for pixel, (low, high, start, end) in zip(map(float, point.split(",")), scales, strict=True))
        for point in line.attrib["points"].split()
    ]  # fmt: skip


def test_curves_are_those_of_the_log(exported: tuple[Path, str]) -> None:
    folder, card = exported
    assert f"]({FILE})" in section(card, "### Training Logs")
    root = ElementTree.parse(folder / FILE).getroot()
    loss, metric = root.findall(f"{SVG}svg")
    assert [text.text for text in root.findall(f"{SVG}text")] == ["train/loss", "spearman_cosine"]
    assert [key.text for key in root.iter(f"{SVG}tspan")] == ["dev", "far"]
    shown = [read_line(plot, line) for plot in (loss, metric) for line in plot.findall(f"{SVG}polyline")]
    wanted = [[(2, 0.5), (4, 0.25)], [(0, 0.125), (3, 0.875), (4, 0.625)], [(0, 0.5), (3, 0.25)]]
    for found, truth in zip(shown, wanted, strict=True):
        for one, other in zip(found, truth, strict=True):
            assert one == pytest.approx(other, abs=0.01)


def test_curves_stand_side_by_side_and_nothing_makes_none() -> None:
    root = ElementTree.fromstring(training_curves(LOG, ABOUT["primary_metrics"]))
    assert [float(plot.attrib["x"]) for plot in root.findall(f"{SVG}svg")] == [16, 32 + WIDTH]
    assert training_curves(LOG[:2], ["eval/dev/spearman_cosine"]) == ""


def test_fingerprints_and_findings(exported: tuple[Path, str]) -> None:
    card = exported[1]
    assert section(card, "### Fingerprints of the Training Rows").strip() == "- train.jsonl.gz: `0123abcd`"
    said = section(card, "### Known Mistakes of the Training Data").strip()
    assert said == "- `constant_labels` (pairs.jsonl): all 64 labels are 1"
    assert section(card, "### Warnings of the Data Check").strip() == "- `leak` (dev): 3 of 16 texts are trained on"


def test_hardware_and_time(exported: tuple[Path, str]) -> None:
    assert section(exported[1], "### Training Hardware and Time").strip().splitlines() == [
        "- Device: NVIDIA H100, 8 ranks on 2 nodes",
        "- Seen: 64 rows and 1,234 tokens, repetitions included",
        "- Wall time: 1 h 02 min, with evaluation and checkpoints",
        "- Device hours: 4.14",
    ]


def test_config_is_whole_but_for_secrets_and_places(bench: Bench, exported: tuple[Path, str]) -> None:
    card = exported[1]
    found = yaml.safe_load(re.search(r"````yaml\n(.*?)````", card, re.DOTALL).group(1))  # type: ignore[union-attr]
    wanted = yaml.safe_load((bench.folder / "account" / "config.yaml").read_text())
    for section_, key in (("data", "cache_dir"), ("trainer", "default_root_dir")):
        del wanted[section_][key]
    del wanted["tracking"]
    wanted["model"]["encoder"] |= {"backbone": "tiny-encoder", "revision": "[redacted]"}
    for source in wanted["data"]["train"] + wanted["data"]["validation"]:
        source["path"] = Path(source["path"]).name
    assert found == wanted
    assert str(bench.folder) not in card


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/my data/pairs.jsonl", "pairs.jsonl"),
        ("~/pairs.jsonl", "pairs.jsonl"),
        ("../runs/one", "one"),
        ("my data/pairs.csv.gz", "pairs.csv.gz"),
        ("data/old/train", "train"),
        ("s3://bucket/secret/pairs.parquet", "pairs.parquet"),
        ("some-org/some-model", "some-org/some-model"),
        ("query / passage: ", "query / passage: "),
        ("bf16-mixed", "bf16-mixed"),
    ],
)
def test_paths_are_cut_and_nothing_else(text: str, shown: str) -> None:
    assert _public(text) == shown
