"""How many ranks a command names."""

from __future__ import annotations

import pytest
from lightning.fabric.utilities.device_parser import _normalize_parse_gpu_string_input as of_lightning

from trainer.distributed.launch import device_count


@pytest.mark.parametrize("written", ["0,1", "3,", " 0, 5,7", "4", "-1"])
def test_devices_are_counted_as_lightning_reads_them(written: str) -> None:
    found = of_lightning(written)
    expected = len(found) if isinstance(found, list) else found if found > 0 else None
    assert device_count(written) == expected


def test_devices_of_a_recipe() -> None:
    assert [device_count(one) for one in (2, [0, 3, 5], "[0, 3]", "auto", -1)] == [2, 3, 2, None, None]
