"""benchmarks/RESULTS.md and docs/recipes.md say what the JSON files say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report, recipes_report = _script("report"), _script("recipes_report")

MACHINE = {
    "command": "python benchmarks/throughput.py --shape stsb",
    "device": "cpu",
    "cpu": "A Processor",
    "cores": 2,
    "threads": 2,
    "versions": {"torch": "2.13", "transformers": "5.2", "sentence-transformers": "6.2"},
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
}


def test_the_document_is_that_of_the_files() -> None:
    written = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    assert written == report.document(BENCHMARKS / "results"), "run python benchmarks/report.py"


def test_the_readme_quotes_the_files() -> None:
    """Every measured shape and precision, with the figures of its file."""
    readme = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    paths = sorted((BENCHMARKS / "results" / "throughput").glob("*.json"))
    assert paths
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        ours, theirs = (f"{content['sides'][side]['rows_per_s']:.1f}" for side in ("ours", "default"))
        ratio = content["ratios"]["default"]
        rounds = ratio["speed_each_round"]
        spread = f"({min(rounds):.2f} to {max(rounds):.2f})" if len(rounds) > 1 else "(1 round)"
        speed = f"{ratio['speed']:.2f} {spread}"
        row = f"| {content['precision']} | {ours} | {theirs} | {speed} | {ratio['memory']:.2f} |"
        assert row in readme, path.name


def test_the_recipes_are_those_of_the_file() -> None:
    content = json.loads((BENCHMARKS / "results" / "recipes.json").read_text(encoding="utf-8"))
    written = (BENCHMARKS.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == recipes_report.document(content), "run python benchmarks/recipes_report.py"


def test_a_recipe_beats_another_by_two_deviations_or_is_level() -> None:
    """In words, as NumPy's standard deviation of a sample decides."""
    ours, theirs = [0.50, 0.52, 0.54], [0.40, 0.41, 0.42]
    assert np.mean(ours) - np.mean(theirs) > 2 * np.std(ours, ddof=1)
    assert recipes_report._verdict(ours, theirs) == "beats (+0.1100)"
    assert recipes_report._verdict(theirs, ours) == "is beaten (-0.1100) by"
    assert recipes_report._verdict(ours, [0.49]) == "is level (+0.0300, two deviations are 0.0400) with"


def test_each_kind_of_file_has_its_rows(tmp_path: Path) -> None:
    """Figures, and the command, machine and commit of each."""
    ours = {
        "rows_per_s": 60.0,
        "tokens_per_s": 1800.0,
        "share_of_matrix_rate": 0.5,
        "share_with_replays": 0.6,
        "losses": [2, 1],
    }
    theirs = {**ours, "rows_per_s": 20.0, "share_with_replays": 0.5}
    speed = {
        "shape": "stsb",
        "batch_size": 16,
        "precision": "bf16",
        "prepared": {"used_pieces": 10796},
        "sides": {
            "ours": {**ours, "peak_device_mib": None, "peak_host_mib": 500.0},
            "default": {**theirs, "peak_device_mib": None, "peak_host_mib": 1000.0},
        },
        "ratios": {"default": {"speed": 3.0, "speed_each_round": [2.9, 3.0, 3.1], "memory": 0.5}},
    }
    contents: dict[str, dict[str, Any]] = {
        "a.json": speed,
        "gpu/b.json": {"reports": [{**speed, "shape": "ja-en"}], "data": "generated", "device": "A GPU"},
        "c.json": {
            "memory": [{"shape": "stsb", "batch_size": 16, "precision": "fp32", "peak_mib": {"ours": 1.0, "best": 4.0}}]
        },
        "d.json": {
            "shape": "ja-en",
            "batch_size": 16,
            "precision": "fp32",
            "scaling": [
                {
                    "side": "ours",
                    "rows_per_s": {"1": 10.0, "2": 18.0},
                    "speedup": 1.8,
                    "bytes_per_step": {"gradient": 9.0e7, "all": 9.1e7},
                }
            ],
        },
        "e.json": {"of": "another benchmark"},
        "f.json": {
            "precision": "bf16",
            "quality": {
                "stsb-en": {
                    "before": 0.5,
                    "runs": {"ours": {"1": {"spearman": 0.7}, "2": {"spearman": 0.8}}},
                }
            },
        },
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**MACHINE, **content}))
    text = report.document(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        "| stsb | 16 | bf16 | 10,796 | ours | 60.0 | 1,800 | 0.50 (0.60 with replays) | 500 | 1.5000 |  |  | [1] |"
        in rows
    )
    assert (
        "| stsb | 16 | bf16 | 10,796 | default | 20.0 | 1,800 | 0.50 | 1,000 | 1.5000 | **3.00x** (2.90 to 3.10) "
        "| 0.50x | [1] |" in rows
    )
    assert [row for row in rows if row.startswith("| ja-en | 16 | bf16 | 10,796 | default") and row.endswith("[2] |")]
    assert "| stsb | 16 | fp32 | ours 1, best 4 | 0.25x of best | [3] |" in rows
    assert "| ja-en | 16 | fp32 | ours | 10.0 | 18.0 | 1.80x | 90.0 | 1.00 | [4] |" in rows
    assert "A GPU, 2 threads; generated texts" in text
    deviation = np.std([0.7, 0.8], ddof=1)
    assert f"| stsb-en | bf16 | ours | 0.5000 | 0.7500 ± {deviation:.4f} | 0.7000, 0.8000 | [5] |" in rows
    assert text.count("`python benchmarks/throughput.py --shape stsb`") == 5
    assert text.count("commit 0123456789;") == 5
    assert "another" not in text
