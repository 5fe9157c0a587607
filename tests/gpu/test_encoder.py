"""Every packed backbone on a GPU: the embeddings and gradients that it has on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.encoder.test_packed_kinds import CASES, LONGEST, TEXTS, folders  # noqa: F401
from trainer.data.collate import pack_texts
from trainer.demo_encoder import Kind
from trainer.encoder import Encoder, EncoderSpec

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
DEMO_LONGEST, WHOLE = 128, 4096


@pytest.fixture(scope="module", params=[*CASES, *(f"demo {kind}" for kind in get_args(Kind))])
def spec(request: pytest.FixtureRequest, folders: dict[str, Path], tiny_encoders: dict[str, Path]) -> EncoderSpec:  # noqa: F811
    name = request.param
    if name in CASES:
        return EncoderSpec(str(folders[name]), max_length=LONGEST, dropout=0.0)
    return EncoderSpec(str(tiny_encoders[name.removeprefix("demo ")]), max_length=DEMO_LONGEST, dropout=0.0)


def _results(spec: EncoderSpec, device: torch.device, max_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Embeddings, and the gradients of all weights for one direction of them."""
    encoder = Encoder(spec, max_tokens)
    batch = pack_texts(encoder.text(TEXTS))
    encoder.compact_vocabulary(torch.unique(batch.input_ids_T))
    encoder.to(device).train()
    direction = torch.randn(len(TEXTS), encoder.embedding_dimension, generator=torch.Generator().manual_seed(3))
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        embeddings = encoder.embed(batch.to(device))
    (embeddings * direction.to(device)).sum().backward()
    gradients = [p.grad.cpu() for p in encoder.parameters() if p.grad is not None]
    return [embeddings.detach().cpu(), *gradients]


def _errors(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Of the embeddings and of all gradients together, relative."""
    squares = [float((a - b).square().sum()) for a, b in zip(found, expected, strict=True)]
    sizes = [float(b.square().sum()) for b in expected]
    return (squares[0] / sizes[0]) ** 0.5, (sum(squares[1:]) / sum(sizes[1:])) ** 0.5


def test_fp32_is_the_same(spec: EncoderSpec) -> None:
    """In chunks under activation checkpointing, each with its own cut of the stream."""
    found, expected = (_results(spec, device, 60, torch.float32) for device in (GPU, CPU))
    assert max(_errors(found, expected)) < 1e-5


def test_bf16_is_as_near_as_on_a_cpu(spec: EncoderSpec) -> None:
    """To fp32; half again as far at most."""
    expected = _results(spec, CPU, WHOLE, torch.float32)
    ours, host = (_errors(_results(spec, device, WHOLE, torch.bfloat16), expected) for device in (GPU, CPU))
    assert all(error < 1.5 * other + 1e-4 for error, other in zip(ours, host, strict=True)), (ours, host)
