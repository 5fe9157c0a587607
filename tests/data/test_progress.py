"""A bar on a terminal, one line elsewhere, nothing for small work."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trainer.data.progress import shown_progress


def _shown(terminal: bool, large: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with shown_progress("pairs[1].jsonl: tokenising 1,000 rows", 1000, "rows", large, console) as advance:
        for _ in range(10):
            advance(100.0)
    return out.getvalue()


def test_a_terminal_gets_a_bar_with_rows_and_remaining_time() -> None:
    shown = _shown(terminal=True, large=True)
    assert "pairs[1].jsonl: tokenising 1,000 rows" in shown
    assert "1000/1000" in shown
    assert "0:00:00" in shown


def test_a_log_gets_one_line() -> None:
    assert _shown(terminal=False, large=True) == "pairs[1].jsonl: tokenising 1,000 rows\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_small_work_says_nothing(terminal: bool) -> None:
    assert _shown(terminal, large=False) == ""
