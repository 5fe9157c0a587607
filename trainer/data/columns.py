"""Where a cell lies in a row: a column by name or position, or a field inside one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.files import did_you_mean


@dataclass(frozen=True)
class Column:
    """A column of the data.

    Attributes:
        name: of the column itself.
        fields: the way from its cell to the wanted value: keys of objects, places in lists. A key behind a list
            is looked up in each of its elements.
    """

    name: str
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.name, *self.fields))

    def cell(self, row: dict[str, Any]) -> Any:
        """The value in ``row``.

        Raises:
            LookupError: the row has no such column or field.
        """
        value = row[self.name]
        for field in self.fields:
            if value is None:
                return None
            if isinstance(value, list) and field.isdecimal():
                value = value[int(field)]
            elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
                value = [one[field] for one in value]
            elif isinstance(value, dict):
                value = value[field]
            else:
                raise LookupError(field)
        return value

    def cell_or_none(self, row: object) -> Any:
        try:
            return self.cell(row) if isinstance(row, dict) else None
        except LookupError:
            return None


def find_column(wanted: str | int, file: str, found: Sequence[str], asked_by: str) -> Column:
    """The column that a config means by ``wanted``: a name, a position from 0, or ``name.field``.

    Args:
        wanted: as in the config.
        file: its name, for the error.
        found: its columns; none where it has no row, and then any name is taken.
        asked_by: the key of the config, for the error.

    Raises:
        ValueError: the file has no such column.
    """
    if isinstance(wanted, int):
        if not found or str(wanted) in found:
            return Column(str(wanted))
        if 0 <= wanted < len(found):
            return Column(found[wanted])
        raise ValueError(
            f"{file}: no column {wanted} ({asked_by}); there are {len(found)}, 0 to {len(found) - 1}: "
            f"{', '.join(found)}"
        )
    name, *fields = wanted.split(".")
    if wanted in found or not found or not fields:
        name, fields = wanted, []
    if found and name not in found:
        raise ValueError(
            f"{file}: no column '{wanted}' ({asked_by}); found: {', '.join(found)}.{did_you_mean(wanted, found)}"
        )
    return Column(name, tuple(fields))
