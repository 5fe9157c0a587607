"""Checks of single cells: a text, a score, a class number, or the reason why it is none."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from trainer.data.hashes import hash_value
from trainer.data.rows import MAX_TEXT_CHARS

MAX_LABEL = 2**31 - 1
MAX_SCORE = 3.4028234663852886e38  # of float32, which losses compute in; more would become infinite
# Spaces, and the characters that no one sees: zero-width ones, joiners, marks of direction, a BOM in the middle.
_BLANK = re.compile(r"[\s\u180e\u200b-\u200f\u2060\ufeff]*")


class BadValueError(ValueError):
    """Why a cell cannot be used; the sentence goes on after the column's name."""


class OutOfRangeError(BadValueError):
    """A score outside score_range; ``span`` is the least range that holds both."""

    def __init__(self, number: float, low: float, high: float) -> None:
        super().__init__(f"is {number:g}, outside score_range {low:g}..{high:g}")
        self.span = min(number, low), max(number, high)


def check_text(value: object) -> str:
    if not isinstance(value, str):
        lists = "; map a list as positives or negatives" if isinstance(value, list) else ""
        raise BadValueError("is null" if value is None else f"holds {_kind(value)} ({value!s:.40}), not text{lists}")
    if not value or value.isspace():
        raise BadValueError("is empty" if not value else "is blank")
    if not value.isascii() and _BLANK.fullmatch(value):
        raise BadValueError("is blank: all its characters are zero-width")
    if len(value) > MAX_TEXT_CHARS:
        raise BadValueError(f"has {len(value):,} characters, {MAX_TEXT_CHARS:,} at most are taken")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate: bytes that are not UTF-8, or half a pair in a JSON escape
            raise BadValueError("is not valid UTF-8") from None
    return value


def check_id(value: object) -> str:
    """A name of a row: text, or a whole number."""
    return str(value) if type(value) is int else check_text(value)


def texts_check(most: int | None) -> Callable[[object], list[str]]:
    """A check that turns a cell into a list of texts, the first ``most`` of them; without ``most`` it needs one."""

    def check(value: object) -> list[str]:
        if value is None and most is not None:
            return []
        if not isinstance(value, list):
            raise BadValueError("is null" if value is None else f"holds {_kind(value)} ({value!s:.40}), not a list")
        if not value and most is None:
            raise BadValueError("is an empty list")
        texts = []
        for place, text in enumerate(value[:most]):
            try:
                texts.append(check_text(text))
            except BadValueError as error:
                raise BadValueError(f"in place {place} {error}") from None
        return texts

    return check


def check_group(value: object) -> int:
    """A number for the value that names a group: the same for equal values."""
    if isinstance(value, (list, dict)):
        raise BadValueError(f"holds {_kind(value)}, not the name of a group")
    blank = isinstance(value, str) and not value.strip()
    if value is None or blank or value != value:  # NaN: what pandas reads a blank cell as
        what = "null" if value is None else "not a number" if not blank else "blank" if value else "empty"
        raise BadValueError(f"is {what}; a row that belongs to no group takes a name of its own")
    return hash_value(_key(value))


def score_check(
    score_range: tuple[float, float] | None,
    label_map: Mapping[str, float] | None,
    names: Sequence[str] | None,
    column: str = "score",
) -> Callable[[object], float]:
    """A check that turns a cell into a score, mapped linearly from ``score_range`` (if given) to 0..1.

    Args:
        score_range: lowest and highest score of the data.
        label_map: value in the data -> score.
        names: class names of the column.
        column: of the data.
    """

    def check(value: object) -> float:
        if isinstance(value, list):
            each = ", ".join(f"score_{place + 1}: {column}.{place}" for place in range(min(len(value), 2)))
            more = ", ..." if len(value) > 2 else ""
            raise BadValueError(f"holds a list, not a number; if it has one of each candidate, write {each}{more}")
        number = _look_up(value, label_map, names) if label_map is not None else to_number(value)
        if score_range is None:
            if abs(number) > MAX_SCORE:
                raise BadValueError(f"is {number:g}, but scores are float32, at most {MAX_SCORE:g}; set score_range")
            return number
        low, high = score_range
        if not low <= number <= high:
            raise OutOfRangeError(number, low, high)
        return (number - low) / (high - low)

    return check


