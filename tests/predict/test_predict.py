"""`trainer predict`: the embeddings of sentence-transformers, in order, whatever the ranks and the kills."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from tests.other_user import open_folder, without_permissions
from tests.two_ranks import TwoRanks
from trainer.cli import main
from trainer.data.loading import load
from trainer.data.sources import Source
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.towers import load_encoder
from trainer.predict.embed import Settings, embed_rows
from trainer.predict.shards import Shards, open_shards, start_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, demo_texts: list[str]) -> Path:
    """250 rows; some texts come twice, in one shard and in two."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [*demo_texts[:240], *demo_texts[:5], *demo_texts[235:240]]
    path.write_text("".join(json.dumps({"key": f"d{i}", "body": text}) + "\n" for i, text in enumerate(texts)))
    return path


def texts_of(corpus: Path) -> list[str]:
    return [json.loads(line)["body"] for line in corpus.read_text().splitlines()]


def run(model: Path, corpus: Path, out: Path, *flags: str) -> int:
    where = ["--model", str(model), "--data", str(corpus), "--text", "body", "--out", str(out), "--accelerator", "cpu"]
    return main(["predict", *where, "--shard-rows", "100", *flags])


def test_values_and_order_are_those_of_sentence_transformers(
    tiny_encoder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_encoder, corpus, tmp_path / "out", "--max-tokens", "300", "--id", "key") == 0
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(tmp_path / "out/*.parquet"), split="train", cache_dir=str(tmp_path))
    expected = SentenceTransformer(str(tiny_encoder), device="cpu").encode(texts_of(corpus))
    assert rows["id"] == [f"d{i}" for i in range(250)]
    assert_allclose(np.array(rows["embedding"]), expected, atol=1e-5)
    said = capsys.readouterr().out
    assert re.match(r"250 texts, [\d,]+ tokens in [\d.]+ s on 1 rank: [\d,]+ texts/s, [\d,]+ tokens/s\n", said)
    assert said.endswith("250 rows of 32 float32 numbers in 3 parquet files\n")


