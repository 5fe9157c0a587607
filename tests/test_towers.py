"""Training with separate towers: batches, two ranks, vocabularies, resume, evaluation and export of a whole run."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.batches import gradients_of, largest_difference
from tests.two_ranks import TwoRanks
from trainer.batch import PackedBatch
from trainer.check.report import make_report
from trainer.cli import main
from trainer.data.batches import StepBatches
from trainer.data.module import PairData
from trainer.data.opaque import OpaqueBatches, OpaqueStream
from trainer.data.sources import Source
from trainer.data.streaming import StreamedTable
from trainer.data.tokens import tokenize
from trainer.data.validation import ValidationSet
from trainer.demo_data import MAX_SCORE, read_pairs, write_pairs
from trainer.distributed import gather
from trainer.encoder import EncoderSpec
from trainer.encoder.spec import LoRA
from trainer.encoder.towers import Towers, load_encoder, load_texts
from trainer.evaluation import STS, InformationRetrieval
from trainer.evaluation.scoring import evaluate
from trainer.evaluation.search import Collection
from trainer.losses import CosineSimilarity, InfoNCE
from trainer.module import EmbeddingModule

ROWS, BATCH = 14, 13  # the last step of an epoch has one row: one of two ranks has none
PAIR = {"anchor": "sentence1", "positive": "sentence2"}
SCORED = PAIR | {"score": "score"}
QUERY, DOCUMENT = "bert", "roberta"


@dataclass(frozen=True)
class Bench:
    """Plain values, shipped to both ranks."""

    query: str
    document: str
    pairs: str
    cache: str

    @property
    def specs(self) -> tuple[EncoderSpec, EncoderSpec]:
        return EncoderSpec(self.query, dropout=0.0), EncoderSpec(self.document, dropout=0.0, max_length=24)

    def data(self, columns: dict[str, Any] = SCORED) -> PairData:
        spec, document = self.specs
        score_range = (0.0, float(MAX_SCORE)) if "score" in columns else None
        source = Source(self.pairs, columns, score_range)
        return PairData([source], spec, batch_size=BATCH, seed=5, cache_dir=self.cache, document_encoder=document)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_encoders: dict[str, Path], cache: Path) -> Bench:
    pairs = write_pairs(tmp_path_factory.mktemp("pairs"), ROWS, 12, seed=3)[0]
    return Bench(str(tiny_encoders[QUERY]), str(tiny_encoders[DOCUMENT]), str(pairs), str(cache))


class Model(nn.Module):
    """Towers and loss as the strategy sees them: one module with one forward."""

    def __init__(self, encoder: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.encoder, self.loss = encoder, loss

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.loss(self.encoder(batch), batch.targets)


def step(bench: Bench, number: int, max_tokens: int, frozen: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss of the global batch of a step and the gradients that the optimizer would see, on any number of ranks."""
    data = bench.data()
    data.setup("fit")
    spec, document = bench.specs
    if frozen:
        document.freeze = 2
    towers = load_encoder(spec, document, max_tokens).train()
    for tower, part in zip(("query", "document"), towers.parts.values(), strict=True):
        used = data.used_ids(tower)
        assert used is not None
        part.compact_vocabulary(used)
    model = Model(towers, InfoNCE() if number == 0 else CosineSimilarity())
    wrapped = DistributedDataParallel(model) if gather.world_size() > 1 else model
    ranks = gather.rank(), gather.world_size()
    value = wrapped(StepBatches(data.tables, data.order, data.order.steps_per_epoch, *ranks)[number])
    value.backward()
    return float(gather.reduce_sum(value.detach()) / gather.world_size()), gradients_of(model)


def test_two_ranks_compute_what_one_process_computes(two_ranks: TwoRanks, bench: Bench) -> None:
    """A step of 13 rows and one of a single row, whole and in chunks; each tower trains the pieces of its own texts."""
    for number, frozen in ((0, False), (1, False), (0, True)):
        loss, gradients = step(bench, number, 16384, frozen)
        if number == 0:
            chunked_loss, chunked = step(bench, number, 40, frozen)
            assert chunked_loss == pytest.approx(loss, rel=1e-5)
            assert largest_difference(chunked, gradients) < 1e-5
        for two_loss, found in two_ranks(step, bench, number, 16384, frozen):
            assert two_loss == pytest.approx(loss, rel=1e-5)
            assert largest_difference(found, gradients) < 2e-5
        towers = {name.split(".")[1] for name, gradient in gradients.items() if float(gradient.abs().max()) > 0.0}
        assert towers == ({"query"} if frozen else {"query", "document"})


