"""Pages that a process keeps, as the kernel counts them; in a process of its own, for it can't be taken back."""

import platform
import resource
import subprocess
import sys

import pytest

from trainer.host_memory import keep_freed_pages

STEPS, NUM_BYTES = 20, 100 << 20
SCRIPT = f"""
import resource
import torch
from trainer.host_memory import keep_freed_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({STEPS}):
        torch.empty({NUM_BYTES // 4}).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The heap grows at first.
print(faults(), keep_freed_pages(), faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_pages_are_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    before, kept, _, after = done.stdout.split()
    assert kept == "True"
    pages = STEPS * NUM_BYTES // resource.getpagesize()
    assert int(before) > 0.9 * pages
    assert int(after) < 0.01 * pages


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_pages()
