"""Rows per second and peak memory of our fit and of sentence-transformers' own trainer, paired.

    python benchmarks/throughput.py --shape stsb --data FOLDER --json OUT

Both sides take the same steps over the same rows in the same order, in a fresh process per turn; time stands
between the ends of steps, the first steps are dropped. Tokenizing is outside our steps (its time is printed,
it is done once for all epochs) and inside those of the other side, as both work for a user.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from provenance import provenance

WARMUP_STEPS = 5
SEED = 42
SHAPE_NAMES = ("stsb", "ja-en", "hebrew-nli")  # of shapes.py, which takes seconds to import


# -- one turn, in its own process --------------------------------------------------------------------------


class Clock:
    """Takes the time at the end of every step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []

    def tick(self) -> None:
        import torch

        if torch.cuda.is_available() and len(self.ends) + 1 in (WARMUP_STEPS, self.steps):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())

    def result(self) -> dict[str, Any]:
        import resource

        import torch
        from peer import BATCH_SIZE

        assert len(self.ends) == self.steps, (len(self.ends), self.steps)
        seconds = self.ends[-1] - self.ends[WARMUP_STEPS - 1]
        return {
            "rows_per_s": BATCH_SIZE * (self.steps - WARMUP_STEPS) / seconds,
            "seconds_per_step": seconds / (self.steps - WARMUP_STEPS),
            "cpu_seconds_per_step": (self.cpu_ends[-1] - self.cpu_ends[WARMUP_STEPS - 1]) / (self.steps - WARMUP_STEPS),
            "step_seconds": [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)][WARMUP_STEPS - 1 :],
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "peak_device_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
        }


def run_side(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One turn, or the preparation of all turns."""
    from peer import Fit, fit_ours, fit_peer, in_our_order, load_peer, our_data, peer_loss
    from shapes import SHAPES

    from trainer.encoder import EncoderSpec

    task = SHAPES[args.shape].task
    backbone = SHAPES[args.shape].backbone(args.data, args.cache)
    tokens = args.cache / "tokens"
    if side == "prepare":
        data = our_data(task, args.data, EncoderSpec(backbone, max_length=task.max_length), SEED, tokens)
        start = time.perf_counter()
        data.prepare_data()
        seconds = time.perf_counter() - start
        data.setup("fit")
        return {
            "task": asdict(task),
            "tokenize_s": seconds,
            "rows": data.sizes[0],
            "used_pieces": len(data.used_ids()),
        }
    clock = Clock(args.steps)
    fit = Fit(steps=args.steps, seed=SEED, precision=args.precision, on_step=clock.tick)
    if side == "ours":
        fit_ours(task, args.data, backbone, fit, tokens)
    else:
        rows = in_our_order(task.rows(args.data), args.steps, SEED)
        model = load_peer(task, backbone, fit)
        fit_peer(model, peer_loss(task, model), rows, fit, shuffle=False)
    return clock.result()


# -- all turns ---------------------------------------------------------------------------------------------


def start_side(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one turn in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "turn.json"
        command = [
            sys.executable,
            __file__,
            "--side",
            side,
            "--shape",
            args.shape,
            "--steps",
            str(args.steps),
        ]
        command += ["--precision", args.precision, "--data", str(args.data), "--cache", str(args.cache)]
        threads = {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        log = Path(folder) / "log"
        with log.open("w") as file:
            done = subprocess.run(
                [*command, "--json", str(out)],
                env={**os.environ, **threads, **quiet},
                stdout=file,
                stderr=file,
            )
        if done.returncode:
            raise SystemExit(f"{side} failed with status {done.returncode}:\n{log.read_text()[-4000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def summarize(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    ratios = [ours["rows_per_s"] / peer["rows_per_s"] for ours, peer in pairs]
    summary: dict[str, Any] = {
        "ratio_median": statistics.median(ratios),
        "ratio_each_pair": ratios,
    }
    for name, turns in (("ours", [pair[0] for pair in pairs]), ("peer", [pair[1] for pair in pairs])):
        summary[name] = {
            key: statistics.median(turn[key] for turn in turns)
            for key in ("rows_per_s", "seconds_per_step", "cpu_seconds_per_step", "peak_rss_mib")
        }
        if turns[0]["peak_device_mib"] is not None:
            summary[name]["peak_device_mib"] = max(turn["peak_device_mib"] for turn in turns)
    return summary


def print_turn(side: str, turn: dict[str, Any]) -> None:
    print(
        f"  {side:5} {turn['rows_per_s']:8.1f} rows/s  {1000 * turn['seconds_per_step']:8.1f} ms/step  "
        f"{1000 * turn['cpu_seconds_per_step']:8.1f} ms of CPU  "
        f"peak {turn['peak_rss_mib']:6.0f} MiB",
        flush=True,
    )


def main() -> None:
    args = parse()
    if args.side:
        args.json.write_text(json.dumps(run_side(args.side, args)))
        return
    print(f"{args.shape}, {args.precision}, {args.steps} steps of 16 rows, {args.threads} threads", flush=True)
    load = os.getloadavg()
    prepared = start_side("prepare", args)
    print(
        f"  {prepared['rows']} rows with {prepared['used_pieces']} pieces, tokenized in {prepared['tokenize_s']:.1f} s"
    )
    pairs = []
    for _ in range(args.turns):
        turns = {}
        for side in ("ours", "peer"):
            turns[side] = start_side(side, args)
            print_turn(side, turns[side])
        pairs.append((turns["ours"], turns["peer"]))
    summary = summarize(pairs)
    each = ", ".join(f"{ratio:.2f}" for ratio in summary["ratio_each_pair"])
    print(
        f"  median {summary['ours']['rows_per_s']:.1f} against {summary['peer']['rows_per_s']:.1f} rows/s: "
        f"{summary['ratio_median']:.2f}x (pairs: {each})"
    )
    if args.json:
        report = {
            "shape": args.shape,
            "precision": args.precision,
            "steps": args.steps,
            "warmup_steps": WARMUP_STEPS,
            "threads": args.threads,
            "prepared": prepared,
            "summary": summary,
            "turns": [{"ours": ours, "peer": peer} for ours, peer in pairs],
            "load_average_before": load,
            "load_average_after": os.getloadavg(),
            **provenance(),
        }
        args.json.write_text(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPE_NAMES, required=True)
    parser.add_argument("--steps", type=int, default=45, help=f"of a turn; the first {WARMUP_STEPS} are not timed")
    parser.add_argument("--turns", type=int, default=3, help="of each side")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--data", type=Path, default=os.environ.get("TRAINER_TEST_DATA"), help="$TRAINER_TEST_DATA")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "trainer-benchmarks")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--side", choices=("prepare", "ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is None:
        parser.error("give the folder of data by --data or TRAINER_TEST_DATA")
    if args.steps <= WARMUP_STEPS + 1:
        parser.error(f"--steps must be over {WARMUP_STEPS + 1}: the first {WARMUP_STEPS} are not timed")
    return args


if __name__ == "__main__":
    main()
