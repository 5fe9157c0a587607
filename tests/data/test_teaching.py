"""A teacher's embeddings, and its scores, on their way from the data to the loss."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor

from tests.batches import relative_error
from tests.tracking.small_run import make_trainer
from tests.two_ranks import TwoRanks
from trainer import evaluation
from trainer.check.report import make_report
from trainer.data import teaching
from trainer.data.evalsource import EvalSource
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.data.teaching import teach
from trainer.demo_encoder import write_encoder
from trainer.encoder.spec import EncoderSpec, LoRA
from trainer.evaluation import Translation
from trainer.evaluation.runner import Evaluation
from trainer.losses import MSE, GISTEmbed, InfoNCE, Loss, MarginMSE, Matryoshka
from trainer.module import EmbeddingModule

COLUMNS: dict[str, int | str] = {"anchor": "a", "positive": "p"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_texts: list[str], tiny_encoders: dict[str, Path]) -> Path:
    """Rows with repeated texts, a student, and a teacher of another vocabulary type."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "student").symlink_to(tiny_encoders["bert"])
    (folder / "teacher").symlink_to(tiny_encoders["roberta"])
    rows = [
        {"a": demo_texts[i // 2], "p": demo_texts[100 + i], "n": demo_texts[200 + i], "scores": [i / 8, 0.25 - i]}
        for i in range(60)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("prompt", [None, "passage: "])
def test_embeddings_are_those_of_the_teacher(prompt: str | None, folder: Path, tmp_path: Path) -> None:
    """As sentence-transformers encodes the same texts behind the teacher's prompt, not the student's; each once."""
    source = Source(str(folder / "rows.jsonl"), COLUMNS, prompts={"anchor": "query: "})
    table = teach(source, EncoderSpec(str(folder / "teacher"), prompt=prompt), tmp_path, 100, CPU)
    assert table.num_texts == 30 + 60
    rows = np.array([7, 0, 59, 58])
    found = pickle.loads(pickle.dumps(table)).embeddings(rows)
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    model = SentenceTransformer(str(folder / "teacher"), device="cpu")
    for column, name in enumerate(COLUMNS.values()):
        wanted = model.encode([lines[r][name] for r in rows], prompt=prompt)
        assert found[:, column] == pytest.approx(wanted, abs=1e-5)


def test_the_set_that_compares_with_a_teacher_gives_it_the_texts_alone(folder: Path, tmp_path: Path) -> None:
    """The student reads the prompt of a column, the teacher does not: as sentence-transformers encodes the two."""
    prompts = {"anchor": "query: ", "positive": "passage: "}
    path, teacher, student = str(folder / "rows.jsonl"), str(folder / "teacher"), str(folder / "student")
    dev = EvalSource(
        name="dev",
        path=path,
        columns=COLUMNS,
        evaluator=evaluation.MSE(),
        prompts=prompts,
        teacher=EncoderSpec(teacher),
    )
    spec = EncoderSpec(student)
    data = PairData([Source(path, COLUMNS)], spec, validation=[dev], batch_size=9, cache_dir=str(tmp_path))
    module = EmbeddingModule(spec, InfoNCE())
    (found,) = make_trainer(tmp_path, [Evaluation()]).validate(module, datamodule=data, verbose=False)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    theirs = SentenceTransformer(teacher, device="cpu").encode([line["a"] for line in lines])
    ours = SentenceTransformer(student, device="cpu").encode([line["p"] for line in lines], prompt="passage: ")
    assert found["eval/dev/negative_mse"] == pytest.approx(-100 * ((ours - theirs) ** 2).mean(), rel=1e-5)


def test_they_are_made_once_for_texts_and_teacher(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(str(folder / "rows.jsonl"), COLUMNS)
    first = teach(source, EncoderSpec(str(folder / "teacher")), tmp_path, 1000, CPU)
    shutil.copytree(folder / "teacher", tmp_path / "moved")
    other = teach(source, EncoderSpec(str(folder / "teacher"), pooling="cls"), tmp_path, 1000, CPU)
    assert other.folder != first.folder
    monkeypatch.setattr(teaching, "Encoder", None)  # whoever embeds now fails
    assert teach(source, EncoderSpec(str(tmp_path / "moved")), tmp_path, 50, CPU).folder == first.folder
    with pytest.raises(TypeError):
        teach(
            Source(str(folder / "rows.jsonl"), {"text": "n"}), EncoderSpec(str(folder / "teacher")), tmp_path, 50, CPU
        )


def test_a_teacher_that_embeds_leaves_the_run_its_numbers(folder: Path, tmp_path: Path) -> None:
    """Heads and adapters are drawn behind it: else a start with a cold cache would be another run."""
    plain = SentenceTransformer(str(folder / "teacher"), device="cpu")
    SentenceTransformer(modules=[*plain, Dense(32, 32)], device="cpu").save_pretrained(str(tmp_path / "dense"))
    torch.manual_seed(7)
    teach(Source(str(folder / "rows.jsonl"), COLUMNS), EncoderSpec(str(tmp_path / "dense")), tmp_path, 1000, CPU)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("is_cut", [False, True])
def test_damaged_embeddings_are_made_again(is_cut: bool, folder: Path, tmp_path: Path) -> None:
    """Zeroed, or cut to half of their bytes."""
    source, teacher = Source(str(folder / "rows.jsonl"), COLUMNS), EncoderSpec(str(folder / "teacher"))
    file = teach(source, teacher, tmp_path, 1000, CPU).folder / "embeddings.float32"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if is_cut else bytes(len(whole)))
    student = EncoderSpec(str(folder / "student"))
    module = EmbeddingModule(student, GISTEmbed(), teacher=teacher, max_tokens=1000)
    data = PairData([source], student, cache_dir=str(tmp_path))
    module.open_teachers(data, CPU, verify=True)
    assert file.read_bytes() == whole


def test_a_streamed_source_is_refused(folder: Path, tmp_path: Path) -> None:
    source = Source(str(folder / "rows.jsonl"), COLUMNS, streaming=True)
    with pytest.raises(ValueError, match=r"rows.jsonl: a teacher embeds all texts before .* streaming: true; set it"):
        teach(source, EncoderSpec(str(folder / "teacher")), tmp_path, 50, CPU)


def test_a_teacher_that_is_not_there_is_called_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.teacher\.backbone '.*teecher' is neither a model folder nor"):
        teach(Source(str(folder / "rows.jsonl"), COLUMNS), EncoderSpec(str(folder / "teecher")), tmp_path, 50, CPU)


def test_validation_reads_no_training_data(folder: Path, tmp_path: Path) -> None:
    """So the teacher has nothing to embed, and a run can be validated where its training data is gone."""
    spec = EncoderSpec(str(folder / "student"))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps({"a": text, "p": text}) + "\n" for text in "abc"))
    dev = EvalSource(name="dev", path=str(tmp_path / "dev.jsonl"), columns=COLUMNS, evaluator=Translation())
    gone = [Source(str(tmp_path / "gone.jsonl"), COLUMNS)]
    data = PairData(gone, spec, validation=[dev], batch_size=9, cache_dir=str(tmp_path))
    module = EmbeddingModule(spec, MSE(), teacher=EncoderSpec(str(folder / "teacher")))
    (found,) = make_trainer(tmp_path, [Evaluation()]).validate(module, datamodule=data, verbose=False)
    assert found["eval/dev/mean_accuracy"] == 1.0
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("loss", "teacher", "text"),
    [
        (MSE(), None, "MSE learns from a teacher, but there is none: set model.teacher.backbone"),
        (InfoNCE(), EncoderSpec("x"), "model.teacher is set, but InfoNCE asks for no teacher: leave it out"),
        (
            MSE(),
            EncoderSpec("x", freeze=1),
            "model.teacher.freeze is set, but a teacher is never trained: leave it out",
        ),
        (
            MSE(),
            EncoderSpec("x", lora=LoRA()),
            "model.teacher.lora is set, but a teacher is never trained: leave it out",
        ),
    ],
)
def test_a_teacher_that_is_missing_or_idle(loss: Loss, teacher: EncoderSpec | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EmbeddingModule(EncoderSpec("x"), loss, teacher=teacher)


@pytest.mark.parametrize("loss", [MSE(), Matryoshka(MSE(), [8, 4])])
def test_a_teacher_of_another_size_is_refused_before_it_embeds(
    folder: Path, tmp_path: Path, demo_texts: list[str], loss: Loss
) -> None:
    write_encoder(tmp_path / "large", demo_texts[:50], hidden=64, layers=1, heads=2, vocab=200)
    spec = EncoderSpec(str(folder / "student"))
    size = SentenceTransformer(spec.backbone, device="cpu").get_embedding_dimension()
    data = PairData([Source(str(folder / "rows.jsonl"), COLUMNS)], spec, batch_size=9, cache_dir=str(tmp_path))
    module = EmbeddingModule(spec, loss, teacher=EncoderSpec(str(tmp_path / "large")))
    wanted = f"^MSE compares embeddings of {size} dimensions with a teacher's of 64; set projection_dim to 64"
    with pytest.raises(ValueError, match=wanted):
        make_trainer(tmp_path, []).fit(module, datamodule=data)
    assert not (tmp_path / "teacher").exists()
    data.setup("fit")
    with pytest.raises(ValueError, match=wanted):  # which the check makes, without weights
        make_report(module, data, 6, 6, num_ranks=1, is_half=False, strategy="auto")


def train(folder: str, cache_dir: str, num_workers: int = 0) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after an epoch, and what the loss saw of the teacher in each step."""
    student = EncoderSpec(f"{folder}/student", dropout=0.0)
    module = EmbeddingModule(
        student,
        GISTEmbed(scale=20.0),
        losses={"near": MSE()},
        teacher=EncoderSpec(f"{folder}/teacher"),
        optimizer="sgd",
        learning_rate=0.01,
    )
    path = f"{folder}/rows.jsonl"
    sources = [Source(path, COLUMNS), Source(path, {"anchor": "n", "positive": "p"}, loss="near")]
    data = PairData(sources, student, batch_size=9, seed=3, cache_dir=cache_dir, num_workers=num_workers)
    seen: list[float] = []
    step = module.training_step

    def note(batch: Any, batch_idx: int) -> Tensor:
        seen.append(float(batch.targets.extras["teacher"].double().sum()))
        return step(batch, batch_idx)

    module.training_step = note  # type: ignore[method-assign]
    make_trainer(Path(folder) / "runs", [], max_epochs=1).fit(module, datamodule=data)
    assert not any("teacher" in name for name, _ in module.named_parameters())
    return {name: p.detach().clone() for name, p in module.named_parameters()}, seen


def test_two_ranks_learn_what_one_with_a_loader_worker_learns(
    two_ranks: TwoRanks, folder: Path, tmp_path: Path
) -> None:
    alone, seen = train(str(folder), str(tmp_path / "one"), 1)
    (weights, first), (others, second) = two_ranks(train, str(folder), str(tmp_path / "two"))
    assert len(seen) == 2 * 7
    assert [a + b for a, b in zip(first, second, strict=True)] == pytest.approx(seen, abs=1e-4)
    assert all(torch.equal(weights[name], value) for name, value in others.items())
    assert relative_error(weights, alone) < 1e-5


def test_scores_of_candidates_come_in_their_order(folder: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    columns = {**COLUMNS, "negative": "n", "score_2": "scores.1", "score_1": "scores.0"}
    student = EncoderSpec(str(tiny_encoder))
    module = EmbeddingModule(student, MarginMSE())
    data = PairData([Source(str(folder / "rows.jsonl"), columns)], student, batch_size=16, cache_dir=str(tmp_path))
    seen = []
    step = module.training_step

    def note(batch: Any, batch_idx: int) -> Tensor:
        seen.append((batch.targets.row_ids_B, batch.targets.extras["scores"]))
        return step(batch, batch_idx)

    module.training_step = note  # type: ignore[method-assign]
    make_trainer(tmp_path, [], max_steps=2).fit(module, datamodule=data)
    assert len(seen) == 2
    for rows, scores in seen:
        assert torch.equal(scores, torch.stack([rows / 8, 0.25 - rows], dim=1).float())


@pytest.mark.parametrize(
    ("columns", "streaming", "text"),
    [
        ({"score_2": "s"}, False, "columns has score_2; number them score_1"),
        ({"score_1": "s"}, True, "score_1 does not go with streaming: true"),
    ],
)
def test_scores_that_cannot_be(columns: dict[str, str], streaming: bool, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Source("x.parquet", {**COLUMNS, **columns}, streaming=streaming)
