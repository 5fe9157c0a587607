"""Recipes on generated pairs, for tests of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainer.demo_data import write_pairs


def write_tiny_recipe(folder: Path, encoder: Path, **trainer: object) -> Path:
    """Data and recipe of 3 steps in ``folder``; ``trainer`` are keys of the Trainer beside those of one process."""
    pairs = write_pairs(folder, num_train=12, num_dev=6)
    return write_recipe(folder / "tiny.yaml", encoder, pairs, trainer={"devices": 1, **trainer})


def write_recipe(path: Path, encoder: Path, pairs: tuple[Path, Path], **sections: dict[str, object]) -> Path:
    """A recipe for pairs of training and of validation, on a CPU, a log at each step; ``sections`` are added to its."""
    columns = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
    source = {"columns": columns, "score_range": [0, 5]}
    content: dict[str, dict[str, Any]] = {
        "model": {"encoder": {"backbone": str(encoder)}, "loss": "CosineSimilarity"},
        "data": {
            "train": [{"path": str(pairs[0]), **source}],
            "validation": [{"name": "dev", "path": str(pairs[1]), **source}],
            "batch_size": 4,
        },
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 1},
        "tracking": {"wandb": "off"},
    }
    for name, keys in sections.items():
        content[name] = content.get(name, {}) | keys
    path.write_text(yaml.safe_dump(content))
    return path
