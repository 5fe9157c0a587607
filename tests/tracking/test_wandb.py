"""W&B for real, offline: what it stores, under which id, without secrets, and after a SIGKILL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.tracking.small_run import make_parts, make_trainer, read_metrics, write_rows
from trainer.checkpoint import DirectoryCheckpointIO
from trainer.evaluation.runner import Evaluation
from trainer.tracking.metrics import MetricsLog, run_id_in
from trainer.tracking.wandb import Tracking, choose_mode, keep_id, make_logger

# A process of its own: it is killed, and W&B keeps one service per process.
SCRIPT = """
import os, signal, sys, time
from trainer.tracking.wandb import Tracking, make_logger

assert "wandb.sdk" not in sys.modules, "imported before it is needed"

def run(first, last):
    tracking = Tracking(wandb="offline", group="paper", job_type="sweep", tags=["a", "b"], name="my run")
    logger = make_logger(tracking, sys.argv[1], {"model": {"max_tokens": 512, "hf_token": "SECRET"}})
    for step in range(first, last):
        logger.log_metrics({"train/loss": 1.0 / (step + 1), "eval/dev/spearman_cosine": 0.5}, step=step)
    logger.log_hyperparams({"password": "SECRET"})
    time.sleep(2.5)
    os.kill(os.getpid(), signal.SIGKILL)

# One behind the other, as a requeued job runs.
for first, last in ((0, 5), (3, 8)):
    child = os.fork()
    if child == 0:
        run(first, last)
    status = os.waitpid(child, 0)[1]
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


def records(fragment: Path) -> list[dict]:
    """What W&B's own reader finds in an offline file."""
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", fragment], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def no_wandb_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def test_offline_runs_of_one_directory_are_one_run(tmp_path: Path) -> None:
    """Two processes, both killed 2.5 s after their last row: two fragments, one id, every row, no secret."""
    run_dir = tmp_path / "runs" / "stsb" / "seed=1"
    remote = "https://bob:SECRET@example.com/x.git"
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "x"],
        cwd=tmp_path,
        check=True,
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
    }
    (tmp_path / "train.py").write_text(SCRIPT)
    argv = [sys.executable, "train.py", str(run_dir), "--hub.token=SECRET", "--key", "SECRET"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    fragments = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(fragments) == 2
    run_id = (run_dir / "wandb_id").read_text().strip()
    steps = []
    for fragment in fragments:
        found = records(fragment)
        run = next(record["run"] for record in found if "run" in record)
        assert (run["run_id"], run["resume"]) == (run_id, True)
        assert (run["run_group"], run["job_type"], run["tags"]) == ("paper", "sweep", ["a", "b"])
        assert (run["project"], run["display_name"]) == ("sentence-encoders", "my run")
        config = run["config"]["update"]
        assert config["model"] == {"max_tokens": 512, "hf_token": "[redacted]"}
        assert config["run"]["slurm"] == {"job_id": "77", "restart_count": "1", "ntasks": "1"}
        assert config["run"]["world_size"] == 1
        assert len(config["run"]["git_commit"]) == 40
        axes = {metric.get("glob_name"): metric for record in found if (metric := record.get("metric"))}
        assert axes["*"]["step_metric"] == "trainer/global_step"
        assert axes["eval/*"]["summary"]["max"] is True
        history = [record["history"]["item"] for record in found if "history" in record]
        steps.append([item["trainer/global_step"] for item in history])
        assert [item["train/loss"] for item in history] == [1.0 / (step + 1) for step in steps[-1]]
    assert steps == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]
    stored = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(stored) > 4
    assert [path for path in stored if b"SECRET" in path.read_bytes()] == []


