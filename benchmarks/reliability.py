"""Runs are killed and preempted at random moments, and must end as if nothing had happened.

    python benchmarks/reliability.py kill --count 50 --json benchmarks/results/reliability/kill.json
    python benchmarks/reliability.py kill-saving --count 10 --json benchmarks/results/reliability/kill-saving.json
    python benchmarks/reliability.py preempt --count 20 --json benchmarks/results/reliability/preempt.json
    python benchmarks/reliability.py preempt-steps --count 16 --json benchmarks/results/reliability/preempt-steps.json
    python benchmarks/reliability.py preempt-saving --count 4 --json benchmarks/results/reliability/preempt-saving.json
    python benchmarks/reliability.py preempt-validation --count 4 \\
        --json benchmarks/results/reliability/preempt-validation.json
    python benchmarks/reliability.py ranks --count 6 --json benchmarks/results/reliability/ranks.json
    python benchmarks/reliability.py report benchmarks/results/reliability/*.json

`kill`: SIGKILL to all processes of a run, several times before it may end; TMPDIR lies on another file system.
`kill-saving` waits for a checkpoint to be under way.
`preempt`: USR1 to a job on a two-node Slurm (slurm/local-cluster.sh), as at the end of a time limit; the job script
requeues it; `preempt-steps` does so behind the imports, `preempt-saving` while a checkpoint is written and
`preempt-validation` while dev is evaluated. All
compare the final weights with those of a run that was never disturbed, bit for bit.
`ranks`: one rank of two is killed or stopped (SIGSTOP) while it trains; the job must end, with a status that is not 0,
and name the rank.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from provenance import provenance

from trainer.demo_data import read_pairs, write_pairs
from trainer.demo_encoder import write_encoder
from trainer.manifest import newest, newest_valid, read_state, steps

ROOT = Path(__file__).parents[1]
HERE = str(Path(__file__).parent)
DOCUMENT = ROOT / "docs" / "reliability.md"
MARKS = ("<!-- tables: written by benchmarks/reliability.py report -->", "<!-- end of tables -->")
INTERVAL = 5  # steps between checkpoints
ROWS, BATCH, EPOCHS = 240, 4, 2
LAST = EPOCHS * ROWS // BATCH


def write_recipe(folder: Path) -> Path:
    """120 steps with a dropout of 0.1; a checkpoint every 5 of them, an evaluation every 10."""
    train, dev = write_pairs(folder, num_train=ROWS, num_dev=400, seed=1)
    texts = [text for pair in read_pairs(train) for text in (pair.sentence1, pair.sentence2)]
    write_encoder(folder / "encoder", texts, hidden=64, layers=2, heads=4, vocab=2000)
    columns = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
    source = {"path": str(train), "columns": columns, "score_range": [0, 5]}
    content = {
        "model": {
            "encoder": {"backbone": str(folder / "encoder"), "compact_vocabulary": "off", "dropout": 0.1},
            "loss": "CosineSimilarity",
            "learning_rate": 1e-3,
        },
        "data": {
            "train": [source],
            "validation": [{**source, "name": "dev", "path": str(dev)}],
            "batch_size": BATCH,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "val_check_interval": 10,
            "log_every_n_steps": 1,
        },
        "checkpoint": {"save_every_steps": INTERVAL, "keep": 3},
        "tracking": {"wandb": "offline"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def logged_steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["step"] for row in rows if "train/loss" in row]


def same_end(run_dir: Path, reference: Path) -> bool:
    """Weights and Adam's moments of the last step, bit for bit."""
    ends = [newest(folder) for folder in (run_dir, reference)]
    if ends[0] is None or ends[1] is None or ends[0].name != ends[1].name:
        return False
    one, other = (read_state(end) for end in ends if end)
    moments = [
        {f"{n}.{k}": v for n, s in state["optimizer_states"][0]["state"].items() for k, v in s.items()}
        for state in (one, other)
    ]
    return all(
        left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
        for left, right in ((one["state_dict"], other["state_dict"]), (moments[0], moments[1]))
    )


# -- kill ---------------------------------------------------------------------------------------------------


