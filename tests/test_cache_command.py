"""`trainer cache`: what it shows, what it removes, and what it leaves because somebody needs it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tests.other_user import open_folder, without_permissions
from trainer.cli import main
from trainer.data.cache import build_once, clean, default_cache_dir, entries, use

ROOT = Path(__file__).parents[1]
HOLD = """
import sys
from pathlib import Path
from trainer.data.cache import use
use(Path(sys.argv[1]), None)
print("in use", flush=True)
sys.stdin.read()
"""


def _build(folder: Path) -> None:
    (folder / "data.bin").write_bytes(bytes(1000))
    (folder / "report.json").write_text(json.dumps({"source": "pairs.jsonl", "num_rows": 12_345}))


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def _make(cache: Path, name: str, days_old: float = 0.0) -> Path:
    folder = cache / "tokens" / _key(name)
    build_once(folder, _build)
    then = time.time() - days_old * 86_400
    os.utime(folder / "report.json", (then, then))
    return folder


def test_ls_shows_kind_source_rows_size_and_last_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _make(tmp_path, "a")
    unfinished = tmp_path / "rows" / f"{_key('b')}.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "half").write_bytes(bytes(500))
    assert main(["cache", "ls", "--data.cache_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    day = time.strftime("%Y-%m-%d")
    cells = [line.split() for line in out.splitlines()]
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    assert ["tokens", "pairs.jsonl", "12,345", "1.1", "kB", day] in [line[:6] for line in cells]
    assert 1050 < num_bytes < 1150
    assert ["rows", "(unfinished)", "500", "bytes", day] in [line[:5] for line in cells]
    assert f"(2 folders) in {tmp_path}" in out


def test_the_cache_may_lie_in_the_home_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _make(tmp_path / "cache", "a")
    assert main(["cache", "ls", "--data.cache_dir=~/cache"]) == 0
    assert f"(1 folder) in {tmp_path / 'cache'}" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_names_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a home folder that is read-only; a file stands in its way here, for root may write everywhere."""
    (tmp_path / ".cache").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TRAINER_CACHE")
    with pytest.raises(ValueError, match=r"Not a directory; .* TRAINER_CACHE, or data.cache_dir of the config, names"):
        _make(default_cache_dir(), "a")


def test_clean_takes_leftovers_then_what_is_old_then_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = _make(tmp_path, "old", days_old=31), _make(tmp_path, "new", days_old=29)
    leftover = tmp_path / "tokens" / f"{_key('killed')}.unfinished"
    leftover.mkdir()
    arguments = ["cache", "clean", "--data.cache_dir", str(tmp_path)]
    assert main(arguments) == 0
    assert (leftover.exists(), old.exists(), new.exists()) == (False, True, True)
    assert capsys.readouterr().out == f"freed 0 bytes (1 folder) in {tmp_path}\n"
    assert main(["cache", "clean", f"--data.cache_dir={tmp_path}", "--older-than=40"]) == 0
    assert (old.exists(), new.exists()) == (True, True)
    assert capsys.readouterr().out == f"freed 0 bytes (0 folders) in {tmp_path}\n"
    assert main([*arguments, "--older-than", "30"]) == 0
    assert (old.exists(), new.exists()) == (False, True)
    assert capsys.readouterr().out == f"freed 1.1 kB (1 folder) in {tmp_path}\n"
    assert main([*arguments, "--all"]) == 0
    assert entries(tmp_path) == []


