"""A recipe of 3 steps on generated pairs, for tests of the command line."""

from __future__ import annotations

from pathlib import Path

import yaml

from trainer.demo_data import write_pairs


def write_tiny_recipe(folder: Path, encoder: Path, **trainer: object) -> Path:
    """Data and recipe in ``folder``; ``trainer`` are keys of the Trainer beside those of one process on a CPU."""
    train, dev = write_pairs(folder, num_train=12, num_dev=6)
    columns = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
    source = {"columns": columns, "score_range": [0, 5]}
    content = {
        "model": {"encoder": {"backbone": str(encoder)}, "loss": "CosineSimilarity"},
        "data": {
            "train": [{"path": str(train), **source}],
            "validation": [{"name": "dev", "path": str(dev), **source}],
            "batch_size": 4,
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, **trainer},
        "tracking": {"wandb": "off"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
