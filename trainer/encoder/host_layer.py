"""A layer of BERT on a CPU as one autograd function.

A step of a few hundred tokens calls some 200 small operations a layer, casts and copies among them, and they run on one
core whatever there is. Here the three projections are one product, each number is cast once, and the backward is
written out. Dropout drops what the layer itself would drop: it draws the same masks in the same order.

Shape suffixes: T tokens of the stream, H hidden, I intermediate.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.encoder.attention import Packing
from trainer.encoder.dropout import draw_masks
from trainer.encoder.host_attention import HostAttention
from trainer.encoder.trainable import blocks

# Self-attention and two linear layers, a norm behind either sum (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).
# MPNet's adds a bias by position (Song et al. 2020, https://arxiv.org/abs/2004.09297), and has other names.
_MODEL_TYPES = frozenset({"bert", "camembert", "electra", "ernie", "mpnet", "roberta", "xlm-roberta"})
# x @ weight.T + bias as torch's compiler calls it. In fp32 torch's own linear layer takes MKL where there is one, which
# reaches three quarters of this on processors that are not Intel's; in bf16 it writes the bias to its output first.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkl.is_available() else None
_ONEDNN_DTYPES = {torch.float32}
if _onednn is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _ONEDNN_DTYPES.add(torch.bfloat16)


def use_host_layers(backbone: PreTrainedModel) -> None:
    """Let layers of BERT's kind take a packed stream on a CPU in one function; others, and layers with adapters, stay
    as they are."""
    config = backbone.config
    if config.model_type not in _MODEL_TYPES or config.hidden_act != "gelu" or getattr(config, "is_decoder", False):
        return
    for layer in blocks(backbone):
        layer_class: Any = type(layer)
        if all(type(module) in (nn.Linear, nn.LayerNorm) for module in _modules(layer)):
            layer.__class__ = _host_class(layer_class)


@cache
def _host_class(layer_class: Any) -> Any:
    """The same layer by the same name; a bound forward of its own would tie it into a cycle of references."""

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        packing = kwargs.get("packing", kwargs.get("position_bias"))
        if packing is None or not _takes(self, packing):
            return layer_class.forward(self, hidden_states, *args, **kwargs)
        out = _forward(self, hidden_states, packing)
        return out if "packing" in kwargs else (out,)

    return type(layer_class.__name__, (layer_class,), {"forward": forward})


def _takes(layer: Any, packing: Packing) -> bool:
    """Not on a GPU, nor long texts without dropout; nor where somebody waits for the modules inside, as ZeRO's third
    stage does to gather their weights."""
    if not packing.takes_host(_attention(layer).dropout.p if layer.training else 0.0):
        return False
    return not any(module._forward_pre_hooks or module._forward_hooks for module in islice(layer.modules(), 1, None))


def _attention(layer: Any) -> Any:
    return layer.attention.attn if _is_mpnet(layer) else layer.attention.self


def _is_mpnet(layer: Any) -> bool:
    return hasattr(layer.attention, "attn")


def _modules(layer: Any) -> list[Any]:
    """In the order of their arithmetic: query, key, value, output, norm, intermediate, output, norm."""
    attention, output = _attention(layer), layer.output
    if _is_mpnet(layer):
        joined = [attention.q, attention.k, attention.v, attention.o, layer.attention.LayerNorm]
    else:
        dense, norm = layer.attention.output.dense, layer.attention.output.LayerNorm
        joined = [attention.query, attention.key, attention.value, dense, norm]
    return [*joined, layer.intermediate.dense, output.dense, output.LayerNorm]


def _forward(layer: Any, hidden_1TH: Tensor, packing: Packing) -> Tensor:
    attention, output = _attention(layer), layer.output
    attention_rate, rate = (m.dropout.p if layer.training else 0.0 for m in (attention, output))
    scale = attention.attention_head_size**-0.5
    host = HostAttention(packing.bins, attention.num_attention_heads, scale, attention_rate)
    weights = [weight for module in _modules(layer) for weight in (module.weight, module.bias)]
    dtype = weights[0].dtype
    compute_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
    with torch.autocast("cpu", enabled=False):
        out_TH: Tensor = _HostLayer.apply(  # type: ignore[no-untyped-call]
            hidden_1TH[0].to(dtype), host, packing.bin_bias, rate, output.LayerNorm.eps, compute_dtype, *weights
        )
    return out_TH[None]


class _HostLayer(torch.autograd.Function):
    """Sums and norms in the type of the weights, all else in ``dtype``, as autocast has it."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        attention: HostAttention,
        position_bias: Tensor | None,
        rate: float,
        eps: float,
        dtype: torch.dtype,
        *weights: Tensor,
    ) -> Tensor:
        wq, bq, wk, bk, wv, bv, wo, bo, norm1, shift1, wi, bi, wd, bd, norm2, shift2 = weights
        size = x_TH.shape[-1:]
        w_qkv, b_qkv = _joined((wq, wk, wv), dtype), torch.cat((bq, bk, bv))
        wo, wi, wd = (w.to(dtype) for w in (wo, wi, wd))
        x_low = x_TH.to(dtype)
        qkv = _linear(x_low, w_qkv, b_qkv)
        attended, grow_attention, saved = attention.forward(qkv, position_bias)
        masks1, grow = draw_masks([x_TH.numel()], rate, dtype)
        sum1 = _add_dropped(x_TH, _linear(attended, wo, bo), masks1, grow)
        middle, *moments1 = torch.native_layer_norm(sum1, size, norm1, shift1, eps)
        middle_low = middle.to(dtype)
        before = _linear(middle_low, wi, bi)
        after = nn.functional.gelu(before)
        masks2, _ = draw_masks([x_TH.numel()], rate, dtype)
        sum2 = _add_dropped(middle, _linear(after, wd, bd), masks2, grow)
        out, *moments2 = torch.native_layer_norm(sum2, size, norm2, shift2, eps)
        ctx.save_for_backward(
            *(x_low, w_qkv, qkv, attended, wo, sum1, *moments1, norm1, shift1),
            *(middle_low, wi, before, after, wd, sum2, *moments2, norm2, shift2),
            *(*masks1, *masks2, *saved),
        )
        ctx.attention, ctx.grow, ctx.grow_attention = attention, grow, grow_attention
        ctx.num_masks = len(masks1) + len(masks2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_qkv, qkv, attended, wo, sum1, mean1, rstd1, norm1, shift1, *more = ctx.saved_tensors
        middle, wi, before, after, wd, sum2, mean2, rstd2, norm2, shift2, *more = more
        masks, saved = more[: ctx.num_masks], more[ctx.num_masks :]
        size, dtype = sum1.shape[-1:], x.dtype
        norm_backward = partial(torch.ops.aten.native_layer_norm_backward, output_mask=[True, True, True])
        with torch.autocast("cpu", enabled=False):
            g_sum2, g_norm2, g_shift2 = norm_backward(grads[0], sum2, size, mean2, rstd2, norm2, shift2)
            g_d = _drop(g_sum2.to(dtype), masks[1:], ctx.grow)
            g_before = torch.ops.aten.gelu_backward(_linear(g_d, wd.t(), None), before)
            g_middle = _plus_times(g_sum2, g_before, wi)
            g_sum1, g_norm1, g_shift1 = norm_backward(g_middle, sum1, size, mean1, rstd1, norm1, shift1)
            g_o = _drop(g_sum1.to(dtype), masks[:1], ctx.grow)
            g_attended, with_bias = _linear(g_o, wo.t(), None), ctx.needs_input_grad[2]
            g_qkv, g_bias = ctx.attention.backward(g_attended, qkv, ctx.grow_attention, saved, with_bias)
            products = [g_qkv.t() @ x, g_o.t() @ attended, g_before.t() @ middle, g_d.t() @ after]
            biases = [g.sum(0) for g in (g_qkv, g_o, g_before, g_d)]
            w_grads, b_grads = ([g.to(norm1.dtype) for g in gs] for gs in (products, biases))
            g_x = _plus_times(g_sum1, g_qkv, w_qkv) if ctx.needs_input_grad[0] else None
        linear = [g for pair in zip(w_grads[0].chunk(3), b_grads[0].chunk(3), strict=True) for g in pair]
        linear += [w_grads[1], b_grads[1], g_norm1, g_shift1, w_grads[2], b_grads[2], w_grads[3], b_grads[3]]
        return g_x, None, g_bias, None, None, None, *linear, g_norm2, g_shift2


def _joined(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """One below the other, cast on the way."""
    joined = weights[0].new_empty(sum(len(weight) for weight in weights), *weights[0].shape[1:], dtype=dtype)
    for part, weight in zip(joined.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)  # on all cores, which torch.cat is not where it casts
    return joined


def _add_dropped(x: Tensor, y: Tensor, masks: list[Tensor], grow: float) -> Tensor:
    """x + dropout(y); y is written over."""
    for mask in masks:
        y *= mask.view_as(y).to(y.dtype)
    return torch.add(x, y, alpha=grow)


def _drop(grad: Tensor, masks: list[Tensor], grow: float) -> Tensor:
    for mask in masks:
        grad = torch.addcmul(grad.new_zeros(()), grad, mask.view_as(grad).to(grad.dtype), value=grow)
    return grad


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, which may be of a wider type."""
    if _onednn is not None and x.dtype in _ONEDNN_DTYPES:
        product: Tensor = _onednn(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _plus_times(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """x + grad @ weight."""
    if _onednn is not None and grad.dtype == torch.float32:
        product: Tensor = _onednn.binary(grad, x, weight.t(), None, "add")
        return product
    return x + grad @ weight
