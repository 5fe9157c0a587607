"""The arithmetic of a step against what torch's own counter sees a stock transformers model compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AlbertConfig, AutoModel

from trainer.encoder import EncoderSpec
from trainer.encoder.flops import count_arithmetic
from trainer.encoder.spec import LoRA
from trainer.encoder.trainable import restrict

LENGTHS = (3, 17, 40)
KINDS = ("bert", "roberta", "mpnet", "distilbert", "modernbert", "qwen3")


def _counted(spec: EncoderSpec) -> tuple[int, int]:
    """FLOPs of the forward, and of forward and backward, of each text alone: nothing is padded. Eager attention, for
    the fused kernels compute a product again in the backward."""
    model = AutoModel.from_pretrained(spec.backbone, attn_implementation="eager")
    restrict(model, spec)
    model.pooler = None
    sums = [0, 0]
    for length in LENGTHS:
        ids = torch.arange(5, 5 + length)[None]
        with FlopCounterMode(display=False) as forward:
            hidden = model(input_ids=ids).last_hidden_state
        with FlopCounterMode(display=False) as backward:
            hidden.sum().backward()
        sums[0] += forward.get_total_flops()
        sums[1] += forward.get_total_flops() + backward.get_total_flops()
    return sums[0], sums[1]


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_of_each_kind(kind: str, tiny_encoders: dict[str, Path]) -> None:
    spec = EncoderSpec(str(tiny_encoders[kind]))
    arithmetic = count_arithmetic(spec)
    assert (arithmetic.forward(LENGTHS), arithmetic.step(LENGTHS)) == _counted(spec)


def test_layers_that_share_their_weights_count_each_time(tmp_path: Path) -> None:
    """ALBERT's: four layers, of two groups."""
    config = AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_hidden_layers=4, num_hidden_groups=2,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    spec = EncoderSpec(str(tmp_path))
    arithmetic = count_arithmetic(spec)
    assert (arithmetic.forward(LENGTHS), arithmetic.step(LENGTHS)) == _counted(spec)


@pytest.mark.parametrize(
    "restricted", [{"freeze": 1}, {"lora": LoRA(r=4)}, {"lora": LoRA(r=4), "freeze": 1}], ids=["freeze", "lora", "both"]
)
def test_what_is_frozen_has_no_gradient(restricted: dict[str, Any], tiny_encoder: Path) -> None:
    """Exact but for the gradient of the input of the first layer that is trained, which nobody wants."""
    spec = EncoderSpec(str(tiny_encoder), **restricted)
    arithmetic = count_arithmetic(spec)
    forward, step = _counted(spec)
    assert arithmetic.forward(LENGTHS) == forward
    assert arithmetic.step(LENGTHS) == pytest.approx(step, rel=0.06)
    assert arithmetic.step(LENGTHS) < count_arithmetic(EncoderSpec(str(tiny_encoder))).step(LENGTHS)
