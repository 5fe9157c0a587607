"""Writes docs/recipes.md from results/recipes.json, which recipes.py has measured.

python benchmarks/recipes_report.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from trainer.compare.fold import Spread
from trainer.compare.show import metric

HERE = Path(__file__).parent
HEAD = """# Recipes

Written by `python benchmarks/recipes_report.py` from `benchmarks/results/recipes.json`; a test holds the two together.

Five published models can be trained again by a config in `configs/published`, and better by the one of the same name in
`configs`:

{recipes}
Look at your own data, train, and compare; each takes your `path`:

```bash
trainer check --config configs/ja-en-financial.yaml --data.train.path my.jsonl.gz --data.validation.path my.jsonl.gz
trainer fit --config configs/ja-en-financial.yaml --data.train.path my.jsonl.gz --data.validation.path my.jsonl.gz
trainer compare runs/ja-en-financial
```

## How they were measured

Public sets of the same kind stand in for the published data, and all start from all-MiniLM-L6-v2, an English encoder.
Its vocabulary does not know all pieces of these languages: the share that it reads as unknown stands beside each
result, and absolute values are low. One thread of a CPU, bf16.

- *published* is `configs/published/X.yaml` through `trainer fit`; *published, ST* the same loss, rows, epochs and
  settings through sentence-transformers 6.2's own trainer;
- *ours* is `configs/X.yaml`; *best of ST* its best fitting loss and batch sampler, with our epochs, batch, learning
  rate and warm-up, and the dropout of the backbone. It trains on all rows, ours leaves out those it watches itself on.
- Every model is a folder that sentence-transformers loads, and its own evaluators score it (MAP@R, which it lacks, is
  `LabelRetrieval` over its embeddings). Mean and standard deviation over the seeds.
- Settings were chosen on other rows (`--on tune`); these runs alone were scored on the dev set.
- Rows/s of *published* and *ours* are rows by `train/wall_s`, which has the evaluations and checkpoints of the run in
  it; those of ST are of its steps alone, for it ran without either. Runs shared the machine, some with a test suite:
  rough figures, RESULTS.md of `benchmarks` has the speed.

