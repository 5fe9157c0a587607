"""What the files of a run say about it, as the tables of a model card: settings, logs and metrics."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.evalsource import EvalSource
from trainer.data.module import PairData
from trainer.encoder import Encoder, EncoderSpec
from trainer.evaluation.base import Evaluator
from trainer.module import EmbeddingModule

# Headings of sentence-transformers' evaluators, so that model indexes sort ours beside them.
_DESCRIPTIONS = {
    "STS": "Semantic Similarity",
    "BinaryClassification": "Binary Classification",
    "InformationRetrieval": "Information Retrieval",
    "LabelAccuracy": "Label Accuracy",
    "LabelRetrieval": "Label Retrieval",
    "MSE": "Knowledge Distillation",
}
_MAX_LOSS_LINES = 100
_ROWS = re.compile(r"data\.train\.(\d+)\.rows")


@dataclass(frozen=True)
class Run:
    """What the card tells about.

    Attributes:
        module: with its encoder loaded.
        data: sources, not yet read.
        config: the effective config as saved.
        log: rows of metrics.jsonl.
        checkpoint: name of the exported file.
        step: optimizer steps it had taken.
        name: of the run: its directory, without what lies above runs/.
        reason: why it was taken, in Markdown.
        findings: about its data, as `read_findings` gives them.
        fingerprints: of the rows of each training source; none where the checkpoint does not tell.
        about: what it ran on, run.json.
    """

    module: EmbeddingModule
    data: PairData
    config: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    checkpoint: str
    step: int
    name: str
    reason: str
    findings: Sequence[Mapping[str, Any]] = ()
    fingerprints: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def read_findings(path: Path) -> list[dict[str, Any]]:
    """What a check.json says of the data; those that check.allow let pass are marked. None without such a file."""
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["findings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} can't be read: {error!r}; remove it, and the card says nothing of it") from error


def fingerprints(identity: Mapping[str, Any]) -> list[str]:
    """Of the rows of each training source, from what a checkpoint's manifest says of its run."""
    found = {int(match[1]): str(value) for key, value in identity.items() if (match := _ROWS.fullmatch(key))}
    return [found[number] for number in sorted(found)]


def hyperparameters(run: Run) -> dict[str, Any]:
    """What decides the result; not where and how it ran, for it is the same on any number of ranks."""
    module, data = run.module, run.data
    encoders = list(module.encoder.parts.values())
    trainer = run.config.get("trainer") or {}
    return {
        "batch_size": data.batch_size,
        "learning_rate": module.learning_rate,
        "schedule": module.schedule,
        "warmup_ratio": module.warmup_ratio,
        "optimizer": module.optimizer_name,
        "weight_decay": module.weight_decay,
        "decay_all": module.decay_all,
        "gradient_clip_val": trainer.get("gradient_clip_val"),
        "precision": trainer.get("precision") or "32-true",
        "seed": run.config.get("seed_everything"),
        "max_epochs": trainer.get("max_epochs"),
        "max_steps": trainer.get("max_steps", -1),
        "max_rows": data.max_rows,
        "max_tokens": module.max_tokens,
        **_encoder_settings(module.encoder_specs[0], encoders[0]),
        **{
            f"document_{name}": value
            for spec, encoder in zip(module.encoder_specs[1:], encoders[1:], strict=True)
            for name, value in _encoder_settings(spec, encoder).items()
        },
    }


def _encoder_settings(spec: EncoderSpec, encoder: Encoder) -> dict[str, Any]:
    return {
        "max_length": encoder.text.max_length,
        "pooling": spec.pooling,
        "normalize": spec.normalize,
        "prompt": None if spec.prompt is None else repr(spec.prompt),
        "dropout": spec.dropout,
        "freeze": spec.freeze,
        "lora": None if spec.lora is None else vars(spec.lora),
        "compact_vocabulary": spec.compact_vocabulary,
    }


def non_default(values: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that differ from their defaults, and those that a reader always looks for."""
    signatures = [inspect.signature(owner).parameters for owner in (EncoderSpec, EmbeddingModule, PairData)]
    defaults = {name: one.default for parameters in signatures for name, one in parameters.items()}
    defaults |= {"gradient_clip_val": 1.0, "max_steps": -1}  # the command line's
    always = {"batch_size", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "max_tokens", "seed"}
    defaults |= {f"document_{name}": value for name, value in defaults.items()}
    return {name: x for name, x in values.items() if name in always or x != defaults.get(name, ...)}


def training_logs(
    log: Iterable[Mapping[str, Any]], sets: Sequence[EvalSource], steps_per_epoch: int | None
) -> list[dict[str, Any]]:
    """Lines of the card's table: every evaluation, and about a hundred training losses over the run."""
    rows = list(log)
    losses = {row["step"]: row["train/loss"] for row in rows if row.get("train/loss") is not None}
    primary = {f"eval/{s.name}/{s.evaluator.primary}": f"{s.name}_{s.evaluator.primary}" for s in sets}
    lines: dict[int, dict[str, Any]] = {}
    for row in rows:
        found = {name: row[key] for key, name in primary.items() if row.get(key) is not None}
        if found:
            lines.setdefault(row["step"], {}).update(found)
    steps = sorted(losses)
    stride = max(1, math.ceil(len(steps) / _MAX_LOSS_LINES))
    # Counted from the end, so that the last loss is always among them.
    for step in {*steps[::-1][::stride], *(lines.keys() & losses.keys())}:
        lines.setdefault(step, {})["Training Loss"] = losses[step]
    epoch = (lambda step: {"Epoch": step / steps_per_epoch}) if steps_per_epoch else (lambda step: {})
    return [{**epoch(step), "Step": step, **lines[step]} for step in sorted(lines)]


def evaluations(run: Run) -> dict[Any, dict[str, float]]:
    """Evaluator -> its metrics at the exported step; the evaluators carry what the card reads off them."""
    measured = {key: value for row in run.log if row["step"] == run.step for key, value in row.items()}
    results: dict[Any, dict[str, float]] = {}
    for source in run.data.validation_sources:
        prefix = f"eval/{source.name}/"
        metrics = {
            key[len(prefix) :]: value for key, value in measured.items() if key.startswith(prefix) and value is not None
        }
        if metrics:
            results[_describe(source.evaluator, source.name)] = metrics
    return results


def _describe(evaluator: Evaluator, name: str) -> Any:
    described: Any = copy.copy(evaluator)  # sets may share one evaluator
    kind = type(evaluator).__name__
    described.name, described.primary_metric = name, evaluator.primary
    described.description = _DESCRIPTIONS.get(kind, kind)
    return described
