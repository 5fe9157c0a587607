"""The made runs of these tests have the files and keys of a real fit."""

from __future__ import annotations

import json
from pathlib import Path

from tests.compare.made_runs import make_run
from tests.tracking.small_run import make_parts, make_trainer, read_metrics, write_rows
from trainer.compare.command import read_runs
from trainer.compare.fold import fold
from trainer.evaluation.runner import Evaluation
from trainer.tracking.metrics import MetricsLog


def test_made_runs_are_like_real_ones(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str]) -> None:
    rows = write_rows(tmp_path, demo_texts)
    module, data = make_parts(tiny_encoder, rows, [rows])
    real = tmp_path / "real"
    make_trainer(real, [MetricsLog(), Evaluation()]).fit(module, data)
    made = make_run(tmp_path / "made")

    def keys(folder: Path) -> list[set[str]]:
        logged = read_metrics(folder)
        return [
            {name.replace("dev0", "dev") for row in logged for name in row if ("train/loss" in row) == trained}
            for trained in (True, False)
        ]

    for written, invented in zip(keys(real), keys(made), strict=True):
        assert invented <= written  # a fit may log more
    about = [json.loads((folder / "run.json").read_text()) for folder in (real, made)]
    assert about[0].keys() == about[1].keys()
    assert about[0]["primary_metrics"] == ["eval/dev0/spearman_cosine"]
    (group,) = fold(read_runs([str(real)]))
    last = read_metrics(real)[-1]
    found = group.last("eval/dev0/spearman_cosine")
    assert found is not None
    assert found.mean == last["eval/dev0/spearman_cosine"]
