"""Signals are noted, not acted on; processes that start under the shield never see them."""

import signal
import subprocess
import sys

import pytest

from trainer.interruption import EXIT_CODES, Interrupted

NOTE = """
import os, signal, sys
from trainer import interruption
heavy = {"torch", "lightning", "yaml"} & sys.modules.keys()
assert not heavy, heavy
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever these tests run under
interruption.listen()
for name in sys.argv[1:]:
    os.kill(os.getpid(), signal.Signals[name])
print(interruption.received().name)
interruption.stop_if_asked()
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("signals", "first", "status"),
    [
        (["SIGUSR1"], "SIGUSR1", 85),
        (["SIGTERM"], "SIGTERM", 143),
        (["SIGHUP", "SIGTERM"], "SIGHUP", 129),
        (["SIGUSR1", "SIGTERM", "SIGUSR1"], "SIGUSR1", 85),
    ],
)
def test_the_first_request_counts(signals: list[str], first: str, status: int) -> None:
    done = run(NOTE, *signals)
    assert (done.stdout, done.returncode) == (f"{first}\n", status), done.stderr


def test_a_request_while_python_shuts_down_changes_no_status() -> None:
    """Python takes its handlers away before it takes its modules apart; a TERM behind a USR1 would undo the 85."""
    late = "class Late:\n    def __del__(self, kill=os.kill, pid=os.getpid()):\n        kill(pid, 15)\nlate = Late()\n"
    done = run(NOTE.replace("interruption.stop", f"{late}interruption.stop"), "SIGUSR1")
    assert (done.stdout, done.returncode) == ("SIGUSR1\n", 85), done.stderr


def test_a_closed_terminal_is_nothing_to_nohup() -> None:
    done = run(NOTE.replace("SIG_DFL", "SIG_IGN"), "SIGHUP", "SIGTERM")
    assert (done.stdout, done.returncode) == ("SIGTERM\n", 143), done.stderr


def test_ctrl_c_waits_for_a_step_only_while_there_are_steps() -> None:
    assert "KeyboardInterrupt" in run(NOTE, "SIGINT").stderr
    in_training = NOTE.replace("listen()", "listen(); interruption.training(True)")
    done = run(in_training, "SIGINT")
    assert (done.stdout, done.returncode) == ("SIGINT\n", 130)
    assert "Ctrl-C once more stops at once" in done.stderr
    assert "KeyboardInterrupt" in run(in_training, "SIGINT", "SIGINT").stderr


def test_codes_are_what_a_shell_shows() -> None:
    assert {number: Interrupted(number).code for number in EXIT_CODES} == {
        signal.SIGUSR1: 85,
        signal.SIGTERM: 128 + signal.SIGTERM,
        signal.SIGINT: 128 + signal.SIGINT,
        signal.SIGHUP: 128 + signal.SIGHUP,
    }


SHIELD = """
import os, signal, subprocess, sys
from trainer import interruption
interruption.listen()
sleep = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(1.0); print('alive')"]
with interruption.shielded():
    inside = subprocess.Popen(sleep, stdout=subprocess.PIPE, text=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert interruption.received() is None
assert interruption.received() == signal.SIGUSR1
outside = subprocess.Popen(sleep, stdout=subprocess.PIPE, text=True)
for child in (inside, outside):
    child.stdout.readline()
    child.send_signal(signal.SIGUSR1)
print(inside.communicate()[0].strip(), inside.returncode, outside.wait())
"""


def test_a_shielded_child_outlives_the_signal() -> None:
    done = run(SHIELD)
    assert done.stdout.split() == ["alive", "0", str(-signal.SIGUSR1)], done.stderr
