"""Separate towers against sentence-transformers' Router, in value, in gradient and as an exported folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense
from torch.testing import assert_close

from tests.batches import gradients_of, largest_difference
from trainer.batch import PackedBatch
from trainer.data.collate import pack_texts, pack_towers
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.text import load_text_preparation
from trainer.encoder.towers import Towers, load_encoder, load_texts
from trainer.losses import InfoNCE

WHOLE = 16384
QUERY, DOCUMENT = "bert", "roberta"  # other pieces for a text, other places for its positions


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory, tiny_encoders: dict[str, Path]) -> tuple[EncoderSpec, EncoderSpec]:
    """Two encoders with larger weights than fresh ones: under those all first pieces lie together, and rounding errors
    are as large as what tells texts apart."""
    folder = tmp_path_factory.mktemp("backbones")
    for kind in (QUERY, DOCUMENT):
        model: Any = SentenceTransformer(str(tiny_encoders[kind]), device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
        model.save_pretrained(str(folder / kind))
    return (
        EncoderSpec(str(folder / QUERY), dropout=0.0, prompt="find: "),
        EncoderSpec(str(folder / DOCUMENT), dropout=0.0, max_length=40, pooling="cls"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, specs: tuple[EncoderSpec, EncoderSpec]) -> Path:
    """Both towers as they are exported; documents are embedded from their first piece."""
    folder = tmp_path_factory.mktemp("router") / "model"
    with load_encoder(*specs, WHOLE).as_sentence_transformer() as model:
        model.save_pretrained(str(folder))
    return folder


def _batch(specs: tuple[EncoderSpec, EncoderSpec], columns: list[list[str]]) -> PackedBatch:
    text = load_texts(*specs)
    ids = [text.of_column(name)(texts) for name, texts in zip(("anchor", "positive", "negative"), columns, strict=True)]
    targets = pack_texts(ids[0]).targets
    return pack_towers([[torch.tensor(one).numpy() for one in column] for column in ids], targets, len(columns[0]))


@pytest.mark.parametrize("max_tokens", [WHOLE, 60], ids=["whole", "chunked"])
def test_loss_and_gradients_are_those_of_a_router(
    specs: tuple[EncoderSpec, EncoderSpec], folder: Path, demo_texts: list[str], max_tokens: int
) -> None:
    """MultipleNegativesRankingLoss of queries, positives and negatives through the folder that was exported."""
    columns = [demo_texts[:7], demo_texts[7:14], demo_texts[14:21]]
    towers = load_encoder(*specs, max_tokens).train()  # dropout is 0
    batch = _batch(specs, columns)
    ours = InfoNCE(scale=20.0)(towers(batch), batch.targets)
    ours.backward()

    peer: Any = SentenceTransformer(str(folder), device="cpu").eval()
    tasks = ("query", "document", "document")
    features = [
        peer.preprocess(texts, prompt=peer.prompts[task] or None, task=task)
        for task, texts in zip(tasks, columns, strict=True)
    ]
    theirs = MultipleNegativesRankingLoss(peer, scale=20.0)(features, torch.zeros(7))
    theirs.backward()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    expected = {
        f"{task}.backbone.{name}": gradient
        for task in ("query", "document")
        for name, gradient in gradients_of(peer[0].sub_modules[task][0].model).items()
    }
    assert largest_difference(gradients_of(towers), expected) < 1e-5
    for task in ("query", "document"):  # both are far from 0
        assert max(float(g.abs().max()) for name, g in expected.items() if name.startswith(task)) > 1e-2


def test_the_exported_folder_embeds_as_the_towers(
    specs: tuple[EncoderSpec, EncoderSpec], folder: Path, demo_texts: list[str]
) -> None:
    """encode_query, encode_document and plain encode; each route alone is an encoder with its own prompt and length."""
    towers = load_encoder(*specs, WHOLE).eval()
    assert isinstance(towers, Towers)
    texts = [*demo_texts[:5], "stone " * 60]
    peer = SentenceTransformer(str(folder), device="cpu")
    for route, part, encode in (
        ("query", towers.query, peer.encode_query),
        ("document", towers.document, peer.encode_document),
        ("document", towers.document, peer.encode),
    ):
        with torch.no_grad():
            ours = towers.embed(pack_texts(part.text(texts), route))
        assert_close(ours, torch.tensor(encode(texts)), rtol=0.0, atol=1e-5)
        alone = Encoder(EncoderSpec(str(folder), route=route), WHOLE).eval()
        assert alone.text.max_length == part.text.max_length
        with torch.no_grad():
            assert_close(alone.embed(pack_texts(alone.text(texts))), ours, rtol=0.0, atol=1e-5)
    with torch.no_grad():
        others = towers.embed(pack_texts(towers.document.text(texts), "document"))
        assert float((towers.embed(pack_texts(towers.query.text(texts))) - others).abs().max()) > 0.1


def test_a_route_as_a_model_of_its_own_keeps_its_prompt(folder: Path, demo_texts: list[str], tmp_path: Path) -> None:
    with Encoder(EncoderSpec(str(folder), route="query"), WHOLE).as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path / "queries"))
    expected = SentenceTransformer(str(folder), device="cpu").encode_query(demo_texts[:4])
    found: Any = SentenceTransformer(str(tmp_path / "queries"), device="cpu")
    for encode in (found.encode, found.encode_query):
        assert_close(torch.tensor(encode(demo_texts[:4])), torch.tensor(expected), rtol=0.0, atol=1e-5)


def test_a_route_takes_the_prompt_of_its_own_name_alone(folder: Path, demo_texts: list[str], tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config_sentence_transformers.json"
    prompts = {"prompts": {"passage": "at night "}, "default_prompt_name": "passage"}
    path.write_text(json.dumps(json.loads(path.read_text()) | prompts))
    peer = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    for route, encode in (("query", peer.encode_query), ("document", peer.encode_document)):
        alone = Encoder(EncoderSpec(str(tmp_path / "model"), route=route), WHOLE).eval()
        with torch.no_grad():
            ours = alone.embed(pack_texts(alone.text(demo_texts[:4])))
        assert_close(ours, torch.tensor(encode(demo_texts[:4])), rtol=0.0, atol=1e-5)


def test_texts_of_two_tokenizers_are_never_equal(specs: tuple[EncoderSpec, EncoderSpec]) -> None:
    """By their pieces they could be: numbers of two vocabularies. With one tokenizer and prompt they are compared."""
    text = load_texts(*specs)
    assert text.documents is not None
    assert text.documents.hash_seed == 1
    assert text.fingerprint != load_text_preparation(specs[0]).fingerprint
    query = EncoderSpec(specs[0].backbone)
    same = load_texts(query, EncoderSpec(specs[0].backbone, max_length=20))
    assert same.documents is not None
    assert same.documents.hash_seed == 0
    assert same.of_column("negative_1").max_length == 20
    assert same.of_column("anchor").max_length == same.max_length != 20


# -- what is refused --------------------------------------------------------------------------------------


def _dense(folder: Path, out: Path) -> str:
    model = SentenceTransformer(str(folder), device="cpu")
    model.append(Dense(32, 16))
    model.save_pretrained(str(out))
    return str(out)


def test_embeddings_of_different_dimensions(tiny_encoders: dict[str, Path], tmp_path: Path) -> None:
    """Said by the small files of the folders, and again where only the weights tell."""
    query, document = EncoderSpec(_dense(tiny_encoders[QUERY], tmp_path)), EncoderSpec(str(tiny_encoders[DOCUMENT]))
    message = re.escape(
        "the embeddings of model.encoder have 16 dimensions, those of model.document_encoder 32: a query and a "
        "document are compared, so take backbones of one size, or one that ends in a Dense layer"
    )
    with pytest.raises(ValueError, match=message):
        load_texts(query, document)
    with pytest.raises(ValueError, match=message):
        load_encoder(query, document, WHOLE)


def test_a_folder_with_routes_is_not_one_encoder(folder: Path, tiny_encoder: Path) -> None:
    has = re.escape(f"backbone '{folder}' has an encoder for each of query, document (a Router of sentence-transform")
    for route, asked in ((None, "unset"), ("queries", "'queries'")):
        spec = EncoderSpec(str(folder), route=route)
        remedy = r".*but model\.encoder\.route is " + asked + "; name one of them, or train both: encoder and document_"
        for refuse in (lambda spec=spec: Encoder(spec, WHOLE), lambda spec=spec: load_text_preparation(spec)):
            with pytest.raises(ValueError, match=has + remedy):
                refuse()
    with pytest.raises(
        ValueError, match=r"model\.encoder\.route is 'query', but '.*' has one encoder for all texts: le"
    ):
        load_text_preparation(EncoderSpec(str(tiny_encoder), route="query"))


def test_an_error_names_the_tower(tiny_encoder: Path) -> None:
    query = EncoderSpec(str(tiny_encoder))
    for load in (load_texts, lambda *both: load_encoder(*both, WHOLE)):
        with pytest.raises(
            ValueError, match=r"^model\.document_encoder\.backbone '/nowhere' is neither a model folder"
        ):
            load(query, EncoderSpec("/nowhere"))


def test_routes_that_share_layers_are_no_two_towers(tiny_encoder: Path, tmp_path: Path) -> None:
    shared: Any = list(SentenceTransformer(str(tiny_encoder), device="cpu"))
    router = Router.for_query_document([*shared, Dense(32, 32)], [*shared, Dense(32, 32)])  # type: ignore[list-item]
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "shared"))
    query, document = (EncoderSpec(str(tmp_path / "shared"), route=route) for route in ("query", "document"))
    load_text_preparation(query)
    with pytest.raises(
        ValueError,
        match=r"the routes 'query' and 'document' of '.*shared' share query_0_Transformer, query_1_Pooling, which two "
        "towers would train apart; take a backbone without shared layers, or one encoder for all texts",
    ):
        load_texts(query, document)


def test_an_older_router(folder: Path, tmp_path: Path) -> None:
    """Before it was called Router, sentence-transformers wrote Asym and config.json."""
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "router_config.json").rename(old / "config.json")
    modules = json.loads((old / "modules.json").read_text())
    modules[0]["type"] = "sentence_transformers.models.Asym"
    (old / "modules.json").write_text(json.dumps(modules))
    now = EncoderSpec(str(folder), route="document")
    assert (
        load_text_preparation(EncoderSpec(str(old), route="document")).fingerprint
        == load_text_preparation(now).fingerprint
    )
