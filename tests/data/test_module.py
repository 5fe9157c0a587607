"""The data module: what a rank gets at a step, and what it refuses or says about sizes."""

import gzip
import json
import logging
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from trainer.batch import PackedBatch
from trainer.data import parts
from trainer.data.batches import StepBatches
from trainer.data.evalsource import EvalSource
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.data.steps import StepLoader
from trainer.encoder import EncoderSpec

COLUMNS = {"anchor": "a", "positive": "b", "score": "s"}


def make_data(folder: Path, encoder: Path, num_rows: int, batch_size: int, max_length: int = 32) -> PairData:
    path = folder / "train.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(num_rows):
            file.write(json.dumps({"a": f"row {i}", "b": "the cat " * (1 + i % 5), "s": i / 100}) + "\n")
    source = Source(str(path), COLUMNS)
    spec = EncoderSpec(str(encoder), max_length=max_length)
    data = PairData([source], spec, batch_size=batch_size, cache_dir=str(folder / "cache"))
    data.prepare_data()
    return data


def test_ranks_share_out_the_rows_of_a_step(tmp_path: Path, tiny_encoder: Path) -> None:
    """The rows of all ranks are the one process's rows with their own scores, on 1 to 5 ranks."""
    data = make_data(tmp_path, tiny_encoder, num_rows=23, batch_size=8)
    data.setup("fit")
    alone = StepBatches(data.tables, data.order, 3, rank=0, world_size=1)
    seen: list[int] = []
    for step in range(3):
        whole = alone[step]
        rows = whole.targets.row_ids_B.tolist()
        seen += rows
        np.testing.assert_allclose(whole.targets.scores_B, np.array(rows) / 100, rtol=1e-6)
        for world_size in range(2, 6):
            parts = [
                StepBatches(data.tables, data.order, 3, rank, world_size)[step].targets for rank in range(world_size)
            ]
            assert sorted(row for part in parts for row in part.row_ids_B.tolist()) == sorted(rows)
            assert [len(part.row_ids_B) for part in parts] == list(parts[0].rows_per_rank)
            assert [part.first_row for part in parts] == np.cumsum([0, *parts[0].rows_per_rank])[:-1].tolist()
    assert sorted(seen) == list(range(23))


