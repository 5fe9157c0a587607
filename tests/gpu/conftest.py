"""These tests run where ``python -m tests.gpu`` has found a GPU or made one; tests/test_gpu.py starts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

WHERE = os.environ.get("TRAINER_TESTS_GPU", "")
collect_ignore_glob = [] if WHERE else ["test_*.py"]

WithoutReads = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="session", autouse=True)
def _installed() -> None:
    if WHERE == "simulated":
        from tests.gpu import simulated

        simulated.install()


@pytest.fixture(autouse=True)
def without_reads() -> Iterator[WithoutReads]:
    """A test of this folder has a GPU. Inside of what this makes, the host may not wait for a number of it."""
    import torch

    if WHERE == "simulated":
        from tests.gpu.simulated import SimulatedGPU

        with SimulatedGPU() as gpu:

            @contextmanager
            def counted() -> Iterator[None]:
                gpu.reads.clear()
                yield
                assert not gpu.reads, f"the host has read numbers of the device: {dict(gpu.reads)}"

            yield counted
    else:

        @contextmanager
        def refused() -> Iterator[None]:
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

        yield refused
