"""The exported folder, opened by sentence-transformers itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

from trainer.cli import main
from trainer.data.collate import pack_texts
from trainer.demo_encoder import write_encoder
from trainer.export.sentence_transformers import export_run
from trainer.manifest import STATE, mark_best, read_state, write_checkpoint

TEXTS = [
    "The doctor bought the car at the shop at dawn.",
    "A physician purchased an automobile.",
    "it was the monarch who hid that diamond after dark in the hostel",
    "zebra xylophone quartz jukebox",  # from here on pieces that no training text uses
    "jukebox " * 40,  # truncated
    "zebra",
]


def assert_same_embeddings(run: Any, out: Path) -> SentenceTransformer:
    model = SentenceTransformer(str(out), device="cpu")
    ours = run.embed(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS), ours.numpy(), rtol=0, atol=1e-5)
    assert ours.std(dim=0).max() > 0.01, "texts that all embed alike would prove nothing"
    return model


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_sentence_transformers_encodes_as_we_do(bench: Any, tmp_path: Path, pooling: str, normalize: bool) -> None:
    run = bench.write_run(f"{pooling}-{normalize}", {"pooling": pooling, "normalize": normalize})
    used = set(run.encoder.vocabulary.used_ids.tolist())
    covered = [set(ids) <= used for ids in run.encoder.text(TEXTS)]
    assert covered[0]
    assert not any(covered[3:])
    export_run(run.folder, tmp_path / "model")
    model = assert_same_embeddings(run, tmp_path / "model")
    assert isinstance(model[-1], Normalize) == normalize
    assert model[1].pooling_mode == {"last": "lasttoken"}.get(pooling, pooling)
    base = SentenceTransformer(str(bench.backbone), device="cpu").encode(TEXTS)
    assert np.abs(base - model.encode(TEXTS)).max() > 0.1, "the weights are the backbone's"


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_other_backbones(bench: Any, tmp_path: Path, kind: Any) -> None:
    backbone = write_encoder(tmp_path / "base", [p.sentence1 for p in bench.pairs] + TEXTS, hidden=32, kind=kind)
    run = bench.write_run(kind, {"backbone": str(backbone)})
    export_run(run.folder, tmp_path / "model")
    assert_same_embeddings(run, tmp_path / "model")


def test_dense_module_is_trained_and_kept(bench: Any, tmp_path: Path) -> None:
    base = SentenceTransformer(str(bench.backbone), device="cpu")
    torch.manual_seed(0)
    modules = [base[0], Pooling(32, "cls"), Dense(32, 12), Normalize()]
    dense = SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="dot")
    dense.save_pretrained(str(tmp_path / "base"), create_model_card=False)
    run = bench.write_run("dense", {"backbone": str(tmp_path / "base"), "max_length": 9})
    export_run(run.folder, tmp_path / "model")
    model = assert_same_embeddings(run, tmp_path / "model")
    assert (model.get_embedding_dimension(), model.max_seq_length, model.similarity_fn_name) == (12, 9, "dot")
    assert not torch.equal(model[2].linear.weight, dense[2].linear.weight)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompt_of_the_config_becomes_the_default(bench: Any, tmp_path: Path, include_prompt: bool) -> None:
    base = SentenceTransformer(str(bench.backbone), device="cpu")
    base.set_pooling_include_prompt(include_prompt)
    base.prompts = {"query": "the doctor ", "document": "", "old": "At the hotel: "}
    base.default_prompt_name = "old"
    base.save_pretrained(str(tmp_path / "base"), create_model_card=False)
    spec = {"backbone": str(tmp_path / "base"), "prompt": "the teacher: "}
    run = bench.write_run(f"prompt-{include_prompt}", spec)
    export_run(run.folder, tmp_path / "model")
    model = assert_same_embeddings(run, tmp_path / "model")
    with_prompt = model.encode(TEXTS)
    # Whichever of ST's methods a user calls, the text is prepared as in training.
    np.testing.assert_array_equal(model.encode_query(TEXTS), with_prompt)
    np.testing.assert_array_equal(model.encode_document(TEXTS), with_prompt)
    assert np.abs(model.encode(TEXTS, prompt="") - with_prompt).max() > 1e-3
    assert model.prompts["old"] == "At the hotel: "


def test_prompt_of_the_folder_is_kept_or_switched_off(
    bench: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its default goes before queries and documents too, as in training; without one its other prompts stay."""
    base = SentenceTransformer(str(bench.backbone), device="cpu")
    for folder, default in (("with", "query"), ("without", None)):
        base.prompts, base.default_prompt_name = {"query": "at night: ", "document": ""}, default
        base.save_pretrained(str(tmp_path / folder), create_model_card=False)
    for name, folder, prompt, expected in (
        ("kept", "with", None, ["at night: "] * 3),
        ("off", "with", "", ["", "", ""]),
        ("unset", "without", None, ["", "at night: ", ""]),
    ):
        run = bench.write_run(f"folder-prompt-{name}", {"backbone": str(tmp_path / folder), "prompt": prompt})
        caplog.clear()
        export_run(run.folder, tmp_path / name)
        said = "the folder has prompts (query: 'at night: '), training put none before a text: encode_query will;"
        assert [said in message for message in caplog.messages] == [True] * (name == "unset")
        model = assert_same_embeddings(run, tmp_path / name)
        for encode, put in zip((model.encode, model.encode_query, model.encode_document), expected, strict=True):
            np.testing.assert_array_equal(encode(TEXTS), model.encode(TEXTS, prompt=put))


