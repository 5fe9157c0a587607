"""Sections of a model card that give account of its run: gain, data, config and cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.compare.fold import Spread
from trainer.compare.show import amount, duration
from trainer.data.files import data_format, is_hub_id
from trainer.export.record import Run
from trainer.tracking.redact import redact
from trainer.tracking.runs import number

# Of a config: what the run computes. Where it lies, how it is watched and who looks at it is nobody's business.
_SECTIONS = ("seed_everything", "model", "data", "trainer", "checkpoint", "check")
_PLACES = ("default_root_dir", "cache_dir", "logger", "ckpt_path")
_PATH = re.compile(r"(\w+:/)?[~.]{0,2}/.*|[^\s/]+(/[^\s/]+)+")


def primary_metrics(run: Run) -> list[str]:
    """Names of the metrics that stand for the validation sets, as the run noted them."""
    sources = run.data.validation_sources
    return list(run.about.get("primary_metrics") or [f"eval/{one.name}/{one.evaluator.primary}" for one in sources])


def against_base(run: Run) -> str:
    """Every validation metric before the first step and at the exported one; nothing where none was measured."""
    measured: dict[int, dict[str, float]] = {}
    for row in run.log:
        found = {name: value for name in row if name.startswith("eval/") and (value := number(row, name)) is not None}
        if found:
            measured.setdefault(row["step"], {}).update(found)
    if not measured:
        return ""
    heading = "\n### Against the Untouched Base\n\n"
    if 0 not in measured:
        return f"{heading}The base was not evaluated: the log of the run has no metric of step 0.\n"
    last = max(measured)
    shown = run.step if run.step in measured else last
    if shown == 0:
        return ""
    steps = {"Base, step 0": 0, f"{'Exported' if shown == run.step else 'Last'}, step {shown:,}": shown}
    if last != shown:
        steps[f"Last, step {last:,}"] = last
    names = [name for name in measured[shown] if name in measured[0]]
    primary = [name for name in primary_metrics(run) if name in names] or names
    text = heading + _table(measured, steps, primary)
    if rest := [name for name in names if name not in primary]:
        text += f"\n<details><summary>All metrics</summary>\n\n{_table(measured, steps, primary + rest)}\n</details>\n"
    return text


def _table(measured: Mapping[int, Mapping[str, float]], steps: Mapping[str, int], names: Sequence[str]) -> str:
    base, shown, *_ = steps.values()
    lines = [
        "| " + " | ".join(["Set", "Metric", *steps, "Difference"]) + " |",
        "|:--|:--" + "|--:" * (len(steps) + 1) + "|",
    ]
    for name in names:
        one, _, metric = name.removeprefix("eval/").rpartition("/")
        values = [measured[step].get(name) for step in steps.values()]
        gain = measured[shown][name] - measured[base][name]
        cells = [one, metric, *("–" if value is None else f"{value:.4f}" for value in values), f"{gain:+.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def data_account(run: Run) -> str:
    """What identifies the rows that were trained on, and what the check of the data said of them."""
    parts = []
    if run.fingerprints:
        names = [_public(source.path) for source in run.data.train_sources]
        rows = "".join(f"- {name}: `{one}`\n" for name, one in zip(names, run.fingerprints, strict=True))
        parts.append(f"\n### Fingerprints of the Training Rows\n\n{rows}")
    for heading, allowed in (("Known Mistakes of the Training Data", True), ("Warnings of the Data Check", False)):
        told = "".join(_finding(one) for one in run.findings if one["allowed"] == allowed)
        parts.append(f"\n### {heading}\n\n{told}" if told else "")
    return "".join(parts)


def _finding(finding: Mapping[str, Any]) -> str:
    where = f" ({_public(finding['where'])})" if finding["where"] else ""
    return f"- `{finding['name']}`{where}: {finding['cause']}\n"


def cost(run: Run) -> str:
    """Device, ranks, time and rows of the whole run, as far as they are known."""
    totals = {name: value for row in run.log for name in row if (value := number(row, name)) is not None}
    lines = []
    if "device" in run.about:
        ranks, nodes = run.about["ranks"], run.about["nodes"]
        where = f" on {nodes:,} node{'s' * (nodes > 1)}"
        lines.append(f"Device: {run.about['device']}, {ranks:,} rank{'s' * (ranks > 1)}{where}")
    seen = [
        f"{totals[f'train/{what}_seen']:,.0f} {what}" for what in ("rows", "tokens") if f"train/{what}_seen" in totals
    ]
    if seen:
        lines.append(f"Seen: {' and '.join(seen)}, repetitions included")
    if "train/wall_s" in totals:
        lines.append(f"Wall time: {duration(_one(totals['train/wall_s']))}, with evaluation and checkpoints")
        lines.append(f"Device hours: {amount(_one(totals.get('train/gpu_hours')))}")
    return "\n### Training Hardware and Time\n\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def _one(value: float | None) -> Spread | None:
    return Spread.of([value])


def config_block(run: Run) -> str:
    """The effective config, folded away, without secrets and places."""
    known = {name: run.config[name] for name in _SECTIONS if name in run.config}
    code = yaml.safe_dump(_without_places(redact(known)), sort_keys=False, allow_unicode=True, width=100)
    return f"\n### Config\n\n<details><summary>Click to expand</summary>\n\n````yaml\n{code}````\n\n</details>\n"


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_places(inner) for key, inner in value.items() if key not in _PLACES}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return _public(value) if isinstance(value, str) else value


def _public(text: str) -> str:
    """Of a path its last name; a hub id and what is no path stay."""
    is_path = "/" in text and (_PATH.fullmatch(text) or data_format(Path(text)))
    return Path(text).name if is_path and not is_hub_id(text) else text