def test_a_rank_without_rows_embeds_a_placeholder_that_does_not_count(tmp_path: Path, tiny_encoder: Path) -> None:
    data = make_data(tmp_path, tiny_encoder, num_rows=9, batch_size=8)
    data.setup("fit")
    last = StepBatches(data.tables, data.order, 2, rank=1, world_size=2)[1]
    assert last.targets.rows_per_rank == (1, 0)
    assert last.num_rows == 0
    assert last.num_tokens == 0
    assert len(last.lengths) == 2  # one row of two texts keeps the graph the same on every rank


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 3), (2, 3)])
def test_the_loader_gives_every_step_from_where_the_run_stands(
    num_workers: int, batch_size: int, tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several steps travel in one message; what comes out are single batches, the same as without a loader."""
    monkeypatch.setattr(parts, "_WINDOW", 12)
    data = make_data(tmp_path, tiny_encoder, num_rows=50, batch_size=batch_size)
    data.setup("fit")
    data.num_workers = num_workers
    data.trainer = SimpleNamespace(global_step=17 + 3, limit_train_batches=1.0)  # three steps into the second epoch
    loader = data.train_dataloader()
    assert len(loader) == data.steps_per_epoch == 17
    alone = StepBatches(data.tables, data.order, 17, rank=0, world_size=1)
    found = list(loader)
    assert len(found) == 14
    for batch, step in zip(found, range(20, 34), strict=True):
        assert torch.equal(batch.targets.row_ids_B, alone[step].targets.row_ids_B)
        assert torch.equal(batch.input_ids_T, alone[step].input_ids_T)


def test_a_batch_smaller_than_the_number_of_ranks_is_refused(tmp_path: Path, tiny_encoder: Path, two_ranks) -> None:
    data = make_data(tmp_path, tiny_encoder, num_rows=5, batch_size=1)
    source, spec = data.train_sources[0], data.encoder_spec
    for message in two_ranks(set_up_on_rank, source, spec, str(tmp_path / "cache")):
        assert message.startswith("data.batch_size is 1 rows over all ranks, but there are 2 ranks; raise")


def test_two_validation_sets_of_one_name_are_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    """Their metrics have one name too: eval/dev/..."""
    sets = [EvalSource(f"{path}.jsonl", COLUMNS, name="dev") for path in ("old", "new")]
    train, spec = [Source("x.jsonl", COLUMNS)], EncoderSpec(str(tiny_encoder))
    with pytest.raises(ValueError, match=r"two sets of the name 'dev', old\.jsonl and new\.jsonl: .* give each a name"):
        PairData(train, spec, validation=sets)
    PairData(train, spec, validation=[sets[0], replace(sets[1], name="new")])


@pytest.mark.parametrize("max_rows", [0, -1])
def test_max_rows_that_leave_no_row_are_refused(max_rows: int, tmp_path: Path, tiny_encoder: Path) -> None:
    with pytest.raises(ValueError, match=f"data.max_rows is {max_rows}; it must be 1 or more, or left out"):
        PairData([Source("x.jsonl", COLUMNS)], EncoderSpec(str(tiny_encoder)), max_rows=max_rows)


def test_no_training_source_is_refused_where_one_is_trained_on(tmp_path: Path, tiny_encoder: Path) -> None:
    """`trainer validate` needs none."""
    data = PairData([], EncoderSpec(str(tiny_encoder)), cache_dir=str(tmp_path))
    data.setup("validate")
    with pytest.raises(ValueError, match=r"data\.train is empty: there is nothing to train on"):
        data.setup("fit")


def set_up_on_rank(source: Source, spec: EncoderSpec, cache: str) -> str:
    data = PairData([source], spec, batch_size=1, cache_dir=cache)
    with pytest.raises(ValueError, match="2 ranks") as error:
        data.setup("fit")
    return str(error.value)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_without_rows_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"data.batch_size is {batch_size}; it must be 1 or more"):
        PairData([], EncoderSpec("x"), batch_size=batch_size)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stream_cache_gib": -1.0}, "data.stream_cache_gib is -1; it must be 0 or more, and finite"),
        ({"stream_cache_gib": math.nan}, "data.stream_cache_gib is nan; it must be 0 or more, and finite"),
        ({"num_workers": -1}, "data.num_workers is -1; it must be 0 or more"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        PairData([], EncoderSpec("x"), **options)


def test_what_round_robin_leaves_out_is_said(
    tmp_path: Path, tiny_encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, rows in (("long", 23), ("short", 9)):
        (tmp_path / name).mkdir()
        make_data(tmp_path / name, tiny_encoder, rows, batch_size=8)
    sources = [Source(str(tmp_path / name / "train.jsonl.gz"), COLUMNS) for name in ("long", "short")]
    spec = EncoderSpec(str(tiny_encoder), max_length=32)
    data = PairData(sources, spec, batch_size=8, mixing="round_robin", cache_dir=str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert "data.mixing round_robin: 7 of 32 rows are left out of an epoch" in caplog.text
    assert [data.order.step(0, index).source for index in range(data.steps_per_epoch)] == [0, 1, 0, 1]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=f"x.jsonl: weight is {weight:g}; it must be above 0"):
        PairData([Source("x.jsonl", COLUMNS, weight=weight)], EncoderSpec("x"))


@pytest.mark.parametrize("mixing", ["proportional", "round_robin"])
def test_a_weight_that_nothing_reads_is_refused(mixing: Any) -> None:
    sources = [Source("x.jsonl", COLUMNS, weight=9.0), Source("y.jsonl", COLUMNS)]
    wanted = rf"x.jsonl: weight is 9, which counts under data\.mixing weighted alone, and data\.mixing is {mixing}; set"
    with pytest.raises(ValueError, match=wanted):
        PairData(sources, EncoderSpec("x"), mixing=mixing)
    PairData(sources, EncoderSpec("x"), mixing="weighted")


def test_all_negatives_of_a_list_are_for_validation() -> None:
    columns = {"anchor": "a", "positives": "b", "negatives": "n"}
    with pytest.raises(ValueError, match=r"x.jsonl: max_negatives null is for data\.validation; give a number"):
        PairData([Source("x.jsonl", columns, max_negatives=None)], EncoderSpec("x"))


def test_a_length_that_does_not_fit_is_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    data = make_data(tmp_path, tiny_encoder, 9, batch_size=8)
    source = data.train_sources[0]
    assert data.text_of(source).fingerprint == data.text.fingerprint
    for length in (2, 33):
        source.max_lengths = {"anchor": length}
        with pytest.raises(ValueError, match=rf"max_lengths gives 'anchor' {length} pieces; give 3 to 32, which is"):
            data.prepare_data()
    with pytest.raises(ValueError, match="max_lengths names 'query', which is no text column; there are anchor, pos"):
        Source("x.jsonl", COLUMNS, max_lengths={"query": 64})
    lists = Source(
        "x.jsonl", {"anchor": "a", "positive": "b", "negatives": "n"}, max_negatives=2, max_lengths={"negatives": 9}
    )
    assert data.text_of(lists).max_lengths == {"negative_1": 9, "negative_2": 9}
    held_out = EvalSource(name="dev", path="x.jsonl", columns=COLUMNS, max_lengths={"anchor": 5})
    with pytest.raises(ValueError, match=r"max_lengths is for data\.train; an evaluation embeds as the exported model"):
        PairData([], EncoderSpec("x"), validation=[held_out])


@pytest.mark.parametrize("keys", [{"subset": "en"}, {"revision": "v1"}])
def test_what_chooses_from_a_hub_set_is_refused_of_files(keys: dict[str, str], tmp_path: Path) -> None:
    """Files are read whole: the run would take rows of all languages, or of another version, for those asked for."""
    (tmp_path / "x.jsonl").touch()
    spec, (key, value) = EncoderSpec("x"), *keys.items()
    for path in (str(tmp_path), str(tmp_path / "x.jsonl"), f"{tmp_path}/*.jsonl", "memory://x.jsonl"):
        said = re.escape(f"{path}: {key} is {value}, which chooses from a data set of the hub; path names files")
        with pytest.raises(ValueError, match=said):
            PairData([Source(path, COLUMNS, **keys, streaming="://" in path)], spec)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=said):
            PairData([], spec, validation=[EvalSource(name="dev", path=path, columns=COLUMNS, **keys)])  # type: ignore[arg-type]
    PairData([Source("org/set", COLUMNS, **keys)], spec)  # type: ignore[arg-type]


def test_a_prompt_of_a_column_that_fills_its_length_is_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    data = make_data(tmp_path, tiny_encoder, 9, batch_size=8)
    source = data.train_sources[0]
    prompt = "the doctor bought the car at the shop:"
    least = len(AutoTokenizer.from_pretrained(tiny_encoder)(prompt)["input_ids"])
    source.prompts, source.max_lengths = {"anchor": prompt + " "}, {"anchor": least + 1}
    data.text_of(source)
    source.max_lengths = {"anchor": least}
    message = f"before 'anchor', which makes {least} pieces with the special ones, and {least} are kept: no text is"
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    source.prompts, source.max_lengths = {"positive": prompt * 5}, None
    with pytest.raises(ValueError, match=r"before 'positive', which makes .* and 32 are kept: no text is left"):
        data.text_of(source)


def test_a_prompt_of_an_evaluation_that_fills_the_length_is_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    """Every text of the column would have one embedding, and the metric say nothing."""
    rows = make_data(tmp_path, tiny_encoder, 9, batch_size=8).train_sources[0].path
    prompts = {"positive": "the doctor bought the car at the shop:" * 5}
    held_out = EvalSource(name="dev", path=rows, columns=COLUMNS, prompts=prompts)
    data = PairData([], EncoderSpec(str(tiny_encoder), max_length=32), validation=[held_out], cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"before 'positive', which makes .* and 32 are kept: no text is left"):
        data.setup("validate")


class _SlowBatches(StepBatches):
    def __getitem__(self, step: int) -> PackedBatch:
        time.sleep(0.03)
        return super().__getitem__(step)


def test_the_loader_tells_what_was_waited_for_it(tmp_path: Path, tiny_encoder: Path) -> None:
    """The time inside the loader, and none of what is done with a batch."""
    data = make_data(tmp_path, tiny_encoder, num_rows=24, batch_size=8)
    data.setup("fit")
    batches = _SlowBatches(data.tables, data.order, 3, rank=0, world_size=1)
    loader = StepLoader(batches, batch_sampler=[[0], [1, 2]], collate_fn=list)
    begun = time.perf_counter()
    for batch in loader:
        assert batch.num_rows == 8
        time.sleep(0.05)
    assert 3 * 0.03 <= loader.seconds_waited <= time.perf_counter() - begun - 3 * 0.05