def test_prompts_of_columns_become_those_of_queries_and_documents(bench: Any, tmp_path: Path) -> None:
    """Behind the encoder's own prompt, as in training; one for both is the default; several are none."""
    source = {"path": str(bench.folder / "data" / "train.jsonl.gz"), "score_range": [0.0, 5.0]}
    source["columns"] = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}

    def exported(name: str, spec: dict[str, Any], *prompts: dict[str, str]) -> tuple[Any, SentenceTransformer]:
        run = bench.write_run(name, spec, data={"train": [{**source, "prompts": one} for one in prompts]})
        export_run(run.folder, tmp_path / name)
        return run, SentenceTransformer(str(tmp_path / name), device="cpu")

    run, model = exported("columns", {"prompt": "at dusk "}, {"anchor": "the teacher: ", "positive": "the shop: "})
    plain = replace(run.encoder.text, prompt="")
    with torch.no_grad():
        for encode, prompt in ((model.encode_query, "the teacher: "), (model.encode_document, "the shop: ")):
            ours = run.encoder.eval().embed(pack_texts(plain([f"at dusk {prompt}{text}" for text in TEXTS])))
            np.testing.assert_allclose(encode(TEXTS), ours.numpy(), rtol=0, atol=1e-5)
    _, model = exported("both", {}, {"anchor": "the car: ", "positive": "the car: "})
    assert model.prompts[model.default_prompt_name] == model.prompts["query"] == "the car: "
    _, model = exported("several", {}, {"anchor": "the car: "}, {"anchor": "the shop: "})
    assert (model.prompts["query"], model.prompts["document"], model.default_prompt_name) == ("", "", None)


@pytest.mark.parametrize("kind", ["distilbert", "modernbert", "qwen3"])
def test_adapters_of_a_run_are_added_in(bench: Any, tmp_path: Path, kind: Any) -> None:
    """The checkpoint holds adapters alone; the exported folder is whole, and refuses another base."""
    texts = [pair.sentence1 for pair in bench.pairs] + TEXTS
    backbone = write_encoder(tmp_path / "base", texts, hidden=32, kind=kind)
    run = bench.write_run(f"lora-{kind}", {"backbone": str(backbone), "lora": {"r": 4}})
    path = run.folder / "checkpoints" / "step-00000003"
    assert all("lora" in name for name in read_state(path)["state_dict"])
    export_run(run.folder, tmp_path / "model")
    assert_same_embeddings(run, tmp_path / "model")
    assert b"lora_" not in (tmp_path / "model" / "model.safetensors").read_bytes()
    write_encoder(backbone, texts, hidden=32, kind=kind, seed=9)
    with pytest.raises(ValueError, match=r"the frozen weights of '.*base' are not those the checkpoint was trained"):
        export_run(run.folder, tmp_path / "other")


def test_whole_vocabulary_is_written(bench: Any, tmp_path: Path) -> None:
    """Trained rows from the checkpoint, the others the backbone's times the product of weight decay."""
    run = bench.write_run("vocabulary")
    export_run(run.folder, tmp_path / "model")
    name = "embeddings.word_embeddings.weight"
    base = load_file(bench.backbone / "model.safetensors")[name].numpy()
    weights = read_state(run.folder / "checkpoints" / "step-00000003")["state_dict"]
    prefix = "encoder.backbone.embeddings.word_embeddings."
    expected = base * np.float32(0.75)
    expected[weights[f"{prefix}used_ids"].numpy()] = weights[f"{prefix}weight"].numpy()
    np.testing.assert_array_equal(load_file(tmp_path / "model" / "model.safetensors")[name].numpy(), expected)


