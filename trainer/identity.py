"""What a run is: everything that decides its weights. A checkpoint carries it, and whoever goes on must match it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

# Where a run is, how it is watched and how much fits at once are no part of it; nor is a path, for the fingerprint of
# the rows stands beside it.
_PART = re.compile(
    r"seed_everything"
    r"|model\.(?!max_tokens$|print_first_batch$).*"
    r"|data\.(?!num_workers$|cache_dir$|stream_cache_gib$|validation(\.|$)|train\.\d+\.path$).*"
    r"|trainer\.(max_epochs|max_steps|precision|strategy|limit_train_batches|overfit_batches|gradient_clip_\w+)"
)
_MAX_SHOWN = 6


@dataclass
class Resume:
    """How a run goes on from a checkpoint.

    Attributes:
        allow: settings that may differ from the checkpoint's, e.g. learning_rate,max_epochs.
    """

    allow: Optional[Union[str, list[str]]] = None

    @property
    def names(self) -> list[str]:
        return split_names(self.allow)


def split_names(names: Optional[Union[str, list[str]]]) -> list[str]:
    """A list, or words with commas between them."""
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names or []) if name.strip()]


def identity(config: Mapping[str, Any], fingerprints: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Flat and plain: key -> value of all that decides the weights of a run.

    Args:
        config: the effective config.
        fingerprints: of the rows of each training source.
        facts: what the config may leave to a default: strategy and precision as they are.
    """
    flat = {key: value for key, value in _flatten("", config) if is_part(key)}
    rows = {f"data.train.{number}.rows": fingerprint for number, fingerprint in enumerate(fingerprints)}
    return {**flat, **rows, **facts}


def is_part(key: str) -> bool:
    """Whether what stands under a dotted key of the config decides the weights."""
    return _PART.fullmatch(key) is not None


def _flatten(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield prefix, value
        return
    for key, inner in items:
        yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (saved value, value now) of what is not equal; a key that one side lacks counts as None."""
    keys = sorted(saved.keys() | now.keys())
    return {key: (saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)}


def refuse_differences(found: Mapping[str, tuple[Any, Any]], allowed: Sequence[str], checkpoint: Any) -> list[str]:
    """The differences that are allowed, a line each.

    Raises:
        ValueError: there are others; they are named, with the words that allow them.
    """
    refused = {key: values for key, values in found.items() if not any(_names(name, key) for name in allowed)}
    if refused:
        shown = [_line(key, *values) for key, values in list(refused.items())[:_MAX_SHOWN]]
        more = f" and {len(refused) - _MAX_SHOWN} more" if len(refused) > _MAX_SHOWN else ""
        words = ",".join(dict.fromkeys(_word(key) for key in refused))
        raise ValueError(
            f"this run is not the one that saved {checkpoint}: {'; '.join(shown)}{more}\n"
            f"  go on with the new values: --resume.allow {words} · or start anew: --trainer.default_root_dir OTHER"
        )
    return [_line(key, *values) for key, values in found.items()]


def _names(name: str, key: str) -> bool:
    """``learning_rate`` and ``model.learning_rate`` name that key, ``data`` all below it."""
    return f".{key}.".find(f".{name}.") >= 0


def _word(key: str) -> str:
    """The shortest name that a user would give a key."""
    parts = key.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ("encoder", "loss", "train") else parts[-1]


def _line(key: str, saved: Any, now: Any) -> str:
    return f"{key} was {saved}, now {now}"
