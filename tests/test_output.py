"""Readers that go away before the work is done: real pipes, through the real command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_recipe import write_tiny_recipe


@pytest.mark.parametrize("both", [False, True])
def test_ctrl_c_saves_though_it_has_ended_the_tee(tiny_encoder: Path, tmp_path: Path, both: bool) -> None:
    """``fit | tee log`` and ``fit 2>&1 | tee log``: the terminal sends the signal to tee as well."""
    recipe = write_tiny_recipe(tmp_path, tiny_encoder, max_epochs=1000, default_root_dir=str(tmp_path / "run"))
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(recipe)]
    command += ["--check.allow", "few_rows_many_epochs"]
    with open(tmp_path / "err", "wb") as err:
        stderr = subprocess.STDOUT if both else err
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert process.stdout is not None
        try:
            assert any(line.startswith("step 2/") for line in process.stdout)
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
            process.wait()
    logged = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (tmp_path / f"run/checkpoints/step-{logged['step']:08}/state.ckpt").exists()
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said
    assert said.count("nobody reads standard output any more") == (not both)


def test_a_short_command_says_nothing_of_it() -> None:
    """``trainer --help | head -0``: all that is not read is dropped."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def test_a_full_disk_is_no_reader_that_went_away() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "trainer", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode != 0
    assert b"No space left on device" in done.stderr
