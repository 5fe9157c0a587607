"""docs/reliability.md shows what the loops of benchmarks/reliability.py gave; short ones are run in tests/slow."""

from __future__ import annotations

import sys
from pathlib import Path

LOOPS = Path(__file__).parents[1] / "benchmarks" / "reliability.py"


def test_the_document_shows_what_was_measured() -> None:
    """Its tables are those of the results beside it."""
    sys.path.insert(0, str(LOOPS.parent))
    try:
        import reliability
    finally:
        sys.path.remove(str(LOOPS.parent))
    results = sorted((LOOPS.parent / "results" / "reliability").glob("*.json"))
    assert {path.stem for path in results} == {
        "kill",
        "kill-saving",
        "preempt",
        "preempt-steps",
        "preempt-saving",
        "preempt-validation",
        "ranks",
    }
    document = reliability.DOCUMENT.read_text(encoding="utf-8")
    assert reliability.with_tables(document, results) == document
