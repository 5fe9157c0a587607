"""What must match when a run goes on, and the words that allow a difference."""

import pytest

from trainer.identity import Resume, differences, identity, refuse_differences

CONFIG = {
    "seed_everything": 42,
    "ckpt_path": None,
    "model": {"encoder": {"backbone": "b"}, "loss": {"class_path": "CoSENT"}, "learning_rate": 5e-5, "max_tokens": 64},
    "data": {
        "train": [{"path": "a.jsonl", "columns": {"anchor": "x"}}],
        "validation": [{"path": "d.jsonl"}],
        "batch_size": 16,
        "num_workers": 2,
        "cache_dir": "c",
    },
    "trainer": {"devices": 2, "max_epochs": 1, "callbacks": None, "default_root_dir": "r", "precision": "32-true"},
    "checkpoint": {"keep": 2},
    "tracking": {"wandb": "off"},
    "resume": {"allow": None},
}


def test_what_decides_the_weights_and_nothing_else() -> None:
    found = identity(CONFIG, ["f1"], {"trainer.precision": "32-true", "trainer.strategy": "replicated"})
    assert found == {
        "seed_everything": 42,
        "model.encoder.backbone": "b",
        "model.loss.class_path": "CoSENT",
        "model.learning_rate": 5e-5,
        "data.train.0.columns.anchor": "x",
        "data.train.0.rows": "f1",
        "data.batch_size": 16,
        "trainer.max_epochs": 1,
        "trainer.precision": "32-true",
        "trainer.strategy": "replicated",
    }


# Fault -> what changes, and the word that allows it
CHANGES = {
    "strategy": ({"trainer.strategy": "zero-2"}, "strategy"),
    "precision": ({"trainer.precision": "bf16-mixed"}, "precision"),
    "model": ({"model.encoder.backbone": "c"}, "encoder"),
    "data": ({"data.train.0.rows": "f2"}, "train"),
    "loss": ({"model.loss.class_path": "InfoNCE", "model.loss.init_args.scale": 20.0}, "loss"),
    "batch size": ({"data.batch_size": 32}, "batch_size"),
    "learning rate": ({"model.learning_rate": 1e-4}, "learning_rate"),
    "no duplicates": ({"data.no_duplicates": True}, "no_duplicates"),
    "rows per label": ({"data.train.0.rows_per_label": 4}, "train"),
    "seed": ({"seed_everything": 1}, "seed_everything"),
}


@pytest.mark.parametrize(("change", "word"), CHANGES.values(), ids=CHANGES)
def test_each_difference_is_named_refused_and_allowed_in_words(change: dict, word: str) -> None:
    saved = identity(CONFIG, ["f1"], {"trainer.strategy": "replicated"})
    found = differences(saved, {**saved, **change})
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"not the one that saved C: {key} was .*, now {value}") as error:
        refuse_differences(found, [], "C")
    assert f"--resume.allow {word} ·" in str(error.value)
    with pytest.raises(ValueError, match="not the one"):
        refuse_differences(found, ["warmup_ratio"], "C")
    lines = refuse_differences(found, [word], "C")
    assert len(lines) == len(change)
    assert lines[0].startswith(f"{key} was")
    assert refuse_differences(found, [key.split(".")[0]], "C") == lines


def test_several_differences_in_two_lines() -> None:
    saved = {f"model.a{n}": n for n in range(9)}
    with pytest.raises(ValueError, match="and 3 more") as error:
        refuse_differences(differences(saved, {}), [], "C")
    assert len(str(error.value).splitlines()) == 2


def test_equal_runs_and_the_forms_of_allow() -> None:
    assert differences({"a": 1}, {"a": 1}) == {}
    assert refuse_differences({}, [], "C") == []
    assert Resume().names == []
    assert Resume("learning_rate, max_epochs").names == ["learning_rate", "max_epochs"]
    assert Resume(["data"]).names == ["data"]
