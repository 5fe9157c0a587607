"""Work of a pool: results in order, and never more items taken than may be under way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer.data.workers import map_ahead


def _slow_at_first(number: int) -> int:
    time.sleep(0.02 if number % 4 == 0 else 0.0)
    return number * number


def test_results_come_in_order_and_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(3) as pool:
        results = []
        for result in map_ahead(pool, _slow_at_first, items(), ahead=5):
            results.append(result)
            assert len(taken) <= len(results) + 4
    assert results == [number * number for number in range(40)]


def test_the_first_error_in_order_is_raised() -> None:
    def fail(number: int) -> int:
        if number >= 3:
            raise ValueError(f"item {number}")
        return number

    with ThreadPoolExecutor(2) as pool:
        results = map_ahead(pool, fail, range(10), ahead=6)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="item 3"):
            next(results)
