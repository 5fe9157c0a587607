"""A layer as one function on a GPU is the layer of transformers there, dropout included."""

from __future__ import annotations

import pytest
import torch

from tests.encoder.test_fused_layer import LENGTHS, H, _pair, _results
from trainer.encoder.attention import plan_buckets

GPU = torch.device("cuda:0")


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("is_mixed", [True, False], ids=["autocast", "weights in bf16"])
def test_fused_layer(rate: float, is_mixed: bool) -> None:
    """By the same seed, in value and every gradient; attention itself drops nothing, for each kernel draws its own."""
    kwargs = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": 0.0}
    dtype = torch.float32 if is_mixed else torch.bfloat16
    start = torch.randn(1, sum(LENGTHS), H, generator=torch.Generator().manual_seed(1)).to(GPU, dtype)
    results = []
    for layer in _pair(dtype=dtype, **kwargs):
        layer.to(GPU).train()
        stream = start.clone().requires_grad_()
        torch.manual_seed(7)
        with torch.autocast("cuda", torch.bfloat16, enabled=is_mixed):
            out = layer(stream, packing=plan_buckets(LENGTHS, GPU))
        assert out.dtype == dtype
        is_fused = "FusedLayer" in out.grad_fn.next_functions[0][0].name()
        assert is_fused == (not results), "ours is one function, theirs is not"
        results.append({name: value.float().cpu() for name, value in _results(layer, out, stream).items()})
    ours, theirs = results
    for name, expected in theirs.items():
        if name != "attention.self.key.bias":  # 0 but for rounding
            assert float((ours[name] - expected).norm() / expected.norm()) < 0.03, name
