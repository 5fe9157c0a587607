"""Rows of a file against what the config asks for: good ones become cells, bad ones are counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import yaml

from trainer.data.blocks import PEEKED
from trainer.data.columns import Column, find_column
from trainer.data.hashes import hash_value
from trainer.data.rows import Record, Rows
from trainer.data.values import (
    BadValueError,
    OutOfRangeError,
    check_group,
    check_id,
    check_text,
    is_word,
    label_check,
    rule,
    score_check,
    shown,
    texts_check,
)

if TYPE_CHECKING:
    from trainer.data.sources import Source

logger = logging.getLogger(__name__)

_LISTED = 5  # bad rows that an error quotes
_COUNTED = 1000  # bad rows over the budget until reading stops
_MAPPED = 500  # words of labels of which an error shows the whole map
_SCORED = 20  # words that may stand for a score


def checked_rows(source: Source, rows: Rows, bad: BadRows) -> Iterator[list[Any]]:
    """Cells of the good rows in canonical order; bad ones, and those that ``where`` drops, are told to ``bad``."""
    columns = {
        name: find_column(column, rows.name, rows.columns, f"columns.{name}") for name, column in source.columns.items()
    }
    where = (source.where or {}).items()
    wanted = [
        ((key, str(column)), column, rule(values))
        for key, values in where
        for column in [find_column(key, rows.name, rows.columns, "where")]
    ]
    records = _refuse_words(source, rows, columns)
    checks = _checks(source, rows, columns)
    negatives = columns.get("negatives")
    has_lists = not columns.keys().isdisjoint(("positives", "negatives"))
    for number, row in records:
        if isinstance(row, str):
            bad.add(f"{rows.place(number)}: {row}")
            continue
        cells = []
        try:
            for asked, column, test in wanted:
                cell, class_names = column.cell(row), rows.class_names.get(column.name)
                if not test(cell, class_names):
                    bad.drop(asked, cell, class_names)
                    break
            else:
                for column, check in checks:
                    # A record that names no negatives has none, as one whose list is null.
                    has_none = column is negatives and column.name not in row
                    cells.append(check(None if has_none else column.cell(row)))
                if has_lists:
                    yield from _spread(source, dict(zip(_keys(source), cells, strict=True)))
                else:
                    yield cells
        except BadValueError as error:
            if isinstance(error, OutOfRangeError):
                bad.widen(error.span)
            bad.add(f"{rows.place(number)}: column '{column}' {error}")
        except LookupError:
            bad.add(f"{rows.place(number)}: column '{column}' is missing")


def _checks(source: Source, rows: Rows, columns: dict[str, Column]) -> list[tuple[Column, Callable[[object], Any]]]:
    checks: list[tuple[Column, Callable[[object], Any]]] = []
    for name in _keys(source):
        column = columns[name]
        label_map = source.label_map if name == source.mapped_column else None
        class_names = rows.class_names.get(column.name)
        if name == "score":
            checks.append((column, score_check(source.score_range, label_map, class_names, str(column))))
        elif name in source.candidate_scores:
            checks.append((column, score_check(None, None, None, str(column))))  # on a teacher's own scale
        elif name == "label":
            checks.append((column, label_check(label_map, class_names)))
        elif name == "id":
            checks.append((column, check_id))
        elif name == "group":
            checks.append((column, check_group))
        elif name in ("positives", "negatives"):
            checks.append((column, texts_check(source.max_negatives if name == "negatives" else None)))
        else:
            checks.append((column, check_text))
    return checks


def _keys(source: Source) -> list[str]:
    """Keys of ``source.columns`` in canonical order."""
    return [key for key in dict.fromkeys(map(source.key_of, source.canonical_columns)) if key in source.columns]


def _spread(source: Source, cells: dict[str, Any]) -> Iterator[list[Any]]:
    """The rows of a record with lists: one for each positive, and a column for each of its negatives."""
    if "positives" in cells:
        # Of the anchor, so that records that ask the same thing are one group.
        cells.setdefault("group", hash_value(cells["anchor"]))
    for place, text in enumerate(cells.pop("negatives", ())):
        cells[f"negative_{place + 1}"] = text
    for positive in cells.pop("positives", [cells.get("positive")]):
        cells["positive"] = positive
        yield [cells.get(name) for name in source.canonical_columns]


def _refuse_words(source: Source, rows: Rows, columns: dict[str, Column]) -> Iterator[Record]:
    """The records of ``rows``; labels that are words without a label_map are one error, not one per row."""
    first = list(islice(rows.records, PEEKED))
    records = chain(first, rows.records)
    for name in ("score", "label"):
        column = columns.get(name)
        if column is None or name == source.mapped_column:
            continue
        seen = [cell for _, row in first if (cell := column.cell_or_none(row)) is not None]
        if seen and 2 * sum(map(is_word, seen)) > len(seen):
            words = {str(cell) for _, row in records if is_word(cell := column.cell_or_none(row))}
            raise ValueError(f"{rows.name}: column '{column}' {_words_remedy(name, sorted(words))}")
    return records


def _words_remedy(name: str, words: list[str]) -> str:
    if len(words) > (_MAPPED if name == "label" else _SCORED):
        held = f"holds {len(words)} different words ({', '.join(words[:_LISTED])}, ...), not a {name}"
        if name != "label":
            return held
        begun = _label_map({word: number for number, word in enumerate(words[:_LISTED])}).removesuffix("}")
        return f"{held}. Map them to class numbers: {begun}, ...}}"
    numbers = {word: number if name == "label" else 0.0 for number, word in enumerate(words)}
    kind = "class numbers" if name == "label" else "scores, with numbers of your own"
    held = f"words: {', '.join(words)}" if len(words) <= _SCORED else f"{len(words)} different words"
    return f"holds {held}. Map them to {kind}: {_label_map(numbers)}"


def _label_map(numbers: dict[str, float]) -> str:
    """As a config says it, in one line."""
    written = yaml.safe_dump({"label_map": numbers}, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return str(written).strip()[1:-1]


def _asked(wanted: object) -> str:
    return " or ".join(map(shown, wanted if isinstance(wanted, list) else [wanted]))


class BadRows:
    """Counts the rows that cannot be used and quotes the first ones; beside them, those that ``where`` drops."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.budget = source.max_bad_rows if source.on_bad_row == "skip" else 0
        self.count = 0
        self.first: list[str] = []
        self.num_dropped = 0
        # First values that were dropped, by the key of where and the name of its column.
        self._dropped: dict[tuple[int | str, str], list[str]] = {}
        self.scale: tuple[float, float] | None = None  # that holds every score, where score_range does not

    def widen(self, span: tuple[float, float]) -> None:
        low, high = self.scale or span
        self.scale = min(low, span[0]), max(high, span[1])

    def add(self, reason: str) -> None:
        self.count += 1
        if len(self.first) < _LISTED:
            self.first.append(reason)
        if self.count >= self.budget + _COUNTED:
            self._refuse(f"{self.count:,} or more bad rows")

    def drop(self, asked: tuple[int | str, str], cell: object, class_names: list[str] | None) -> None:
        """A row whose ``cell`` is not what ``where`` asks: by its key, of the column of that name."""
        self.num_dropped += 1
        values = self._dropped.setdefault(asked, [])
        if len(values) <= _LISTED and (value := shown(cell, class_names)) not in values:
            values.append(value)

    def why_none(self) -> str:
        """Where no row is left, what became of those that were read; empty where none was."""
        causes = []
        if self.count:
            causes.append(f" after {self.count} bad ones were skipped; the first: {self.first[0]}")
        if self.num_dropped:
            asked, read = self.source.where or {}, "others" if self.count else "that were read"
            held = [
                f"column '{name}' holds {', '.join(values[:_LISTED])}{', ...' * (len(values) > _LISTED)}; "
                f"asked for {_asked(asked[key])}"
                for (key, name), values in self._dropped.items()
            ]
            causes.append(f" of {self.num_dropped:,} {read}: {'. '.join(held)}")
        return f" left{'; and'.join(causes)}" if causes else ""

    def close(self) -> None:
        """Called behind the last row: now the count is complete."""
        if self.count > self.budget:
            self._refuse("1 bad row" if self.count == 1 else f"{self.count:,} bad rows")
        if self.count:
            logger.warning("%s: %d bad rows skipped; the first: %s", self.source.path, self.count, self.first[0])

    def _refuse(self, count: str) -> None:
        quoted = "\n".join(self.first)
        if self.source.on_bad_row == "skip":
            remedy = f", over max_bad_rows {self.budget}; mend them"
        else:
            remedy = "; mend them, or set on_bad_row: skip"
        raise ValueError(f"{quoted}\n{self.source.path}: {count}{remedy}{self._scale_remedy()}")

    def _scale_remedy(self) -> str:
        """A sentence behind the others where scores lie outside score_range."""
        if self.scale is None:
            return ""
        low, high = self.scale
        return f". If the scores go from {low:g} to {high:g}, set score_range: [{low:.12g}, {high:.12g}]"
