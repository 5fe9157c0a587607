"""Groups, best and last values, curves: against NumPy on the rows of the files."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.compare.made_runs import best_of, make_run, make_runs
from trainer.compare.command import read_runs
from trainer.compare.fold import MISSING, Spread, cost, differences, fold, metrics_of, primary_metrics
from trainer.compare.show import amount, cost_cells, differing_losses, notes, winners
from trainer.compare.show import metric as shown
from trainer.compare.table import print_comparison
from trainer.tracking.runs import RunRecord
from trainer.tracking.wandb import Tracking, make_logger

METRIC = "eval/dev/spearman_cosine"


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("values", [[0.8, 0.8, 0.8], [1e9 + 0.1, 1e9 + 0.2, 1e9 + 0.4], [-3.0, 5.0], [2.5]])
def test_mean_and_deviation(values: list[float]) -> None:
    """Those of Python's exact arithmetic; equal values have no spread at all, or their curve would fill a plot."""
    found = Spread.of([None, *values])
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(values), rel=1e-15)
    if len(values) == 1:
        assert found.deviation is None
    else:
        exact = statistics.stdev(values)
        assert found.deviation == (pytest.approx(exact, rel=1e-12) if exact else 0.0)


def test_seeds_of_a_recipe_are_one_group(tmp_path: Path) -> None:
    folders = make_runs(tmp_path / "runs")
    groups = fold(read_runs([str(tmp_path / "runs")]))
    assert [group.name for group in groups] == ["cosent", "cosine", "infonce"]
    assert [group.seeds for group in groups] == [[1, 2, 3]] * 3
    assert primary_metrics(groups) == [METRIC]
    for group in groups:
        mine = [folder for folder in folders if folder.parent.name == group.name]
        for metric in metrics_of(groups, "eval/"):
            values = [best_of(folder, metric) for folder in mine]
            assert group.best(metric) == Spread(
                pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)), 3
            )
        ends = [[row[METRIC] for row in rows_of(folder) if METRIC in row][-1] for folder in mine]
        assert group.last(METRIC) == Spread(pytest.approx(np.mean(ends)), pytest.approx(np.std(ends, ddof=1)), 3)
        lowest = [best_of(folder, "train/loss") for folder in mine]
        found = group.best("train/loss")
        assert found is not None
        assert found.mean == pytest.approx(np.mean(lowest))


def test_a_run_directory_and_offline_files_are_seeds_of_one_group(tmp_path: Path) -> None:
    """W&B gives the scale of 20.0 back as 20."""
    import wandb

    folders = [make_run(tmp_path / f"seed={seed}", "infonce", seed, steps=10) for seed in (1, 2)]
    for folder in folders:
        config = folder / "config.yaml"
        config.write_text(config.read_text() + "extra: {range: [0.0, 5.0], none: {}, list: []}\n")
    logger = make_logger(Tracking(wandb="offline"), folders[1])
    assert logger
    for row in rows_of(folders[1]):
        logger.log_metrics({"train/lr": 1e-3}, row["step"])
    wandb.finish()
    groups = fold(read_runs([str(folders[0]), str(folders[1] / "wandb")]))
    assert [group.seeds for group in groups] == [[1, 2]]


@pytest.mark.parametrize(("key", "other"), [("device", "NVIDIA H100"), ("ranks", 8), ("nodes", 2)])
def test_runs_on_other_machines_are_groups_of_their_own(tmp_path: Path, key: str, other: Any) -> None:
    """They cost something else, though the config (trainer.devices: auto) is the same."""
    folders = make_runs(tmp_path, recipes=1, seeds=4)
    for folder in folders[1:3]:
        about = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**about, key: other}))
    groups = fold(read_runs([str(tmp_path)]))
    assert [group.seeds for group in groups] == [[1, 4], [2, 3]]
    own = {"device": "x86_64 CPU", "ranks": 1, "nodes": 1}
    assert differences(groups) == {f"run.{key}": [own[key], other]}
    expected = {"device": "1 x NVIDIA H100", "ranks": "8 x x86_64 CPU", "nodes": "1 x x86_64 CPU (2 nodes)"}
    assert [cost(group).device for group in groups] == ["1 x x86_64 CPU", expected[key]]


