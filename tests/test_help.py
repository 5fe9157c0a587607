"""The help answers at once and says what the live parser says."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from trainer.cli import COMMANDS, main
from trainer.export.command import flags as export_flags
from trainer.help_text import FOLDER, HEIGHT, KEYS, WIDTH, live_parsers, screens
from trainer.mine.command import flags as mine_flags
from trainer.predict.command import flags as predict_flags

ALL = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.txt"))}


@pytest.fixture(scope="module")
def parsers() -> Mapping[str, Any]:
    return live_parsers()


def test_files_are_what_the_parser_gives() -> None:
    """A failure here is mended by: python -m trainer.help_text"""
    assert screens().items() <= ALL.items()


def test_every_command_has_a_screen() -> None:
    assert set(ALL) == {"trainer", *COMMANDS} - {"demo"}  # the demo's own parser is small and quick
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", ALL["trainer"], re.MULTILINE)


@pytest.mark.parametrize("name", ALL)
def test_fits_a_screen(name: str) -> None:
    lines = ALL[name].splitlines()
    assert len(lines) <= HEIGHT == 40
    assert max(map(len, lines)) <= WIDTH == 80


@pytest.mark.parametrize("command", KEYS)
def test_flags_and_defaults_are_live(command: str, parsers: Mapping[str, Any]) -> None:
    actions = {action.dest: action for action in parsers[command]._actions}
    flags = re.findall(r"^[* ] --(\S+)(?: (\S+))?(?:  |\s\S|$)", ALL[command], re.MULTILINE)
    flags = [(key, default) for key, default in flags if key != "help-all"]
    assert [key for key, _ in flags] == KEYS[command].split()
    for key, default in flags:
        live = actions[key].default
        assert default == ("" if live is None else str(live)), key


def test_every_flag_in_an_example_exists(parsers: Mapping[str, Any]) -> None:
    known = {option for parser in parsers.values() for option in parser._option_string_actions}
    for parser in (predict_flags(), mine_flags(), export_flags()):
        known |= parser._option_string_actions.keys()
    known |= {
        "--FLAG",
        "--KEY",
        "--help-all",
        "--debug",
        "--exact",
        "--json",
        "--probe",
        "--all",
        "--older-than",
        "--data.validation.path",  # below a list: the parser takes it, and has no option of the name
        "--data.validation.name",
    }
    for name, text in ALL.items():
        for flag in re.findall(r"--[A-Za-z][\w.-]*", text):
            assert flag in known or flag == "--help", f"{name}.txt: {flag}"


@pytest.mark.parametrize("args", [["--help"], [], ["fit", "-h"], ["fit", "--config", "x.yaml", "--help"]])
def test_prints_the_screen(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    assert capsys.readouterr().out == ALL["fit" if "fit" in args else "trainer"]


def test_answers_within_half_a_second_without_heavy_imports() -> None:
    """In a process of its own: what counts is a fresh start."""
    program = (
        "import sys; from trainer.cli import main; main(['fit', '--help']); "
        "sys.exit(bool({'torch', 'lightning', 'transformers', 'jsonargparse'} & sys.modules.keys()))"
    )
    seconds = []  # of CPU: those of the clock tell what else the machine does
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5


def test_help_all_is_the_whole_list(parsers: Mapping[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help-all"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for key in ("--trainer.sync_batchnorm", "--model.decay_all", "--tracking.entity", "--data.max_rows"):
        assert key in printed


def test_help_of_a_loss(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--model.loss.help", "InfoNCE"])
    assert ended.value.code == 0
    assert "--model.loss.scale" in capsys.readouterr().out.replace("init_args.", "")
