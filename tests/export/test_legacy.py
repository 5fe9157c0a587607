"""The older layout says what sentence-transformers 5 said itself, and both generations load it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tests.export.conftest import TEXTS, VERSION_5, Bench, install
from trainer.cli import main
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
TYPES = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]


@pytest.fixture(scope="module")
def legacy(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder, and the embeddings it must give."""
    run, out = bench.write_run("legacy", {"normalize": True, "max_length": 24}), tmp_path_factory.mktemp("out")
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


def test_this_version_loads_it(legacy: tuple[Path, np.ndarray]) -> None:
    folder, embeddings = legacy
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 24
    np.testing.assert_allclose(model.encode(TEXTS), embeddings, atol=1e-5)


@pytest.mark.slow
def test_version_5_loads_it(legacy: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """The real one, with the transformers, datasets and hub client of its time, in a process of its own."""
    site = install(tmp_path / "site", VERSION_5)
    folder, embeddings = legacy
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
    assert version == "5.1.2 24"
    np.testing.assert_allclose(json.loads(found), embeddings, atol=1e-5)


def test_what_older_versions_do_not_have_is_refused(tmp_path: Path) -> None:
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.router.Router"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    text = r"--legacy: sentence-transformers 3 to 5 can't load the module sentence_transformers\.base.*Router"
    with pytest.raises(ValueError, match=text):
        rewrite_as_legacy(tmp_path, 10)
