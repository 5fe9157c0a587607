"""Run directories as `trainer fit` writes them, made in milliseconds; test_real_run.py holds them to a real fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trainer.tracking.direction import direction

EVERY, STEPS, EVAL_EVERY = 5, 300, 25
LOSSES: dict[str, dict[str, Any]] = {
    "cosine": {"class_path": "trainer.losses.CosineSimilarity"},
    "cosent": {"class_path": "trainer.losses.CoSENT", "init_args": {"scale": 20.0}},
    "infonce": {"class_path": "trainer.losses.InfoNCE", "init_args": {"scale": 20.0}},
}
TOP = {"cosine": 0.81, "cosent": 0.84, "infonce": 0.77}
EVAL = [f"{kind}_{name}" for name in ("cosine", "dot", "euclidean", "manhattan") for kind in ("pearson", "spearman")]
EVAL += ["pearson_max", "spearman_max"]


def make_run(folder: Path, recipe: str = "cosine", seed: int = 1, steps: int = STEPS) -> Path:
    """One run; its numbers follow from recipe and seed."""
    rate, batch = (2e-3, 64) if recipe == "infonce" else (1e-3, 32)
    top, rng = TOP[recipe], np.random.default_rng([seed, *recipe.encode()])
    folder.mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "model": {"encoder": {"backbone": "all-MiniLM-L6-v2", "dropout": None}, "loss": LOSSES[recipe],
                  "learning_rate": rate},
        "data": {"train": [{"path": "pairs.jsonl.gz", "columns": {"anchor": "sentence1", "positive": "sentence2"}}],
                 "batch_size": batch, "cache_dir": f"/cache/{seed}", "stream_cache_gib": 8 + seed},
        "trainer": {"default_root_dir": str(folder), "max_epochs": 3, "devices": 1},
        "tracking": {"wandb": "off", "name": f"{recipe} {seed}"},
        "ckpt_path": None,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    about = {"device": "x86_64 CPU", "ranks": 1, "nodes": 1, "primary_metrics": ["eval/dev/spearman_cosine"],
             "directory": "/made"}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about, indent=1) + "\n")
    rows: list[dict[str, Any]] = []
    for step in range(0, steps + 1, EVERY):
        position = {
            "train/rows_seen": batch * step,
            "train/tokens_seen": batch * step * 21,
            "train/wall_s": step * 0.11 * batch / 32 * rng.uniform(0.98, 1.02) + 1e-3,
            "train/gpu_hours": step * 0.11 / 3600,
        }
        if step:
            loss = top * math.exp(-step / 70) + 0.05 + rng.normal(0, 0.015)
            trained = {
                "train/loss": loss,
                "train/lr": rate * (1 - step / (steps + 1)),
                "train/grad_norm": 1 + rng.exponential(0.3),
            }
            speed = rng.normal(300, 12)
            trained |= {**position, "train/rows_per_s": speed, "train/tokens_per_s": speed * 21}
            trained |= {"train/padding_efficiency": 0.8, "train/host_peak_gib": 0.9}
            rows.append({"step": step, **trained})
        if step % EVAL_EVERY == 0:
            score = top * (1 - 0.5 * math.exp(-step / 60)) + rng.normal(0, 0.006)
            found = {f"eval/dev/{name}": score - 0.004 * number for number, name in enumerate(EVAL)}
            rows.append({"step": step, **found, **_health(score), **position})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _health(score: float) -> dict[str, Any]:
    bins = np.linspace(-0.95, 0.95, 20)
    of = {"positive": score, "negative": 0.15}
    found: dict[str, Any] = {"alignment": 1 - score, "uniformity": -2 - score, "effective_rank": 20 * score}
    for kind, middle in of.items():
        found |= {f"{kind}_p05": middle - 0.2, f"{kind}_p50": middle, f"{kind}_p95": middle + 0.15}
        found[f"{kind}_histogram"] = [int(400 * math.exp(-(((x - middle) / 0.18) ** 2))) for x in bins]
    return {f"health/dev/{name}": value for name, value in found.items()}


def make_runs(folder: Path, recipes: int = 3, seeds: int = 3) -> list[Path]:
    """Recipes times seeds, as runs/<recipe>/seed=<seed>."""
    names = list(LOSSES)[:recipes]
    return [make_run(folder / name / f"seed={seed}", name, seed) for name in names for seed in range(1, seeds + 1)]


def best_of(folder: Path, metric: str) -> float:
    """The best value that stands in the file, read without the code under test."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    values = [row[metric] for row in map(json.loads, lines) if metric in row]
    return max(values) if direction(metric) == "max" else min(values)
