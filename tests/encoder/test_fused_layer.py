"""A layer as one function is the layer of transformers, in value and in every gradient, dropout included.

Shape suffixes: T tokens of the stream, H hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    ElectraConfig,
    ErnieConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from trainer.encoder import fused_layer
from trainer.encoder.attention import PACKED_ATTENTION, Packing, plan_buckets
from trainer.encoder.dropout import use_host_dropout
from trainer.encoder.fused_layer import use_fused_layers

H, HEADS, LENGTHS = 16, 2, (2, 3, 5, 5, 33)
T = sum(LENGTHS) + 4  # and padding at the end
SIZES = {
    "hidden_size": H,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": 40,
    "vocab_size": 11,
}


def _packing() -> Packing:
    return plan_buckets(LENGTHS, torch.device("cpu"))


def _backbone(config_class: Any = BertConfig, dtype: torch.dtype = torch.float32, **kwargs: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    backbone: PreTrainedModel = AutoModel.from_config(config_class(**(SIZES | kwargs)))
    backbone.set_attn_implementation(PACKED_ATTENTION)
    use_host_dropout(backbone)
    with torch.no_grad():
        for name, weight in backbone.named_parameters():
            if name.endswith("bias"):  # which start at 0, where a mistake does not show
                weight.normal_(std=0.1)
            elif "LayerNorm" not in name:
                weight.mul_(5.0)
    return backbone.to(dtype)


def _layer(backbone: PreTrainedModel) -> Any:
    return backbone.encoder.layer[0]


def _is_ours(backbone: PreTrainedModel) -> bool:
    return not type(_layer(backbone)).__module__.startswith("transformers.")


def _stream(dtype: torch.dtype = torch.float32) -> Tensor:
    stream = torch.randn(1, T, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return stream.to(dtype).requires_grad_()


def _results(layer: nn.Module, out: Tensor, stream: Tensor) -> dict[str, Tensor]:
    """The output of the tokens, and all gradients for one direction of it."""
    tokens = out[:, : sum(LENGTHS)]
    direction = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2)).to(out)
    names, weights = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad((tokens * direction).sum(), [stream, *weights])
    return {"out": tokens.detach(), **dict(zip(("stream", *names), gradients, strict=True))}


def _pair(config_class: Any = BertConfig, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[Any, Any]:
    """One layer twice: ours, and transformers'."""
    ours, theirs = (_backbone(config_class, dtype, **kwargs).eval() for _ in range(2))
    use_fused_layers(ours)
    assert _is_ours(ours)
    return _layer(ours), _layer(theirs)


@pytest.mark.parametrize(
    "config_class", [BertConfig, CamembertConfig, ElectraConfig, ErnieConfig, RobertaConfig, XLMRobertaConfig]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_without_dropout(config_class: Any, dtype: torch.dtype, tolerance: float) -> None:
    results = []
    for layer in _pair(config_class, dtype):
        stream = _stream(dtype)
        results.append(_results(layer, layer(stream, packing=_packing()), stream))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # The gradient of a key's bias is 0 but for rounding: the softmax does not see it.
        size = float(theirs["attention.self.query.bias" if name == "attention.self.key.bias" else name].abs().max())
        assert_close(ours[name], expected, rtol=0.0, atol=tolerance * max(1.0, size), msg=lambda m, n=name: f"{n}: {m}")


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch has no such products."""
    results = []
    for product in (fused_layer._onednn, None):
        monkeypatch.setattr(fused_layer, "_onednn", product)
        layer, stream = _pair()[0], _stream()
        results.append(_results(layer, layer(stream, packing=_packing()), stream))
    for name, expected in results[1].items():
        assert_close(results[0][name], expected, rtol=0.0, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("is_mixed", [True, False], ids=["autocast", "weights in bf16"])
def test_bf16_is_as_near_as_theirs(is_mixed: bool) -> None:
    """To the layer in float64; half again as far at most."""
    exact = _pair(dtype=torch.float64)[1]
    stream = _stream(torch.float64)
    expected = _results(exact, exact(stream, packing=_packing()), stream)
    errors: list[dict[str, float]] = []
    dtype = torch.float32 if is_mixed else torch.bfloat16
    for layer in _pair(dtype=dtype):
        stream = _stream(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            out = layer(stream, packing=_packing())
        assert out.dtype == dtype
        found = _results(layer, out, stream)
        errors.append({name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()})
    ours, theirs = errors
    for name in set(expected) - {"attention.self.key.bias"}:
        assert ours[name] < 1.5 * theirs[name] + 2.0**-9, name


@pytest.mark.parametrize("rates", [(0.1, 0.3), (0.4, 0.0), (0.0, 0.2)])
def test_dropout_drops_the_same(rates: tuple[float, float]) -> None:
    """By the same seed; in value and every gradient."""
    kwargs = {"hidden_dropout_prob": rates[0], "attention_probs_dropout_prob": rates[1]}
    results = []
    for layer in _pair(dtype=torch.float64, **kwargs):
        layer.train()
        torch.manual_seed(7)
        stream = _stream(torch.float64)
        results.append(_results(layer, layer(stream, packing=_packing()), stream))
    ours, theirs = results
    for name, expected in theirs.items():
        assert_close(ours[name], expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_drops_in_training_alone() -> None:
    layer, _ = _pair()
    stream, packing = _stream(), _packing()
    with torch.no_grad():
        assert torch.equal(layer(stream, packing=packing), layer(stream, packing=packing))
        layer.train()
        assert not torch.equal(layer(stream, packing=packing), layer(stream, packing=packing))


def test_checkpointing_replays_the_masks() -> None:
    layer = _pair()[0].train()
    results = []
    for replay in (False, True):
        torch.manual_seed(3)
        stream = _stream()
        run = (lambda *args: checkpoint(layer, *args, packing=_packing(), use_reentrant=False)) if replay else layer
        out = run(stream) if replay else layer(stream, packing=_packing())
        results.append(_results(layer, out, stream))
    plain, replayed = results
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def test_hooks_inside_are_called() -> None:
    """ZeRO's third stage gathers weights in them."""
    layer, theirs = _pair()
    seen: list[str] = []
    layer.intermediate.dense.register_forward_pre_hook(lambda *_: seen.append("hook"))
    with torch.no_grad():
        out = layer(_stream(), packing=_packing())
        assert torch.equal(out, theirs(_stream(), packing=_packing()))
    assert seen == ["hook"]


def test_padded_batches_take_the_layer_itself() -> None:
    """As an export does, whose attention is stock."""
    ours, theirs = (_backbone().eval() for _ in range(2))
    use_fused_layers(ours)
    for backbone in (ours, theirs):
        backbone.set_attn_implementation("sdpa")
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("kwargs", [{"hidden_act": "relu"}, {"is_decoder": True}], ids=["relu", "decoder"])
def test_other_layers_stay(kwargs: dict[str, Any]) -> None:
    backbone = _backbone(**kwargs)
    use_fused_layers(backbone)
    assert not _is_ours(backbone)


def test_adapters_stay() -> None:
    backbone = _backbone()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), backbone)
    use_fused_layers(backbone)
    assert not _is_ours(backbone)
