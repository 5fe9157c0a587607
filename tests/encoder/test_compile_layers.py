"""Compiled layers against eager ones: the same masks, the same losses, no compiling for every length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.testing import assert_close

from tests.batches import gradients_of
from trainer.data.collate import pack_texts
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.spec import LoRA

# Steps of different numbers of tokens, buckets and chunks.
BATCHES = (
    ["The doctor bought the car at the shop in winter.", "a", "stone " * 30, "It was the thief who stole it."],
    ["In winter, at dusk, the physician purchased a vehicle.", "stone " * 60, "a lamp", "", "a picture", "the sea"],
    ["At noon the lamp was painted by the stranger on the hill.", "The picture was hidden in the cellar.", "a cellar"],
)
KINDS = ("bert", "mpnet", "distilbert", "modernbert", "qwen3", "deberta-v2")


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """No code of another test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _train(encoder: Encoder, precision: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of SGD steps with dropout, and the gradients of the first; nothing may be compiled behind that."""
    losses, gradients = [], {}
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for step, texts in enumerate(BATCHES):
        torch.manual_seed(step)
        with (
            torch._dynamo.config.patch(error_on_recompile=step > 0),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            embeddings = encoder.embed(pack_texts(encoder.text(texts)))
            weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))
            loss = (embeddings * weights).mean() + embeddings.square().mean()
            loss.backward()
        losses.append(float(loss.detach()))
        gradients = gradients or gradients_of(encoder)
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


@pytest.mark.parametrize(
    ("kind", "precision", "max_tokens"),
    [
        ("bert", "fp32", 40),
        pytest.param("bert", "bf16", 4096, marks=pytest.mark.slow),
        *(pytest.param(kind, "fp32", 40, marks=pytest.mark.slow) for kind in KINDS[1:]),
    ],
)
def test_losses_and_gradients_are_those_of_eager_layers(
    tiny_encoders: dict[str, Path], kind: str, precision: str, max_tokens: int
) -> None:
    spec = EncoderSpec(str(tiny_encoders[kind]), dropout=0.2)
    eager, compiled = (Encoder(replace(spec, compile_layers=on), max_tokens).train() for on in (False, True))
    expected, expected_gradients = _train(eager, precision)
    losses, gradients = _train(compiled, precision)
    assert losses == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 1e-2)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(float(g.norm()) for g in expected_gradients.values())
    for name, gradient in gradients.items():
        assert float((gradient - expected_gradients[name]).norm()) < (1e-5 if precision == "fp32" else 2e-2) * scale


def test_the_exported_model_is_that_of_eager_layers(tiny_encoder: Path) -> None:
    """Adapters and all; and the compiled forward goes on behind it."""
    texts = BATCHES[0]
    encoder = Encoder(EncoderSpec(str(tiny_encoder), lora=LoRA(r=4), dropout=0.0, compile_layers=True), 4096)
    expected = SentenceTransformer(str(tiny_encoder), device="cpu").encode(texts, convert_to_tensor=True)
    for _ in range(2):
        with encoder.as_sentence_transformer() as model:
            assert_close(model.encode(texts, convert_to_tensor=True), expected, rtol=0.0, atol=1e-5)
        with torch.no_grad():
            embeddings = encoder.embed(pack_texts(encoder.text(texts)))
        assert_close(embeddings, expected, rtol=0.0, atol=1e-5)
