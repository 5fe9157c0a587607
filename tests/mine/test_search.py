"""A part of the search that is not whole is searched again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer.mine.search import _is_whole


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_a_part_that_was_cut_is_not_whole(kept: float, tmp_path: Path) -> None:
    """Emptied too, as a power cut leaves a file."""
    path = tmp_path / "negatives-00000.npz"
    np.savez(path, ids=np.arange(1000))
    assert _is_whole(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert not _is_whole(path)
