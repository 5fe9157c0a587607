"""Embeddings of many rows in numbered files, each written whole: what is there is finished, and stays.

A folder holds ``_manifest.json`` (what was embedded, by what, and how) and ``shard-00000.parquet``, ... with columns id
and embedding, or ``shard-00000.npy``, ... with the embeddings alone and ``shard-00000.ids.npy`` beside them where rows
have ids. Shard n holds the rows from n * shard_rows on, in the order of the data.

Shape suffixes: N rows of all shards, B rows of one, D embedding.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainer.files import whole_file, write_whole
from trainer.identity import differences

MANIFEST = "_manifest.json"  # readers of whole folders (pyarrow, Spark) pass over names that begin so
_VERSION = 1
Format = Literal["parquet", "npy"]
DType = Literal["float32", "float16"]


@dataclass(frozen=True)
class Shards:
    """Where the embeddings of a data set lie.

    Attributes:
        folder: of all files.
        format: of the shards.
        num_rows: N.
        shard_rows: rows of each shard but the last.
        dimension: D.
        dtype: of the numbers.
        has_ids: whether the rows have ids of their own; else Parquet names them by their number.
    """

    folder: Path
    format: Format
    num_rows: int
    shard_rows: int
    dimension: int
    dtype: DType
    has_ids: bool

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    def rows_of(self, number: int) -> slice:
        """Rows of a shard."""
        start = number * self.shard_rows
        return slice(start, min(start + self.shard_rows, self.num_rows))

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.{self.format}"

    def _ids_path(self, number: int) -> Path:
        return self.path(number).with_suffix(".ids.npy")

    def sweep(self) -> None:
        """Remove what a kill has left half written; nobody else may be writing."""
        for left in self.folder.glob(".shard-*.partial"):
            left.unlink(missing_ok=True)

    def unfinished(self) -> list[int]:
        """Shards that are not there, or not whole."""
        return [number for number in range(self.num_shards) if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        path, rows = self.path(number), self.rows_of(number)
        wanted = (rows.stop - rows.start, self.dimension)
        try:
            if self.format == "npy":
                found = np.load(path, mmap_mode="r")
                if self.has_ids and np.load(self._ids_path(number), mmap_mode="r").shape != wanted[:1]:
                    return False
                return found.shape == wanted and found.dtype == self.dtype
            schema = pq.read_schema(path)
            return (pq.read_metadata(path).num_rows, schema.field("embedding").type.list_size) == wanted
        except (OSError, EOFError, ValueError, KeyError, pa.ArrowInvalid):
            return False

    def write(self, number: int, embeddings_BD: NDArray[np.floating], ids: Sequence[str] | None) -> None:
        """Write a shard whole.

        Raises:
            ValueError: the folder can't be written.
        """
        rows = self.rows_of(number)
        assert embeddings_BD.shape == (rows.stop - rows.start, self.dimension), embeddings_BD.shape
        try:
            if self.format == "npy":
                if ids is not None:  # first, for the embeddings say that the shard is finished
                    with whole_file(self._ids_path(number)) as file:
                        np.save(file, np.array(ids, dtype=np.str_))
                with whole_file(self.path(number)) as file:
                    np.save(file, embeddings_BD.astype(self.dtype, copy=False))
            else:
                with whole_file(self.path(number)) as file:
                    # Vectors neither repeat nor compress: both would only take time.
                    pq.write_table(
                        self._table(rows, embeddings_BD, ids), file, compression="none", use_dictionary=False
                    )
        except OSError as error:
            raise ValueError(
                f"{self.path(number)} can't be written: {error.strerror}; what is finished is kept: make room, and the "
                "same command goes on from there"
            ) from error

    def _table(self, rows: slice, embeddings_BD: NDArray[np.floating], ids: Sequence[str] | None) -> pa.Table:
        flat = pa.array(np.ascontiguousarray(embeddings_BD, dtype=self.dtype).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, self.dimension)
        names = pa.array(np.arange(rows.start, rows.stop)) if ids is None else pa.array(ids, pa.string())
        return pa.table({"id": names, "embedding": vectors})

    def read(self, number: int) -> NDArray[np.floating]:
        """Embeddings of a shard, (B, D) as they were written, read-only; npy is memory-mapped."""
        return _read(self.path(number), self.dimension)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings of some rows, (len(rows), D)."""
        taken = np.empty((len(rows), self.dimension), dtype=np.float32)
        numbers = rows // self.shard_rows
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            taken[here] = self.read(number)[rows[here] - number * self.shard_rows]
        return taken

    def pieces(self) -> Iterator[NDArray[np.floating]]:
        """All embeddings, shard by shard."""
        return (self.read(number) for number in range(self.num_shards))


@lru_cache(maxsize=4)  # whoever takes single rows comes back to the same shard
def _read(path: Path, dimension: int) -> NDArray[np.floating]:
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)


def start_shards(shards: Shards, facts: Mapping[str, Any], remedy: str = "") -> None:
    """Make the folder, or go on in one that the same run has begun.

    Args:
        shards: to be written.
        facts: all that decides the embeddings, plain values.
        remedy: where the folder is of another run, if the user did not name it.

    Raises:
        ValueError: the folder holds something else; what differs is named.
    """
    mine = {**_layout(shards), **facts}
    if (shards.folder / MANIFEST).exists():
        _, saved = _read_manifest(shards.folder)
        if different := differences(saved, mine):
            listed = "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in different.items())
            remedy = remedy or "give another folder, or remove it"
            raise ValueError(f"{shards.folder} holds the embeddings of another run: {listed}; {remedy}")
    elif shards.folder.is_dir() and any(shards.folder.iterdir()):
        raise ValueError(f"{shards.folder} holds other files and no {MANIFEST}; give an empty or a new folder")
    else:
        try:
            write_whole(shards.folder / MANIFEST, json.dumps({"version": _VERSION, **mine}, indent=1))
        except OSError as error:
            raise ValueError(f"{shards.folder} can't be written: {error.strerror}; give another folder") from error


def open_shards(folder: Path) -> tuple[Shards, dict[str, Any]]:
    """Finished embeddings and what was said about them.

    Raises:
        ValueError: there are none, or some are missing.
    """
    shards, said = _read_manifest(folder)
    if missing := shards.unfinished():
        raise ValueError(
            f"{folder}: {len(missing)} of {shards.num_shards} shards are missing, the first is "
            f"{shards.path(missing[0]).name}; the trainer predict that began them goes on from there"
        )
    return shards, said


def _layout(shards: Shards) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(shards).items() if key != "folder"}


def _read_manifest(folder: Path) -> tuple[Shards, dict[str, Any]]:
    try:
        said: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = said.pop("version")
        layout = {field.name: said[field.name] for field in dataclasses.fields(Shards) if field.name != "folder"}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{folder} has no {MANIFEST}; give a folder that trainer predict wrote") from error
    except OSError as error:
        raise ValueError(f"{folder / MANIFEST}: {error.strerror}; ask who wrote it, or give another folder") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST} can't be read; remove {folder} and embed again") from error
    if version != _VERSION:
        raise ValueError(f"{folder / MANIFEST} is of version {version}, this program reads {_VERSION}; embed again")
    return Shards(folder, **layout), said
