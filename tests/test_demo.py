"""The demo: its data mean what their scores say, its encoders are reproducible, and it learns."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from trainer.config_files import ConfigError, read_command
from trainer.demo import run_demo, write_encoder, write_pairs
from trainer.demo_data import PARTICIPLES, SLOTS, is_dev, read_pairs
from trainer.lightning_cli import run

KINDS = ("bert", "roberta", "mpnet")
TEXTS = [
    "The doctor bought a car.",
    "Am Morgen repariert die Ärztin das Boot.",
    "医者は船を買った。",
    "a b c",
]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parse(sentence: str) -> tuple[int, ...]:
    """The meaning of a sentence, found by looking for every synonym of every slot."""
    for form, participle in PARTICIPLES.items():
        sentence = re.sub(rf"\b{participle}\b", form, sentence)
    found = [
        [i for i, words in enumerate(slot) if any(re.search(rf"\b{w}\b", sentence, re.I) for w in words)]
        for slot in SLOTS
    ]
    assert all(len(concepts) == 1 for concepts in found), (sentence, found)
    return tuple(concepts[0] for concepts in found)


def test_score_is_the_number_of_agreeing_slots_and_dev_is_held_out(tmp_path: Path) -> None:
    train_path, dev_path = write_pairs(tmp_path, 300, 200, seed=3)
    train, dev = read_pairs(train_path), read_pairs(dev_path)
    assert (len(train), len(dev)) == (300, 200)
    for pairs, held_out in ((train, False), (dev, True)):
        for pair in pairs:
            first, second = parse(pair.sentence1), parse(pair.sentence2)
            assert pair.score == sum(a == b for a, b in zip(first, second, strict=True))
            assert is_dev(first) == is_dev(second) == held_out
    assert {pair.score for pair in dev} == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


def test_words_on_the_surface_are_a_poor_guide(tmp_path: Path) -> None:
    _, dev_path = write_pairs(tmp_path, 1, 2000, seed=0)
    dev = read_pairs(dev_path)
    words = [(set(p.sentence1.lower().split()), set(p.sentence2.lower().split())) for p in dev]
    overlap = [len(a & b) / len(a | b) for a, b in words]
    assert spearmanr(overlap, [pair.score for pair in dev]).statistic < 0.45


@pytest.mark.parametrize("kind", KINDS)
def test_same_arguments_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    texts = [p.sentence1 for p in read_pairs(write_pairs(tmp_path / "data", 400, 1, seed=1)[0])] + TEXTS
    state = torch.get_rng_state()
    a, b, c = (
        write_encoder(tmp_path / name, texts, hidden=32, kind=kind, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert files(a) == files(b)
    assert len({file.stat().st_mode for file in a.rglob("*") if file.is_file()}) == 1  # safetensors alone: 0600
    assert files(a)["model.safetensors"] != files(c)["model.safetensors"]
    assert torch.equal(torch.get_rng_state(), state)
    again = write_pairs(tmp_path / "again", 400, 1, seed=1)[0]
    assert again.read_bytes() == (tmp_path / "data" / "train.jsonl.gz").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_transformers_loads_the_folder(tmp_path: Path, kind: str, normalize: bool) -> None:
    write_encoder(tmp_path, TEXTS, hidden=32, kind=kind, normalize=normalize, max_positions=16)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    long = " ".join(TEXTS * 5)  # truncated to all positions there are
    embeddings = model.encode([*TEXTS, long], convert_to_tensor=True)
    assert len(model.tokenizer(long, truncation=True, max_length=model.max_seq_length)["input_ids"]) == 16
    assert embeddings.shape == (5, 32)
    assert embeddings.isfinite().all()
    lengths = embeddings.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(5), atol=1e-5) == normalize
    unknown = model.tokenizer.unk_token_id
    assert all(unknown not in model.tokenizer(text)["input_ids"] for text in TEXTS)


def test_demo_trains_exports_and_names_true_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/demo")
    before, after = run_demo(folder, num_train=3000, num_dev=200, hidden=64)
    shown = capsys.readouterr().out
    assert before < 0.5
    assert after > before + 0.2
    assert f"before {before:.3f}, after {after:.3f}" in shown
    assert "3 nearest of" in shown
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    dev = [line["eval/dev/spearman_cosine"] for line in logged if "eval/dev/spearman_cosine" in line]
    assert dev[0] == pytest.approx(before, abs=1e-3)  # ours in training, sentence-transformers' from the folders
    assert max(dev) == pytest.approx(after, abs=1e-3)

    commands = dict(re.findall(r"^  (two processes|a cluster|your data|all flags) +(.*)$", shown, re.M))
    assert len(commands) == 4
    repository = Path(__file__).parents[1]
    words = shlex.split(commands["a cluster"])
    assert (repository / words[words.index("--nodes") + 2]).is_file()
    Path("configs").symlink_to(repository / "configs")  # the demo is run from there
    readme = (repository / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (first_model,) = re.findall(r"^\.venv/bin/trainer fit (.*pairs\.jsonl\.gz.*)$", readme, re.M)
    assert shlex.split(commands["your data"].split(" fit ", 1)[1]) == shlex.split(first_model)
    for name, num_ranks in (("two processes", 2), ("your data", 1)):
        words = shlex.split(commands[name].split(" fit ", 1)[1])
        if name == "your data":
            words += ["--model.encoder.backbone", str(folder / "encoder")]  # the recipe's own is on the hub
        cli = run(["fit", *words], read_command(words), execute=False)
        assert cli.trainer.world_size == num_ranks
        assert not cli.run_dir.exists()  # a used one would be refused
    run_demo(folder, num_train=64, num_dev=20, hidden=32)  # again, over its own folder
    assert (folder / "run" / "model").is_dir()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds something that is no demo; give a new folder: --dir runs/demo-2"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