def test_a_machine_that_is_not_known_separates_nothing() -> None:
    """W&B may know the ranks alone; two that are known still do not meet."""
    known: list[dict[str, Any]] = [{"ranks": 2}, {"ranks": 2, "device": "A"}, {"ranks": 2, "device": "B"}, {}]
    config = {"model": {"learning_rate": 1}}
    runs = [RunRecord(f"/r/{i}", {**config, "seed_everything": i}, [{"step": 1}], a) for i, a in enumerate(known)]
    groups = fold(runs)
    assert [group.seeds for group in groups] == [[0, 1, 3], [2]]
    assert [cost(group).device for group in groups] == ["2 x A", "2 x B"]


def test_a_run_that_has_hardly_begun_is_told_in_the_table(tmp_path: Path) -> None:
    """It has an evaluation, but neither a loss nor a speed yet."""
    folders = make_runs(tmp_path, recipes=1, seeds=3)
    log = folders[1] / "metrics.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    groups = fold(read_runs([str(tmp_path)]))
    (group,) = groups
    losses = [best_of(folder, "train/loss") for folder in (folders[0], folders[2])]
    expected = f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}, 2 of 3 runs"
    assert shown(group.best("train/loss")) == expected
    assert "of 3 runs" not in shown(group.best(METRIC))
    assert [cost_cells(group)[one].endswith(", 2 of 3 runs") for one in ("rows/s", "tokens/s")] == [True, True]
    assert notes(groups) == [
        "cosine: its runs stand at different steps, cosine/seed=2 at 0 and cosine/seed=3 at 300; its means mix them: "
        "wait for those behind, or leave them out"
    ]


def made(name: str, score: float, loss: float, config: dict[str, Any]) -> RunRecord:
    rows = [{"step": 1, METRIC: score, "eval/sts/spearman_cosine": score, "train/loss": loss}]
    return RunRecord(f"/r/{name}", config, rows)


def dev_set(**changed: Any) -> dict[str, Any]:
    return {"name": "dev", "path": "stsb-dev.jsonl", "evaluator": {"class_path": "trainer.evaluation.STS"}, **changed}


@pytest.mark.parametrize(
    ("changed", "differing"),
    [
        ({"path": "hard-dev.jsonl"}, "path"),
        ({"max_rows": 100}, "max_rows"),
        ({"score_range": [0, 5], "split": "test"}, "score_range, split"),
        ({"evaluator": {"class_path": "trainer.evaluation.Triplet"}}, "evaluator"),
    ],
)
def test_sets_of_one_name_but_other_data_have_no_winner(changed: dict[str, Any], differing: str) -> None:
    """The other set has one: it is the same in both, whatever its place in the list."""
    sts = {"name": "sts", "path": "sts.jsonl"}
    sets = [[dev_set(), sts], [sts, dev_set(**changed)]]
    groups = fold([made(f"{n}x", 0.8 - n / 10, 1.0, {"data": {"validation": one}}) for n, one in enumerate(sets)])
    assert winners(groups, METRIC) == set()
    assert winners(groups, "eval/sts/spearman_cosine") == {0}
    assert notes(groups) == [f"dev is not the same set in all groups ({differing} of data.validation): no bold there"]


@pytest.mark.parametrize(
    "changed", [{"prompts": {"anchor": "query: "}}, {"on_bad_row": "skip"}, {"max_rows": None}, {"weight": 2.0}]
)
def test_what_leaves_a_set_as_it_is_leaves_its_winner(changed: dict[str, Any]) -> None:
    """Prompts are the encoder's side of it; a key that an older version did not write is the null of today."""
    sets = [[dev_set()], [dev_set(**changed)]]
    groups = fold([made(f"{n}x", 0.8 - n / 10, 1.0, {"data": {"validation": one}}) for n, one in enumerate(sets)])
    assert winners(groups, METRIC) == {0}
    assert notes(groups) == []


