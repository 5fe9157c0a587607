"""The benchmarks that the README shows, short."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = re.findall(r"^\.venv/bin/python benchmarks/.*", README, flags=re.MULTILINE)


def test_the_readme_shows_one() -> None:
    assert COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_benchmark_command(command: str, data_dir: Path, tmp_path: Path) -> None:
    """As written, on the smallest shape with a few steps: both sides run and the ratio is written."""
    words = shlex.split(command)[1:]
    few = {
        "--shape": "stsb",
        "--steps": "2",
        "--turns": "1",
        "--warmup": "1",
        "--data": str(data_dir),
        "--json": str(tmp_path / "out.json"),
    }
    for option, value in few.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    ours, theirs = report["sides"]["ours"], report["sides"]["default"]
    assert report["ratios"]["default"]["speed"] == theirs["seconds"][0] / ours["seconds"][0]
    assert 0 < ours["share_of_matrix_rate"] < 1.5
    # The same rows and the same start, dropout apart.
    assert len(ours["losses"]) == len(theirs["losses"]) == 3
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=0.5)
    assert min(ours["peak_host_mib"], theirs["peak_host_mib"]) > 300  # weights, gradients, moments of 22.7 M parameters


def test_gpu_benchmark_on_the_cpu(tmp_path: Path) -> None:
    """Tiny: generated data, chunks, and both settings of the other side."""
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--cpu",
        "--shapes",
        "nli-chunks",
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads((tmp_path / "out.json").read_text())["reports"]
    assert report["sides"].keys() == {"ours", "default", "best"}
    assert report["sides"]["ours"]["replayed_share"] > 0.2  # a second forward of the chunks, a third of the arithmetic


def test_recipes_are_trained_and_scored(data_dir: Path, tmp_path: Path) -> None:
    """The smallest system, all its variants, one seed."""
    out = tmp_path / "recipes.json"
    command = [sys.executable, "benchmarks/recipes.py", "--data", str(data_dir), "--json", str(out)]
    command += ["--systems", "korean-nutrition", "--seeds", "1", "--on", "tune"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = {one["variant"]: one for one in json.loads(out.read_text())["outcomes"]}
    assert set(outcomes) == {"base", "published", "published-st", "ours", "best-st"}
    assert all(0.2 < one["score"] < 0.5 for one in outcomes.values())
    assert outcomes["published"]["rows"] == outcomes["published-st"]["rows"] == 3 * 81
    assert outcomes["base"]["score"] != outcomes["published"]["score"] != outcomes["ours"]["score"]
