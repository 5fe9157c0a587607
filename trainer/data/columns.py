"""Where a cell lies in a row: a column by name or position, or a field inside one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.files import data_format
from trainer.messages import did_you_mean


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


def is_position(wanted: str | int) -> bool:
    """Whether it means a column by its place, where none has that name."""
    return isinstance(wanted, int) or wanted.isdecimal()


def find_column(wanted: str | int, file: str, found: Sequence[str], asked_by: str) -> Column:
    """The column that a config means by ``wanted``: a name, a position from 0, or ``name.field``.

    Args:
        wanted: as in the config, whose keys are text: there a position is written "3".
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
            f"{', '.join(found)}{_other_separator(file, found)}"
        )
    if is_position(wanted) and found and wanted not in found:
        return find_column(int(wanted), file, found, asked_by)
    name, *fields = wanted.split(".")
    if wanted in found or not found or not fields:
        name, fields = wanted, []
    if found and name not in found:
        hint = _other_separator(file, found) or f".{did_you_mean(wanted, found)}"
        raise ValueError(f"{file}: no column '{wanted}' ({asked_by}); found: {', '.join(found)}{hint}")
    return Column(name, tuple(fields))


def refuse_moved(
    asked: Sequence[tuple[str, str | int]], file: str, found: Sequence[str], earlier: dict[tuple[str, ...], str]
) -> None:
    """Raises ValueError where a position means another column than in an earlier file, whose column is here too.

    Args:
        asked: columns as in the config, each behind its key.
        file: its name.
        found: its columns.
        earlier: columns -> the first file that has them; this one joins them.
    """
    if not found or tuple(found) in earlier:
        return
    for columns, other in earlier.items():
        for key, wanted in asked:
            here, there = find_column(wanted, file, found, key).name, find_column(wanted, other, columns, key).name
            if is_position(wanted) and here != there and there in found:
                raise ValueError(
                    f"{file}: column {wanted} ({key}) is '{here}', in {other} '{there}': its columns are "
                    f"{', '.join(found)}, there {', '.join(columns)}; name them ({key}: {there}) in place of positions"
                )
    earlier[tuple(found)] = file


def _other_separator(file: str, found: Sequence[str]) -> str:
    """What to do with a CSV or TSV whose only column is a header split by another character, else nothing."""
    suffix = data_format(Path(file))
    if len(found) != 1 or suffix not in (".csv", ".tsv"):
        return ""
    if ";" in found[0]:  # Excel's CSV, where the comma is in the numbers
        wanted = "commas" if suffix == ".csv" else "tabs"
        return f". The file seems to be separated by ';'; save it with {wanted}, or as JSON lines"
    if suffix == ".csv" and "\t" in found[0]:
        return ". The file seems to be separated by tabs; give it the suffix .tsv"
    if suffix == ".tsv" and "," in found[0]:
        return ". The file seems to be separated by commas; give it the suffix .csv"
    return ""
