"""Does every way to train run on the GPUs of this machine, and does it give the same? Data and encoder are generated.

    python benchmarks/gpu_smoke.py --json benchmarks/results/gpu-smoke.json
    python benchmarks/gpu_smoke.py --cpu        # two processes over gloo, a small encoder: to see the script itself

Per case: a fit of 60 steps with dropout off through the command line and a hardware file, in a process of its own. A
case passes if its losses follow those of the first one (one device, fp32) within its tolerance, if dev Spearman rises,
and if sentence-transformers loads what was exported. The last case goes on from a checkpoint of another one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from provenance import provenance

from trainer.demo_data import read_pairs, write_pairs
from trainer.demo_encoder import write_encoder

ROOT = Path(__file__).parents[1]
STEPS, BATCH, RESUME_AT = 60, 32, 40
# On GPUs, and with --cpu: width and layers of the encoder, and a learning rate that it learns with in so few steps.
SIZES = {False: (384, 6, 5e-5), True: (64, 2, 1e-3)}


@dataclass(frozen=True)
class Case:
    """A hardware file, what is changed of it, and how far a loss may lie from fp32's on one device."""

    name: str
    hardware: str
    flags: tuple[str, ...]
    tolerance: float
    resumed_from: str = ""


FP32, BF16 = ("--trainer.precision", "32-true"), ("--trainer.precision", "bf16-mixed")
CASES = (
    Case("1 device, fp32", "1gpu", FP32, 0.0),
    Case("1 device, bf16", "1gpu", BF16, 0.02),
    Case("DDP, fp32", "ddp", FP32, 1e-4),
    Case("DDP, bf16", "ddp", BF16, 0.02),
    Case("ZeRO-1, bf16", "zero1", BF16, 0.02),
    Case("ZeRO-2, bf16", "zero2", BF16, 0.02),
    Case("ZeRO-2 with offload, bf16", "zero2-offload", BF16, 0.02),
    Case("ZeRO-3, bf16", "zero3", BF16, 0.02),
    Case("DDP, fp32, from a checkpoint", "ddp", FP32, 1e-4, "DDP, fp32"),
)


def write_recipe(folder: Path, hidden: int, layers: int, learning_rate: float) -> Path:
    train, dev = write_pairs(folder, num_train=STEPS * BATCH, num_dev=400, seed=1)
    texts = [text for pair in read_pairs(train) for text in (pair.sentence1, pair.sentence2)]
    write_encoder(folder / "encoder", texts, hidden=hidden, layers=layers, heads=hidden // 32, vocab=2000)
    columns = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
    source = {"path": str(train), "columns": columns, "score_range": [0, 5]}
    content = {
        "model": {
            "encoder": {"backbone": str(folder / "encoder"), "dropout": 0.0},
            "loss": "CosineSimilarity",
            "learning_rate": learning_rate,
            "max_tokens": 256,  # chunks
        },
        "data": {
            "train": [source],
            "validation": [{**source, "name": "dev", "path": str(dev)}],
            "batch_size": BATCH,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {"max_epochs": 1, "log_every_n_steps": 1},
        "checkpoint": {"save_every_steps": 20},
        "tracking": {"wandb": "off"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fit(recipe: Path, run_dir: Path, case: Case, cpu: bool, *more: str) -> str:
    """What went wrong, or nothing."""
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(recipe)]
    command += ["--config", str(ROOT / "configs" / "hardware" / f"{case.hardware}.yaml"), *case.flags]
    if cpu:
        devices = "1" if case.hardware == "1gpu" else "2"
        command += ["--trainer.accelerator", "cpu", "--trainer.devices", devices, "--data.num_workers", "0"]
    command += ["--trainer.default_root_dir", str(run_dir), *more]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return "no end after 300 s"
    return done.stderr[-1500:] if done.returncode else ""


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run(recipe: Path, case: Case, cpu: bool, reference: list[float]) -> dict[str, Any]:
    """A case and its losses; ``reference`` holds those of the first one."""
    from sentence_transformers import SentenceTransformer

    run_dir, started = recipe.parent / case.name, time.monotonic()
    more: tuple[str, ...] = ()
    if case.resumed_from:
        more = ("--ckpt_path", str(recipe.parent / case.resumed_from / "checkpoints" / f"step-{RESUME_AT:08d}"))
        reference = reference[RESUME_AT:]
    problem = fit(recipe, run_dir, case, cpu, *more)
    result: dict[str, Any] = {"case": case.name, "seconds": round(time.monotonic() - started, 1)}
    if problem:
        return result | {"ok": False, "problem": problem}
    rows = rows_of(run_dir)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    spearman = [row["eval/dev/spearman_cosine"] for row in rows if "eval/dev/spearman_cosine" in row]
    furthest = max(abs(a - b) for a, b in zip(losses, reference or losses, strict=True))
    loads = SentenceTransformer(str(run_dir / "model"), device="cpu").encode(["a text"]).shape == (1, SIZES[cpu][0])
    rates = sorted(row["train/rows_per_s"] for row in rows if "train/rows_per_s" in row)
    return result | {
        "ok": furthest <= case.tolerance and spearman[-1] > (0.0 if more else spearman[0]) and loads,
        "losses": losses,
        "furthest_loss": furthest,
        "spearman": [spearman[0], spearman[-1]],
        "rows_per_s": rates[len(rates) // 2],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="two processes on the CPU instead of the GPUs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no GPU is seen here; --cpu runs the same cases on two processes")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="trainer-gpu-smoke-") as folder:
        recipe = write_recipe(Path(folder), *SIZES[args.cpu])
        for case in CASES:
            results.append(run(recipe, case, args.cpu, results[0].get("losses", []) if results else []))
            shown = {key: value for key, value in results[-1].items() if key != "losses"}
            print(json.dumps(shown), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"gpus": gpus, "provenance": provenance(), "cases": results}, indent=1) + "\n")
    failed = [result["case"] for result in results if not result["ok"]]
    print(
        f"{len(results) - len(failed)} of {len(results)} cases pass" + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
