"""``python -m tests.gpu``: the tests of this folder on the GPU of this machine, or else on a simulated one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SIMULATED = "TRAINER_TESTS_GPU"  # in the environment: real or simulated


def has_gpu() -> bool:
    """Asked of another process: torch looks for devices when it is imported, and a simulated one must be there then."""
    asked = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0


def load_device(folder: Path) -> None:
    """Compile and load the device that simulated.cpp makes."""
    torch_folder, made = Path(sysconfig.get_path("purelib")) / "torch", folder / "simulated.so"
    lib = torch_folder / "lib"
    flags = [f"-I{torch_folder / 'include'}", f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    source = str(FOLDER / "simulated.cpp")
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", "-o", str(made), source, *flags], check=True)
    assert "torch" not in sys.modules
    ctypes.CDLL(str(made))


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="trainer-gpu-") as folder:
        os.environ[SIMULATED] = "real" if has_gpu() else "simulated"
        if os.environ[SIMULATED] == "simulated":
            load_device(Path(folder))
        import pytest

        return pytest.main([str(FOLDER), "-p", "no:cacheprovider", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
