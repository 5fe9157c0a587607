"""MPNet packed is MPNet padded, whose bias by position is a table of its own that all layers share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.testing import assert_close

from tests.batches import gradients_of, largest_difference
from trainer.data.collate import pack_texts
from trainer.demo_encoder import write_encoder
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.attention import Packing

TABLE = "backbone.encoder.relative_attention_bias.weight"
SHORT = ["the sea", "a", "The doctor bought the car at the shop in winter.", "stone " * 40, "", "It was a thief."]
LONG = [*SHORT, "stone lamp " * 120, "a lamp " * 75]
TEXTS = {"short": SHORT, "long": LONG, "alone": LONG[-1:]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_texts: list[str]) -> Path:
    """Positions for 300 pieces, and biases as large as scores; fresh ones are a fiftieth."""
    path = write_encoder(
        tmp_path_factory.mktemp("mpnet"), demo_texts, hidden=32, vocab=400, max_positions=300, kind="mpnet"
    )
    model = SentenceTransformer(str(path), device="cpu")
    torch.manual_seed(0)
    torch.nn.init.normal_(model[0].model.encoder.relative_attention_bias.weight)
    model.save_pretrained(str(path))
    return path


def _load(folder: Path, max_tokens: int = 4096, **spec: Any) -> Encoder:
    encoder = Encoder(EncoderSpec(str(folder), **spec), max_tokens).train()
    assert encoder.packed
    return encoder


def _step(encoder: Encoder, texts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings, and gradients of a function whose own differs at every element."""
    embeddings = encoder.embed(pack_texts(encoder.text(texts)))
    _backward(embeddings)
    return embeddings, gradients_of(encoder)


def _peer_step(folder: Path, texts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    peer: Any = SentenceTransformer(str(folder), device="cpu").eval()
    embeddings = peer(peer.preprocess(texts))["sentence_embedding"]
    _backward(embeddings)
    return embeddings, {f"backbone.{name}": gradient for name, gradient in gradients_of(peer[0].model).items()}


def _backward(embeddings: Tensor) -> None:
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))
    (embeddings * weights).sum().backward()


def _use_modules(encoder: Encoder) -> None:
    """Not one function a layer: somebody waits for a module inside."""
    for layer in encoder.backbone.encoder.layer:
        layer.intermediate.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("way", ["layers", "modules", "buckets"])
@pytest.mark.parametrize("max_tokens", [4096, 100], ids=["whole", "chunked"])
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS.keys())
def test_equals_the_padded_forward(
    folder: Path, texts: list[str], max_tokens: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings and gradients, that of the table too: by one function a layer, by its modules, and by the attention of
    a GPU."""
    if way == "buckets":
        monkeypatch.setattr(Packing, "takes_host", lambda *_: False)
    encoder = _load(folder, max_tokens, dropout=0.0)
    if way == "modules":
        _use_modules(encoder)
    (ours, our_gradients), (theirs, their_gradients) = _step(encoder, texts), _peer_step(folder, texts)
    assert_close(ours, theirs, rtol=0.0, atol=1e-5)
    assert largest_difference(our_gradients, their_gradients) < 1e-5
    assert largest_difference({"": our_gradients[TABLE]}, {"": their_gradients[TABLE]}) < 2e-5


def test_bf16_is_as_near_as_theirs(folder: Path) -> None:
    """To float32, under autocast; half again as far at most."""
    exact = _peer_step(folder, LONG)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = _step(_load(folder, dropout=0.0), LONG), _peer_step(folder, LONG)
    for name in (None, TABLE, "backbone.encoder.layer.0.attention.attn.q.weight"):
        our, their, true = (x[0].detach() if name is None else x[1][name] for x in (ours, theirs, exact))
        assert float((our - true).norm()) < 1.5 * float((their - true).norm()) + 2.0**-9 * float(true.norm()), name


def test_a_function_and_its_modules_drop_the_same(folder: Path) -> None:
    """By the same seed; in value and gradient."""
    results = []
    for use in (lambda encoder: None, _use_modules):
        encoder = _load(folder, dropout=0.3)
        use(encoder)
        torch.manual_seed(7)
        results.append(_step(encoder, LONG))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert_close(ours, theirs, rtol=0.0, atol=1e-5)
    assert largest_difference(our_gradients, their_gradients) < 1e-5


def test_the_table_is_read_once(folder: Path) -> None:
    """However many widths the texts take: ZeRO's third stage gathers it, and all ranks must do so as often."""
    encoder, reads = _load(folder), []
    encoder.backbone.encoder.relative_attention_bias.register_forward_hook(lambda *_: reads.append(1))
    for texts in (SHORT[:1], LONG):
        encoder.embed(pack_texts(encoder.text(texts)))
    assert len(reads) == 2


def test_the_graph_is_the_same_for_texts_of_any_length(folder: Path) -> None:
    """By its shape gradients come in an order, which must be that of all ranks: ZeRO's second stage adds them by it."""
    encoder, graphs = _load(folder), []
    for texts in (SHORT[:2], LONG):
        seen: set[Any] = set()
        nodes = [encoder.embed(pack_texts(encoder.text(texts))).grad_fn]
        while nodes:
            node: Any = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes.extend(one for one, _ in node.next_functions)
        graphs.append(sorted(node.name() for node in seen))
    assert graphs[0] == graphs[1]


def test_a_frozen_table_gets_no_gradient_and_the_rest_the_same(folder: Path) -> None:
    free, frozen = (_load(folder, dropout=0.0) for _ in range(2))
    frozen.get_parameter(TABLE).requires_grad_(False)
    gradients, expected = _step(frozen, LONG)[1], _step(free, LONG)[1]
    del expected[TABLE]
    assert largest_difference(gradients, expected) < 1e-6


def test_the_exported_config_is_that_of_the_folder(folder: Path, tmp_path: Path) -> None:
    with _load(folder).as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path))
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    assert ours == theirs
    assert ours["architectures"] == ["MPNetModel"]
