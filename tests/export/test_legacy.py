"""The older layout says what sentence-transformers 5 said itself, and both generations load it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from tests.export.conftest import TEXTS, VERSION_5, Bench, install
from trainer.cli import main
from trainer.demo_encoder import write_encoder
from trainer.export.legacy import rewrite_as_legacy

# As sentence-transformers 5.1.2 writes them for all-MiniLM-L6-v2.
POOLING_KEYS = {
    "word_embedding_dimension",
    "pooling_mode_cls_token",
    "pooling_mode_mean_tokens",
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
    "pooling_mode_lasttoken",
    "include_prompt",
}
KNOWN = ["cls", "max", "mean", "weightedmean"]  # whose older keys are pooling_mode_MODE_tokens, or _token
SPECIAL = ["doctor", "car"]  # pieces of the vocabulary, so that they have rows
TYPES = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]


@pytest.fixture(scope="module")
def legacy(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder, and the embeddings it must give; its tokenizer has special tokens beside the named ones."""
    out = tmp_path_factory.mktemp("out")
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(bench.backbone, out / "base"))
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL})
    tokenizer.save_pretrained(out / "base")
    run = bench.write_run("legacy", {"backbone": str(out / "base"), "normalize": True, "max_length": 24})
    assert main(["export", str(run.folder), str(out / "model"), "--legacy"]) == 0
    return out / "model", run.embed(TEXTS).numpy()


def test_the_folder_is_as_older_versions_write_it(legacy: tuple[Path, np.ndarray]) -> None:
    folder, embeddings = legacy
    read = {name: json.loads((folder / name).read_text()) for name in ("modules.json", "sentence_bert_config.json")}
    assert [module["type"] for module in read["modules.json"]] == TYPES
    assert read["sentence_bert_config.json"] == {"max_seq_length": 24, "do_lower_case": False}
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    assert pooling.keys() == POOLING_KEYS
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens", "include_prompt"]
    assert pooling["word_embedding_dimension"] == embeddings.shape[1]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["additional_special_tokens"] == SPECIAL
    assert "extra_special_tokens" not in tokenizer


def test_this_version_loads_it(legacy: tuple[Path, np.ndarray]) -> None:
    folder, embeddings = legacy
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 24
    assert model.tokenizer.extra_special_tokens == SPECIAL
    np.testing.assert_allclose(model.encode(TEXTS), embeddings, atol=1e-5)


ROTARY: dict[str, dict[str, Any]] = {
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "modernbert": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *ROTARY.items(),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0}}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}}),
        ("gemma3_text", {"rope_parameters": ROTARY["modernbert"]["rope_parameters"]}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}}),
        ("gpt_neox_japanese", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
        ("bert", {}),
    ],
)
def test_rotary_positions_stand_in_the_older_keys(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """transformers 5 reads them where the newer ones, which 4 does not know, are missing."""
    wanted = AutoConfig.for_model(kind, num_hidden_layers=3, **settings)
    config = as_legacy(tmp_path, wanted)
    assert getattr(AutoConfig.from_pretrained(tmp_path), "rope_parameters", None) == config.get("rope_parameters")
    newer = {"rope_parameters", *(["layer_types"] if kind == "modernbert" else [])}
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config.keys() - newer}))
    found = AutoConfig.from_pretrained(tmp_path)
    for name in newer:
        assert getattr(found, name, None) == getattr(wanted, name, None)


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention"]}, r"lets each n-th layer .*\['slid"),
        ("olmo3", {"rope_parameters": ROTARY["modernbert"]["rope_parameters"]}, r"rotary positions of this 'olmo3', "),
        ("qwen3", {"is_causal": False}, r"is_causal: false, and a piece of this 'qwen3'"),
    ],
)
def test_what_transformers_4_cannot_be_told_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], told: str
) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=2, **settings)
    with pytest.raises(ValueError, match=rf"--legacy: transformers 4, .*{told}.*; export without it"):
        as_legacy(tmp_path, config)


