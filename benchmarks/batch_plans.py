"""What batches without repeated texts cost to plan: rows per CPU second and memory, beside sentence-transformers.

Both sides get the premises and hypotheses of the same rows as hashes and plan one epoch; nothing is tokenised.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_texts(data: Path, num_rows: int) -> list[dict[str, str]]:
    with gzip.open(data / "nli/nli-300k.train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(num_rows), strict=False)]
    return [{"premise": row["premise"], "hypothesis": row["hypothesis"]} for row in rows]


def measure_ours(hashes: NDArray[np.int64], batch_size: int) -> dict[str, Any]:
    from trainer.data.distinct import DistinctTexts
    from trainer.data.order import Order
    from trainer.data.parts import Permutation

    order = Order([DistinctTexts(Permutation(len(hashes)), hashes.__getitem__)], batch_size, seed=0)
    plain = Order([Permutation(len(hashes))], batch_size, seed=0)
    start = time.process_time()
    placed = sum(len(order.step(0, index).rows) for index in range(order.steps_per_epoch))
    seconds = time.process_time() - start
    start = time.process_time()
    for index in range(plain.steps_per_epoch):
        plain.step(0, index)
    seconds_plain = time.process_time() - start
    tracemalloc.start()
    start = time.process_time()
    order.step(1, order.steps_per_epoch // 2)
    seek = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    repeats = [hashes[plain.step(0, index).rows] for index in range(plain.steps_per_epoch)]
    repeated = sum(texts.size - len(np.unique(texts)) for texts in repeats)
    return {
        "side": "ours",
        "batch_size": batch_size,
        "rows_per_cpu_s": round(len(hashes) / seconds),
        "rows_per_cpu_s_without": round(len(hashes) / seconds_plain),
        "seek_cpu_s": round(seek, 4),
        "seek_peak_mb": round(peak / 1e6, 2),
        "steps": order.steps_per_epoch,
        "left_out": len(hashes) - placed,
        "repeats_per_batch_without": round(repeated / plain.steps_per_epoch, 3),
    }


def measure_theirs(rows: list[dict[str, str]], batch_size: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    sampler = NoDuplicatesBatchSampler(Dataset.from_list(rows), batch_size, False, generator=torch.Generator(), seed=0)
    start = time.process_time()
    placed = sum(map(len, sampler))
    seconds = time.process_time() - start
    return {
        "side": "sentence-transformers",
        "batch_size": batch_size,
        "rows_per_cpu_s": round(len(rows) / seconds),
        "left_out": len(rows) - placed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("TRAINER_TEST_DATA"))
    parser.add_argument("--rows", type=int, default=300_067)
    parser.add_argument("--peer_rows", type=int, default=20_000, help="theirs is slow: it gets the first rows only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or TRAINER_TEST_DATA must name the folder of data")
    from provenance import provenance

    rows = read_texts(args.data, args.rows)
    numbers: dict[str, int] = {}
    hashes = np.array([[numbers.setdefault(text, len(numbers)) for text in row.values()] for row in rows])
    results: list[dict[str, Any]] = []

    def add(result: dict[str, Any]) -> None:
        results.append(result)
        print(json.dumps(result), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"provenance": provenance(), "results": results}, indent=1) + "\n")

    for batch_size in (16, 64, 1024):
        add(measure_ours(hashes, batch_size))
    for batch_size in (16, 64):
        add(measure_theirs(rows[: args.peer_rows], batch_size))


if __name__ == "__main__":
    main()