def test_a_group_without_the_set_takes_no_part() -> None:
    runs = [made(f"{n}x", 0.8 - n / 10, 1.0, {"lr": n, "data": {"validation": [dev_set()]}}) for n in range(2)]
    groups = fold([*runs, RunRecord("/r/other", {"data": {"validation": None}}, [{"step": 1, "train/loss": 1.0}])])
    assert winners(groups, METRIC) == {0}
    assert notes(groups) == []


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ({"data": {"batch_size": 16}}, {"data": {"batch_size": 256}}, ["batch sizes"]),
        ({"data": {"train": [{"path": "a"}]}}, {"data": {"train": [{"path": "b"}]}}, ["training data"]),
        ({"model": {"teacher": None}}, {"model": {"teacher": {"backbone": "t"}}}, ["teachers"]),
        ({"model": {"loss": {"class_path": "A"}}}, {"model": {"loss": {"class_path": "B"}}}, ["losses"]),
        ({"trainer": {"log_every_n_steps": 1}}, {"trainer": {"log_every_n_steps": 10}}, ["logging intervals"]),
        ({"model": {"losses": None}}, {"model": {"losses": {"a": {"class_path": "B"}}}}, ["losses"]),
        ({"model": {"learning_rate": 1e-4}}, {"model": {"learning_rate": 1e-5}}, []),
        ({"data": {"num_workers": 0}}, {"data": {"num_workers": 2}}, []),
    ],
)
def test_losses_of_different_kinds_have_no_winner(one: dict, other: dict, what: list[str]) -> None:
    """InfoNCE among 256 rows starts ln 16 = 2.8 above InfoNCE among 16."""
    groups = fold([made("ax", 0.5, 1.2, one), made("bx", 0.6, 3.9, other)])
    assert differing_losses(groups) == what
    assert winners(groups, "train/loss") == (set() if what else {0})
    assert winners(groups, METRIC) == {1}


def test_a_seed_that_stands_twice_is_told(tmp_path: Path) -> None:
    make_runs(tmp_path, recipes=1, seeds=2)
    assert notes(fold(read_runs([str(tmp_path)]))) == []
    make_run(tmp_path / "cosine" / "seed=1_job=7", seed=1)
    (note,) = notes(fold(read_runs([str(tmp_path)])))
    assert "seed 1 stands 2 times (" in note
    assert "seed=1_job=7" in note


def test_only_the_keys_that_differ(tmp_path: Path) -> None:
    make_runs(tmp_path)
    found = differences(fold(read_runs([str(tmp_path)])))
    assert found == {
        "model.loss": ["trainer.losses.CoSENT", "trainer.losses.CosineSimilarity", "trainer.losses.InfoNCE"],
        "model.loss.scale": [20.0, MISSING, 20.0],
        "model.learning_rate": [1e-3, 1e-3, 2e-3],
        "data.batch_size": [32, 32, 64],
    }


