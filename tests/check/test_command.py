"""`trainer check` on the mistakes of published models and on sound sets: verdict, exit code, text, JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from tests.data.test_retrieval import write_beir
from trainer.cli import main
from trainer.demo_data import write_pairs

CONFIGS = Path(__file__).parents[2] / "configs"
PAIR = {"anchor": "a", "positive": "b"}
SCORED = {**PAIR, "score": "s"}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def pairs(count: int, scores: Sequence[float], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows without a text that stands twice."""
    return [
        {"a": f"{texts[i % len(texts)]} {i}", "b": f"{texts[-1 - i % len(texts)]} {i}", "s": scores[i % len(scores)]}
        for i in range(count)
    ]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a check."""
    capsys.readouterr()
    code = main(["check", "--json", *map(str, args)])
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report["errors"] else 0)
    return code, report


def names(report: dict[str, Any], severity: str) -> list[str]:
    return [f["name"] for f in report["findings"] if f["severity"] == severity and not f["allowed"]]


def source(path: Path, columns: dict[str, str], **more: Any) -> str:
    return json.dumps([{"path": str(path), "columns": columns, **more}])


def common(folder: Path, encoder: Path, loss: str) -> list[str]:
    return ["--model.encoder.backbone", str(encoder), "--model.loss", loss, "--data.cache_dir", str(folder / "cache")]


# -- published models -------------------------------------------------------------------------------------

# What their data was like, and the errors that must be named.
PUBLISHED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ja-en-financial": ({"count": 3725, "scores": [1.0]}, ["constant_labels"]),
    "hebrew-nli": ({"count": 600, "scores": [0, 1, 2]}, ["label_range"]),
    "korean-terms": ({"count": 7, "scores": [0.5, 0.7, 1.0]}, ["few_rows_many_epochs"]),
    "korean-nutrition": ({"count": 81, "scores": [0, 1]}, []),
    "sinhala-qa": ({"count": 600, "scores": [0]}, []),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_recipes_allow_their_mistakes(
    recipe: str, tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has exactly the errors that it allows, so it runs as published and says what is wrong."""
    shape, errors = PUBLISHED[recipe]
    path = CONFIGS / "published" / f"{recipe}.yaml"
    config = yaml.safe_load(path.read_text())
    rows = pairs(shape["count"], shape["scores"], demo_texts)
    columns = config["data"]["train"][0]["columns"]
    keys = {"anchor": "a", "positive": "b", "text": "a", "score": "s", "label": "s"}
    renamed = [{column: row[keys[name]] for name, column in columns.items()} for row in rows]
    args: list[object] = ["--config", path, "--model.encoder.backbone", tiny_encoder, "--model.encoder.max_length", 64]
    args += ["--data.cache_dir", tmp_path / "cache", "--data.train.path", write(tmp_path / "train.jsonl", renamed)]
    if "validation" in config["data"]:
        dev = [{"sentence1": f"x {i}", "sentence2": f"y {i}", "score": i % 6} for i in range(12)]
        args += ["--data.validation.path", write(tmp_path / "dev.jsonl", dev)]
    code, report = run(capsys, *args)
    assert code == 0
    assert [f["name"] for f in report["findings"] if f["severity"] == "error"] == errors
    assert config.get("check", {}).get("allow", []) == errors
    code, report = run(capsys, *args, "--check.allow", "[]")
    assert (code, names(report, "error")) == (1 if errors else 0, errors)
    if recipe == "korean-nutrition":
        assert "unreachable_margin" in names(report, "warning")
    if recipe == "korean-terms":
        assert "no_low_scores" in names(report, "warning")


