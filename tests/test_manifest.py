"""A checkpoint directory is whole or it is not there; what is damaged is found, always."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.checkpoint_path import find_checkpoint
from trainer.files import sha256_of
from trainer.manifest import (
    MANIFEST,
    STATE,
    best,
    clean_up,
    drop,
    mark_best,
    newest,
    newest_valid,
    num_bytes,
    problem,
    read_manifest,
    read_state,
    steps,
    tensor_digest,
    write_checkpoint,
)


def content(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"global_step": step, "state_dict": {"weight": torch.randn(50, 20, generator=generator)}, "list": [1, "a"]}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (3, 6, 9):
        write_checkpoint(content(step), tmp_path / "checkpoints" / f"step-{step:08d}", {"step": step})
    return tmp_path


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def test_round_trip(run_dir: Path) -> None:
    read = read_state(folder_of(run_dir, 9))
    assert torch.equal(read["state_dict"]["weight"], content(9)["state_dict"]["weight"])
    assert read["list"] == [1, "a"]
    assert read_manifest(folder_of(run_dir, 9))["step"] == 9
    assert newest(run_dir) == folder_of(run_dir, 9)
    assert newest_valid(run_dir) == (folder_of(run_dir, 9), {})
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (3, 6, 9)]
    assert num_bytes(content(9)) == 4000


def test_same_step_again_replaces_the_older_one(run_dir: Path) -> None:
    write_checkpoint({**content(9), "list": [2]}, folder_of(run_dir, 9), {"step": 9})
    assert read_state(folder_of(run_dir, 9))["list"] == [2]
    assert problem(folder_of(run_dir, 9)) is None
    assert len(list((run_dir / "checkpoints").iterdir())) == 3


KILLED_WHILE_REMOVING = """
import os, shutil, signal, sys, torch
from pathlib import Path
from trainer.manifest import write_checkpoint
def is_older(event, arguments):  # what python reports before it removes a folder
    if event == "shutil.rmtree" and Path(arguments[0]).exists() and Path(arguments[0], "state.ckpt").exists():
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(is_older)
write_checkpoint({"state_dict": {"w": torch.zeros(3)}, "global_step": 9}, Path(sys.argv[1]), {"step": 9})
"""


def test_a_kill_while_the_older_one_is_removed_leaves_the_newer_one(run_dir: Path) -> None:
    """The same step again: its folder is at no time the one that is being removed."""
    command = [sys.executable, "-c", KILLED_WHILE_REMOVING, str(folder_of(run_dir, 9))]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert newest_valid(run_dir) == (folder_of(run_dir, 9), {})
    assert torch.equal(read_state(folder_of(run_dir, 9))["state_dict"]["w"], torch.zeros(3))


KILLED_BETWEEN_RENAMES = """
import os, signal, sys, torch
from pathlib import Path
from trainer.manifest import write_checkpoint
def is_second(event, arguments):  # what python reports before it renames
    if event == "os.rename" and Path(arguments[1]) == Path(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(is_second)
write_checkpoint({"state_dict": {"w": torch.zeros(3)}, "global_step": 9}, Path(sys.argv[1]), {"step": 9})
"""


def test_a_kill_between_the_renames_of_a_replacement_leaves_the_older_one(run_dir: Path) -> None:
    mark_best(run_dir, 9)
    command = [sys.executable, "-c", KILLED_BETWEEN_RENAMES, str(folder_of(run_dir, 9))]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not folder_of(run_dir, 9).exists()
    for put_back in (False, True):  # who only reads a run finds it, too
        if put_back:
            clean_up(run_dir)
            assert folder_of(run_dir, 9).is_dir()
        assert newest_valid(run_dir) == (folder_of(run_dir, 9), {})
        assert newest(run_dir) == best(run_dir) == folder_of(run_dir, 9)
        assert torch.equal(
            read_state(folder_of(run_dir, 9))["state_dict"]["weight"], content(9)["state_dict"]["weight"]
        )
        for word in ("auto", "best", str(folder_of(run_dir, 9))):
            assert find_checkpoint(word, "test", run_dir, {}) == str(folder_of(run_dir, 9))
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["best.json", *(f"step-{n:08d}" for n in (3, 6, 9))]


def test_what_is_left_of_a_removal_is_not_put_back(run_dir: Path) -> None:
    left = folder_of(run_dir, 9).rename(run_dir / "checkpoints" / ".step-00000009.replaced")
    (left / STATE).unlink()
    assert newest_valid(run_dir)[0] == folder_of(run_dir, 6)
    clean_up(run_dir)
    assert sorted(os.listdir(run_dir / "checkpoints")) == [f"step-{n:08d}" for n in (3, 6)]


READ_WHILE_DROPPED = """
import sys
from pathlib import Path
from trainer.manifest import drop
def keep(event, arguments):  # as NFS does with a file that a reader has open: it comes back under such a name
    if event == "os.rmdir":
        Path(arguments[0], ".nfs0001").touch()
sys.addaudithook(keep)
drop(Path(sys.argv[1]))
"""


def test_an_old_checkpoint_that_cannot_be_removed_wholly_ends_nothing(run_dir: Path) -> None:
    """Nor does it where a run goes back, and comes by that step again."""
    left = run_dir / "checkpoints" / ".step-00000003.dropped"
    for remaining in ([6, 9], [3, 6, 9]):
        command = [sys.executable, "-c", READ_WHILE_DROPPED, str(folder_of(run_dir, 3))]
        dropped = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert dropped.returncode == 0, dropped.stderr
        assert os.listdir(left) == [".nfs0001"]
        assert list(steps(run_dir)) == remaining
        write_checkpoint(content(3), folder_of(run_dir, 3), {"step": 3})
    drop(folder_of(run_dir, 3))
    assert sorted(os.listdir(run_dir / "checkpoints")) == [f"step-{n:08d}" for n in (6, 9)]


def test_best_is_a_name_not_a_copy(run_dir: Path) -> None:
    assert best(run_dir) is None
    mark_best(run_dir, 6)
    assert best(run_dir) == folder_of(run_dir, 6)
    for text in ("{broken", "{}", "[]"):
        (run_dir / "checkpoints" / "best.json").write_text(text)
        with pytest.raises(ValueError, match=r"best.json can't be read: .*; remove it, and the newest checkpoint is"):
            best(run_dir)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGE = {
    (truncate, STATE): r"state.ckpt has [\d,]+ bytes, [\d,]+ were written",
    (empty, STATE): r"state.ckpt has 0 bytes, [\d,]+ were written",
    (Path.unlink, STATE): r"state.ckpt is missing",
    (truncate, MANIFEST): r"manifest.json can't be read",
    (empty, MANIFEST): r"manifest.json can't be read",
    (Path.unlink, MANIFEST): r"manifest.json is missing",
}


@pytest.mark.parametrize(("damage", "name"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_damage_is_found_and_the_previous_one_is_taken(run_dir: Path, damage, name: str) -> None:
    damage(folder_of(run_dir, 9) / name)
    found, damaged = newest_valid(run_dir)
    assert found == folder_of(run_dir, 6)
    (reason,) = damaged.values()
    assert re.fullmatch(DAMAGE[damage, name], reason)


@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_every_flipped_bit_is_found(run_dir: Path, name: str) -> None:
    """200 single bits at random places: torch.load notices few of them."""
    path = folder_of(run_dir, 9) / name
    original = path.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        flipped = bytearray(original)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert problem(folder_of(run_dir, 9)) is not None
    path.write_bytes(original)
    assert problem(folder_of(run_dir, 9)) is None


def test_another_format_is_named(run_dir: Path) -> None:
    write_checkpoint(content(9), folder_of(run_dir, 9), {"format": 99})
    assert problem(folder_of(run_dir, 9)) == "manifest.json is of format 99, this version reads 1"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def plant(folder: Path, state: dict) -> None:
    """What whoever can write the file can write: a state with code in it, and a manifest that fits."""
    torch.save(state, folder / STATE)
    about = read_manifest(folder)
    about["files"][STATE] = {"bytes": (folder / STATE).stat().st_size, "sha256": sha256_of(folder / STATE)}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**about, "sha256": digest}))


def test_code_in_a_checkpoint_is_refused_and_never_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir)
    plant(folder_of(run_dir, 9), {**content(9), "bomb": Bomb()})
    assert problem(folder_of(run_dir, 9)) is None
    with pytest.raises(ValueError, match="is refused: it holds more than tensors and plain types"):
        read_state(folder_of(run_dir, 9))
    assert not Path("exploded").exists()


WRITE = """
import resource, sys, torch
from pathlib import Path
from trainer.manifest import write_checkpoint
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
content = {"global_step": 12, "state_dict": {"weight": torch.zeros(500_000)}}
try:
    write_checkpoint(content, Path(sys.argv[1]), {"step": 12})
except ValueError as error:
    print(error)
"""


def write_in_a_process(*arguments: str) -> str:
    command = [sys.executable, "-c", WRITE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


def test_a_write_that_fails_leaves_the_older_one(run_dir: Path) -> None:
    """A limit on the size of files, the kernel's: the disk looks free, the write fails in its middle."""
    said = write_in_a_process(str(folder_of(run_dir, 12)), "1000000")
    assert said.startswith(f"checkpoint {folder_of(run_dir, 12)} can't be written: ")
    assert "2,000,000 bytes needed" in said
    assert f"{folder_of(run_dir, 9)} is intact" in said
    assert newest_valid(run_dir) == (folder_of(run_dir, 9), {})
    assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_before_anything_is_written(run_dir: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True, timeout=20)
    try:
        shutil.copytree(run_dir / "checkpoints", small / "checkpoints")
        said = write_in_a_process(str(folder_of(small, 12)))
        assert "2,000,000 bytes needed, " in said
        assert f"free on {small}/checkpoints; {folder_of(small, 9)} is intact. Make room" in said
        assert newest_valid(small) == (folder_of(small, 9), {})
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=20)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"can't be written: .*Not a directory.*there is no older checkpoint"):
        write_checkpoint(content(1), tmp_path / "file" / "checkpoints" / "step-00000001", {})


def test_a_digest_is_of_names_and_bytes() -> None:
    matrix = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    named = [("a", matrix.T), ("b", torch.tensor(1.0)), ("c", torch.ones(2, dtype=torch.bfloat16, requires_grad=True))]
    content = b"abouta" + matrix.numpy().T.tobytes() + b"b\0\0\x80?" + b"c\x80?\x80?"
    assert tensor_digest(named, "about") == hashlib.sha256(content).hexdigest()