def test_uncompacted_run_and_low_precision_state(bench: Any, tmp_path: Path) -> None:
    run = bench.write_run("bf16", {"compact_vocabulary": "off"}, compact=False)
    path = run.folder / "checkpoints" / "step-00000003"
    checkpoint = read_state(path)
    checkpoint["state_dict"] = {k: v.bfloat16() for k, v in checkpoint["state_dict"].items()}
    write_checkpoint(checkpoint, path, {})
    run.encoder.bfloat16().float()
    export_run(path, tmp_path / "model")
    assert_same_embeddings(run, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_folder_holds_no_private_path_and_is_readable(bench: Any, tmp_path: Path) -> None:
    run = bench.write_run("clean")
    export_run(run.folder, tmp_path / "model")
    files = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert {"README.md", "modules.json", "tokenizer.json", "model.safetensors"} <= {f.name for f in files}
    for file in files:
        content = file.read_bytes()
        for private in (
            str(bench.folder),
            bench.folder.name,
            str(tmp_path),
            "packed_segments",
            "confidential",
        ):
            assert private.encode() not in content, file
    assert len({file.stat().st_mode for file in files}) == 1  # safetensors alone would write 0600
    versions = json.loads((tmp_path / "model" / "config_sentence_transformers.json").read_text())
    assert "sentence_transformers" in versions["__version__"]


def test_best_goes_before_newest_and_a_named_one_before_both(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bench.write_run("choice")
    folder = run.folder / "checkpoints"
    checkpoint = read_state(folder / "step-00000003")
    weights = checkpoint["state_dict"]
    weight = "encoder.backbone.embeddings.LayerNorm.weight"
    saved = {"best_value": 0.87501, "best_step": 2, "monitor": "eval/dev/spearman_cosine"}
    for step in (4, 2):
        content = {**checkpoint, "global_step": step, "callbacks": {"Checkpoints": saved}}
        state = {**weights, weight: torch.full((32,), float(step))}
        write_checkpoint({**content, "state_dict": state}, folder / f"step-{step:08d}", {})
    mark_best(run.folder, 2)

    def exported(source: Path) -> tuple[float, str]:
        assert main(["export", str(source), "model"]) == 0
        found = load_file(tmp_path / "model" / "model.safetensors")["embeddings.LayerNorm.weight"]
        card = (tmp_path / "model" / "README.md").read_text().split("### Exported Checkpoint\n\n")[1].split("\n")[0]
        step, reason = re.fullmatch("`step-0+.`, step (.): (.*)[.]", card).groups()  # type: ignore[union-attr]
        assert capsys.readouterr().out == f"exported: model: step {step}, {reason.replace('`', '')}\n"
        return float(found[0]), card

    monkeypatch.chdir(tmp_path)

    best = "`step-00000002`, step 2: the highest `eval/dev/spearman_cosine` of the run, 0.8750."
    assert exported(run.folder) == (2.0, best)
    assert exported(folder / "step-00000004") == (4.0, "`step-00000004`, step 4: named at export.")
    (folder / "best.json").unlink()
    newest = "`step-00000004`, step 4: the newest of the run; no metric chose a best one."
    assert exported(run.folder) == (4.0, newest)
    # Three exports into one place: each replaced the one before, and nothing else is left there.
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_not_ours_is_never_replaced(bench: Any, tmp_path: Path) -> None:
    run = bench.write_run("refuse")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for out in (tmp_path / "notes", tmp_path / "file", run.folder):
        with pytest.raises(ValueError, match="exists and is no exported model; give an empty"):
            export_run(run.folder, out)
    with pytest.raises(ValueError, match="holds a model that siamese-trainer did not export"):
        export_run(run.folder, bench.backbone)
    assert (tmp_path / "notes" / "todo.txt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    export_run(run.folder, tmp_path / "empty")
    assert_same_embeddings(run, tmp_path / "empty")


def test_older_export_survives_a_failed_one(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench.write_run("failure")
    export_run(run.folder, tmp_path / "model")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Normalize, "save", fail)
    again = bench.write_run("failure-2", {"normalize": True})
    with pytest.raises(OSError, match="disk full"):
        export_run(again.folder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_embeddings(run, tmp_path / "model")


def without_config(folder: Path) -> Path:
    (folder / "config.yaml").unlink()
    return folder


def without_checkpoint(folder: Path) -> Path:
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    return folder


def torn(folder: Path) -> Path:
    path = folder / "checkpoints" / "step-00000003"
    (path / STATE).write_bytes((path / STATE).read_bytes()[:5000])
    return path


def not_a_checkpoint(folder: Path) -> Path:
    write_checkpoint({"weights": torch.ones(1)}, folder / "checkpoints" / "step-00000003", {})
    return folder


def out_of_place(folder: Path) -> Path:
    return (folder / "checkpoints" / "step-00000003").rename(folder / "step-00000003")


def misspelt(folder: Path) -> Path:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("learning_rate", "learning_rat"))
    return folder


def broken_yaml(folder: Path) -> Path:
    (folder / "config.yaml").write_text("model: [")
    return folder


def headless(folder: Path) -> Path:
    (folder / "config.yaml").write_text("trainer: {max_epochs: 1}")
    return folder


def without_a_weight(folder: Path) -> Path:
    path = folder / "checkpoints" / "step-00000003"
    checkpoint = read_state(path)
    del checkpoint["state_dict"]["encoder.backbone.embeddings.LayerNorm.bias"]
    write_checkpoint(checkpoint, path, {})
    return folder


def of_another_base(folder: Path) -> Path:
    path = folder / "checkpoints" / "step-00000003"
    write_checkpoint({**read_state(path), "base_vocabulary": "0" * 64}, path, {})
    return folder


def beside_another(folder: Path) -> Path:
    recipe = folder.with_name("recipe")
    for seed in (1, 2):
        shutil.copytree(folder, recipe / f"seed={seed}")
    return recipe


FAULTS: dict[Callable[[Path], Path], str] = {
    without_config: r"has no config.yaml; give a run directory that a fit wrote",
    without_checkpoint: r"holds no finished checkpoint; give a run directory",
    torn: r"step-00000003 can't be trusted: state.ckpt has 5,000 bytes, .* were written; export another checkpoint",
    not_a_checkpoint: r"has no state_dict and global_step; give a checkpoint that a fit wrote",
    out_of_place: r"does not lie in the checkpoints/ folder of a run.*give RUN/checkpoints/STEP",
    misspelt: r"config.yaml does not fit this version: .*learning_rat",
    broken_yaml: r"config.yaml is no YAML: .*restore",
    headless: r"config.yaml has no sections model and data; restore",
    without_a_weight: r"does not fit the backbone '.*tiny-encoder': Missing key.*LayerNorm.bias.*Restore",
    of_another_base: r"is not the one the checkpoint was trained from: restore the backbone",
    lambda folder: folder / "nothing": r"there is no run or checkpoint .*nothing",
    beside_another: r"recipe is a folder of 2 run\(s\): seed=1, seed=2; name one: .*recipe/seed=1",
    lambda folder: folder / "checkpoints": r"checkpoints holds no finished checkpoint; give a run directory",
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_bad_input_is_a_sentence_and_leaves_nothing(
    bench: Any, tmp_path: Path, fault: Callable[[Path], Path], message: str
) -> None:
    number = list(FAULTS).index(fault)
    source = fault(bench.write_run(f"fault-{number}").folder)
    with pytest.raises(ValueError, match=f"(?s){message}") as raised:
        export_run(source, tmp_path / "model")
    assert len(str(raised.value)) < 600
    assert list(tmp_path.iterdir()) == []


def test_no_host_is_asked_even_for_names_like_hub_ids(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse_network: Callable[[], int]
) -> None:
    monkeypatch.chdir(bench.folder.parent)
    relative = f"{bench.folder.name}/tiny-encoder"
    run = bench.write_run("relative", {"backbone": relative})
    before = refuse_network()
    export_run(run.folder, tmp_path / "model")
    assert refuse_network() == before
    assert_same_embeddings(run, tmp_path / "model")


def test_a_relative_backbone_is_found_from_another_folder(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the fit was started, even if a folder of the same name lies here."""
    monkeypatch.chdir(bench.folder.parent)
    relative = f"{bench.folder.name}/tiny-encoder"
    run = bench.write_run("elsewhere", {"backbone": relative})
    (run.folder / "run.json").write_text(json.dumps({"directory": str(bench.folder.parent)}))
    (tmp_path / relative).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    export_run(run.folder, tmp_path / "model")
    assert_same_embeddings(run, tmp_path / "model")