def label_check(label_map: Mapping[str, float] | None, names: Sequence[str] | None) -> Callable[[object], int]:
    """A check that turns a cell into a class number from 0."""

    def check(value: object) -> int:
        number = _look_up(value, label_map, names) if label_map is not None else to_number(value)
        if not number.is_integer():
            raise BadValueError(f"is {number:g}, not a whole class number; if it is a degree, name the column score")
        if not 0 <= number <= MAX_LABEL:
            raise BadValueError(
                f"is {number:g}, classes are numbered 0, 1, 2, ...; a label_map gives others their number"
            )
        return int(number)

    return check


def to_number(value: object) -> float:
    """A finite number; numbers in text count, for CSV has nothing else."""
    if value is None:
        raise BadValueError("is null")
    if not isinstance(value, (str, int, float, Decimal)):
        raise BadValueError(f"holds {_kind(value)}, not a number")
    if has_decimal_comma(value):
        raise BadValueError(f"is '{value!s:.40}' with a decimal comma; write {str(value).strip().replace(',', '.')}")
    try:
        number = _float(value)
    except ValueError:
        raise BadValueError("is empty" if not value else f"is '{value!s:.40}', not a number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadValueError(f"is {number}, not a finite number")
    return number


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def rule(wanted: object) -> Callable[[object, Sequence[str] | None], bool]:
    """A test of cells: one of some values, or ``'>= 0.7'`` (also ``<= > < !=``).

    The test takes the cell and the class names of its column, if it has some. True and 1.0 are also met by a text of
    just these letters: a config can't say whether it means the text, and pandas writes CSV so.

    Raises:
        ValueError: a comparison that compares with nothing.
    """
    if isinstance(wanted, str) and (sign := next((s for s in _COMPARISONS if wanted.startswith(s)), None)):
        operand = wanted[len(sign) :].strip()
        if not operand:
            raise ValueError(f"where: '{wanted}' compares with nothing; write e.g. '{sign} 0.5'")
        try:
            limit = _float(operand)
        except ValueError:
            if sign != "!=":
                raise ValueError(f"where: '{wanted}' compares with '{operand}', which is no number") from None
            return lambda value, names: operand not in _keys(value, names)
        compare = _COMPARISONS[sign]
        return lambda value, names: compare(to_number(value), limit)
    kept = {text for value in (wanted if isinstance(wanted, list) else [wanted]) for text in (_key(value), str(value))}
    return lambda value, names: not kept.isdisjoint(_keys(value, names))


def shown(value: object, names: Sequence[str] | None = None) -> str:
    """A value as `rule` compares it, for a message."""
    return "null" if value is None else f"'{_keys(value, names)[0]:.40}'"


def has_decimal_comma(value: object) -> bool:
    """Whether a text is a number as much of Europe writes it, "1,5"; "1,500" may be one of thousands."""
    if not isinstance(value, str) or re.fullmatch(r"\s*[+-]?[1-9]\d{0,2},\d{3}\s*", value):
        return False
    return re.fullmatch(r"\s*[+-]?\d+,\d+\s*", value) is not None


def is_word(value: object) -> bool:
    """Whether a label can only be read through a label_map."""
    if not isinstance(value, str) or not value.strip() or has_decimal_comma(value):
        return False
    try:
        _float(value)
    except ValueError:
        return True
    return False


def _float(value: str | int | float | Decimal) -> float:
    """A number, also from text. The underscores that Python's literals may hold make it a word: 1_2 is not twelve."""
    if isinstance(value, str) and "_" in value:
        raise ValueError(f"{value} is a word")
    return float(value)


def _look_up(value: object, label_map: Mapping[str, float], names: Sequence[str] | None) -> float:
    if value is None:
        raise BadValueError("is null")
    keys = _keys(value, names)
    for key in keys:
        if key in label_map:
            return float(label_map[key])
    raise BadValueError(f"is '{keys[0]:.40}', which is not in label_map ({', '.join(label_map)})")


def _keys(value: object, names: Sequence[str] | None) -> list[str]:
    """How a config may write a value: the name of a class before its number."""
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return [names[value], _key(value)]
    return [_key(value)]


def _key(value: object) -> str:
    """How a value of the data is written as a key of label_map."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _kind(value: Any) -> str:
    numbers = {int: "a number", float: "a number", Decimal: "a number"}
    names = {bool: "a truth value", list: "a list", str: "a text", **numbers}
    return names.get(type(value), f"a {type(value).__name__}")
