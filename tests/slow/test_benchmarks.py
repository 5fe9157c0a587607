"""The benchmarks that the README shows, short."""

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
        "--steps": "7",
        "--turns": "1",
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
    assert "ratio" in (tmp_path / "out.json").read_text()
