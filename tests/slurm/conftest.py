"""One cluster for all tests of this folder, and a user's folder to submit from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import Slurm, cluster, processes_of

CONFIG = """\
seed_everything: 7
model:
  encoder: {{backbone: {encoder}, max_length: 32}}
  loss: {{class_path: CosineSimilarity}}
  learning_rate: 1.0e-3
data:
  train: [{{path: {train}, columns: {columns}, score_range: [0, 5]}}]
  validation: [{{name: dev, path: {dev}, columns: {columns}, score_range: [0, 5], evaluator: STS}}]
  batch_size: 15
trainer: {{max_epochs: 1, val_check_interval: 4}}
tracking: {{wandb: "off"}}
"""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Iterator[Slurm]:
    from trainer.demo_data import write_pairs

    project, state = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("slurm")
    train, dev = write_pairs(project, 100, 20)
    columns = "{anchor: sentence1, positive: sentence2, score: score}"
    (project / "configs").mkdir()
    config = CONFIG.format(encoder=tiny_encoder, train=train, dev=dev, columns=columns)
    (project / "configs" / "pairs.yaml").write_text(config)

    try:
        started = cluster("start", state, TRAINER_SLURM_FAKE_GPUS="2")
        assert started.returncode == 0, started.stderr
        yield Slurm({**os.environ, "SLURM_CONF": started.stdout.strip().partition("=")[2]}, project)
    finally:
        cluster("stop", state)
    assert processes_of(state) == []
