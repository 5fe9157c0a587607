"""One rank and two: rows per second, and bytes that a rank hands to collectives in a step, ours and
sentence-transformers' under DDP.

    python benchmarks/scaling.py --shape ja-en --json benchmarks/results/scaling/NAME.json

gloo on a CPU, where a rank has half of the cores; NCCL on two GPUs. The global batch stays the same. Runs of one side
take turns as in throughput.py; the sides come one after the other, so what compares between them is speed-up and bytes,
not rows per second. Both losses see the global batch (theirs with gather_across_devices).
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from throughput import SHAPE_NAMES, add_options, described, parse, write
from turns import Job, Side, prepare, prepare_environment, results, take_turn

if TYPE_CHECKING:
    from shapes import Shape

SIDES = ("ours", "default")
NUM_RANKS = (1, 2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(side: str, shape: Shape, turns: tuple[int, ...], args: argparse.Namespace) -> dict[str, Any]:
    """One side on one rank and on two."""
    live: dict[int, list[Side]] = {}
    with tempfile.TemporaryDirectory() as folder:
        common = (side, shape, args.precision, turns, args.data, args.cache, args.threads)
        prepare(Job(*common), Path(folder) / "prepare.log")
        try:
            for ranks in NUM_RANKS:
                port = free_port()
                live[ranks] = [
                    Side(Job(*common, rank, ranks, port), Path(folder) / f"{ranks}-{rank}.log") for rank in range(ranks)
                ]
            for each in live.values():
                for rank in each:
                    rank.wait()  # warm-up
            seconds: dict[int, list[float]] = {ranks: [] for ranks in NUM_RANKS}
            for number in range(len(turns) - 1):
                for ranks in NUM_RANKS if number % 2 == 0 else reversed(NUM_RANKS):
                    seconds[ranks].append(take_turn(live[ranks]))
            measured = {ranks: results(live[ranks]) for ranks in NUM_RANKS}
        finally:
            for each in live.values():
                for rank in each:
                    rank.stop()
    speedups = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    return {
        "side": side,
        "rows_per_s": {n: statistics.median(shape.batch_size * turns[1] / s for s in seconds[n]) for n in NUM_RANKS},
        "speedup": statistics.median(speedups),
        "speedup_each_round": speedups,
        "bytes_per_step": measured[2][0]["bytes_per_step"],
        "losses": {n: measured[n][0]["losses"] for n in NUM_RANKS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPE_NAMES, default="ja-en")
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=5)
    add_options(parser)
    parser.set_defaults(threads=max(1, (os.cpu_count() or 2) // 2))
    args = parse(parser)
    prepare_environment(args.threads)
    from shapes import SHAPES

    shape, sides = SHAPES[args.shape], []
    for side in SIDES:
        sides.append(measure(side, shape, (args.warmup, *[args.steps] * args.turns), args))
        rates, moved = sides[-1]["rows_per_s"], sides[-1]["bytes_per_step"]
        gradient, other = moved["gradient"] / 1e6, (moved["all"] - moved["gradient"]) / 1e6
        print(
            f"{side:8} {rates[1]:.1f} rows/s on 1 rank, {rates[2]:.1f} on 2 ({sides[-1]['speedup']:.2f}x); "
            f"a step moves {gradient:.1f} MB of gradients, {other:.2f} MB else",
            flush=True,
        )
    ours, theirs = (one["bytes_per_step"]["gradient"] for one in sides)
    print(f"gradient bytes: {ours / theirs:.2f}x theirs")
    report = {"shape": args.shape, "precision": args.precision, "batch_size": shape.batch_size, "threads": args.threads}
    write(args.json, {**report, "scaling": sides, "gradient_bytes_ratio": ours / theirs, **described()})


if __name__ == "__main__":
    main()