def fit(recipe: Path, run_dir: Path, ranks: int, *flags: str, **more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(recipe)]
    command += ["--trainer.default_root_dir", str(run_dir), "--trainer.devices", str(ranks), *flags]
    command += ["--tracking.wandb", "off"]
    if ranks > 1:
        command += ["--trainer.strategy", "ddp"]
    run_dir.mkdir(parents=True, exist_ok=True)
    log = open(run_dir / "log.txt", "ab")  # noqa: SIM115 - the process keeps it
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment(**more), start_new_session=True)


def kill_loop(folder: Path, count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Moments drawn uniformly over the life of a process."""
    yield from _kills(folder, count, draw, in_saves=False)


def kill_saving_loop(folder: Path, count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Within 30 ms after a save has begun: saves take a small part of a life."""
    yield from _kills(folder, count, draw, in_saves=True)


def _kills(folder: Path, count: int, draw: random.Random, in_saves: bool) -> Iterator[dict[str, Any]]:
    """Chains of up to five kills, on one and on two ranks in turn; every chain runs to its end."""
    recipe = write_recipe(folder)
    tmp = tempfile.mkdtemp(dir="/dev/shm") if Path("/dev/shm").is_dir() else str(folder)
    lasted: dict[int, float] = {}
    for ranks in (1, 2):
        start = time.monotonic()
        assert fit(recipe, folder / f"undisturbed-{ranks}", ranks, TMPDIR=tmp).wait(300) == 0
        lasted[ranks] = time.monotonic() - start
    done = chain = 0
    while done < count:
        ranks, run_dir = 1 + chain % 2, folder / f"chain-{chain}"
        kills: list[dict[str, Any]] = []
        again: tuple[str, ...] = ()
        while len(kills) < min(5, count - done):
            begun = time.monotonic()
            process = fit(recipe, run_dir, ranks, *again, TMPDIR=tmp)
            if in_saves:
                _await_save(process, run_dir, draw)
            else:
                _await(process, draw.uniform(0.3, lasted[ranks]))
            if process.poll() is None:
                kills.append(_kill(process, run_dir, ranks, time.monotonic() - begun))
                again = ("--ckpt_path", "auto")
            else:
                break  # it came to its end before
        code = process.wait(300) if process.poll() is not None and not kills else 0
        if newest(run_dir) is None or newest(run_dir).name != f"step-{LAST:08d}":  # type: ignore[union-attr]
            code = fit(recipe, run_dir, ranks, *again, TMPDIR=tmp).wait(300)
        equal = code == 0 and same_end(run_dir, folder / f"undisturbed-{ranks}")
        for kill in kills:
            ends = {"chain": chain, "final_exit_code": code, "bitwise_equal": equal, "ok": kill["ok"] and equal}
            yield {**kill, **ends}
        done, chain = done + len(kills), chain + 1
        shutil.rmtree(run_dir)
    shutil.rmtree(tmp, ignore_errors=True)


def _await(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def _await_save(process: subprocess.Popen[bytes], run_dir: Path, draw: random.Random) -> None:
    """Until the second save from now, or a later one, is under way for up to 30 ms."""
    saves, before = draw.randint(2, 4), False
    while saves and process.poll() is None:
        under_way = any((run_dir / "checkpoints").glob(".step-*.partial"))
        saves -= under_way and not before
        before = under_way
        time.sleep(0.001)
    _await(process, draw.uniform(0.0, 0.03))


def _kill(process: subprocess.Popen[bytes], run_dir: Path, ranks: int, offset: float) -> dict[str, Any]:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    time.sleep(0.1)  # until the other rank of the group is gone, too
    saving = [path.name for path in (run_dir / "checkpoints").glob(".step-*")]
    reached = max(logged_steps(run_dir), default=0)
    found, damaged = newest_valid(run_dir)
    resumed = int(found.name.removeprefix("step-")) if found else 0
    return {
        "ranks": ranks,
        "offset_s": round(offset, 3),
        "while_saving": bool(saving),
        "step_reached": reached,
        "resumes_at": resumed,
        "steps_lost": max(0, reached - resumed),
        "damaged": {path.name: reason for path, reason in damaged.items()},
        "ok": not damaged and max(0, reached - resumed) <= INTERVAL and list(steps(run_dir)) == sorted(steps(run_dir)),
    }


# -- preempt ------------------------------------------------------------------------------------------------


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    script = str(ROOT / "slurm" / "local-cluster.sh")
    started = subprocess.run([script, "start", str(folder)], capture_output=True, text=True, timeout=120, check=True)
    path = re.search(r"SLURM_CONF=(\S+)", started.stdout)
    assert path, started.stdout
    try:
        yield environment(SLURM_CONF=path[1], TRAINER_PYTHON=sys.executable, WANDB_MODE="offline")
    finally:
        subprocess.run([script, "stop", str(folder)], capture_output=True, timeout=60, check=False)


def show_job(job: str, environ: dict[str, str]) -> dict[str, str]:
    shown = subprocess.run(
        ["scontrol", "show", "job", "-o", job], env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)


def submit(recipe: Path, run_dir: Path, environ: dict[str, str], *flags: str) -> str:
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={run_dir.parent}/{run_dir.name}.out"]
    command += [str(ROOT / "slurm" / "train.sh"), str(recipe), "--trainer.default_root_dir", str(run_dir)]
    command += ["--trainer.callbacks+=phases.Phases", *flags]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    return done.stdout.strip()


def wait_for(job: str, environ: dict[str, str], states: set[str], timeout_s: float = 240.0) -> dict[str, str]:
    deadline = time.monotonic() + timeout_s
    held_since = 0.0
    while (shown := show_job(job, environ)).get("JobState") not in states:
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job} is {shown.get('JobState')}, not {states}, after {timeout_s} s")
        if shown.get("JobState") == "PENDING" and shown.get("Restarts", "0") != "0":
            # Slurm holds a requeued job back for two minutes. A start in the very second of the requeue it refuses:
            # "Job credential revoked".
            held_since = held_since or time.monotonic()
            if time.monotonic() - held_since > 3.0:
                now = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
                subprocess.run(now, env=environ, check=False, timeout=30)
        time.sleep(0.3)
    return shown


ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def preempt_loop(folder: Path, count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Moments drawn uniformly over the life of a job."""
    yield from _preemptions(folder, count, draw, "life")


def preempt_steps_loop(folder: Path, count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Moments from the end of the imports to the last step, for imports take most of so short a life."""
    yield from _preemptions(folder, count, draw, "steps")


def preempt_saving_loop(folder: Path, count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Within 10 ms after a save has begun; straight to both ranks, for scancel takes longer than such a save."""
    yield from _preemptions(folder, count, draw, "saving")


def preempt_validation_loop(folder: Path, count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Within 50 ms after one of the evaluations, drawn at random, has begun; straight to both ranks too."""
    yield from _preemptions(folder, count, draw, "validation")


def _preemptions(folder: Path, count: int, draw: random.Random, part: str) -> Iterator[dict[str, Any]]:
    recipe = write_recipe(folder)
    with cluster(folder / "slurm") as environ:
        reference = folder / "undisturbed"
        job = submit(recipe, reference, environ)
        wait_for(job, environ, {"RUNNING"})
        begun = time.monotonic()
        first = 0.0
        while LAST not in logged_steps(reference):
            first = first if (reference / "timeline-0").exists() else time.monotonic() - begun
            assert time.monotonic() - begun < 200, (folder / "undisturbed.out").read_text()
            time.sleep(0.1)
        lasts = time.monotonic() - begun
        assert wait_for(job, environ, ENDED)["JobState"] == "COMPLETED", (folder / "undisturbed.out").read_text()
        done = number = 0
        while done < count:
            number += 1
            longest = {"life": lasts, "steps": lasts - first, "saving": 0.01, "validation": 0.05}[part]
            offset, evaluation = draw.uniform(0.0, longest), draw.randint(1, LAST // 10)
            outcome = _preempt(recipe, folder / f"run-{number}", reference, environ, offset, part, evaluation)
            if outcome is not None:  # else the job had ended, or had not come to Python
                done += 1
                yield outcome


def _preempt(
    recipe: Path, run_dir: Path, reference: Path, environ: dict[str, str], offset: float, part: str, evaluation: int
) -> dict[str, Any] | None:
    job = submit(recipe, run_dir, environ)
    wait_for(job, environ, {"RUNNING"})
    while part != "life" and not (run_dir / "timeline-0").exists():
        time.sleep(0.02)
    if part in ("saving", "validation"):
        pids = [_rank_process(str(run_dir), rank) for rank in (0, 1)]
        begun = run_dir / "begun-validation-0"
        while part == "validation" and not (begun.exists() and int(begun.read_text() or 0) >= evaluation):
            time.sleep(0.0005)
        while part == "saving" and not any((run_dir / "checkpoints").glob(".step-*.partial")):
            time.sleep(0.0005)
        time.sleep(offset)
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
    else:
        time.sleep(offset)
        subprocess.run(["scancel", "--signal=USR1", job], env=environ, check=False, timeout=30, capture_output=True)
    shown = wait_for(job, environ, ENDED)
    output = (run_dir.parent / f"{run_dir.name}.out").read_text(errors="replace")
    restarts = int(shown.get("Restarts", 0))
    if restarts == 0 and shown["JobState"] == "COMPLETED":
        return None
    noted = run_dir / "phase-0"
    stopped = [int(step) for step in re.findall(r"stopped by SIGUSR1 at step (\d+)", output)]
    losses = logged_steps(run_dir)
    ids = {path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")}
    resumed = re.findall(r"^checkpoint: \S*step-(\d+)", output, re.M)
    outcome = {
        "job": job,
        "offset_s": round(offset, 3),
        "phase": noted.read_text() if noted.exists() else "ending" if resumed == [f"{LAST:08d}"] else "import",
        "saved_at": stopped,
        "resumed_at": [int(step) for step in resumed],
        "restarts": restarts,
        "exit_codes": re.findall(r"ended with exit code (\d+)", output),
        "steps_lost": 0 if sorted(losses) == list(range(1, LAST + 1)) else len(losses) - LAST,
        "wandb_ids": len(ids),
        "scontrol": {key: shown[key] for key in ("JobState", "Restarts", "ExitCode") if key in shown},
        "bitwise_equal": same_end(run_dir, reference),
    }
    outcome["ok"] = (
        shown["JobState"] == "COMPLETED"
        and restarts == 1
        and len(stopped) <= 1
        and outcome["exit_codes"] == ["85", "0"]
        and outcome["steps_lost"] == 0
        and len(ids) == 1
        and outcome["bitwise_equal"]
    )
    if outcome["ok"]:
        shutil.rmtree(run_dir)
    return outcome


# -- ranks --------------------------------------------------------------------------------------------------

TIMEOUT_S = 15  # watch.timeout_s


def ranks_loop(folder: Path, count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Two kills for each stop."""
    recipe = write_recipe(folder)
    with cluster(folder / "slurm") as environ:
        for number in range(count):
            run_dir, rank = folder / f"run-{number}", draw.randrange(2)
            name = "SIGSTOP" if number % 3 == 2 else "SIGKILL"
            long = ("--trainer.max_epochs", "1000", "--watch.timeout_s", str(TIMEOUT_S), "--tracking.wandb", "off")
            job = submit(recipe, run_dir, environ, *long)
            deadline = time.monotonic() + 200
            while len(logged_steps(run_dir)) < 10:
                assert time.monotonic() < deadline, f"job {job} does not train"
                time.sleep(0.2)
            time.sleep(draw.uniform(0.0, 3.0))
            os.kill(_rank_process(str(run_dir), rank), signal.Signals[name])
            begun = time.monotonic()
            shown = wait_for(job, environ, ENDED)
            seconds = time.monotonic() - begun
            output = (folder / f"{run_dir.name}.out").read_text(errors="replace")
            stacks = sorted(path.name for path in run_dir.glob("hang-rank*.txt"))
            first = re.search(r"the first to fail was (.*)", output)
            silent = re.search(rf"rank {rank} on host \S+ \(pid \d+\)[^;]*", output)
            named = silent[0] if silent else first[1] if first else ""
            yield {
                "signal": name,
                "rank": rank,
                "seconds_to_the_end": round(seconds, 1),
                "named": named,
                "stacks": stacks,
                "scontrol": {key: shown[key] for key in ("JobState", "ExitCode") if key in shown},
                "ok": seconds < 60 + TIMEOUT_S * (name == "SIGSTOP")
                and shown["JobState"] == "FAILED"
                and f"rank {rank}" in named
                and bool(stacks) == (name == "SIGSTOP"),
            }


def _rank_process(run_dir: str, rank: int) -> int:
    """The Python process of a task of a job; its loader workers and its shell have other command lines."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        is_python = "python" in Path(words[0]).name and words[1:4] == ["-m", "trainer", "fit"]
        if is_python and run_dir in words and f"SLURM_PROCID={rank}" in variables:
            return int(path.name)
    raise AssertionError(f"rank {rank} of {run_dir} has no process")


# -- report -------------------------------------------------------------------------------------------------

_ENDS = ("steps_lost", "bitwise_equal", "ok")
COLUMNS = {
    "kill": ("ranks", "offset_s", "while_saving", "step_reached", "resumes_at", *_ENDS),
    "preempt": ("phase", "offset_s", "saved_at", "resumed_at", "restarts", "exit_codes", "wandb_ids", *_ENDS),
    "ranks": ("signal", "rank", "seconds_to_the_end", "named", "stacks", "scontrol", "ok"),
}


def with_tables(document: str, results: list[Path]) -> str:
    """The document with the tables of these results between its two marks."""
    head, rest = document.split(MARKS[0])
    return f"{head}{MARKS[0]}\n\n{tables(results)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def tables(paths: list[Path]) -> str:
    """The loops as Markdown tables."""
    parts = []
    for path in paths:
        result = json.loads(path.read_text())
        name, outcomes = result["loop"], result["outcomes"]
        good = sum(outcome["ok"] for outcome in outcomes)
        parts.append(f"### {name}: {good} of {len(outcomes)}\n")
        machine = f"{result['cores']} cores, {result['device']}"
        parts.append(f"Commit {result['commit'][:12]}, seed {result['seed']}, {machine}.\n")
        columns = COLUMNS[name.partition("-")[0]]
        parts.append("| # | " + " | ".join(column.replace("_", " ") for column in columns) + " |")
        parts.append("|---" * (len(columns) + 1) + "|")
        for number, outcome in enumerate(outcomes, 1):
            parts.append(f"| {number} | " + " | ".join(_cell(outcome[column]) for column in columns) + " |")
        parts.append("")
    return "\n".join(parts)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value)


LOOPS = {
    "kill": kill_loop,
    "kill-saving": kill_saving_loop,
    "preempt": preempt_loop,
    "preempt-steps": preempt_steps_loop,
    "preempt-saving": preempt_saving_loop,
    "preempt-validation": preempt_validation_loop,
    "ranks": ranks_loop,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=(*LOOPS, "report"))
    parser.add_argument("results", nargs="*", type=Path, help="of report: JSON files")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--into", type=Path, default=DOCUMENT, help="of report: the document")
    args = parser.parse_args()
    if args.loop == "report":
        args.into.write_text(with_tables(args.into.read_text(encoding="utf-8"), args.results), encoding="utf-8")
        return 0
    loop = LOOPS[args.loop]
    outcomes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="trainer-reliability-", ignore_cleanup_errors=True) as folder:
        for outcome in loop(Path(folder), args.count, random.Random(args.seed)):
            outcomes.append(outcome)
            print(len(outcomes), json.dumps(outcome), flush=True)
            if args.json:  # after each: a loop of an hour may itself be stopped
                content = {"loop": args.loop, "seed": args.seed, **provenance(), "outcomes": outcomes}
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(content, indent=1))
        good = sum(outcome["ok"] for outcome in outcomes)
        print(f"{args.loop}: {good} of {len(outcomes)} ended as if nothing had happened")
    return 0 if outcomes and good == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