def test_one_class_of_triplets(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", [{"a": f"{demo_texts[i]} {i}", "s": 3} for i in range(81)])
    args = [
        *common(tmp_path, tiny_encoder, "BatchHardTriplet"),
        "--data.train",
        source(path, {"text": "a", "label": "s"}),
    ]
    _, report = run(capsys, *args)
    assert names(report, "error") == ["single_class"]
    assert report["findings"][0]["cause"].startswith("all 81 rows have the label 3")


def test_a_validation_set_inside_the_training_set(
    tmp_path: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, _ = write_pairs(tmp_path, 60, 20)
    columns = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
    validation = [{"name": "dev", "path": str(train), "columns": columns}]
    args = [*common(tmp_path, tiny_encoder, "CosineSimilarity"), "--data.validation", json.dumps(validation)]
    _, report = run(capsys, *args, "--data.train", source(train, columns, score_range=[0, 5]))
    assert names(report, "error") == ["leak"]
    assert report["validation"][0]["num_known_rows"] == 60


def test_what_is_streamed_is_not_called_free_of_leaks(
    sound: list[str], tmp_path: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same 200 rows train and validate: read while training, nobody has looked for them."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in (tmp_path / "x.jsonl").open()]), path)
    validation = json.dumps([{"name": "dev", "path": str(path), "columns": SCORED}])
    streamed = {"path": str(path), "columns": SCORED, "streaming": True}
    args = [*sound, "--data.validation", validation, "--data.train"]
    _, report = run(capsys, *args, json.dumps([streamed]))
    (facts,) = report["validation"]
    assert (facts["num_rows"], facts["num_known_rows"], facts["num_known_texts"]) == (200, None, None)
    assert facts["num_unsearched"] == 1
    assert main(["check", *args, json.dumps([streamed])]) == 0
    assert "validation dev  200 rows; not looked for in training, which is streamed" in capsys.readouterr().out
    other = {
        "path": str(write(tmp_path / "other.jsonl", pairs(20, [0.0, 1.0], [f"{text} ." for text in demo_texts]))),
        "columns": SCORED,
    }
    assert main(["check", *args, json.dumps([other, streamed])]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "200 rows; 0 of them (0.0%) and 0 of 400 texts stand in training; 1 of its sources not looked at" in said


def test_columns_that_the_loss_does_not_take(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence that fit would stop with, which no check.allow helps."""
    path = write(tmp_path / "x.jsonl", pairs(20, [0, 1], demo_texts))
    args = [*common(tmp_path, tiny_encoder, "CosineSimilarity"), "--data.train", source(path, PAIR)]
    _, report = run(capsys, *args)
    assert names(report, "error") == ["unfit_columns"]
    assert report["findings"][0]["cause"] == f"CosineSimilarity needs a column 'score', {path} has anchor, positive"


def test_a_negative_that_is_the_positive(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", pairs(20, [0, 1], demo_texts))
    args = [*common(tmp_path, tiny_encoder, "InfoNCE"), "--data.train", source(path, {**PAIR, "negative": "b"})]
    _, report = run(capsys, *args)
    assert names(report, "error") == ["unfit_columns"]
    wanted = f"{path} maps negative to 'b', the column of its positives: each text would be pulled and pushed"
    assert report["findings"][0]["cause"] == wanted


def test_negatives_without_the_prompt_of_the_positives(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In training, and in a set that is scored by them; lists name theirs once."""
    rows = [{"a": f"{text} 1", "p": f"{text} 2", "n": [f"{text} 3", f"{text} 4"]} for text in demo_texts[:40]]
    train, dev = write(tmp_path / "x.jsonl", rows[:30]), write(tmp_path / "dev.jsonl", rows[30:])
    columns = {"anchor": "a", "positive": "p", "negatives": "n"}
    args = [*common(tmp_path, tiny_encoder, "InfoNCE"), "--trainer.max_epochs", 1]

    def unlike(**prompts: str) -> tuple[list[str], list[str]]:
        ranked = {"name": "dev", "path": str(dev), "columns": columns, "evaluator": "Reranking", "prompts": prompts}
        named = "--data.train", source(train, columns, prompts=prompts), "--data.validation", json.dumps([ranked])
        _, report = run(capsys, *args, *named)
        found = [one for one in report["findings"] if one["name"] == "unlike_prompts"]
        assert all(one["severity"] == "error" for one in found)
        return [one["where"] for one in found], [one["cause"].partition(":")[0] for one in found]

    both = {"anchor": "query: ", "positive": "passage "}
    where, causes = unlike(**both)
    assert where == [str(train), "dev"]
    assert set(causes) == {"'positive' has the prompt 'passage ', 'negatives' has no prompt"}
    assert unlike(**both, negatives="passage ") == ([], [])


def test_a_source_whose_weight_is_too_small_for_a_step(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """10 steps shared out by 100 and 1: the second source has a tenth of a step, by 100 and 10 one."""
    found = []
    for weight in (1.0, 10.0):
        paths = [write(tmp_path / f"{name}.jsonl", pairs(80, [0, 1], demo_texts)) for name in ("large", "small")]
        train = [{"path": str(p), "columns": PAIR, "weight": w} for p, w in zip(paths, (100.0, weight), strict=True)]
        args = [*common(tmp_path, tiny_encoder, "InfoNCE"), "--data.train", json.dumps(train)]
        _, report = run(capsys, *args, "--data.mixing", "weighted", "--data.batch_size", "16")
        found.append([f["where"] for f in report["findings"] if f["name"] == "untrained_source"])
    assert found == [[str(paths[1])], []]


def test_scores_that_do_not_match_the_candidates(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The step that fit would stop at."""
    rows = [{"a": t, "p": f"{t} x", "n": f"{t} y", "m": f"{t} z", "s": 1.0} for t in demo_texts[:20]]
    path = write(tmp_path / "x.jsonl", rows)
    columns = {"anchor": "a", "positive": "p", "negative": "n", "negative_1": "m", "score_1": "s"}
    for loss, taken in (("MarginMSE", "2 or 3"), ("DistillKLDiv", "3")):
        _, report = run(capsys, *common(tmp_path, tiny_encoder, loss), "--data.train", source(path, columns))
        assert names(report, "error") == ["unfit_columns"]
        wanted = f"{loss} takes {taken} scores a row beside 3 candidates, {path} has 1"
        assert report["findings"][0]["cause"] == wanted


@pytest.mark.parametrize(
    ("evaluator", "columns", "told"),
    [
        ("BinaryClassification", {"label": "l"}, "needs labels 0 and 1, both of them; the 20 rows hold 0, 1, 2"),
        ("STS", {"score": "one"}, "Correlation needs at least two different scores; the 20 rows hold 1."),
        ("LabelRetrieval", {"text": "a", "label": "own"}, "the 20 texts have 20 labels, each its own"),
        ("Reranking", {"label": "one"}, "none of 20 queries has both relevant and other candidates"),
        ("Reranking", {"label": "one", "negative": "b"}, "the set has a label and negative"),
        ("Reranking", {}, "needs a label that says which candidates are relevant, or negatives"),
        ("LabelAccuracy", {"label": "l"}, "LabelAccuracy asks InfoNCE for classes, which it does not tell"),
    ],
)
def test_a_set_that_its_evaluator_can_not_score(
    tmp_path: Path,
    tiny_encoder: Path,
    demo_texts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    evaluator: str,
    columns: dict[str, str],
    told: str,
) -> None:
    """Refused before a weight is read, by check as by fit."""
    monkeypatch.chdir(tmp_path)
    rows = [{"a": t, "b": f"{t} x", "l": i % 3, "one": 1, "own": i} for i, t in enumerate(demo_texts[:20])]
    path = write(tmp_path / "x.jsonl", rows)
    columns = columns if "text" in columns else {**PAIR, **columns}
    held_out = [{"name": "dev", "path": str(path), "columns": columns, "evaluator": evaluator}]
    flags = [*common(tmp_path, tiny_encoder, "InfoNCE"), "--data.train", source(path, PAIR)]
    for command in ("check", "fit"):
        assert main([command, *flags, "--data.validation", json.dumps(held_out)]) == 1
        assert told in capsys.readouterr().err


def test_labels_of_a_validation_set_that_the_head_does_not_have(
    tmp_path: Path,
    tiny_encoder: Path,
    demo_texts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of training, refused before a weight is read."""
    monkeypatch.chdir(tmp_path)
    path = write(
        tmp_path / "x.jsonl", [{"a": t, "b": f"{t} x", "l": i % 3, "m": i % 4} for i, t in enumerate(demo_texts[:40])]
    )
    held_out = [{"name": "dev", "path": str(path), "columns": {**PAIR, "label": "m"}, "evaluator": "LabelAccuracy"}]
    flags = [*common(tmp_path, tiny_encoder, "Softmax"), "--data.train", source(path, {**PAIR, "label": "l"})]
    for command in ("check", "fit"):
        assert main([command, *flags, "--data.validation", json.dumps(held_out)]) == 1
        told = capsys.readouterr()
        assert "dev: LabelAccuracy: the 40 rows have labels 0 to 3, the head has 3 classes, 0 to 2. Set" in told.err
        assert "Starting" not in told.out


def test_columns_that_an_evaluator_lacks(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", pairs(20, [0, 1], demo_texts))
    validation = json.dumps([{"name": "dev", "path": str(path), "columns": PAIR, "evaluator": "Triplet"}])
    args = [*common(tmp_path, tiny_encoder, "InfoNCE"), "--data.train", source(path, PAIR)]
    _, report = run(capsys, *args, "--data.validation", validation)
    (finding,) = [found for found in report["findings"] if found["name"] == "unfit_columns"]
    assert finding["cause"] == f"Triplet needs column negative, {path} has anchor, positive"
    assert finding["where"] == "dev"


# -- numbers, text, JSON ----------------------------------------------------------------------------------


@pytest.fixture
def sound(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str]) -> list[str]:
    """200 pairs, no weights and no network."""
    encoder = tmp_path / "no-weights"
    shutil.copytree(tiny_encoder, encoder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = write(tmp_path / "x.jsonl", pairs(200, [0.0, 0.3, 1.0], demo_texts))
    dev = write(tmp_path / "dev.jsonl", [{"a": f"x {i}", "b": f"y {i}", "s": i / 12} for i in range(12)])
    validation = json.dumps([{"name": "dev", "path": str(dev), "columns": SCORED}])
    columns = source(path, SCORED)
    return [*common(tmp_path, encoder, "CosineSimilarity"), "--data.train", columns, "--data.validation", validation]


def test_plan(
    sound: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps, negatives, tokens and padding are those of the run: counted here from the packed batches themselves."""
    monkeypatch.chdir(tmp_path)
    from trainer.data.batches import StepBatches
    from trainer.lightning_cli import run as build

    more = ["--model.loss", "InfoNCE", "--trainer.devices", "2", "--trainer.max_epochs", "3"]
    code, report = run(capsys, *sound, *more, "--trainer.limit_train_batches", "10")
    assert code == 0
    assert report["errors"] == 0
    plan, (train,) = report["plan"], report["train"]
    assert (plan["steps_per_epoch"], plan["num_steps"], plan["num_ranks"]) == (10, 30, 2)
    assert plan["num_negatives"] == [15]
    from trainer.config_files import read_command

    data = build(["fit", *sound, "--trainer.accelerator", "cpu"], read_command(sound), execute=False).datamodule
    data.setup("fit")
    batches = [StepBatches(data.tables, data.order, 13, 0, 1)[step] for step in range(13)]
    assert plan["tokens_per_step"] == pytest.approx(sum(b.num_tokens for b in batches) / 13)
    assert plan["max_tokens_per_step"] == max(b.num_tokens for b in batches)
    shares = sum(b.num_tokens for b in batches) / sum(b.padded_tokens for b in batches)
    assert plan["padding_efficiency"] == pytest.approx(shares)
    assert plan["num_used_pieces"] == len(data.used_ids()) < plan["num_pieces"]
    assert train["num_rows"] == 200
    assert not Path("runs").exists()


def test_memory_is_that_of_the_parameters(
    sound: list[str], tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parameters as a loaded and compacted encoder has them, 4 bytes each, AdamW's state twice that."""
    import torch

    from trainer.encoder import Encoder, EncoderSpec

    _, report = run(capsys, *sound)
    memory, plan = report["memory"], report["plan"]
    encoder = Encoder(EncoderSpec(str(tiny_encoder)), 1000)
    # Any ids of the right number; those of special pieces are among the ones that texts use.
    special = encoder.text.tokenizer.all_special_ids
    others = [i for i in range(plan["num_pieces"]) if i not in special]
    encoder.compact_vocabulary(torch.tensor(others[: plan["num_used_pieces"] - len(special)]))
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    # A special piece that no text uses is trained too.
    assert memory["num_trained"] == pytest.approx(trained, abs=len(special) * 32)
    assert memory["gradients"] == 4 * memory["num_trained"]
    assert memory["optimizer"] == 8 * memory["num_trained"]
    assert memory["total"] == sum(memory[key] for key in ("weights", "gradients", "optimizer", "activations"))
    _, off = run(capsys, *sound, "--model.encoder.compact_vocabulary", "off", "--model.optimizer", "sgd")
    assert off["memory"]["weights"] == 4 * off["memory"]["num_parameters"] < memory["weights"]
    assert off["memory"]["optimizer"] == 0
    # ZeRO on two ranks: half of moments and copy from stage 1, of gradients from 2; of weights under 3.
    for stage, expected in ((1, (1, 4, 6)), (2, (1, 2, 6)), (3, (0.5, 2, 6))):
        zero = json.dumps({"class_path": "ZeRO", "init_args": {"stage": stage, "live_parameters": 0}})
        _, shared = run(capsys, *sound, "--trainer.devices", "2", "--trainer.strategy", zero)
        found = shared["memory"]
        share = (
            found["weights"] / memory["weights"],
            *(found[k] / found["num_trained"] for k in ("gradients", "optimizer")),
        )
        assert share == pytest.approx(expected, rel=1e-6)


def test_text(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.jsonl", pairs(40, [1.0], demo_texts))
    args = [*common(tmp_path, tiny_encoder, "CosineSimilarity"), "--data.train", source(path, SCORED)]
    assert main(["check", *args]) == 1
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 100
    assert "ERROR   constant_labels" in "\n".join(lines)
    assert "            loss: {class_path: InfoNCE, init_args: {scale: 20.0}}" in "\n".join(lines)
    assert lines[-1].startswith("1 error, ")
    assert main(["check", *args, "--check.allow", "constant_labels"]) == 0
    said = capsys.readouterr().out
    assert "ALLOWED constant_labels" in said
    assert "\x1b" not in said


def test_a_batch_smaller_than_the_number_of_ranks_is_refused(
    sound: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As fit refuses it, here without the ranks."""
    more = ["--trainer.devices", "2", "--trainer.num_nodes", "2", "--data.batch_size"]
    assert main(["check", *sound, *more, "3"]) == 1
    assert "data.batch_size is 3 rows over all ranks, but there are 4 ranks; raise" in capsys.readouterr().err
    code, report = run(capsys, *sound, *more, "4")
    assert (code, report["plan"]["num_ranks"]) == (0, 4)


@pytest.mark.parametrize(
    ("kind", "name", "kept"),
    [
        ("rows", "report.json", None),
        ("tokens", "report.json", 0.0),
        ("tokens", "ids.int32", 0.5),
        ("rows", "rows.arrow", 0.5),
    ],
)
def test_a_damaged_cache_is_made_again(
    kind: str, name: str, kept: float | None, sound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is gone (None), or cut to a part of its bytes; no fact comes from the cache."""
    _, before = run(capsys, *sound)
    shutil.rmtree(tmp_path / "cache" / "facts")
    for file in list((tmp_path / "cache" / kind).glob(f"*/{name}")):
        if kept is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    _, after = run(capsys, *sound)
    assert after == before


def test_an_unknown_name_is_refused(sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *sound, "--check.allow", "constant_label"]) == 2
    said = capsys.readouterr().err
    assert "flag --check.allow: check.allow: 'constant_label' is no finding. Did you mean 'constant_labels'?" in said


def test_a_monitor_of_no_set_is_refused(sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *sound, "--checkpoint.monitor", "eval/dve/spearman_cosine"]) == 1
    said = "checkpoint.monitor 'eval/dve/spearman_cosine' is of no set in data.validation; there are: eval/dev/.... "
    assert f"error: {said}Did you mean 'eval/dev/spearman_cosine'?" in capsys.readouterr().err
    assert main(["check", *sound, "--checkpoint.monitor", "eval/dev/pearson_cosine"]) == 0


WATCHED = {
    ("EarlyStopping", "val_loss"): "is of no set in data.validation; there are: eval/dev/..., eval/docs/....",
    ("EarlyStopping", "train/loss"): "is of no set in data.validation; there are: eval/dev/..., eval/docs/....",
    ("EarlyStopping", "eval/docs/spearman_cosine"): "is not measured; there are: eval/docs/cosine_accuracy@1, ",
    ("EarlyStopping", "eval/docs/a/cosine_ndcg@1"): "is not measured; there are: eval/docs/a/cosine_accuracy@1, ",
    ("ModelCheckpoint", "eval/dev/spearman_cosin"): "Did you mean 'eval/dev/spearman_cosine'?",
    ("EarlyStopping", "eval/dev/spearman_dot"): "",
    ("EarlyStopping", "eval/docs/cosine_ndcg@10"): "",
    ("EarlyStopping", "eval/docs/b/cosine_recall@3"): "",
    ("ModelCheckpoint", "val_loss"): "",  # what a callback of the user's logs may be watched by this one
}


@pytest.mark.parametrize(("kind", "monitor"), WATCHED)
def test_a_callback_that_watches_what_no_set_gives(
    kind: str, monitor: str, sound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        write_beir(tmp_path / "docs" / name)
    dev = json.loads(sound[sound.index("--data.validation") + 1])
    docs = {"name": "docs", "path": str(tmp_path / "docs"), "evaluator": "InformationRetrieval"}
    callback = {"class_path": kind, "init_args": {"monitor": monitor, "mode": "max"}}
    words = ["--data.validation", json.dumps([*dev, docs]), "--trainer.callbacks", json.dumps([callback])]
    said = WATCHED[kind, monitor]
    assert main(["check", *sound, *words]) == bool(said)
    errors = capsys.readouterr().err
    assert said in errors
    assert not said or f"error: {kind}: monitor '{monitor}' is " in errors


def test_losses_that_no_source_names_are_refused(sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *sound, "--model.losses", '{"spare": {"class_path": "InfoNCE"}}']) == 1
    assert "error: model.losses has 'spare', but no source of data.train names it" in capsys.readouterr().err


def test_dimensions_that_the_embeddings_do_not_have_are_refused_without_weights(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder's config says 32; behind a Dense of 16 that is too many."""
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    model.append(Dense(32, 16))
    model.save(str(tmp_path / "dense"))
    shutil.copytree(tiny_encoder, tmp_path / "plain")
    for weights in tmp_path.rglob("model.safetensors"):
        weights.unlink()
    path = write(tmp_path / "x.jsonl", pairs(40, [0.0, 1.0], demo_texts))
    for encoder, dims, most in (("plain", [64, 32], 32), ("dense", [32, 16], 16)):
        loss = json.dumps({"class_path": "Matryoshka", "init_args": {"loss": "InfoNCE", "dims": dims}})
        args = [*common(tmp_path, tmp_path / encoder, loss), "--data.train", source(path, PAIR)]
        assert main(["check", *args]) == 1
        said = f"error: Matryoshka dims has {dims[0]}, but embeddings have {most} dimensions; take {most} and smaller"
        assert said in capsys.readouterr().err
        args[3] = args[3].replace(str(dims), str(dims[1:]))
        assert main(["check", *args]) == 0


LAYERS = {
    ("freeze=3",): "model.encoder.freeze is 3, but 'bert' has 2 layers; give 0 (the embeddings alone) to 2",
    ("freeze=-1",): "model.encoder.freeze is -1, but 'bert' has 2 layers; give 0 (the embeddings alone) to 2",
    ("freeze=2",): "nothing is left to train: model.encoder.freeze 2 is all layers, and CosineSimilarity has",
    ("lora.target_modules=[q]",): "model.encoder.lora.target_modules has 'q', which no linear layer of 'bert' is",
    ("lora.target_modules=[]",): "model.encoder.lora.target_modules is empty; name linear layers, or take auto",
    ("lora.r=2", "freeze=2"): "model.encoder.freeze is 2: all 2 layers are frozen, and none is left to adapt",
}


@pytest.mark.parametrize("keys", LAYERS, ids=",".join)
def test_layers_that_are_not_there(keys: Sequence[str], sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *sound, *(f"--model.encoder.{key}" for key in keys)]) == 1
    assert f"error: {LAYERS[tuple(keys)]}" in capsys.readouterr().err


def test_layers_of_a_document_encoder_that_are_not_there(
    sound: list[str], tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    towers = [*sound, f"--model.document_encoder.backbone={tiny_encoder}", "--model.encoder.freeze=2"]
    assert main(["check", *towers, "--model.document_encoder.freeze=3"]) == 1
    assert "error: model.document_encoder.freeze is 3, but 'bert' has 2 layers; give 0 " in capsys.readouterr().err
    assert main(["check", *towers]) == 0  # the other tower is trained


def test_a_head_is_trained_over_frozen_layers(sound: list[str]) -> None:
    assert main(["check", *sound, "--model.encoder.freeze=2", "--model.loss=SigLIP"]) == 0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_step_of_a_probe_is_that_of_the_run(
    sound: list[str], tmp_path: Path, tiny_encoder: Path, name: str
) -> None:
    seen = []

    def look(optimizer: Optimizer, *_: Any) -> None:
        sizes = [sorted(p.shape for p in group["params"]) for group in optimizer.param_groups]
        kept = [{key: group[key] for key in ("fused", "weight_decay")} for group in optimizer.param_groups]
        seen.append((type(optimizer), sizes, kept))

    # Compaction of the vocabulary, weight decay and its exemptions: all that the groups depend on.
    words = [*sound, "--model.encoder.backbone", str(tiny_encoder), f"--model.optimizer={name}"]
    words += ["--model.weight_decay=0.1", "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--tracking.wandb=off"]
    hook = register_optimizer_step_pre_hook(look)
    try:
        assert main(["check", *words, "--probe"]) == 0
        assert main(["fit", *words, f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 0
    finally:
        hook.remove()
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_probe_measures_a_real_step(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", pairs(40, [0.0, 1.0], demo_texts))
    args = [*common(tmp_path, tiny_encoder, "InfoNCE"), "--data.train", source(path, PAIR)]
    _, report = run(capsys, *args, "--probe", "--trainer.devices", "2")
    longest = -(-report["plan"]["max_tokens_per_step"] // 2)
    assert "GiB at most" in report["measured"]
    tokens = int(report["measured"].split(" rows, ")[1].split(" ")[0])
    assert "a batch of 8 rows" in report["measured"]
    assert tokens == pytest.approx(longest, rel=0.3)


def test_probe_reads_only_the_start_of_a_stream(
    tmp_path: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 slices. Rows are permuted within 8, and a loader has the next 8 built ahead."""
    table = pa.table({"a": [f"the cat {i}" for i in range(24 * 2048)], "b": [f"a dog {i}" for i in range(24 * 2048)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2048)
    args = [*common(tmp_path, tiny_encoder, "InfoNCE"), "--data.train"]
    _, report = run(capsys, *args, source(tmp_path / "x.parquet", PAIR, streaming=True), "--probe")
    assert "a batch of 16 rows" in report["measured"]
    assert 0 < len(list((tmp_path / "cache").glob("blocks/*/slice-*.arrow"))) <= 16


# -- real data --------------------------------------------------------------------------------------------


def without_weights(folder: Path, tokenizer: Path) -> Path:
    """A small BERT with a real tokenizer, and nothing but its config."""
    encoder = folder / "encoder"
    shutil.copytree(tokenizer, encoder, copy_function=shutil.copyfile)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = {"model_type": "bert", "vocab_size": 119547, "max_position_embeddings": 512, **sizes}
    (encoder / "config.json").write_text(json.dumps(config))
    return encoder


def test_english_tokenizer_on_amharic(
    tmp_path: Path, data_dir: Path, minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"anchor": "question", "positive": "paragraph"}
    args = [*common(tmp_path, minilm, "InfoNCE"), "--data.train", source(data_dir / "qa/amharic.dev.jsonl.gz", columns)]
    _, report = run(capsys, *args)
    assert names(report, "error") == ["unknown_pieces"]
    assert next(iter(report["train"][0]["columns"][0]["scripts"])) == "Ethiopic"
    assert report["train"][0]["columns"][0]["unknown_share"] > 0.8


@pytest.mark.parametrize("loss", ["CosineSimilarity", "CoSENT", "InfoNCE"])
def test_sound_english_set(
    loss: str, tmp_path: Path, data_dir: Path, minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
    train, dev = (str(data_dir / f"sts/stsb-en.{split}.jsonl.gz") for split in ("train", "dev"))
    more = {"columns": columns, "score_range": [0, 5]}
    args = ["--model.encoder.backbone", minilm, "--model.loss", loss, "--data.train", source(Path(train), **more)]
    _, report = run(capsys, *args, "--data.validation", json.dumps([{"name": "dev", "path": dev, **more}]))
    assert report["errors"] == 0


@pytest.mark.parametrize(
    ("name", "columns", "loss", "scripts"),
    [
        ("sts/jsts", {"anchor": "sentence1", "positive": "sentence2", "score": "score"}, "CoSENT", {"Han", "Hiragana"}),
        ("bitext/tanaka-ja-en", {"anchor": "ja", "positive": "en"}, "InfoNCE", {"Han", "Hiragana"}),
    ],
)
def test_sound_japanese_sets(
    name: str, columns: dict[str, str], loss: str, scripts: set[str], tmp_path: Path, data_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    encoder = without_weights(tmp_path, data_dir / "tokenizers/mbert")
    args = [*common(tmp_path, encoder, loss), "--data.train", source(data_dir / f"{name}.dev.jsonl.gz", columns)]
    _, report = run(capsys, *args)
    assert report["errors"] == 0
    assert "fragmented_texts" not in names(report, "warning")
    assert scripts <= set(report["train"][0]["columns"][0]["scripts"])