def test_pieces_and_lengths_are_those_of_each_tower(bench: Bench) -> None:
    data, rows = bench.data(), read_pairs(Path(bench.pairs))
    data.setup("fit")
    query, document = (text for text in (data.text, data.text.documents) if text is not None)
    ids = {"query": query([row.sentence1 for row in rows]), "document": document([row.sentence2 for row in rows])}
    assert max(map(len, ids["document"])) == 24 < max(map(len, ids["query"]))
    for tower, found in ids.items():
        used = data.used_ids(tower)
        assert used is not None
        assert used.tolist() == sorted({piece for one in found for piece in one})
    batch = StepBatches(data.tables, data.order, data.order.steps_per_epoch, 0, 1)[0]
    queries, documents = batch.streams
    order = data.order.step(0, 0).rows
    for stream, found in ((queries, ids["query"]), (documents, ids["document"])):
        segments = torch.split(stream.input_ids_T, list(stream.lengths))
        assert [segments[place].tolist() for place in stream.order_S.tolist()] == [found[row] for row in order]
    assert batch.num_tokens == sum(queries.lengths) + sum(documents.lengths)
    longest = [max(stream.lengths) * BATCH for stream in batch.streams]
    assert batch.padded_tokens == sum(longest)
    sent = pickle.loads(pickle.dumps(batch)).to("cpu")
    assert torch.equal(sent.streams[1].input_ids_T, documents.input_ids_T)
    assert sent.streams[1].tower == "document"


def test_streams_hold_the_same_pieces(bench: Bench, tmp_path: Path) -> None:
    """A row that lacks a negative has a placeholder of the document tower; hashes of both towers are told apart."""
    rows = [
        {"query": row.sentence1, "pos": row.sentence2, "neg": [row.sentence1, row.sentence2][: i % 3]}
        for i, row in enumerate(read_pairs(Path(bench.pairs)))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = load_texts(*bench.specs)
    assert text.documents is not None
    spec: dict[str, Any] = {"columns": {"anchor": "query", "positive": "pos", "negatives": "neg"}, "max_negatives": 2}
    table = tokenize(Source(str(tmp_path / "rows.parquet"), **spec), text, tmp_path)
    streamed = StreamedTable(Source(str(tmp_path / "rows.parquet"), streaming=True, **spec), text, tmp_path)
    everything = np.arange(len(rows))
    assert [ids.tolist() for ids in table.ids("negative_2", everything[:2])] == [text.documents.no_text] * 2
    assert set(text.documents.no_text) <= set(table.used_ids("document").tolist())
    assert (table.hashes(everything) == streamed.hashes(everything)).all()
    anchors, _, negatives, _ = table.hashes(everything[1:2])[0]
    assert anchors != negatives  # one text
    expected = text.documents([row["pos"] for row in rows])
    for one in (table, streamed):
        assert [ids.tolist() for ids in one.ids("positive", everything)] == expected

    opaque = OpaqueStream(Source(str(tmp_path / "rows.jsonl"), streaming=True, **spec), text, 0)
    whole = OpaqueBatches(opaque, len(rows), 0, 1, 0, 1, {})[0]
    shuffled = whole.targets.row_ids_B.tolist()
    documents = whole.streams[1]
    segments = torch.split(documents.input_ids_T, list(documents.lengths))
    positives = [segments[place].tolist() for place in documents.order_S.tolist()][: len(rows)]
    assert positives == [expected[row] for row in shuffled]
    assert documents.num_columns == 3


def test_columns_without_a_query_are_refused(bench: Bench) -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"{bench.pairs}: model.document_encoder separates documents (positive, ...) from queries (anchor), but the "
            "texts are text: leave document_encoder out, or give pairs"
        ),
    ):
        bench.data({"text": "sentence1", "label": "score"})


def test_a_length_is_that_of_its_tower(bench: Bench) -> None:
    data = bench.data()
    data.train_sources[0].max_lengths = {"positive": 30}
    with pytest.raises(ValueError, match=r"'positive' 30 pieces; give 3 to 24, which is model.document_enc"):
        data.text_of(data.train_sources[0])


# -- a whole run ------------------------------------------------------------------------------------------


