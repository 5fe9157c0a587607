"""What a run prints: plain lines into a file, a bar on a terminal, nothing from rank 1."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.tiny_recipe import write_tiny_recipe
from tests.tracking.small_run import make_parts, make_trainer, write_rows
from tests.two_ranks import TwoRanks
from trainer.cli import main
from trainer.evaluation.runner import Evaluation
from trainer.tracking.metrics import MetricsLog
from trainer.tracking.progress import Progress

TRAIN = (
    r"step {step}/12 \({percent}%\)  loss \d\.\d{{4}}  lr \d\.\d\de-0\d  [\d,]+\.\d rows/s  [\d,]+ tokens/s  "
    r"padding efficiency 0\.\d\d  eta \d:\d\d"
)
EVAL = r"step {step}/12  eval/dev0/spearman_cosine -?\d\.\d{{4}}"


def fit(run_dir: Path, encoder: Path, rows: list[Path], width: int = 0) -> str:
    """What this rank prints, on a terminal of so many columns or into a file."""
    module, data = make_parts(encoder, rows[0], rows[1:])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        console = Console(file=out, force_terminal=True, width=width) if width else None
        callbacks = [MetricsLog(), Evaluation(), Progress(console)]
        make_trainer(run_dir, callbacks, enable_progress_bar=True).fit(module, data)
    return out.getvalue()


@pytest.fixture
def rows(tmp_path: Path, demo_texts: list[str]) -> list[Path]:
    return [write_rows(tmp_path, demo_texts), write_rows(tmp_path, demo_texts, 10)]


def assert_lines(text: str, encoder: Path, nodes: str) -> None:
    header, *lines = text.splitlines()
    assert re.fullmatch(
        rf"{re.escape(str(encoder))}: 0\.\d M parameters, 0\.\d M trained · 22 rows · 12 steps of 4 rows · "
        rf"{nodes} x 1 cpu · precision 32-true",
        header,
    )
    wanted = [
        EVAL.format(step=0),
        TRAIN.format(step=5, percent=42),
        EVAL.format(step=6),
        TRAIN.format(step=10, percent=83),
        TRAIN.format(step=12, percent=100),
        EVAL.format(step=12),
    ]
    assert len(lines) == len(wanted), text
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line), line


def test_plain_lines(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    assert_lines(fit(tmp_path, tiny_encoder, rows), tiny_encoder, "1 node")


def test_terminal(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    """Also on a narrow one the last drawing holds a bar, the last log and the last evaluation, whole."""
    text = fit(tmp_path, tiny_encoder, rows, width=80)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    bar, train, evaluation = plain.splitlines()[-3:]
    assert re.fullmatch(r"\s*12/12 ━{40} 100%  eta 0:00\s*", bar)
    assert re.fullmatch(TRAIN.partition("  ")[2].rpartition("  ")[0].format(), train.strip())
    assert re.fullmatch(EVAL.partition("  ")[2].format(), evaluation.strip())


def test_rank_1_is_silent(tmp_path: Path, tiny_encoder: Path, rows: list[Path], two_ranks: TwoRanks) -> None:
    first, second = two_ranks(fit, tmp_path, tiny_encoder, rows)
    assert_lines(first, tiny_encoder, "2 nodes")
    assert second == ""


def test_rows_of_a_stream_are_not_said_to_be_none(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_tiny_recipe(tmp_path, tiny_encoder, max_steps=1)
    assert (
        main(
            [
                "fit",
                "--config",
                str(recipe),
                "--data.train.streaming",
                "true",
                f"--trainer.default_root_dir={tmp_path}/run",
            ]
        )
        == 0
    )
    assert "M trained · streamed rows · 1 steps of 4 rows · " in capsys.readouterr().out
