"""W&B for real, offline: what it stores, under which id, without secrets, and after a SIGKILL."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from wandb.util import get_core_path

from tests.tracking.small_run import make_parts, make_trainer, read_metrics, write_rows
from trainer.checkpoint import DirectoryCheckpointIO
from trainer.evaluation.runner import Evaluation
from trainer.tracking import wandb_runs
from trainer.tracking.metrics import MetricsLog, run_id_in
from trainer.tracking.wandb import Tracking, keep_id, make_logger
from trainer.tracking.wandb_mode import choose_mode
from trainer.tracking.wandb_runs import offline_folders, read_offline, read_online, record_of

# A process of its own: it is killed, and W&B keeps one service per process.
SCRIPT = """
import json, os, signal, sys, time
from trainer.tracking import wandb_runs
from trainer.tracking.wandb import Tracking, make_logger

assert "wandb.sdk" not in sys.modules, "imported before it is needed"

def run(first, last, end):
    tracking = Tracking(wandb="offline", group="paper", job_type="sweep", tags=["a", "b"], name="my run")
    logger = make_logger(tracking, sys.argv[1], {"model": {"max_tokens": 512, "hf_token": "SECRET"}})
    for step in range(first, last):
        row = {"train/loss": 1.0 / (step + 1), "eval/dev/spearman_cosine": 0.9 - abs(step - 2) / 20, "train/lr": 0.1}
        with open(sys.argv[1] + "/metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **row}) + "\\n")
        logger.log_metrics(row, step)
    assert os.environ["SLURM_JWT"] and os.environ["SLURM_SITE_TOKEN"], "what the run itself needs is gone"
    logger.log_hyperparams({"password": "SECRET"})
    if end == "killed":
        time.sleep(2.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "requeued":
        logger.interrupt(85)
        sys.exit(85)
    if end == "failed":
        logger.finalize("failed")
        raise SystemExit(1)  # the launcher calls sys.exit as it was before W&B took its place
    logger.finalize("success")
    sys.exit()

# One behind the other, as a requeued job runs.
for first, last, end, status in (
    (0, 5, "killed", -9), (3, 8, "requeued", 85), (8, 10, "requeued", 85), (10, 11, "failed", 1),
    (11, 12, "finished", 0)
):
    child = os.fork()
    if child == 0:
        run(first, last, end)
    found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert found == status, (end, found)
"""


def inspect(fragment: Path, *flags: str) -> str:
    """What W&B's own reader finds in an offline file: the program behind `wandb leet inspect`."""
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *flags]
    command += ["--run-file", str(fragment), str(fragment.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(fragment: Path) -> list[dict]:
    return [json.loads(line) for line in inspect(fragment).splitlines()]


def finished_records(fragment: Path) -> list[dict]:
    """All of a run that has ended: its service writes the last block behind the answer to finish()."""
    end = time.monotonic() + 20
    found = records(fragment)
    while not any("exit" in record for record in found):
        assert time.monotonic() < end, "no exit record"
        time.sleep(0.1)
        found = records(fragment)
    return found


@pytest.fixture
def no_wandb_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


FULL_DISK = """
import sys, time
from pathlib import Path
from trainer.tracking import wandb
from trainer.tracking.wandb import Tracking, make_logger

wandb.STALLED_S = 2.0
logger, filler = make_logger(Tracking(wandb="offline"), sys.argv[1], {}), Path(sys.argv[1], "filler")
for step in range(60):
    logger.log_metrics({"train/loss": 1.0}, step)
    time.sleep(0.2)
    if step == 25 and sys.argv[2] == "full":
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(256))
            except OSError:
                pass
    if step == 45:
        filler.unlink(missing_ok=True)  # W&B's service does not come back
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("disk", ["full", "free"])
def test_an_offline_run_whose_disk_is_full_says_so_once(no_wandb_settings: Path, disk: str) -> None:
    small = no_wandb_settings / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True, timeout=20)
    try:
        command = [sys.executable, "-c", FULL_DISK, str(small), disk]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        (fragment,) = small.glob("wandb/offline-run-*/run-*.wandb")
        stored = sum(record.get("type") == "history" for record in records(fragment))
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=20)
    said = re.findall(rf"W&B writes nothing to {fragment} any more; its disk has [\d,]+ bytes free", done.stderr)
    assert len(said) == (disk == "full"), done.stderr
    assert stored < 60 if disk == "full" else stored == 60


def test_two_runs_of_one_process_are_two(no_wandb_settings: Path) -> None:
    """A notebook fits twice: the second run does not go on in the first one's files. And nobody has asked for W&B: by
    default a run without a key writes offline files."""
    import wandb

    for name in ("first", "second"):
        run_dir = no_wandb_settings / name
        run_dir.mkdir()
        logger = make_logger(Tracking(), run_dir)
        assert logger is not None
        logger.log_metrics({"train/loss": 1.0}, step=1)
    wandb.finish()
    ids = [keep_id(no_wandb_settings / name) for name in ("first", "second")]
    assert ids[0] != ids[1]
    for name, run_id in zip(("first", "second"), ids, strict=True):
        (fragment,) = (no_wandb_settings / name).glob("wandb/offline-run-*/*.wandb")
        assert fragment.stem == f"run-{run_id}"


def test_offline_runs_of_one_directory_are_one_run(tmp_path: Path) -> None:
    """Killed once (2.5 s after its last row) and requeued twice, so four processes: one id, every row, steps that only
    rise once what the kill took back is left out, the best of all in the summary, finished at the end alone, no secret.
    """
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
        "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.SECRET.SECRET",
        "SLURM_SITE_TOKEN": "SECRET",
    }
    (tmp_path / "train.py").write_text(SCRIPT)
    argv = [sys.executable, "train.py", str(run_dir), "--hub.token=SECRET", "--key", "SECRET"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("^wandb: ", done.stdout + done.stderr, re.M)  # our line says where the files are
    assert "tracked offline; send it from a machine with a network: wandb sync" in done.stdout

    fragments = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(fragments) == 5
    run_id = (run_dir / "wandb_id").read_text().strip()
    steps, exits, preempted = [], [], []
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
        theirs = next(record["environment"]["slurm"] for record in found if "environment" in record)
        assert theirs.items() >= {"job_id": "77", "restart_count": "1", "ntasks": "1", "procid": "0"}.items()
        assert theirs.keys().isdisjoint(("jwt", "site_token"))
        assert len(config["run"]["git_commit"]) == 40
        defined = [record["metric"] for record in found if "metric" in record]
        axes = {metric.get("glob_name") or metric["name"]: metric for metric in defined}
        assert axes["*"]["step_metric"] == "trainer/global_step"
        assert axes["eval/dev/spearman_cosine"]["summary"] == {"max": True, "last": True}
        assert axes["train/loss"]["summary"] == {"min": True, "last": True}
        assert "train/lr" not in axes
        history = [record["history"]["item"] for record in found if "history" in record]
        history = [item for item in history if "train/loss" in item]
        steps.append([item["trainer/global_step"] for item in history])
        assert [item["train/loss"] for item in history] == [1.0 / (step + 1) for step in steps[-1]]
        exits.append([record["exit"].get("exit_code", 0) for record in found if "exit" in record])
        preempted.append(any("preempting" in record for record in found))
    assert steps == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [8, 9], [10], [11]]
    (run,) = read_offline([fragment.parent for fragment in fragments])
    assert [row["step"] for row in run.rows] == list(range(12))
    assert (run.name, run.about["ranks"]) == ("my run", 1)
    assert exits == [[], [85], [85], [1], [0]]
    assert preempted == [False, True, True, False, False]
    summary = json.loads(inspect(fragments[-1], "--summary"))["summary"]
    assert summary["eval/dev/spearman_cosine"] == {"max": 0.9, "last": pytest.approx(0.45)}
    assert summary["train/loss"] == {"min": 1 / 12, "last": 1 / 12}
    stored = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(stored) > 4
    assert [path for path in stored if b"SECRET" in path.read_bytes()] == []


@pytest.mark.parametrize("back_at", [10, 20])
def test_a_run_of_the_server_forgets_what_it_took_back(back_at: int) -> None:
    """Killed behind step 30, it went on from a checkpoint: what stays in metrics.jsonl is what stays here. The server
    keeps all rows that were sent."""
    first = [(0, 0.1), (10, 0.5), (20, 0.9), (30, 0.95)]
    second = [(step, 0.2 + step / 100) for step in (10, 20, 30, 40) if step >= back_at]
    logged = enumerate([*first, *second])
    history = [{"_step": n, "trainer/global_step": step, "eval/dev/x": score} for n, (step, score) in logged]
    run = SimpleNamespace(name="r", config={}, scan_history=lambda: iter(history[::-1]))
    expected = [pair for pair in first if pair[0] < back_at] + second
    assert [(row["step"], row["eval/dev/x"]) for row in record_of(run).rows] == expected
    # Back to the last step that was logged: no step falls.
    again = [(20, 0.7), (40, 0.8)]
    history = [
        {"_step": n, "trainer/global_step": step, "eval/dev/x": score}
        for n, (step, score) in enumerate([*first[:3], *again])
    ]
    expected = [*first[:2], *again]
    assert [(row["step"], row["eval/dev/x"]) for row in record_of(run).rows] == expected


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
    assert logger is not None
    trainer = make_trainer(run_dir, [MetricsLog(), Evaluation()], logger=logger, plugins=[DirectoryCheckpointIO()])
    trainer.fit(module, data)
    trainer.save_checkpoint(run_dir / "last")
    logger.log_export(run_dir / "last", {"base": "b", "hub_token": "SECRET"})
    import wandb

    wandb.finish()
    (fragment,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    found = finished_records(fragment)
    written = read_metrics(run_dir)
    assert len(written) == 6
    (read,) = read_offline(offline_folders(run_dir / "wandb"))
    at_step: dict[int, dict] = {}
    for row in written:
        at_step.setdefault(row["step"], {}).update(row)
    assert read.rows == list(at_step.values())
    about = json.loads((run_dir / "run.json").read_text())
    assert about.pop("directory") == str(Path.cwd())  # of the file alone
    assert read.about == about
    assert any(isinstance(value, list) for value in read.rows[-1].values()), "no histogram"
    run = next(record["run"] for record in found if "run" in record)
    assert run["config"]["update"]["model"] == {"learning_rate": 0.01, "hub_token": "[redacted]"}
    assert run["display_name"].endswith("/run")
    assert run["run_id"] == run_id_in(run_dir / "last") == (run_dir / "wandb_id").read_text().strip()

    (path,) = run_dir.glob("wandb/offline-run-*/files/media/table/evaluations*.json")
    table = json.loads(path.read_text())
    scores = [(row["eval/dev0/spearman_cosine"], row["step"]) for row in written if "eval/dev0/spearman_cosine" in row]
    expected = ["dev0", "spearman_cosine", scores[0][0], *max(scores), scores[-1][0]]
    assert expected in [[*row] for row in table["data"]]
    artifacts = [record["artifact"] for record in found if "artifact" in record]
    (model,) = [artifact for artifact in artifacts if artifact["type"] == "model"]
    assert json.loads(model["metadata"]) == {"base": "b", "hub_token": "[redacted]"}
    stored = {entry["path"] for entry in model["manifest"]["contents"]}
    assert stored == {path.name for path in (run_dir / "last").iterdir()}
    assert (run_dir / "wandb" / "artifacts").is_dir(), "what waits to be sent lies elsewhere"


def test_a_run_that_ended_in_nan_says_so(no_wandb_settings: Path) -> None:
    """The summary and the table have neither the score of the base as the best nor an earlier score as the last."""
    import wandb

    run_dir, better = no_wandb_settings / "run", {"dev": [0.5, 0.8, math.nan], "lost": [0.9, math.nan, math.nan]}
    run_dir.mkdir()
    logger = make_logger(Tracking(wandb="offline"), run_dir)
    assert logger is not None
    for place, step in enumerate((0, 10, 20)):
        row = {f"eval/{name}/x": scores[place] for name, scores in better.items()}
        written = {name: None if math.isnan(value) else value for name, value in row.items()}
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **written}) + "\n")
        logger.log_metrics(row, step)
    logger.finalize("success")
    wandb.finish()
    (fragment,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    finished_records(fragment)
    summary = json.loads(inspect(fragment, "--summary"))["summary"]
    # W&B's reader writes a nan as null.
    assert summary["eval/dev/x"] == {"max": 0.8, "last": None}
    assert summary["eval/lost/x"] == {"max": None, "last": None}
    (path,) = run_dir.glob("wandb/offline-run-*/files/media/table/evaluations*.json")
    assert json.loads(path.read_text())["data"] == [
        ["dev", "x", 0.5, 0.8, 10, None],
        ["lost", "x", 0.9, None, None, None],
    ]


def test_a_run_of_the_server_reads_as_its_file(tmp_path: Path) -> None:
    """The public API's objects, with what it returns for a history: a histogram as a mapping, no row of the step alone.
    No server is asked."""
    history = [
        {"_step": 1, "trainer/global_step": 5, "train/loss": 0.5, "_runtime": 3},
        {"_step": 0, "trainer/global_step": 0, "eval/dev/x": "NaN", "train/loss": None},
        {"_step": 2, "trainer/global_step": 5, "health/dev/h": {"_type": "histogram", "values": [1, 2], "bins": [0]}},
        {"_step": 3, "lonely": 1},
    ]
    about = {"ranks": 4, "device": "H100", "primary_metrics": ["eval/dev/x"]}
    config = {"seed_everything": 3, "run": {"world_size": 4}, "about": about, "_wandb": {}}
    found = record_of(SimpleNamespace(name="a run", config=config, scan_history=lambda: iter(history)))
    assert found.rows == [
        {"step": 0, "eval/dev/x": None, "train/loss": None},
        {"step": 5, "train/loss": 0.5, "health/dev/h": [1, 2]},
    ]
    assert (found.seed, found.about, dict(found.config)) == (3, about, {"seed_everything": 3})


def test_a_start_that_fails_without_a_word_goes_on_offline(
    no_wandb_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where W&B's service has gone: what waited for its answer says nothing."""
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError

    start = wandb.init

    def init(**arguments: Any) -> Any:
        if arguments["mode"] == "online":
            raise HandleAbandonedError
        return start(**arguments)

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(wandb, "init", init)
    logger = make_logger(Tracking(wandb="online"), no_wandb_settings / "run", {})
    assert logger is not None
    with pytest.warns(UserWarning, match=r"^W&B does not answer \(no reason given\): tracking offline$"):
        logger.experiment.finish()


def test_without_a_server_or_a_key_there_are_no_runs_to_compare(
    no_wandb_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^wandb:a/b: no key for W&B; set WANDB_API_KEY or run wandb login$"):
        read_online("a/b")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_runs, "SERVER_TIMEOUT_S", 1)
    text = r"^wandb:a/b: W&B does not answer \(.+\); name run directories or offline folders$"
    with pytest.raises(ValueError, match=text):
        read_online("a/b")


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


@pytest.mark.parametrize(
    ("environ", "tracking", "expected"),
    [
        ({}, Tracking(), ("sentence-encoders", "stsb/seed=1", [])),
        (
            {"WANDB_PROJECT": "mine", "WANDB_NAME": "a name", "WANDB_TAGS": "a, b c"},
            Tracking(),
            ("mine", "a name", ["a", "b c"]),
        ),
        (
            {"WANDB_PROJECT": "mine", "WANDB_NAME": "a name", "WANDB_TAGS": "a,b"},
            Tracking(project="ours", name="x", tags=[]),
            ("ours", "x", []),
        ),
    ],
)
def test_the_environment_decides_what_the_config_leaves_open(
    environ: dict[str, str],
    tracking: Tracking,
    expected: tuple[str, str, list[str]],
    no_wandb_settings: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    run_dir = no_wandb_settings / "runs" / "stsb" / "seed=1"
    run_dir.mkdir(parents=True)
    logger = make_logger(tracking, run_dir)
    assert logger is not None
    logger.log_metrics({"train/loss": 1.0}, step=1)
    wandb.finish()
    (fragment,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    run = next(record["run"] for record in finished_records(fragment) if "run" in record)
    assert (run["project"], run["display_name"], run.get("tags", [])) == expected


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
