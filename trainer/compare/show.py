"""How values are written, in the terminal and in the report."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Optional

from trainer.compare.fold import MISSING, Group, Spread, cost, differences, metrics_of
from trainer.tracking.direction import direction
from trainer.tracking.runs import last

# What a training loss follows from besides the weights: an in-batch loss grows with the logarithm of the batch.
_OF_LOSS = {
    "losses": r"model\.loss(es)?",
    "teachers": r"model\.teacher",
    "batch sizes": r"data\.batch_size",
    "logging intervals": r"trainer\.log_every_n_steps",  # of noisier means the lowest is lower
    "training data": r"data\.(train|max_rows|mixing|no_duplicates)",
}
# Of a validation set: prompts are the encoder's side, as model.encoder.prompt is; a bad row ends a run or is in no set.
_SAME_SCORES = re.compile(r"name|prompts(\..*)?|on_bad_row|max_bad_rows|streaming|loss|weight")
ARROWS = {"max": "↑", "min": "↓", None: ""}


def metric(value: Optional[Spread]) -> str:
    """Four decimals, as metrics are published."""
    if value is None:
        return "–"
    spread = "" if value.deviation is None or math.isnan(value.mean) else f" ± {value.deviation:.4f}"
    return f"{value.mean:.4f}{spread}{_of_runs(value)}"


def _of_runs(value: Spread) -> str:
    """Said where some runs have no value."""
    return f", {value.count} of {value.count + value.missing} runs" if value.missing else ""


def amount(value: Optional[Spread]) -> str:
    """Three or more figures, all of a whole number and no more, and the spread where it shows."""
    if value is None:
        return "–"
    size = abs(value.mean)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 4
    if size.is_integer() and not value.deviation:
        digits = 0
    spread = f"{value.deviation:,.{digits}f}" if value.deviation else ""
    return f"{value.mean:,.{digits}f}" + (f" ± {spread}" if spread.strip("0.,") else "") + _of_runs(value)


def duration(value: Optional[Spread]) -> str:
    if value is None:
        return "–"
    if value.mean < 60:
        return f"{value.mean:.1f} s{_of_runs(value)}"
    minutes, seconds = divmod(round(value.mean), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s") + _of_runs(value)


def setting(value: Any) -> str:
    """A value of a config; of a class its name."""
    if value is MISSING:
        return "–"
    if isinstance(value, str):
        is_class = value.startswith(("trainer.", "tests.", "torch.", "lightning.")) and "/" not in value
        return value.rpartition(".")[2] if is_class else value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(setting, value)) or "[]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def heading(name: str, short: Optional[str] = None) -> str:
    """A metric, or a shorter name of it, with the way in which it is better."""
    return f"{short or name} {ARROWS[direction(name)]}".rstrip()


def differing_losses(groups: Sequence[Group]) -> list[str]:
    """In words, what makes the losses of the groups numbers of different kinds; nothing where they can be compared."""
    keys = differences(groups)
    return [what for what, of_it in _OF_LOSS.items() if any(re.fullmatch(rf"({of_it})(\..*)?", key) for key in keys)]


def _set_differences(groups: Sequence[Group], name: str) -> list[str]:
    """The keys in which a validation set of one name differs between groups, as far as its scores follow from them."""
    found = [_set_settings(group, name) for group in groups]
    return sorted(key for key in set().union(*found) if any(one.get(key) != found[0].get(key) for one in found))


def _set_settings(group: Group, name: str) -> dict[str, Any]:
    """What a config says of a validation set; the place of the set in the list does not count."""
    names = (key for key in group.settings if re.fullmatch(r"data\.validation\.\d+\.name", key))
    place = next((key.removesuffix("name") for key in names if str(group.settings[key]) == name), None)
    if place is None:
        return {}
    of_set = {key.removeprefix(place): value for key, value in group.settings.items() if key.startswith(place)}
    return {key: value for key, value in of_set.items() if value is not None and not _SAME_SCORES.fullmatch(key)}


def winners(groups: Sequence[Group], name: str) -> set[int]:
    """The groups with the best mean of a metric; none where all are equal or can't be compared."""
    which = direction(name)
    if name.startswith("train/loss") and differing_losses(groups):
        return set()
    means = {number: found.mean for number, group in enumerate(groups) if (found := group.best(name))}
    if which is None or len(set(means.values())) < 2:
        return set()
    if name.startswith("eval/") and _set_differences([groups[number] for number in means], name.split("/")[1]):
        return set()
    top = (max if which == "max" else min)(means.values())
    return {number for number, mean in means.items() if mean == top}


def notes(groups: Sequence[Group]) -> list[str]:
    """What speaks against a mean, a deviation or a comparison, a sentence for each."""
    said = []
    for name in dict.fromkeys(metric.split("/")[1] for metric in metrics_of(groups, "eval/")):
        scored = [group for group in groups if metrics_of([group], f"eval/{name}/")]
        if keys := _set_differences(scored, name):
            said.append(
                f"{name} is not the same set in all groups ({', '.join(keys)} of data.validation): no bold there"
            )
    for group in groups:
        reached = sorted(((last(run.rows, "step") or 0, run.name) for run in group.runs), key=lambda one: one[0])
        (least, short), (most, long) = reached[0], reached[-1]
        if least < most:
            said.append(
                f"{group.name}: its runs stand at different steps, {short} at {least:,} and {long} at {most:,}; its "
                "means mix them: wait for those behind, or leave them out"
            )
        for seed, count in Counter(str(run.seed) for run in group.runs if run.seed is not None).items():
            if count > 1:
                names = ", ".join(run.name for run in group.runs if str(run.seed) == seed)
                said.append(
                    f"{group.name}: seed {seed} stands {count} times ({names}), so the deviation is not one over "
                    "seeds: leave all but one out"
                )
    return said


def cost_cells(group: Group) -> dict[str, str]:
    """What a group took, each with its label."""
    took = cost(group)
    known = [str(seed) for seed in group.seeds if seed is not None]
    return {
        "seeds": f"{len(group.runs)} ({', '.join(known)})" if known else str(len(group.runs)),
        "device": took.device,
        "steps": amount(took.steps),
        "rows": amount(took.rows),
        "tokens": amount(took.tokens),
        "rows/s": amount(took.rows_per_s),
        "tokens/s": amount(took.tokens_per_s),
        "wall time": duration(took.wall_s),
        "device hours": amount(took.gpu_hours),
        "peak GiB": amount(took.peak_gib),
    }