def test_prompt_truncation_length_and_npy(
    tiny_encoder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config["prompts"] = {"query": "look for: ", "document": ""}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    flags = ["--prompt-name", "query", "--truncate-dim", "20", "--normalize", "--max-length", "12", "--format", "npy"]
    assert run(folder, corpus, tmp_path / "out", *flags, "--dtype", "float16", "--id", "key") == 0
    shards = sorted((tmp_path / "out").glob("shard-?????.npy"))
    found = np.concatenate([np.load(path) for path in shards])
    peer = SentenceTransformer(str(folder), device="cpu")
    peer.max_seq_length = 12
    texts = texts_of(corpus)
    expected = peer.encode(texts, prompt_name="query", truncate_dim=20, normalize_embeddings=True)
    fed = peer.preprocess(["look for: " + text for text in texts])["attention_mask"].sum(dim=1)
    full = f"{int((fed == 12).sum())} of 250 texts have 12 pieces or more with the prompt; --max-length keeps that many"
    assert full in capsys.readouterr().out
    assert found.dtype == np.float16
    assert_allclose(found, expected, atol=1e-3)
    assert_allclose(np.linalg.norm(found.astype(np.float32), axis=1), 1.0, atol=2e-3)
    assert np.load(tmp_path / "out/shard-00002.ids.npy").tolist() == [f"d{i}" for i in range(200, 250)]


def test_a_task_is_a_tower_or_a_prompt(
    tiny_encoders: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As encode_query and encode_document, of a model with separate towers and of one encoder with prompts."""
    specs = [
        EncoderSpec(str(tiny_encoders[kind]), prompt=prompt) for kind, prompt in (("bert", "find: "), ("mpnet", ""))
    ]
    with load_encoder(specs[0], specs[1], 300).as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path / "towers"))
    assert run(tmp_path / "towers", corpus, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert (
        "towers' has an encoder for each of query, document (a Router of sentence-transformers), but --task is" in error
    )
    assert error.endswith("is unset; name one of them\n")
    texts = texts_of(corpus)
    prompted: Any = SentenceTransformer(str(tiny_encoders["bert"]), device="cpu")
    prompted.prompts = {"query": "find: ", "document": "At night: "}
    prompted.save_pretrained(str(tmp_path / "prompted"))
    for name in ("towers", "prompted"):
        peer = SentenceTransformer(str(tmp_path / name), device="cpu")
        for task, encode in (("query", peer.encode_query), ("document", peer.encode_document)):
            out = tmp_path / f"{name}-{task}"
            assert run(tmp_path / name, corpus, out, "--task", task, "--format", "npy") == 0
            assert_allclose(np.concatenate(list(open_shards(out)[0].pieces())), encode(texts), atol=1e-5)
    capsys.readouterr()
    assert run(tmp_path / "towers", corpus, tmp_path / "towers-query", "--task", "document", "--format", "npy") == 1
    assert "holds the embeddings of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "default"),
    [({"find": "At night: "}, "find"), ({"query": "find: ", "passage": "At night: "}, None)],
    ids=["default", "passage"],
)
def test_a_task_takes_the_prompt_of_its_own_name_alone(
    tiny_encoder: Path, corpus: Path, tmp_path: Path, prompts: dict[str, str], default: str | None
) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config |= {"prompts": prompts, "default_prompt_name": default}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    peer, texts = SentenceTransformer(str(folder), device="cpu"), texts_of(corpus)
    for task, encode in (("query", peer.encode_query), ("document", peer.encode_document), (None, peer.encode)):
        out, flags = tmp_path / f"out-{task}", ["--task", task] if task else []
        assert run(folder, corpus, out, *flags, "--format", "npy") == 0
        assert_allclose(np.concatenate(list(open_shards(out)[0].pieces())), encode(texts), atol=1e-5)


def embed_here(model: str, corpus: str, out: str, cache: str) -> int:
    """One rank's part of a corpus, into npy shards of 30 rows."""
    rows = load(Source(corpus, {"text": "body"}), Path(cache))
    encoder = Encoder(EncoderSpec(model), 300).eval()
    shards = Shards(Path(out), "npy", len(rows), 30, 32, "float32", has_ids=False)
    if not shards.folder.exists():
        start_shards(shards, {})
    return embed_rows(encoder, rows, "text", shards, Settings(max_tokens=300), torch.device("cpu")).num_texts


def test_two_ranks_write_what_one_writes(
    two_ranks: TwoRanks, tiny_encoder: Path, corpus: Path, cache: Path, tmp_path: Path
) -> None:
    assert embed_here(str(tiny_encoder), str(corpus), str(tmp_path / "one"), str(cache)) == 250
    start_shards(Shards(tmp_path / "two", "npy", 250, 30, 32, "float32", has_ids=False), {})
    totals = two_ranks(embed_here, str(tiny_encoder), str(corpus), str(tmp_path / "two"), str(cache))
    assert totals == [250, 250], "each shard once, and both ranks know the sum"
    one, two = open_shards(tmp_path / "one")[0], open_shards(tmp_path / "two")[0]
    assert_allclose(np.concatenate(list(one.pieces())), np.concatenate(list(two.pieces())), atol=1e-6)
    some = np.array([249, 0, 31, 31])
    assert (one.take(some) == np.concatenate(list(one.pieces()))[some]).all()


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory, demo_texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("long") / "corpus.jsonl"
    lines = (json.dumps({"body": f"{text} {i}"}) + "\n" for i in range(40) for text in demo_texts)
    path.write_text("".join(lines))
    return path


class Started:
    """A `trainer predict` in a process of its own, for it is to be killed."""

    def __init__(self, model: Path, corpus: Path, out: Path, *flags: str) -> None:
        words = ["--model", str(model), "--data", str(corpus), "--text", "body", "--out", str(out), "--format", "npy"]
        command = [sys.executable, "-m", "trainer", "predict", *words, "--accelerator", "cpu", *flags]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.out = out
        self.process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for_more(self) -> None:
        """Until two shards more than now are there."""
        before, deadline = len(self.shards()), time.monotonic() + 240
        while len(self.shards()) < before + 2:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def shards(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.out.glob("shard-*.npy")}

    def children(self) -> list[int]:
        return [int(n) for n in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=200)
        return self.process.returncode, out, err


@pytest.mark.slow
def test_a_killed_rank_keeps_finished_shards(tiny_encoder: Path, long_corpus: Path, tmp_path: Path) -> None:
    started = Started(tiny_encoder, long_corpus, tmp_path / "out", "--shard-rows", "150", "--devices", "2")
    started.wait_for_more()
    os.kill(started.children()[-1], signal.SIGKILL)
    code, _, err = started.ended()
    assert code == 1
    assert "error: rank 1 was ended by SIGKILL; what is finished is kept" in err
    assert 2 <= len(started.shards()) < 160


def test_a_kill_costs_no_finished_shard(tiny_encoder: Path, long_corpus: Path, tmp_path: Path) -> None:
    """Asked to stop on one of two ranks; the only rank killed. Then as if nothing had happened."""
    args = (tiny_encoder, long_corpus, tmp_path / "out", "--shard-rows", "150")
    first = Started(*args, "--devices", "2")
    first.wait_for_more()
    first.process.send_signal(signal.SIGTERM)
    code, out, err = first.ended()
    assert (code, out) == (143, "stopped by SIGTERM; the same command goes on (exit 143)\n"), err
    kept = first.shards()
    assert 2 <= len(kept) < 160

    second = Started(*args)
    second.wait_for_more()
    second.process.kill()
    second.ended()
    assert len(second.shards()) < 160

    words = [str(word) for word in args[2:]]
    command = ["predict", "--model", str(args[0]), "--data", str(args[1]), "--text", "body", "--out", *words]
    assert main([*command, "--format", "npy", "--accelerator", "cpu"]) == 0
    assert kept.items() <= second.shards().items(), "a finished shard was written again"
    assert not list((tmp_path / "out").glob(".*.partial"))
    command[command.index(words[0])] = str(tmp_path / "straight")
    assert main([*command, "--format", "npy", "--accelerator", "cpu"]) == 0
    resumed, straight = (np.concatenate(list(open_shards(tmp_path / n)[0].pieces())) for n in ("out", "straight"))
    assert_allclose(resumed, straight, atol=1e-6)


def test_a_damaged_shard_is_written_again(tiny_encoder: Path, corpus: Path, tmp_path: Path) -> None:
    for kind in ("parquet", "npy"):
        out = tmp_path / kind
        assert run(tiny_encoder, corpus, out, "--format", kind) == 0
        whole = (out / f"shard-00001.{kind}").read_bytes()
        (out / f"shard-00001.{kind}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"1 of 3 shards are missing, the first is shard-00001"):
            open_shards(out)
        assert run(tiny_encoder, corpus, out, "--format", kind) == 0
        assert (out / f"shard-00001.{kind}").read_bytes() == whole


def test_damaged_rows_of_the_cache_are_read_again(
    tiny_encoder: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bit of a letter has turned, which Arrow can't notice."""
    cache = ["--cache-dir", str(tmp_path / "cache"), "--format", "npy"]
    assert run(tiny_encoder, corpus, tmp_path / "whole", *cache) == 0
    (path,) = (tmp_path / "cache").glob("rows/*/rows.arrow")
    content = bytearray(path.read_bytes())
    text = texts_of(corpus)[7].encode()
    content[content.index(text)] ^= 1
    path.write_bytes(content)
    assert run(tiny_encoder, corpus, tmp_path / "again", *cache) == 0
    assert f"{path.parent}: rows.arrow is damaged (its sha256 is another); it is made again" in caplog.text
    whole, again = (np.concatenate(list(open_shards(tmp_path / n)[0].pieces())) for n in ("whole", "again"))
    assert (whole == again).all()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--text", "bod"], 1, "no column 'bod' (columns.text); found: key, body. Did you mean 'body'?"),
        (["--data", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file or folder."),
        (["--model", "no/where"], 1, "--model 'no/where' is neither a model folder nor a reachable hub id: "),
        (["--model", "RECIPE"], 1, "is a folder of 1 run(s): seed=1; name one: "),
        (["--prompt-name", "queri"], 1, "has no prompt 'queri'; it has document, query. Did you mean 'query'?"),
        (["--truncate-dim", "33"], 1, "--truncate-dim is 33, but the model's embeddings have 32"),
        (["--prompt", "word " * 300], 1, "no text is left; take a shorter prompt"),
        (["--max-length", "999"], 1, "--max-length is 999, but "),
        (["--accelerator", "gpu"], 1, "--accelerator gpu: torch "),
        (["--normalise"], 2, "'--normalise' is no flag of trainer predict. Did you mean '--normalize'?"),
        (["--columns", "a"], 2, "'--columns' is no flag of trainer predict. See trainer predict --help"),
        (["--devices", "0"], 2, "--devices: is '0'; it must be a whole number, 1 or more"),
        (["--precision", "int8"], 2, "--precision: invalid choice: 'int8'"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(
    flags: list[str],
    code: int,
    said: str,
    tiny_encoder: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "gpu" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "recipe/seed=1").mkdir(parents=True)
    (tmp_path / "recipe/seed=1/metrics.jsonl").touch()
    flags = [flag.replace("RECIPE", str(tmp_path / "recipe")) for flag in flags]
    assert run(tiny_encoder, corpus, tmp_path / "out", *flags) == code
    error = capsys.readouterr().err
    assert said in error, error
    assert error.count("\n") <= 2
    assert not (tmp_path / "out").exists()


def test_a_model_that_lacks_weights_embeds_nothing(
    tiny_encoder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each rank would draw them for itself."""
    path = shutil.copytree(tiny_encoder, tmp_path / "model") / "model.safetensors"
    weights = {name: weight for name, weight in load_file(path).items() if "layer.1" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    assert run(tmp_path / "model", corpus, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"--model '{tmp_path / 'model'}': its files lack 16 of 39 weights (encoder.layer.1." in error
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_model_yet_is_told_from_a_model(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("model: {}\n")
    assert run(tmp_path / "run", corpus, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"--model {tmp_path / 'run'} is a run that has written no {tmp_path / 'run' / 'model'} yet" in error
    assert f"trainer export {tmp_path / 'run'} OUT, and name OUT" in error


def test_bad_rows_are_named_or_left_out(tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    rows = [{"key": 1, "body": "a man"}, {"key": 2, "body": " "}, {"key": 3, "body": "a woman"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tiny_encoder, path, tmp_path / "out", "--id", "key", "--format", "npy") == 1
    error = capsys.readouterr().err
    assert "bad.jsonl:2: column 'body' is blank" in error
    assert "1 bad row; mend them, or give --on-bad-row skip" in error
    flags = ["--id", "key", "--format", "npy", "--on-bad-row", "skip"]
    assert run(tiny_encoder, path, tmp_path / "out", *flags) == 0
    assert np.load(tmp_path / "out/shard-00000.ids.npy").tolist() == ["1", "3"]


def test_ids_that_mislead_are_said(tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    bodies = ["a man", "", "   ", None, "a woman"]
    path.write_text("".join(json.dumps({"key": f"k{i % 4}", "body": body}) + "\n" for i, body in enumerate(bodies)))
    skip = ["--on-bad-row", "skip"]
    assert run(tiny_encoder, path, tmp_path / "numbers", *skip) == 0
    said = capsys.readouterr().out
    assert "note: 3 bad rows are left out, and ids are numbers of the rows that are left, from 0; name a column" in said
    assert json.loads((tmp_path / "numbers/_manifest.json").read_text())["skipped"] == 3
    assert pq.read_table(tmp_path / "numbers")["id"].to_pylist() == [0, 1]

    assert run(tiny_encoder, path, tmp_path / "named", *skip, "--id", "key") == 0  # k0 stands in rows 1 and 5
    said = capsys.readouterr().out
    assert "note: in 1 of 2 rows stands the id of an earlier row, the first such id is 'k0'; all rows" in said
    assert pq.read_table(tmp_path / "named")["id"].to_pylist() == ["k0", "k0"]


def test__another_runs_shards_are_not_touched(
    tiny_encoder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_encoder, corpus, tmp_path / "out") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(tiny_encoder, corpus, tmp_path / "out", "--normalize", "--prompt", "query: ") == 1
    error = capsys.readouterr().err
    assert "holds the embeddings of another run: normalize was False, now True; prompt was , now query: " in error
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(tiny_encoder, corpus, corpus.parent) == 1
    assert "holds other files and no _manifest.json; give an empty or a new folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"has no _manifest.json; give a folder that trainer predict wrote"):
        open_shards(corpus.parent)
    with pytest.raises(ValueError, match=r"corpus.jsonl has no _manifest.json; give a folder"):
        open_shards(corpus)  # a file, which nobody shall remove


def test_embeddings_of_another_user_are_not_to_be_removed(tiny_encoder: Path, corpus: Path) -> None:
    with open_folder() as folder:
        assert run(tiny_encoder, corpus, folder / "out") == 0
        (folder / "out" / "_manifest.json").chmod(0)
        with (
            without_permissions(),
            pytest.raises(ValueError, match=r"_manifest.json: Permission denied; ask who wrote"),
        ):
            open_shards(folder / "out")


def test_other_weights_are_another_run(
    tiny_encoders: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_encoders["bert"], tmp_path / "model")
    assert run(tiny_encoders["bert"], corpus, tmp_path / "out") == 0
    assert run(model, corpus, tmp_path / "out") == 0, "the same model at another place"
    encoder = Encoder(EncoderSpec(str(model)), 300)
    with torch.no_grad():
        next(encoder.backbone.parameters())[7, 0] += 1.0
    with encoder.as_sentence_transformer() as changed:
        changed.save_pretrained(str(model))
    capsys.readouterr()
    assert run(model, corpus, tmp_path / "out") == 1
    assert re.search("another run: model was [0-9a-f]+, now ", capsys.readouterr().err)


def test_embeddings_that_are_not_finite_are_refused(tiny_encoder: Path, corpus: Path, tmp_path: Path) -> None:
    rows = load(Source(str(corpus), {"text": "body"}), tmp_path)
    encoder = Encoder(EncoderSpec(str(tiny_encoder)), 300).eval()
    with torch.no_grad():
        encoder.backbone.get_input_embeddings().weight.fill_(float("nan"))
    shards = Shards(tmp_path / "out", "npy", len(rows), 100, 32, "float32", has_ids=False)
    start_shards(shards, {})
    with pytest.raises(ValueError, match=r"row 1: its embedding is not finite in float32; take --precision bf16"):
        embed_rows(encoder, rows, "text", shards, Settings(), torch.device("cpu"))
    assert shards.unfinished() == [0, 1, 2]