@pytest.mark.parametrize("modes", list(permutations(KNOWN, 2)), ids="-".join)
def test_two_poolings_keep_their_order_or_are_refused(tmp_path: Path, modes: tuple[str, str]) -> None:
    """A Dense behind them would read other numbers. sentence-transformers says what the older keys mean."""
    wanted = Pooling(4, modes)  # type: ignore[arg-type]
    wanted.save(str(tmp_path))
    config = {f"pooling_mode_{mode}{'_token' if mode == 'cls' else '_tokens'}": mode in modes for mode in KNOWN}
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "config.json").write_text(json.dumps({"word_embedding_dimension": 4, **config}))
    older = Pooling.load(str(tmp_path / "older"))
    kind = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    if older.pooling_mode == wanted.pooling_mode:
        rewrite_as_legacy(tmp_path, 10)
        assert Pooling.load(str(tmp_path)).pooling_mode == modes
    else:
        with pytest.raises(ValueError, match=rf"--legacy: this model pools {modes[0]}, {modes[1]} in this order"):
            rewrite_as_legacy(tmp_path, 10)


@pytest.mark.parametrize("kind", [Dense, Normalize])
def test_modules_of_pieces_are_refused(tmp_path: Path, kind: Any) -> None:
    """Older versions have the module without names, and that one leaves the pieces as they are or fails."""
    sizes = {"in_features": 4, "out_features": 4} if kind is Dense else {}
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"sentence_transformers.base.modules.{kind.__name__}"}]
    pieces = torch.full((1, 3, 4), 2.0)
    kind(**sizes, module_input_name="token_embeddings").save(str(tmp_path))
    assert not torch.equal(kind.load(str(tmp_path))({"token_embeddings": pieces})["token_embeddings"], pieces)
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=f"--legacy: .* a {kind.__name__} from token_embeddings to token_embeddings, "):
        rewrite_as_legacy(tmp_path, 10)

    module = kind(**sizes)
    module.save(str(tmp_path))
    rewrite_as_legacy(tmp_path, 10)
    texts = {"sentence_embedding": pieces[0]}
    torch.testing.assert_close(kind.load(str(tmp_path))(dict(texts)), module(dict(texts)))


def as_legacy(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """Its config.json, in the older layout; no weights."""
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    contents = {"modules.json": [module], "sentence_bert_config.json": {}, "tokenizer_config.json": {}}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    config.save_pretrained(folder)
    rewrite_as_legacy(folder, 10)
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sentence-transformers 5, with the transformers, datasets and hub client of its time."""
    return install(tmp_path_factory.mktemp("site"), VERSION_5)


def encode_by(site: Path, folder: Path) -> tuple[str, np.ndarray]:
    """Version and longest text, and the embeddings of TEXTS, in a process of its own."""
    code = (
        "import json, sys, sentence_transformers as st; m = st.SentenceTransformer(sys.argv[1], device='cpu');"
        "print(st.__version__, m.max_seq_length); print(json.dumps(m.encode(json.loads(sys.argv[2])).tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(TEXTS)],
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    *_, version, found = done.stdout.splitlines()
    return version, np.array(json.loads(found))


@pytest.mark.slow
def test_version_5_loads_it(legacy: tuple[Path, np.ndarray], site: Path) -> None:
    folder, embeddings = legacy
    version, found = encode_by(site, folder)
    assert version == "5.1.2 24"
    np.testing.assert_allclose(found, embeddings, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROTARY)
def test_version_5_finds_the_rotary_positions(bench: Bench, tmp_path: Path, site: Path, kind: Any) -> None:
    """With weights so large that a piece attends to few others: where it attends to all alike, no position matters."""
    texts = [pair.sentence1 for pair in bench.pairs] + TEXTS
    backbone = write_encoder(tmp_path / "base", texts, hidden=32, layers=3, kind=kind)
    path = backbone / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ROTARY[kind]))
    model: Any = SentenceTransformer(str(backbone), device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(str(backbone))
    run = bench.write_run(f"rotary-{kind}", {"backbone": str(backbone)})
    assert main(["export", str(run.folder), str(tmp_path / "model"), "--legacy"]) == 0
    _, found = encode_by(site, tmp_path / "model")
    np.testing.assert_allclose(found, run.embed(TEXTS).numpy(), atol=1e-4)


def test_what_older_versions_do_not_have_is_refused(tmp_path: Path) -> None:
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.router.Router"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    text = r"--legacy: sentence-transformers 3 to 5 can't load the module sentence_transformers\.base.*Router"
    with pytest.raises(ValueError, match=text):
        rewrite_as_legacy(tmp_path, 10)