"Beats" means by more than two standard deviations, the larger of both sides.
"""
_RECIPES = [
    ("", "published", "what is wrong with it", "ours"),
    (
        "`ja-en-financial`",
        "CosineSimilarity, all labels 1.0",
        "nothing pushes texts apart: a constant embedding is the best answer",
        "InfoNCE both ways, no text twice in a batch, no dropout in so short a run, translations held out",
    ),
    (
        "`sinhala-qa`",
        "InfoNCE",
        "an answer that stands twice in a batch is right and punished; nothing is held out",
        "scale 10 for 20, InfoNCE both ways, no text twice in a batch, 5 epochs for 1, questions held out",
    ),
    (
        "`korean-nutrition`",
        "BatchHardTriplet, margin 5",
        "vectors of length 1 are at most 2 apart: the margin is never met; classes meet by chance",
        "a margin in reach, as many texts of each class in a batch, 14 epochs for 3, texts held out",
    ),
    (
        "`hebrew-nli`",
        "CosineSimilarity on labels 0/1/2",
        "classes are no cosines, and 2 is out of reach",
        "InfoNCE on triplets: a premise, what it entails, what contradicts it",
    ),
    (
        "`korean-terms`",
        "CosineSimilarity, 7 pairs, 50 epochs",
        "learnt by heart, and nothing scores below 0.5",
        "InfoNCE both ways, few epochs at a low rate, other terms to watch",
    ),
]
_NAMES = {
    "base": "untouched base",
    "published": "published",
    "published-st": "published, ST",
    "ours": "**ours**",
    "best-st": "best of ST",
}
_STAND_INS = {
    "ja-en-financial": "Japanese and English sentences of the Tanaka corpus",
    "sinhala-qa": "Questions and answers of a Korean chatbot",
    "korean-nutrition": "Korean questions and commands of 3i4K",
    "korean-nutrition, 3,200 texts": "3i4K, its 7 kinds of utterance, 1 epoch",
    "korean-nutrition, Hebrew": "Hebrew comments in 3 classes of sentiment, 100 steps",
    "hebrew-nli": "Indonesian, Persian, Korean and ten American languages; scored on KorSTS",
    "korean-terms": "Korean synonyms of Kengdic",
    "korean-terms, 120 pairs": "The same, 120 pairs, 10 epochs",
}
_NOTES = {
    "korean-nutrition": "Of 81 texts ours leaves out a tenth, to watch itself; the best of ST trains on all.",
    "korean-nutrition, Hebrew": "100 steps on both sides. Rows/s of ST tell of its padding: the longest of 16 comments "
    "is many times the usual one.",
    "korean-terms": "Seven pairs teach no others: what ours does better is to spoil nothing.",
}
_THE = {"published": "the published recipe", "base": "the untouched base", "best-st": "the best of ST"}


def document(content: dict[str, Any]) -> str:
    """The whole of docs/recipes.md."""
    runs = [outcome for outcome in content["outcomes"] if outcome["on"] == "dev"]
    first, *others = _RECIPES
    table = [first, ("---",) * len(first), *others]
    parts = [HEAD.format(recipes="".join(f"| {' | '.join(row)} |\n" for row in table))]
    for system in _STAND_INS:
        of_system = {
            name: sorted(
                (run for run in runs if run["system"] == system and run["variant"] == name), key=lambda run: run["seed"]
            )
            for name in _NAMES
        }
        if all(of_system[name] for name in ("base", "published", "ours")):
            parts.append(_section(system, {name: found for name, found in of_system.items() if found}))
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    parts.append(
        "## The runs\n\n```bash\n.venv/bin/python benchmarks/recipes.py --data FOLDER --json "
        "benchmarks/results/recipes.json\n```\n\n"
        f"{content['cpu']}, {content['cores']} cores; {versions}; at {content['commit'][:7]}.\n"
    )
    return "\n".join(parts)


def _section(system: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    one = runs["ours"][0]
    lines = [
        f"## {system}\n",
        fill(
            f"{_STAND_INS[system]}: {one['train_rows']:,} rows to train on, "
            f"{one['dev_rows']:,} to score; {one['unknown']:.1%} of their pieces are unknown to the base.",
            120,
        ),
        "",
        f"| | {one['metric']} | seeds | rows/s |",
        "|---|---|---|---|",
    ]
    for name, of_name in runs.items():
        scores = [run["score"] for run in of_name]
        seeds = ", ".join(f"{score:.4f}" for score in scores) if len(scores) > 1 else ""
        rates = [run["rows_per_s"] for run in of_name if run["rows_per_s"]]
        rate = f"{statistics.median(rates):.0f}" if rates else ""
        lines.append(f"| {_NAMES[name]} | {metric(Spread.of(scores))} | {seeds} | {rate} |")
    scores_of = {name: [run["score"] for run in of_name] for name, of_name in runs.items()}
    sentences = [
        f"Ours {_verdict(scores_of['ours'], scores_of[name])} {_THE[name]}" for name in _THE if name in scores_of
    ]
    if "published-st" in scores_of:
        verdict = _verdict(scores_of["published"], scores_of["published-st"])
        sentences.append(f"The published recipe through ours {verdict} the same through ST")
    told = [". ".join(sentences) + ".", *([_NOTES[system]] if system in _NOTES else [])]
    return "\n".join([*lines, "", *(fill(text, 120) for text in told), ""])


def _verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    spread = max(statistics.stdev(scores) if len(scores) > 1 else 0.0 for scores in (ours, theirs))
    difference = statistics.mean(ours) - statistics.mean(theirs)
    if abs(difference) <= 2 * spread:
        return f"is level ({difference:+.4f}, two deviations are {2 * spread:.4f}) with"
    return f"{'beats' if difference > 0 else 'is beaten'} ({difference:+.4f}){'' if difference > 0 else ' by'}"


def main() -> None:
    content = json.loads((HERE / "results" / "recipes.json").read_text(encoding="utf-8"))
    (HERE.parent / "docs" / "recipes.md").write_text(document(content), encoding="utf-8")


if __name__ == "__main__":
    main()