def test_what_the_cache_did_not_write_is_neither_shown_nor_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache that shares its folder with a project, and a wrong --data.cache_dir."""
    cached = _make(tmp_path, "a")
    others = [
        Path("runs/stsb/model.bin"),
        Path("src/module/a.py"),
        Path(f"runs/{_key('a')}/model.bin"),
        Path("tokens/mine/ids.bin"),
        Path("rows/half.unfinished/rows.bin"),
        Path(f"rows/{_key('b')}.old/rows.bin"),
        Path(f"rows/{_key('c')}"),  # a file
    ]
    for other in others:
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("kept")
    before = {path for path in tmp_path.rglob("*") if cached not in (path, path.parent)}
    assert [entry.folder for entry in entries(tmp_path)] == [cached]
    assert main(["cache", "clean", "--all", "--data.cache_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"freed 1.1 kB (1 folder) in {tmp_path}\n"
    assert set(tmp_path.rglob("*")) == before, "nothing else is gone, and there is no lock beside it"
    assert {(tmp_path / other).read_text() for other in others} == {"kept"}


def test_a_use_makes_a_folder_young_again(tmp_path: Path) -> None:
    folder = _make(tmp_path, "a", days_old=400)
    build_once(folder, _build)
    assert entries(tmp_path)[0].last_used < time.time() - 399 * 86_400, "to build is not to use"
    use(folder, _build)
    assert entries(tmp_path)[0].last_used > time.time() - 60


def test_what_a_living_process_builds_or_uses_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _make(tmp_path, "used")
    building = tmp_path / "tokens" / f"{_key('new')}.unfinished"
    building.mkdir()
    argv = [sys.executable, "-c", HOLD, str(folder)]
    with (
        FileLock(tmp_path / "tokens" / f"{_key('new')}.lock"),
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "in use\n"
        assert main(["cache", "clean", "--all", "--data.cache_dir", str(tmp_path)]) == 0
        assert folder.exists()
        assert building.exists()
        out = capsys.readouterr().out
        assert out.startswith("freed 0 bytes (0 folders)")
        assert out.endswith("left 1.1 kB (2 folders) that a running process builds or uses\n")
        process.kill()
        process.wait()
        removed, left, _ = clean(tmp_path, older_than_s=0.0)  # a dead process uses nothing
        assert [entry.folder for entry in removed] == [folder]
        assert [entry.folder for entry in left] == [building]


def test_what_belongs_to_another_user_is_left_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    """One of the folders is not even readable."""
    with open_folder() as cache:
        _make(cache, "readable").chmod(0o555)
        for lock in cache.rglob("*.lock"):
            lock.chmod(0o444)
        hidden = _make(cache, "hidden")
        hidden.chmod(0)
        Path(f"{hidden}.lock").chmod(0)
        with without_permissions():
            assert main(["cache", "ls", "--data.cache_dir", str(cache)]) == 0
            assert main(["cache", "clean", "--all", "--data.cache_dir", str(cache)]) == 0
        hidden.chmod(0o755)
        assert len(entries(cache)) == 2
    out = capsys.readouterr().out
    assert "1.1 kB (2 folders) in" in out
    assert "freed 0 bytes (0 folders)" in out
    assert out.endswith("left 1.1 kB (2 folders) that you have no permission to remove: ask who made it\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "say what to do: trainer cache ls, or trainer cache clean --older-than DAYS"),
        (["--lst", "3"], "say what to do: trainer cache ls, or trainer cache clean --older-than DAYS"),
        (["ls", "--all"], "'--all' is not understood here; see trainer cache --help"),
        (["clean", "--older-than", "soon"], "--older-than is 'soon'; it must be a number of days, 0 or more"),
        (["ls", "--older-than=30"], "'--older-than' is not understood here; see trainer cache --help"),
        (["clean", "--older-than"], "--older-than: expected one argument; see trainer cache --help"),
        (["ls", "--data.cache_dir"], "--data.cache_dir: expected one argument; see trainer cache --help"),
        (["clean", "--older-than", "9", "--all"], "give --all or --older-than, once: each says what is removed"),
        (["ls", "--data.cache_dir", __file__], f"--data.cache_dir {__file__} is a file; give the folder of the cache"),
        (["clean", "--older-than="], "--older-than is ''; it must be a number of days, 0 or more"),
        (["clean", "--older-than", "nan"], "--older-than is 'nan'; it must be a number of days, 0 or more"),
    ],
)
def test_other_arguments_are_refused(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *args]) == 2
    assert capsys.readouterr().err.strip() == said
