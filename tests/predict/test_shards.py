"""What is written is read, in every format; NumPy and pyarrow are the witnesses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from trainer.predict.shards import DType, Format, Shards, open_shards, start_shards


@pytest.mark.parametrize("kind", ["parquet", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_come_back_in_their_order(kind: Format, dtype: DType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = rng.normal(size=(25, 6)).astype(np.float32)
    shards = Shards(tmp_path / "out", kind, 25, 10, 6, dtype, has_ids=True)
    start_shards(shards, {"model": "m"})
    names = [f"id {i}" for i in range(25)]
    for number in (2, 0, 1):
        rows = shards.rows_of(number)
        shards.write(number, written[rows].astype(dtype), names[rows])
    found, said = open_shards(tmp_path / "out")
    assert (found, said["model"]) == (shards, "m")
    expected = written.astype(dtype)
    assert (np.concatenate(list(found.pieces())) == expected).all()
    assert {piece.dtype for piece in found.pieces()} == {np.dtype(dtype)}
    some = np.array([24, 3, 3, 10, 0])
    assert (found.take(some) == expected[some].astype(np.float32)).all()
    if kind == "parquet":
        table = pq.read_table(tmp_path / "out", filters=[("id", "==", "id 17")])
        assert (table["embedding"][0].values.to_numpy(zero_copy_only=False) == expected[17]).all()
    else:
        assert np.load(tmp_path / "out/shard-00001.ids.npy").tolist() == names[10:20]
        assert (np.load(tmp_path / "out/shard-00001.npy") == expected[10:20]).all()


def test_a_shard_whose_ids_are_missing_or_cut_is_not_whole(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "out", "npy", 25, 10, 6, "float32", has_ids=True)
    start_shards(shards, {})
    for number in range(3):
        rows = shards.rows_of(number)
        shards.write(number, np.zeros((rows.stop - rows.start, 6), np.float32), [f"id {i}" for i in range(25)][rows])
    assert shards.unfinished() == []
    ids = [tmp_path / "out" / f"shard-0000{number}.ids.npy" for number in range(3)]
    ids[0].unlink()
    np.save(ids[1], np.load(ids[1])[:9])
    ids[2].write_bytes(ids[2].read_bytes()[:-1])
    assert shards.unfinished() == [0, 1, 2]
    with pytest.raises(ValueError, match="3 of 3 shards are missing"):
        open_shards(tmp_path / "out")


@pytest.mark.parametrize("kind", ["parquet", "npy"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5])
def test_a_shard_that_was_cut_is_not_whole(kind: Format, kept: float, tmp_path: Path) -> None:
    """Emptied too, as a power cut leaves a file."""
    shards = Shards(tmp_path / "out", kind, 25, 10, 6, "float32", has_ids=False)
    start_shards(shards, {})
    for number in range(3):
        rows = shards.rows_of(number)
        shards.write(number, np.zeros((rows.stop - rows.start, 6), np.float32), None)
    path = shards.path(1)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert shards.unfinished() == [1]
    with pytest.raises(ValueError, match="1 of 3 shards are missing"):
        open_shards(tmp_path / "out")


def test_a_full_disk_is_a_sentence_and_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(tmp_path / "out", "npy", 5, 10, 2, "float32", has_ids=False)
    start_shards(shards, {})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.files.os.fsync", full)
    with pytest.raises(
        ValueError, match=r"shard-00000.npy can't be written: No space left on device; what is finished"
    ):
        shards.write(0, np.zeros((5, 2), np.float32), None)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_manifest.json"}
