"""The ONNX graph gives what torch gives, in our own hands and in those of sentence-transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tests.export.conftest import TEXTS, VERSION_5, Bench, install
from trainer.cli import main
from trainer.demo_data import read_pairs
from trainer.demo_encoder import write_encoder
from trainer.export import onnx as export_onnx
from trainer.export.onnx import FILE, write_onnx
from trainer.export.sentence_transformers import export_run

ROOT = Path(__file__).parents[2]


def open_graph(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])


def run_graph(folder: Path, batches: list[list[str]]) -> np.ndarray:
    """Embeddings by onnxruntime and sentence-transformers' own modules behind it."""
    model, session, found = SentenceTransformer(str(folder), device="cpu"), open_graph(folder), []
    for texts in batches:
        features: dict[str, Any] = model.preprocess(texts)
        (hidden,) = session.run(None, {one.name: features[one.name].numpy() for one in session.get_inputs()})
        features["token_embeddings"] = torch.from_numpy(hidden)
        for module in list(model)[1:]:
            features = module(features)
        found.append(features["sentence_embedding"].numpy())
    return np.concatenate(found)


@pytest.fixture(scope="module")
def exported(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder of a run with adapters and a normalising head, and the embeddings it must give."""
    spec = {"normalize": True, "max_length": 24, "lora": {"r": 4}}
    run, out = bench.write_run("onnx", spec), tmp_path_factory.mktemp("out") / "model"
    assert main(["export", str(run.folder), str(out), "--format", "onnx"]) == 0
    return out, run.embed(TEXTS).numpy()


def test_the_graph_gives_the_embeddings_of_training(exported: tuple[Path, np.ndarray]) -> None:
    """Texts of 3 to 24 pieces in one batch, so that padding must be masked; then each alone."""
    folder, embeddings = exported
    np.testing.assert_allclose(run_graph(folder, [TEXTS]), embeddings, atol=1e-5)
    np.testing.assert_allclose(run_graph(folder, [[text] for text in TEXTS]), embeddings, atol=1e-5)


def test_the_graph_has_the_names_and_free_axes_that_readers_expect(exported: tuple[Path, np.ndarray]) -> None:
    session = open_graph(exported[0])
    axes = {one.name: one.shape for one in session.get_inputs()}
    assert axes == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("last_hidden_state", ["batch", "length", 32])]
    graph = onnx.load(exported[0] / FILE)
    onnx.checker.check_model(graph)
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", export_onnx.OPSET)]


def test_the_graph_says_nothing_of_this_machine(bench: Bench, exported: tuple[Path, np.ndarray]) -> None:
    content = (exported[0] / FILE).read_bytes()
    for private in (ROOT, bench.folder, Path(torch.__file__).parent):
        assert str(private).encode() not in content, private


def test_this_version_loads_the_torch_weights_beside_it(exported: tuple[Path, np.ndarray]) -> None:
    folder, embeddings = exported
    np.testing.assert_allclose(SentenceTransformer(str(folder), device="cpu").encode(TEXTS), embeddings, atol=1e-5)


def test_token_types_are_an_input_where_the_tokenizer_gives_them(minilm: Path, data_dir: Path, tmp_path: Path) -> None:
    """500 real sentences through a real encoder."""
    texts = [pair.sentence1 for pair in read_pairs(data_dir / "sts" / "stsb-en.dev.jsonl.gz")[:500]]
    model = SentenceTransformer(str(minilm), device="cpu")
    model.save_pretrained(str(tmp_path))
    assert write_onnx(model, tmp_path) < 1e-5
    assert "token_type_ids" in {one.name for one in open_graph(tmp_path).get_inputs()}
    found = run_graph(tmp_path, [texts[start : start + 50] for start in range(0, len(texts), 50)])
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-4)


@pytest.mark.parametrize("prompt", ["", "the doctor: "])
def test_the_snippet_of_the_page_gives_them_too(exported: tuple[Path, np.ndarray], tmp_path: Path, prompt: str) -> None:
    folder, embeddings = shutil.copytree(exported[0], tmp_path / "model"), exported[1]
    if prompt:
        settings = json.loads((folder / "config_sentence_transformers.json").read_text())
        settings |= {"prompts": {"default": prompt}, "default_prompt_name": "default"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
        without, embeddings = embeddings, SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
        assert np.abs(embeddings - without).max() > 1e-3
    page = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)  # type: ignore[union-attr]
    code = code.replace('folder = "model"', f"folder = {str(folder)!r}")
    names: dict[str, Any] = {}
    exec(re.sub(r"texts = .*", f"texts = {TEXTS!r}", code), names)
    np.testing.assert_allclose(names["embeddings"], embeddings, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "distilbert", "mpnet", "modernbert", "qwen3"])
def test_other_backbones(bench: Bench, tmp_path: Path, kind: Any) -> None:
    backbone = write_encoder(tmp_path / "base", [p.sentence1 for p in bench.pairs] + TEXTS, hidden=32, kind=kind)
    run = bench.write_run(f"onnx-{kind}", {"backbone": str(backbone)})
    export_run(run.folder, tmp_path / "model", onnx=True)
    np.testing.assert_allclose(run_graph(tmp_path / "model", [TEXTS]), run.embed(TEXTS).numpy(), atol=1e-4)


@pytest.mark.slow
def test_version_5_runs_the_graph(exported: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """``SentenceTransformer(folder, backend="onnx")``: the newest generation that optimum-onnx 0.1.0 fits."""
    site = install(tmp_path / "site", [*VERSION_5, "optimum==2.1.0", "optimum-onnx==0.1.0"])
    folder, embeddings = exported
    (folder / "model.safetensors").rename(folder / "not-read")  # so that the graph must be what runs
    code = (
        "import json, sys, sentence_transformers as st;"
        "m = st.SentenceTransformer(sys.argv[1], device='cpu', backend='onnx');"
        "print(type(m[0].auto_model).__name__); print(json.dumps(m.encode(json.loads(sys.argv[2])).tolist()))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), json.dumps(TEXTS)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path]), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        )
    finally:
        (folder / "not-read").rename(folder / "model.safetensors")
    *_, kind, found = done.stdout.splitlines()
    assert kind == "ORTModelForFeatureExtraction"
    np.testing.assert_allclose(json.loads(found), embeddings, atol=1e-5)


# -- what is refused --------------------------------------------------------------------------------------


def test_a_graph_that_differs_is_refused(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wrong as an exporter that loses the attention mask; nothing is left behind."""
    forward = export_onnx._Backbone.forward

    def without_mask(self: Any, *inputs: torch.Tensor) -> torch.Tensor:
        input_ids, attention_mask = inputs
        return forward(self, input_ids, torch.ones_like(attention_mask) + 0 * attention_mask)

    monkeypatch.setattr(export_onnx._Backbone, "forward", without_mask)
    with pytest.raises(ValueError, match=r"onnxruntime differ from torch's by [\d.]+, more than 0\.000\d+: .*'bert'"):
        export_run(bench.write_run("wrong").folder, tmp_path / "model", onnx=True)
    assert not list(tmp_path.iterdir())


def test_a_backbone_that_cannot_be_exported_is_refused(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a branch\n  on data")

    monkeypatch.setattr(export_onnx._Backbone, "forward", refuse)
    with pytest.raises(ValueError, match=r"torch can't export the backbone 'bert': a branch on data; leave it out"):
        write_onnx(SentenceTransformer(str(bench.backbone), device="cpu"), tmp_path / "model")


def test_missing_packages_are_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None if name == "onnxscript" else name)
    text = r"--format onnx needs onnxscript, which .* lacks: pip install 'siamese-trainer\[onnx\]'"
    with pytest.raises(ValueError, match=text):
        export_run(tmp_path / "nowhere", tmp_path / "model", onnx=True)


def test_two_encoders_are_refused(bench: Bench, tmp_path: Path) -> None:
    run = bench.write_run("towers", model={"document_encoder": {"backbone": str(bench.backbone)}})
    with pytest.raises(ValueError, match=r"--format onnx: this run has two encoders, .*; leave it out"):
        export_run(run.folder, tmp_path / "model", onnx=True)
