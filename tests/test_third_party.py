"""What libraries would do to values, and say, unless they were told otherwise."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import yaml

from tests.tiny_recipe import write_tiny_recipe
from trainer.cli import main
from trainer.config_files import read_command
from trainer.lightning_cli import run


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_callback_with_an_enum_as_default(tiny_encoder: Path) -> None:
    """Lightning's Timer: its interval is one. The config that the run writes builds the same callback."""
    recipe = write_tiny_recipe(Path(), tiny_encoder, max_steps=1, default_root_dir="run")
    timer = '[{"class_path": "Timer", "init_args": {"duration": "00:01:00:00"}}]'
    assert main(["fit", "--config", str(recipe), "--trainer.callbacks", timer]) == 0
    (written,) = yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["callbacks"]
    assert written["init_args"] == {"duration": "00:01:00:00", "interval": "step", "verbose": True}
    args = ["--config", "run/config.yaml", "--trainer.default_root_dir", "again"]
    again = run(["fit", *args], read_command(args), execute=False)
    (timer_again,) = (one for one in again.trainer.callbacks if type(one).__name__ == "Timer")
    assert (timer_again._duration, timer_again._interval) == (3600, "step")


def test_the_regular_end_is_not_told_by_a_setting_the_user_never_made(tiny_encoder: Path) -> None:
    """Epochs were asked for: Lightning would say that max_steps=3 was reached."""
    recipe = write_tiny_recipe(Path(), tiny_encoder)
    said = logging.StreamHandler(io.StringIO())
    logging.getLogger("lightning.pytorch").addHandler(said)
    try:
        assert main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1"]) == 0
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(said)
    assert "GPU available" in said.stream.getvalue()
    assert "stopped" not in said.stream.getvalue()


def test_lightning_advises_no_setting_that_there_is_not(tiny_encoder: Path, recwarn: pytest.WarningsRecorder) -> None:
    recipe = write_tiny_recipe(Path(), tiny_encoder, max_steps=1, limit_val_batches=0)
    assert main(["fit", "--config", str(recipe), "--data.num_workers", "1"]) == 0
    assert not [one for one in recwarn if "persistent_workers" in str(one.message)]