def _parts(bench: Bench, lora: bool = False, **settings: Any) -> tuple[EmbeddingModule, PairData]:
    spec, document = bench.specs
    document.dropout = 0.1  # a resume draws the same masks
    if lora:
        document.lora = LoRA(r=4)
    common = {"learning_rate": 1e-3, "weight_decay": 0.05, "document_encoder": document, **settings}
    data = bench.data(PAIR)
    data.document_spec = document
    return EmbeddingModule(spec, InfoNCE(), **common), data


def _fit(module: EmbeddingModule, data: PairData, ckpt_path: Path | None = None, max_steps: int = 4) -> Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    trainer = Trainer(
        accelerator="cpu", devices=1, use_distributed_sampler=False, max_epochs=-1, max_steps=max_steps,
        gradient_clip_val=1.0, **dict.fromkeys(quiet, False),
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    return trainer


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_goes_on_bit_for_bit(bench: Bench, tmp_path: Path, lora: bool) -> None:
    """Both towers and both vocabularies stand in the checkpoint; of a tower with adapters, its adapters."""
    whole, data = _parts(bench, lora, schedule="constant")
    _fit(whole, data)
    first, data = _parts(bench, lora, schedule="constant")
    _fit(first, data, max_steps=2).save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=False)
    assert {"query.base_vocabulary", "document.base_weights" if lora else "document.base_vocabulary"} <= saved.keys()
    names = [name for name in saved["state_dict"] if name.startswith("encoder.document.backbone.encoder")]
    assert all("lora" in name for name in names) == lora
    resumed, data = _parts(bench, lora, schedule="constant")
    _fit(resumed, data, tmp_path / "run.ckpt")
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(first.state_dict()["encoder.query.backbone.embeddings.word_embeddings.weight"],
                           theirs["encoder.query.backbone.embeddings.word_embeddings.weight"])  # fmt: skip


def test_compact_vocabularies_change_nothing(bench: Bench) -> None:
    """Four steps with weight decay, then the exported matrices of both towers."""
    found = []
    for compact in ("auto", "off"):
        module, data = _parts(bench)
        for spec in module.encoder_specs:
            spec.compact_vocabulary, spec.dropout = compact, 0.0  # type: ignore[assignment]
        _fit(module, data)
        parts = list(module.encoder.parts.values())
        assert [part.vocabulary is not None for part in parts] == [compact == "auto"] * 2
        with module.encoder.as_sentence_transformer() as model:
            found.append({name: value.clone() for name, value in model.state_dict().items()})
    assert_close(found[0], found[1], rtol=0.0, atol=1e-5)


def test_the_first_batch_is_printed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    module, data = _parts(bench, print_first_batch=True)
    _fit(module, data, max_steps=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    rows = read_pairs(Path(bench.pairs))
    assert len(lines) == BATCH
    for line, row in zip(lines, data.order.step(0, 0).rows, strict=True):
        query, document = line.split(": ", 1)[1].split(" | ")
        assert query.startswith("[CLS]")
        assert document.startswith("<s>")
        letters = (re.sub(r"\W|CLS|SEP", "", query), re.sub(r"\W", "", re.sub(r"</?s>", "", document)))
        texts = [re.sub(r"\W", "", text) for text in (rows[row].sentence1, rows[row].sentence2)]
        assert letters[0].lower() == texts[0].lower()
        assert texts[1].lower().startswith(letters[1].lower())  # cut at 24 pieces


def test_the_report_counts_both_towers(bench: Bench) -> None:
    module, data = _parts(bench)
    data.setup("fit")
    report = make_report(module, data, 2, 4, 1, False, None)
    towers = load_encoder(*bench.specs, 16384)
    assert report.memory is not None
    assert report.memory.num_parameters == sum(p.numel() for p in towers.parameters())
    assert report.plan.num_pieces == sum(len(part.text.tokenizer) for part in towers.parts.values())
    used = [data.used_ids(tower) for tower in ("query", "document")]
    assert report.plan.num_used_pieces == sum(len(ids) for ids in used if ids is not None)
    batch = StepBatches(data.tables, data.order, data.order.steps_per_epoch, 0, 1)[0]
    assert report.plan.max_tokens_of_towers == [sum(stream.lengths) for stream in batch.streams]
    assert report.backbone == f"{bench.query} and {bench.document}"


# -- evaluation -------------------------------------------------------------------------------------------


def test_queries_and_documents_are_evaluated_by_their_tower(
    bench: Bench, demo_texts: list[str], tmp_path: Path
) -> None:
    """Retrieval against sentence-transformers' evaluator of the exported folder, and pairs against SciPy."""
    towers = load_encoder(*bench.specs, 300).eval()
    assert isinstance(towers, Towers)
    with towers.as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path / "model"))
    peer: Any = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = list(dict.fromkeys(demo_texts))[:60]
    queries, documents = texts[:12], texts[4:]  # some stand in both
    relevance = [{(5 * i + k) % len(documents): 1 for k in range(3)} for i in range(len(queries))]
    names = [[f"{kind}{i}" for i in range(len(found))] for kind, found in (("q", queries), ("d", documents))]
    collection = Collection(names[0], queries, names[1], documents, relevance)
    text = load_texts(*bench.specs)
    pairs = {"anchor": queries, "positive": documents[:12], "score": np.linspace(0, 1, 12).tolist()}
    sets = [ValidationSet("ir", collection, InformationRetrieval(), text), ValidationSet("sts", pairs, STS(), text)]
    with torch.no_grad():
        ours = evaluate(towers.embed, sets, 0, 1, 300)

    relevant = {f"q{i}": {f"d{d}" for d in judged} for i, judged in enumerate(relevance)}
    evaluator = InformationRetrievalEvaluator(
        dict(zip(names[0], queries, strict=True)), dict(zip(names[1], documents, strict=True)), relevant,
        score_functions={"cosine": peer.similarity}, write_csv=False,
    )  # fmt: skip
    theirs = evaluator(peer)
    for name in ("cosine_ndcg@10", "cosine_map@100", "cosine_mrr@10", "cosine_recall@5"):
        assert ours[f"eval/ir/{name}"] == pytest.approx(theirs[name], abs=1e-6), name
    a, b = peer.encode_query(queries), peer.encode_document(documents[:12])
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert ours["eval/sts/spearman_cosine"] == pytest.approx(spearmanr(pairs["score"], cosines)[0], abs=1e-6)


