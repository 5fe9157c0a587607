"""A set a hundred times the size of a file of pairs, streamed: killed and resumed on other ranks, and its memory.

    python benchmarks/large_set.py write --source nli-300k.train.jsonl.gz --out FOLDER --copies 100
    python benchmarks/large_set.py resume --set FOLDER --json benchmarks/results/large-set-resume.json
    python benchmarks/large_set.py memory --set FOLDER --source nli-300k.train.jsonl.gz \\
        --json benchmarks/results/large-set-memory.json
    python benchmarks/large_set.py seek --json benchmarks/results/seek.json

`write`: Parquet, the row number appended to each text, a file per million rows.
`resume`: 100 steps on two gloo ranks with a tiny encoder, SIGKILL to all processes on the way, the rest on one rank.
The rows of every step must be those of a run that was never stopped.
`memory`: RssAnon of all loading processes together, with the first 300,000 rows and with all.
`seek`: how long it takes to find a step among 10^9 rows, for both kinds of order.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer
from provenance import provenance

from trainer.data.module import PairData
from trainer.data.order import Order
from trainer.data.parts import BlockShuffle, Permutation
from trainer.data.sources import Source
from trainer.demo_encoder import write_encoder
from trainer.encoder import EncoderSpec

GROUP_ROWS = 50_000
FILE_ROWS = 1_000_000


def write(source: Path, out: Path, copies: int) -> None:
    """``copies`` times the rows of ``source``, each text with the number of its row behind it."""
    table = pj.read_json(str(source)).select(["premise", "hypothesis", "label"])
    out.mkdir(parents=True, exist_ok=True)
    writer, in_file, number = None, 0, 0
    for copy in range(copies):
        rows = pa.array(range(copy * len(table), (copy + 1) * len(table))).cast(pa.string())
        columns = [pc.binary_join_element_wise(table[name], rows, " ") for name in ("premise", "hypothesis")]
        part = pa.table([*columns, table["label"]], names=["premise", "hypothesis", "label"])
        start = 0
        while start < len(part):
            if writer is None:
                writer = pq.ParquetWriter(out / f"part-{number:04d}.parquet", part.schema, compression="zstd")
                in_file, number = 0, number + 1
            taken = min(GROUP_ROWS - in_file % GROUP_ROWS, len(part) - start)
            # A group may hold rows of two copies: two groups then, so that sizes differ.
            writer.write_table(part.slice(start, taken), row_group_size=GROUP_ROWS)
            start, in_file = start + taken, in_file + taken
            if in_file >= FILE_ROWS:
                writer.close()
                writer = None
        print(f"{(copy + 1) * len(table):,} rows", flush=True)
    if writer is not None:
        writer.close()


# -- killed and resumed ---------------------------------------------------------------------------------------


class RecordRows(Callback):
    """Writes the rows of each step of this rank, before it is taken."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        line = {"step": trainer.global_step, "rows": batch.targets.row_ids_B.tolist(), "at": time.time()}
        with open(Path(trainer.default_root_dir) / f"rows-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def rows_by_step(run_dir: Path) -> dict[int, list[int]]:
    """Step -> its rows, rank behind rank; of a step that was taken twice the last time."""
    found: dict[int, dict[int, list[int]]] = {}
    for path in sorted(run_dir.glob("rows-*.jsonl")):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                taken = json.loads(line)
                found.setdefault(taken["step"], {})[int(path.stem[5:])] = taken["rows"]
    return {step: [row for rank in sorted(ranks) for row in ranks[rank]] for step, ranks in found.items()}


def small_encoder(folder: Path, rows: Path) -> Path:
    texts = pq.ParquetFile(rows).read_row_group(0).slice(0, 5000)["premise"].to_pylist()
    return write_encoder(folder / "encoder", texts, hidden=32, layers=1, heads=2, vocab=4000)


def fit(folder: Path, data: Path, run_dir: Path, cache: Path, ranks: int, *flags: str) -> subprocess.Popen[bytes]:
    source = {"path": str(data), "columns": {"anchor": "premise", "positive": "hypothesis"}, "streaming": True}
    config = {
        "model": {"encoder": {"backbone": str(folder / "encoder"), "max_length": 48}, "loss": "InfoNCE"},
        "data": {"train": [source], "batch_size": 512, "num_workers": 1, "cache_dir": str(cache)},
        "trainer": {"max_steps": 100, "accelerator": "cpu", "devices": ranks, "log_every_n_steps": 1},
        "checkpoint": {"save_every_steps": 20},
        "tracking": {"wandb": "off"},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(path), "--trainer.default_root_dir"]
    command += [str(run_dir), "--trainer.callbacks+=large_set.RecordRows", *flags]
    command += ["--trainer.strategy", "ddp"] if ranks > 1 else []
    run_dir.mkdir(parents=True, exist_ok=True)
    here = str(Path(__file__).parent)
    path_to_code = os.pathsep.join([here, str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path_to_code, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = open(run_dir / "log.txt", "ab")  # noqa: SIM115 - the process keeps it
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def resume(data: Path, kill_at: int = 57) -> dict[str, Any]:
    """A run on two ranks; one that is killed at a step and goes on with one rank, its rows for itself."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_encoder(folder, sorted(data.glob("*.parquet"))[0])
        start = time.time()
        undisturbed = fit(folder, data, folder / "whole", folder / "cache-1", 2)
        assert undisturbed.wait() == 0, (folder / "whole" / "log.txt").read_text()[-3000:]
        whole, seconds = rows_by_step(folder / "whole"), time.time() - start
        first_batch = json.loads((folder / "whole" / "rows-0.jsonl").read_text().splitlines()[0])["at"] - start
        killed = fit(folder, data, folder / "killed", folder / "cache-2", 2)
        while max(rows_by_step(folder / "killed"), default=0) < kill_at:
            assert killed.poll() is None, (folder / "killed" / "log.txt").read_text()[-3000:]
            time.sleep(0.2)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        before = rows_by_step(folder / "killed")
        for path in (folder / "killed").glob("rows-*.jsonl"):
            path.unlink()
        resumed = fit(folder, data, folder / "killed", folder / "cache-2", 1, "--ckpt_path", "auto")
        assert resumed.wait() == 0, (folder / "killed" / "log.txt").read_text()[-3000:]
        after = rows_by_step(folder / "killed")
    whole_steps = {step: rows for step, rows in before.items() if len(rows) == len(whole[step])}
    return {
        "rows_of_set": count_rows(data),
        "steps": len(whole),
        "killed_at_step": max(before),
        "resumed_at_step": min(after),
        "steps_of_killed_run_equal": sum(whole[step] == rows for step, rows in whole_steps.items()),
        "steps_of_killed_run": len(whole_steps),
        "steps_of_resumed_run_equal": sum(whole[step] == rows for step, rows in after.items()),
        "steps_of_resumed_run": len(after),
        "distinct_rows": len({row for rows in whole.values() for row in rows}),
        "start_to_first_batch_s": round(first_batch, 1),
        "undisturbed_run_s": round(seconds, 1),
    }


def count_rows(data: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in data.glob("*.parquet"))


# -- memory -----------------------------------------------------------------------------------------------------


def rss_anon_mb(pids: list[int]) -> float:
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def load(data: Path, cache: Path, encoder: Path, steps: int) -> dict[str, Any]:
    """Reads ``steps`` steps with two workers; the memory of all three processes, the median and the most."""
    start = time.perf_counter()
    source = Source(str(data), {"anchor": "premise", "positive": "hypothesis"}, streaming=True)
    module = PairData(
        [source], EncoderSpec(str(encoder), max_length=48), None, 512, num_workers=2, cache_dir=str(cache)
    )
    module.setup("fit")
    opened = time.perf_counter()
    module.trainer = SimpleNamespace(global_step=0, limit_train_batches=1.0)  # type: ignore[assignment]
    iterator = iter(module.train_dataloader())
    next(iterator)
    first = time.perf_counter()
    pids = [os.getpid(), *(worker.pid for worker in iterator._workers)]
    seen, tokens = [], 0
    for _ in range(steps - 1):
        tokens += next(iterator).num_tokens
        seen.append(rss_anon_mb(pids))
    return {
        "rows": module.sizes[0],
        "open_s": round(opened - start, 2),
        "first_batch_s": round(first - opened, 2),
        "tokens_per_s_cold": round(tokens / (time.perf_counter() - first)),
        "rss_anon_mb_median": round(sorted(seen)[len(seen) // 2], 1),
        "rss_anon_mb_most": round(max(seen), 1),
        "steps": steps,
        "cpu_s_of_main_process": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
    }


def memory(data: Path, source: Path, steps: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(source, folder / "set", 1)
        encoder = small_encoder(folder, folder / "set" / "part-0000.parquet")
        results = []
        for rows in (folder / "set", data, folder / "set", data):
            command = [sys.executable, __file__, "load", "--set", str(rows), "--encoder", str(encoder)]
            command += ["--cache", str(folder / "cache"), "--steps", str(steps)]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
            shutil.rmtree(folder / "cache")
        return results


# -- seek -----------------------------------------------------------------------------------------------------


def seek() -> list[dict[str, Any]]:
    parts = {
        "one permutation of 10^9 rows": [Permutation(10**9)],
        "10^9 rows in 20,000 groups": [BlockShuffle((50_000,) * 20_000)],
        "10^9 rows in 1,000 groups": [BlockShuffle((1_000_000,) * 1000)],
        "both kinds mixed, 1.1 x 10^9 rows": [BlockShuffle((50_000,) * 20_000), Permutation(10**8)],
    }
    results = []
    for name, kind in parts.items():
        order = Order(kind, 64, 1)
        order.step(0, 0)
        first, later = [], []
        for epoch in range(1, 21):
            for number in range(5):
                index = epoch * 7919 * (number + 1) % order.steps_per_epoch
                start = time.process_time()
                order.step(epoch, index)
                (later if number else first).append((time.process_time() - start) * 1e3)
        median = [round(sorted(times)[len(times) // 2], 2) for times in (first, later)]
        results.append({"order": name, "first_step_of_an_epoch_ms": median[0], "any_other_ms": median[1],
                        "most_ms": round(max(first + later), 2)})  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("write", "resume", "memory", "load", "seek"))
    for name in ("--source", "--out", "--set", "--cache", "--encoder", "--json"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    if args.command == "write":
        return write(args.source, args.out, args.copies)
    if args.command == "load":
        return print(json.dumps(load(args.set, args.cache, args.encoder, args.steps)))
    measured: Any
    if args.command == "resume":
        measured = resume(args.set)
    elif args.command == "memory":
        measured = memory(args.set, args.source, args.steps)
    else:
        measured = seek()
    result = {"measured": measured, "load_average": os.getloadavg(), **provenance()}
    print(json.dumps(measured, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
