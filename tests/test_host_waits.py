"""A step waits for no number of the device.

On torch's meta device tensors have shapes and no numbers: whatever reads one on the host, or makes a tensor whose size
hangs on one, raises. So what runs there from the batch to the clipped gradient runs on a GPU without waiting for it;
copies that block are not seen.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.test_exactness import LOSSES, WHOLE, Siamese, load_once, make_run
from trainer.demo_encoder import Kind
from trainer.encoder import attention
from trainer.finite import FiniteSteps
from trainer.optimizer import clip, gradient_norm

# Their sums run over as many pairs as the numbers say.
READING_LOSSES = {"BatchTriplet all", "BatchTriplet semi_hard"}
# Biased attention takes buckets or, where the backbone has its own, padding.
BIASED_KINDS = {"mpnet", "deberta-v2"}


class _Autocast(torch.autocast):
    """Of a device that has none."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@pytest.fixture(autouse=True)
def _as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", _Autocast)
    monkeypatch.setattr(attention, "_GPUS", {"meta"})
    monkeypatch.setattr(attention, "_has_varlen", lambda device: True)


def _step(model: Siamese, batch: Any) -> FlopCounterMode:
    """As EmbeddingModule's, with what a fused optimizer would be told. Where somebody counts arithmetic, torch takes
    a GPU's kernels for jagged tensors of this device."""
    finite = FiniteSteps()
    with FlopCounterMode(display=False) as arithmetic:
        finite.watch_loss(model(batch), 0).backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.is_meta for p in parameters)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.param_groups[0]["fused"] = True
    norm = gradient_norm(parameters)
    clip(optimizer, parameters, 1.0, norm)
    trainer: Any = SimpleNamespace(precision_plugin=None, global_step=0)
    finite.check(norm, optimizer, trainer)
    return arithmetic


def _on_meta(
    folder: Path, loss: str, texts: list[str], max_tokens: int = WHOLE, dtype: torch.dtype = torch.float32
) -> set[Any]:
    """The operations that computed anything."""
    run = make_run(folder, loss, texts, 15, max_tokens=max_tokens)
    model = Siamese(run)
    load_once.cache_clear()  # its encoder leaves the host for good
    arithmetic = _step(model.to("meta", dtype), run.batch(slice(None)).to("meta"))
    return set(arithmetic.get_flop_counts()["Global"])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_reads_nothing_from_the_device(tiny_encoder: Path, demo_texts: list[str], loss: str) -> None:
    with pytest.raises(NotImplementedError, match="nonzero") if loss in READING_LOSSES else nullcontext():
        _on_meta(tiny_encoder, loss, demo_texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_no_backbone_reads_anything_from_the_device(
    tiny_encoders: dict[str, Path], demo_texts: list[str], kind: str, dtype: torch.dtype
) -> None:
    """In chunks under activation checkpointing, with a compact vocabulary; by the attention of a GPU."""
    operations = _on_meta(tiny_encoders[kind], "InfoNCE", demo_texts, max_tokens=200, dtype=dtype)
    if dtype == torch.bfloat16:
        varlen = {torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward}
        assert (varlen <= operations) == (kind not in BIASED_KINDS)
    else:  # what torch takes for a jagged tensor; causal layers take buckets
        flash = {torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward}
        assert (flash <= operations) == (kind not in {"qwen3", *BIASED_KINDS})