# -- the commands -----------------------------------------------------------------------------------------


def test_fit_exports_what_validate_and_sentence_transformers_read(bench: Bench, tmp_path: Path) -> None:
    """The metric at the end of a fit, that of the exported folder by its routes, and that of its embeddings with the
    prompts that training put before queries and documents."""
    dev = Path(bench.pairs).with_name("dev.jsonl.gz")
    held_out: dict[str, Any] = {"name": "dev", "path": str(dev), "columns": SCORED, "score_range": [0, MAX_SCORE]}
    prompts = {"prompts": {"anchor": "it was ", "positive": "at dawn "}}
    train = {**held_out, **prompts, "path": bench.pairs}
    del train["name"]
    config: dict[str, Any] = {
        "model": {
            "encoder": {"backbone": bench.query, "prompt": "the "},
            "document_encoder": {"backbone": bench.document},
            "loss": "CosineSimilarity",
            "learning_rate": 1e-3,
        },
        "data": {"train": [train], "validation": [{**held_out, **prompts}], "batch_size": 4},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 3},
        "checkpoint": {"monitor": None},
        "tracking": {"wandb": "off"},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    assert (
        main(["fit", "--config", str(tmp_path / "fit.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = next(row for row in reversed(log) if "eval/dev/pearson_cosine" in row)
    assert expected["step"] == 3

    model = str(tmp_path / "run" / "model")
    config["model"]["encoder"] = {"backbone": model, "route": "query"}
    config["model"]["document_encoder"] = {"backbone": model, "route": "document"}
    config["data"]["validation"] = [held_out]  # the folder has the prompts now
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    assert (
        main(["validate", "--config", str(tmp_path / "again.yaml"), "--trainer.default_root_dir", str(tmp_path)]) == 0
    )
    found = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert found["eval/dev/pearson_cosine"] == pytest.approx(expected["eval/dev/pearson_cosine"], abs=1e-5)

    peer = SentenceTransformer(model, device="cpu")
    assert peer.prompts == {"query": "the it was ", "document": "at dawn "}
    np.testing.assert_array_equal(peer.encode(["a shop"]), peer.encode_document(["a shop"]))
    rows = read_pairs(dev)
    a, b = peer.encode_query([row.sentence1 for row in rows]), peer.encode_document([row.sentence2 for row in rows])
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    pearson = pearsonr([row.score for row in rows], cosines)[0]
    assert expected["eval/dev/pearson_cosine"] == pytest.approx(pearson, abs=1e-5)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "- **Base models:** `bert` for queries, `roberta` for documents" in card
    assert "model.encode_query(" in card