def test_what_a_group_lacks_differs_where_the_other_says_something() -> None:
    """Not in each default of the other's validation set; a logger is how a run is tracked."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "flush_logs_every_n_steps": 9}}
    runs = [
        made(
            "one",
            0.5,
            1.0,
            {"data": {"validation": [dev_set(corpus=None, max_rows=None)]}, "trainer": {"logger": True}},
        ),
        made("two", 0.5, 1.0, {"data": {"validation": []}, "trainer": {"logger": logger}}),
    ]
    assert differences(fold(runs)) == {
        "data.validation": [MISSING, []],
        "data.validation.0.name": ["dev", MISSING],
        "data.validation.0.path": ["stsb-dev.jsonl", MISSING],
        "data.validation.0.evaluator": ["trainer.evaluation.STS", MISSING],
    }
    seeds = [made(f"seed={n}", 0.5, 1.0, {"lr": 1, "trainer": {"logger": [False, logger][n]}}) for n in range(2)]
    assert [len(group.runs) for group in fold(seeds)] == [2]


@pytest.mark.parametrize("axis", ["step", "train/rows_seen", "train/wall_s"])
def test_a_curve_is_the_mean_of_the_seeds_at_each_step(tmp_path: Path, axis: str) -> None:
    folders = make_runs(tmp_path, recipes=1)
    (group,) = fold(read_runs([str(tmp_path)]))
    table = np.array([[(row[axis], row[METRIC]) for row in rows_of(folder) if METRIC in row] for folder in folders])
    points = group.curve(METRIC, axis)
    assert [point.x for point in points] == pytest.approx(table[..., 0].mean(axis=0))
    assert [point.value.mean for point in points] == pytest.approx(table[..., 1].mean(axis=0))
    assert [point.value.deviation for point in points] == pytest.approx(table[..., 1].std(axis=0, ddof=1))


def test_a_seed_that_stopped_early_cuts_the_curve_not_the_table(tmp_path: Path) -> None:
    """A mean over fewer seeds in the middle of a line would look like a jump."""
    make_run(tmp_path / "a" / "seed=1", seed=1)
    make_run(tmp_path / "a" / "seed=2", seed=2, steps=100)
    (group,) = fold(read_runs([str(tmp_path)]))
    assert [point.x for point in group.curve(METRIC, "step")] == [0, 25, 50, 75, 100]
    best = group.best(METRIC)
    assert best is not None
    assert best.count == 2


def test_the_untouched_base_is_not_the_best_of_a_run() -> None:
    """As best.json and the model card have it; a run that has hardly begun has nothing else."""
    spoilt = [{"step": 0, METRIC: 0.9}, {"step": 10, METRIC: 0.2}, {"step": 20, METRIC: 0.1}]
    mended = [{"step": 0, METRIC: 0.5}, {"step": 10, METRIC: 0.4}, {"step": 20, METRIC: 0.6}]
    begun = [{"step": 0, METRIC: 0.7}, {"step": 10, "train/loss": 1.0}]
    groups = fold([RunRecord(f"/r/{n}x", {"lr": n}, rows) for n, rows in enumerate((spoilt, mended, begun))])
    assert [group.best(METRIC) for group in groups] == [Spread(score, None, 1) for score in (0.2, 0.6, 0.7)]
    assert winners(groups[:2], METRIC) == {1}
    collapsed = RunRecord("/r/nan", {}, [{"step": 0, METRIC: 0.9}, {"step": 10, METRIC: None}])
    assert fold([collapsed])[0].best(METRIC) is None


def test_values_that_are_not_finite_are_no_values() -> None:
    rows = [{"step": 1, METRIC: 0.5}, {"step": 2, METRIC: None}, {"step": 3, METRIC: float("nan")}]
    (group,) = fold([RunRecord("x", {}, rows)])
    assert group.best(METRIC) == Spread(0.5, None, 1)
    assert group.best("eval/dev/cosine_accuracy_threshold") is None
    assert group.best("eval/none") is None


def test_a_run_that_ended_in_nan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Its last score is none of those before; sums and steps are not asked."""
    rows = [{"step": 1, METRIC: 0.5, "train/rows_seen": 9}, {"step": 2, METRIC: None}, {"step": 3, "train/loss": 1.0}]
    lost = [{"step": 0, METRIC: 0.9}, {"step": 1, METRIC: None}]
    runs = [RunRecord(f"/r/s{i}", {"lr": 1, "seed_everything": i}, rows) for i in (1, 2)]
    groups = fold([*runs, RunRecord("/r/lost", {"lr": 2}, lost)])
    ends = [group.last(METRIC) for group in groups]
    assert [math.isnan(end.mean) for end in ends if end] == [True, True]
    assert [shown(end) for end in ends] == ["nan", "nan"]
    assert cost(groups[0]).rows == Spread(9.0, 0.0, 2)
    print_comparison(groups, Console(width=100))
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert re.search(r"↑ +0\.5000 ± 0\.0000 \(nan\) +nan$", table[METRIC].rstrip())


def test_runs_without_a_config_are_not_taken_for_seeds() -> None:
    groups = fold([RunRecord(name, {}, [{"step": 1, METRIC: 0.1}]) for name in ("/r/a", "/r/b")])
    assert [group.name for group in groups] == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/r/stsb/lr=1_seed=1", "/r/stsb/lr=1_seed=2_job=77"], "lr=1"),
        (["/r/stsb/seed=1_job=5", "/r/stsb/seed=2_job=6"], "stsb"),
        (["/r/a-s1", "/r/a-s2"], "a"),
        (["/x/one/a", "/y/two/b"], "x/one/a"),
        (["my run", "my run"], "my run"),
    ],
)
def test_the_name_of_a_group_has_no_seed(names: list[str], expected: str) -> None:
    config = {"model": {"learning_rate": 1}}
    runs = [RunRecord(name, {**config, "seed_everything": i}, [{"step": 1}]) for i, name in enumerate(names)]
    (group,) = fold(runs)
    assert group.name == expected


def test_cost_is_the_median_rate_and_the_last_sums(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [row for row in rows_of(folder) if "train/loss" in row]
    (group,) = fold(read_runs([str(folder)]))
    found = cost(group)
    assert found.rows_per_s == Spread(pytest.approx(np.median([row["train/rows_per_s"] for row in rows])), None, 1)
    assert found.rows == Spread(300 * 32, None, 1)
    assert found.gpu_hours == Spread(pytest.approx(300 * 0.11 / 3600), None, 1)
    assert found.device == "1 x x86_64 CPU"


def test_amounts_have_three_figures_and_a_whole_number_no_more() -> None:
    whole, rate, wide = Spread(60.0, 0.0, 2), Spread(12.34, 0.0, 2), Spread(60.0, 2.5, 2)
    assert [amount(one) for one in (whole, rate, wide)] == ["60", "12.3", "60.0 ± 2.5"]
