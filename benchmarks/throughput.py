"""Rows per second, share of what the machine's matrix products allow, and peak memory: our fit beside
sentence-transformers' own trainer.

    python benchmarks/throughput.py --shape stsb --data FOLDER --json OUT

All sides are live processes that take turns of a few steps over the same rows in the same order; the time of a turn is
taken by this process, which only hands the turns out. Tokenizing is outside our steps (its time is printed, it is done
once for all epochs) and inside those of the other side, as both work for a user.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenance import provenance
from turns import SIDES, Job, Side, matrix_rate, prepare, prepare_environment, results, take_turn

if TYPE_CHECKING:
    from shapes import Shape

# Of shapes.py, which is slow to import.
SHAPE_NAMES = ("stsb", "stsb-mpnet", "intents-ko", "ja-en", "chatbot-ko", "hebrew-nli", "nli-chunks")


def compare(
    name: str, shape: Shape, sides: Sequence[str], turns: tuple[int, ...], args: argparse.Namespace
) -> dict[str, Any]:
    """All turns of all sides on one shape, and what they give.

    Args:
        sides: ours first.
        turns: steps of each turn, the warm-up first.
        args: precision, threads, data, cache.
    """
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)  # of the matrix products
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(side, shape, args.precision, turns, args.data, args.cache, args.threads) for side in sides]
        prepared = prepare(jobs[0], Path(folder) / "prepare.log")
        live: list[Side] = []
        try:
            for job in jobs:
                live.append(Side(job, Path(folder) / f"{job.side}.log"))
            seconds, rates = take_turns(live, len(turns) - 1, args.precision)
            measured = {side.job.side: results([side])[0] for side in live}
        finally:
            for side in live:
                side.stop()
    report = {
        "shape": name,
        "task": asdict(shape.task),
        "precision": args.precision,
        "batch_size": shape.batch_size,
        "turns": list(turns),
        "threads": args.threads,
        "prepared": prepared,
        "matrix_flops_per_s": {"median": statistics.median(rates), "each": rates},
        "load_average_before": load,
        "load_average_after": os.getloadavg(),
    }
    first = measured[sides[0]]
    report["sides"] = {
        side: result | {"seconds": seconds[side]} | summarize(seconds[side], first, turns, shape, rates)
        for side, result in measured.items()
    }
    mine = report["sides"]["ours"]
    mine["share_with_replays"] = mine["share_of_matrix_rate"] * (1 + first["replayed_share"])
    report["ratios"] = {side: ratio(mine, report["sides"][side]) for side in sides[1:]}
    return report


def take_turns(live: Sequence[Side], rounds: int, precision: str) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every timed turn by side, and the matrix rates measured between the rounds."""
    for side in live:
        side.wait()  # its warm-up; they warm up side by side
    seconds: dict[str, list[float]] = {side.job.side: [] for side in live}
    rates = [matrix_rate(precision)]
    for number in range(rounds):
        # There and back: what drifts one way favours nobody.
        for side in live if number % 2 == 0 else reversed(live):
            seconds[side.job.side].append(take_turn([side]))
        rates.append(matrix_rate(precision))
    return seconds, rates


def summarize(
    seconds: list[float], ours: dict[str, Any], turns: Sequence[int], shape: Shape, rates: list[float]
) -> dict[str, Any]:
    """Medians over the turns. Tokens and arithmetic are those of our batches: all sides take the same rows."""
    timed = list(zip(turns[1:], seconds, ours["tokens"][1:], ours["flops"][1:], strict=True))
    return {
        "rows_per_s": statistics.median(shape.batch_size * steps / s for steps, s, _, _ in timed),
        "tokens_per_s": statistics.median(tokens / s for _, s, tokens, _ in timed),
        "flops_per_s": statistics.median(flops / s for _, s, _, flops in timed),
        "share_of_matrix_rate": statistics.median(flops / s for _, s, _, flops in timed) / statistics.median(rates),
    }


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    each = [t / o for t, o in zip(theirs["seconds"], ours["seconds"], strict=True)]
    return {
        "speed": statistics.median(each),
        "speed_each_round": each,
        "cpu": statistics.median(
            t / o for t, o in zip(theirs["cpu_seconds"][1:], ours["cpu_seconds"][1:], strict=True)
        ),
        "memory": peak_mib(ours) / peak_mib(theirs),
        "mean_loss_ours": statistics.mean(ours["losses"]),
        "mean_loss_theirs": statistics.mean(theirs["losses"]),
    }


def peak_mib(side: dict[str, Any]) -> float:
    """Of the timed steps: of the device, or of the host without libraries and mapped files."""
    peak: float = side["peak_device_mib"] or side["peak_host_mib"]
    return peak


def show(report: dict[str, Any]) -> None:
    turns, rate = report["turns"], report["matrix_flops_per_s"]["median"]
    print(
        f"{report['shape']}, {report['precision']}, {len(turns) - 1} turns of {turns[1]} steps of "
        f"{report['batch_size']} rows, {report['threads'] or 'all'} threads; matrix products {rate / 1e9:,.0f} GFLOP/s"
    )
    for name, side in report["sides"].items():
        each = report["ratios"].get(name)
        print(
            f"  {name:9} {side['rows_per_s']:9.1f} rows/s  {side['tokens_per_s']:11,.0f} tokens/s  "
            f"share {side['share_of_matrix_rate']:.2f}  peak {peak_mib(side):6.0f} MiB"
            + (f"  ours {each['speed']:.2f}x (CPU {each['cpu']:.2f}x), memory {each['memory']:.2f}x" if each else "")
        )
    print(flush=True)


def described() -> dict[str, Any]:
    """Where a figure comes from: command, machine, versions, commit."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for option in ("--data", "--json", "--cache"):  # of this machine, and nobody else's
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return {"command": f"python benchmarks/{shlex.join(words)}", **provenance()}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--data", type=Path, default=os.environ.get("TRAINER_TEST_DATA"), help="$TRAINER_TEST_DATA")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "trainer-benchmarks")
    parser.add_argument("--json", type=Path, help="write everything here")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.data is None:
        parser.error("give the folder of data by --data or TRAINER_TEST_DATA")
    args.data = Path(args.data).resolve()
    return args


def write(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPE_NAMES, required=True)
    parser.add_argument("--peer", nargs="+", choices=SIDES[1:], default=["default"], help="its settings, see peer.py")
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument("--warmup", type=int, default=5, help="steps of each side before the first turn; 0: none")
    add_options(parser)
    args = parse(parser)
    if min(args.steps, args.turns) < 1 or args.warmup < 0:
        parser.error("--steps and --turns must be 1 or more, --warmup 0 or more")
    prepare_environment(args.threads)
    from shapes import SHAPES

    turns = (args.warmup, *[args.steps] * args.turns)
    report = compare(args.shape, SHAPES[args.shape], ["ours", *args.peer], turns, args)
    show(report)
    write(args.json, {**report, **described()})


if __name__ == "__main__":
    main()
