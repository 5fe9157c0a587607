"""Time and memory of InfoNCE on large batches, in tiles and whole: python benchmarks/loss_memory.py

Each size runs in a fresh process: forward and backward of the loss on B pairs of 384 dimensions, float32. Memory is the
highest resident set of that process above what it has once the embeddings are there; their gradients are included. CPU
seconds are the sum over threads: they mean the same on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from trainer.batch import Targets
from trainer.losses import InfoNCE

DIMENSION = 384
TILED = [2**power for power in range(10, 17)]
WHOLE = [2**power for power in range(10, 15)]  # 32k rows would take 16 GiB
RESULTS = Path(__file__).parent / "results"


def measure(num_rows: int, tiled: bool) -> dict[str, Any]:
    """One forward and backward in this process."""
    _step(64, tiled)  # what libraries allocate once
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(num_rows, DIMENSION, generator=generator).requires_grad_() for _ in range(2)]
    before = _resident_bytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    value = _step(num_rows, tiled, columns)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rows": num_rows,
        "tiled": tiled,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "bytes_above": peak - before,
        "loss": value,
    }


def _step(num_rows: int, tiled: bool, columns: list[torch.Tensor] | None = None) -> float:
    if columns is None:
        columns = [torch.randn(num_rows, DIMENSION).requires_grad_() for _ in range(2)]
    loss = InfoNCE()
    loss.max_whole = 0 if tiled else 2**62
    value = loss(columns, Targets((num_rows,), torch.arange(num_rows)))
    value.backward()
    return float(value.detach())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("ROWS", "TILED"), help="measure in this process and print JSON")
    parser.add_argument("--tiled", type=int, nargs="*", default=TILED, help="sizes in tiles")
    parser.add_argument("--whole", type=int, nargs="*", default=WHOLE, help="sizes with all logits at once")
    parser.add_argument("--json", type=Path, default=RESULTS / "loss-memory.json")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(int(args.one[0]), args.one[1] == "1")))
        return
    runs: list[dict[str, Any]] = []
    for num_rows, tiled in [*((size, False) for size in args.whole), *((size, True) for size in args.tiled)]:
        command = [sys.executable, __file__, "--one", str(num_rows), str(int(tiled))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
        print(runs[-1], flush=True)
        args.json.write_text(json.dumps({"provenance": provenance(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
