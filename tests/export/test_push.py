"""A folder reaches a hub as it is, over a real connection; what can't is said in a sentence."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.export.conftest import Bench, CraftedRun
from tests.stub_hub import COMMIT, Uploads, stub_hub
from trainer.cli import main
from trainer.export.sentence_transformers import _name

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def run(bench: Bench) -> CraftedRun:
    return bench.write_run("pushed")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Uploads]:
    """A hub that takes TOKEN, which this process has. Large files go by LFS: nobody can play the server of hf_xet."""
    uploads = Uploads(tmp_path / "hub", TOKEN)
    with stub_hub({}, {}, uploads) as address:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield uploads


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


Refused = Callable[..., str]


@pytest.fixture
def refused(run: CraftedRun, hub: Uploads, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What a failing export into ``model`` says last."""

    def export(*flags: str) -> str:
        assert main(["export", str(run.folder), str(tmp_path / "model"), *flags]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    return export


@pytest.mark.parametrize("large", [(".safetensors",), ()], ids=["lfs", "commits"])
def test_files_arrive_as_they_are(
    run: CraftedRun,
    hub: Uploads,
    large: tuple[str, ...],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large ones by LFS; and in the commits that the client makes where hf_xet is installed."""
    hub.large = large
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", bool(large))
    out = tmp_path / "model"
    assert main(["export", str(run.folder), str(out), "--push", "me/my-model", "--private"]) == 0
    there = hub.models["me/my-model"]
    assert files(there) == files(out) > {"README.md", "model.safetensors", "1_Pooling/config.json"}
    for name in files(out):
        assert filecmp.cmp(out / name, there / name, shallow=False), name
    assert hub.messages == ["Export of pushed, step 3"]
    assert hub.private == {"me/my-model"}
    assert any(path.startswith("lfs/") for path in hub.paths) == bool(large)
    said = capfd.readouterr()
    assert re.search(rf"^pushed: http://127\.0\.0\.1:\d+/me/my-model/commit/{COMMIT}$", said.out, re.M)
    card = (out / "README.md").read_text()
    assert 'SentenceTransformer("me/my-model")' in card
    assert TOKEN not in said.out + said.err + card


def test_a_run_is_named_without_what_lies_above_it() -> None:
    assert _name(Path("/home/me/runs/stsb/seed=1")) == "stsb/seed=1"
    assert _name(Path("/home/me/elsewhere/one")) == "one"


def test_weights_of_an_older_export_go_and_files_of_others_stay(run: CraftedRun, hub: Uploads, tmp_path: Path) -> None:
    there = hub.folder / "me" / "again"
    (there / "onnx").mkdir(parents=True)
    for name in ("onnx/model.onnx", "model-00001-of-00002.safetensors", "LICENSE", "README.md"):
        (there / name).write_text("old")
    assert main(["export", str(run.folder), str(tmp_path / "model"), "--push", "me/again"]) == 0
    assert files(there) == files(tmp_path / "model") | {"LICENSE"}
    assert (there / "README.md").read_text() != "old"
    assert hub.private == set()


def test_a_public_repository_is_not_private(hub: Uploads, refused: Refused) -> None:
    (hub.folder / "me" / "public").mkdir(parents=True)
    said = refused("--push", "me/public", "--private")
    assert said.startswith("error: --private: me/public is there and public, so nothing was sent; make it private")
    assert files(hub.folder) == set()


def test_who_may_not_write_is_told_so(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", other := "hf_of_somebody_else_entirely")
    said = refused("--push", "others/model")
    assert re.match(r"error: --push others/model: http://\S+ answered 403: .*you may not write here", said)
    assert said.endswith("the token must be allowed to write there (hf auth whoami names its owner)")
    assert other not in said
    assert (tmp_path / "model" / "modules.json").is_file()


def test_a_hub_that_is_not_there(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    said = refused("--push", "me/model")
    assert said.startswith("error: --push me/model: http://127.0.0.1:9 can't be reached or does not take it: ")
    assert said.endswith("model is whole: the same command tries again")


def test_offline_or_without_a_token_nothing_is_exported(
    hub: Uploads, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert refused("--push", "me/model").startswith(
        "error: --push me/model: there is no token of the hub; hf auth login"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused("--push", "me/model")
    assert said.startswith("error: --push me/model: HF_HUB_OFFLINE is set, so nothing is sent")
    assert not (tmp_path / "model").exists()
    assert hub.paths == []
