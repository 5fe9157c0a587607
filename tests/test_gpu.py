"""The tests of tests/gpu, in a process of their own: on the GPU of this machine, or on a simulated one where it has
none, which torch has to find when it is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(600)
def test_on_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "-q", "--color=no", "--tb=short"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    print(done.stdout[-300:])