def test_a_run_stores_the_rows_of_its_metrics_file(
    no_wandb_settings: Path, tiny_encoder: Path, demo_texts: list[str]
) -> None:
    """A real run through the trainer; the config is that of the run directory."""
    run_dir = no_wandb_settings / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("model: {learning_rate: 0.01, hub_token: SECRET}\n")
    rows = write_rows(no_wandb_settings, demo_texts)
    module, data = make_parts(tiny_encoder, rows, [rows])
    logger = make_logger(Tracking(), run_dir)
    trainer = make_trainer(run_dir, [MetricsLog(), Evaluation()], logger=logger, plugins=[DirectoryCheckpointIO()])
    trainer.fit(module, data)
    trainer.save_checkpoint(run_dir / "last")
    import wandb

    wandb.finish()
    (fragment,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    found = records(fragment)
    history = [record["history"]["item"] for record in found if "history" in record]
    written = read_metrics(run_dir)
    assert len(written) == 6
    assert [item.pop("trainer/global_step") for item in history] == [row.pop("step") for row in written]
    for item, row in zip(history, written, strict=True):
        assert {name: value for name, value in item.items() if not name.startswith("_")} == row
    run = next(record["run"] for record in found if "run" in record)
    assert run["config"]["update"]["model"] == {"learning_rate": 0.01, "hub_token": "[redacted]"}
    assert run["display_name"].endswith("/run")
    assert run["run_id"] == run_id_in(run_dir / "last") == (run_dir / "wandb_id").read_text().strip()


class Broken(BaseHTTPRequestHandler):
    """A server that answers 500."""

    def do_GET(self) -> None:
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


class Hanging(Broken):
    """A server that takes the request and says nothing."""

    def do_GET(self) -> None:
        time.sleep(100)

    do_POST = do_GET


# One import of seconds, and a process for each server.
ONLINE = """
import os, sys
import trainer.tracking.wandb as tracking

tracking.INIT_TIMEOUT_S = 2.0  # W&B adds ten seconds of its own
children = []
for name, address in zip(sys.argv[1::2], sys.argv[2::2]):
    if child := os.fork():
        children.append(child)
        continue
    log = os.open(name + ".log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["WANDB_BASE_URL"] = address
    if name != "no key":
        os.environ["WANDB_API_KEY"] = "a" * 40
    logger = tracking.make_logger(tracking.Tracking(wandb="online"), name, {})
    logger.log_metrics({"train/loss": 1.0}, step=3)
    logger.log_metrics({"train/loss": 0.5}, step=4)
    logger.finalize("success")
    sys.exit()
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
"""


def test_a_server_that_does_not_answer(no_wandb_settings: Path) -> None:
    """No network, no key (and nobody to ask), a server that says 500 or nothing, all at once to save time.
    One warning, the run goes on offline, and at the end it says how to send it."""
    servers = {kind.__name__: ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Broken, Hanging)}
    for server in servers.values():
        server.daemon_threads, server.block_on_close = True, False
        Thread(target=server.serve_forever, daemon=True).start()
    places = {name: f"http://127.0.0.1:{server.server_port}" for name, server in servers.items()}
    places |= {"nobody listens": "http://127.0.0.1:9", "no key": "http://127.0.0.1:9"}
    words = [word for place in places.items() for word in place]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", ONLINE, *words],
            cwd=no_wandb_settings,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
        )
    finally:
        for server in servers.values():
            server.shutdown()
    assert done.returncode == 0, done.stderr
    for name in places:
        said = (no_wandb_settings / f"{name}.log").read_text()
        assert len(re.findall(r"UserWarning: W&B does not answer \(.+\): tracking offline", said)) == 1, said
        (fragment,) = (no_wandb_settings / name).glob("wandb/offline-run-*/*.wandb")
        history = [record["history"]["item"] for record in records(fragment) if "history" in record]
        assert [item["train/loss"] for item in history] == [1.0, 0.5]
        (command,) = re.findall("^tracked offline; send it .*: wandb sync (.*)$", said, re.MULTILINE)
        listed = ["bash", "-c", f"ls -d {command}"]
        named = subprocess.run(listed, cwd=no_wandb_settings, capture_output=True, text=True, timeout=10)
        assert no_wandb_settings / named.stdout.rstrip("\n") == fragment.parent


def test_auto_is_online_only_with_a_key(no_wandb_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mode("auto") == "offline"
    (no_wandb_settings / "netrc").write_text("machine api.wandb.ai login user password abc\n")
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode("auto") == "offline"
    assert choose_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == "off"


def test_off_starts_nothing(tmp_path: Path) -> None:
    assert make_logger(Tracking(wandb="off"), tmp_path / "run", {}) is None
    assert not (tmp_path / "run").exists()


def test_the_id_is_made_once_and_follows_a_checkpoint(tmp_path: Path) -> None:
    made = keep_id(tmp_path / "a")
    assert keep_id(tmp_path / "a") == keep_id(tmp_path / "a", "other") == made
    assert keep_id(tmp_path / "b") != made
    assert keep_id(tmp_path / "c", made) == made
    logger = make_logger(Tracking(wandb="offline"), tmp_path / "c")
    assert logger is not None
    assert logger.version == made
    assert not list((tmp_path / "c").glob("wandb")), "nothing may start before the first use"
