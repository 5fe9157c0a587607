"""A layer of BERT as one autograd function.

A step of a few hundred tokens calls some 100 small operations a layer, casts and copies among them. On a CPU they run
on one core whatever there is; a GPU is done with each before the next is called. Here the three projections are one
product, each number is cast once, all weights in one call, which is one kernel on a GPU, and the backward is written
out. Dropout drops what the layer itself would drop: it draws the same masks in the same order.

Shape suffixes: T tokens of the stream, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.encoder.attention import Packing, takes_varlen
from trainer.encoder.dropout import draw_masks
from trainer.encoder.flash_attention import FlashAttention
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


def use_fused_layers(backbone: PreTrainedModel) -> None:
    """Let layers of BERT's kind take a packed stream in one function; others, and layers with adapters, stay as they
    are."""
    config = backbone.config
    if config.model_type not in _MODEL_TYPES or config.hidden_act != "gelu" or getattr(config, "is_decoder", False):
        return
    for layer in blocks(backbone):
        layer_class: Any = type(layer)
        if all(type(module) in (nn.Linear, nn.LayerNorm) for module in _modules(layer)):
            layer.__class__ = _fused_class(layer_class)


@cache
def _fused_class(layer_class: Any) -> Any:
    """The same layer by the same name; a bound forward of its own would tie it into a cycle of references."""

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        packing = kwargs.get("packing", kwargs.get("position_bias"))
        if packing is None or not _takes(self, packing):
            return layer_class.forward(self, hidden_states, *args, **kwargs)
        out = _forward(self, hidden_states, packing)
        return out if "packing" in kwargs else (out,)

    return type(layer_class.__name__, (layer_class,), {"forward": forward})


def _takes(layer: Any, packing: Packing) -> bool:
    """Not long texts without dropout on a CPU; on a GPU in half precision, without a bias by position. Nor where
    somebody waits for the modules inside, as ZeRO's third stage does to gather their weights."""
    attention = _attention(layer)
    if not packing.takes_host(attention.dropout.p if layer.training else 0.0):
        dtype = _compute_dtype(packing.device, layer.output.dense.weight.dtype)
        has_kernel = takes_varlen(packing.device, dtype, attention.attention_head_size)
        if not has_kernel or packing.position_bias is not None:
            return False
    return not any(module._forward_pre_hooks or module._forward_hooks for module in islice(layer.modules(), 1, None))


def _compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of products with weights of this type."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


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
    num_heads, scale = attention.num_attention_heads, attention.attention_head_size**-0.5
    parts: HostAttention | FlashAttention
    if packing.device.type == "cpu":
        parts = HostAttention(packing.bins, num_heads, scale, attention_rate)
    else:
        parts = FlashAttention(packing.boundaries, packing.lengths[-1], num_heads, scale, attention_rate)
    weights = [weight for module in _modules(layer) for weight in (module.weight, module.bias)]
    dtype = weights[0].dtype
    bias = packing.bin_bias if packing.position_bias is not None else None
    compute_dtype = _compute_dtype(packing.device, dtype)
    with torch.autocast(packing.device.type, enabled=False):
        out_TH: Tensor = _FusedLayer.apply(  # type: ignore[no-untyped-call]
            hidden_1TH.squeeze(0).to(dtype), parts, bias, rate, output.LayerNorm.eps, compute_dtype, *weights
        )
    return out_TH[None]


class _FusedLayer(torch.autograd.Function):
    """Sums and norms in the type of the weights, all else in ``dtype``, as autocast has it."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        attention: HostAttention | FlashAttention,
        position_bias: Tensor | None,
        rate: float,
        eps: float,
        dtype: torch.dtype,
        *weights: Tensor,
    ) -> Tensor:
        (w_qkv, b_qkv, wo, bo, wi, bi, wd, bd), (norm1, shift1, norm2, shift2) = _prepared(weights, dtype)
        size = x_TH.shape[-1:]
        x_low = x_TH.to(dtype)
        qkv = _linear(x_low, w_qkv, b_qkv)
        attended, grow_attention, saved = attention.forward(qkv, position_bias)
        sum1, masks1, grow = _add_dropped(x_TH, _linear(attended, wo, bo), rate)
        middle, *moments1 = torch.native_layer_norm(sum1, size, norm1, shift1, eps)
        middle_low = middle.to(dtype)
        before = _linear(middle_low, wi, bi)
        after = nn.functional.gelu(before)
        sum2, masks2, _ = _add_dropped(middle, _linear(after, wd, bd), rate)
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
        with torch.autocast(x.device.type, enabled=False):
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
            grads_of_linear = _cast([*products, *biases], norm1.dtype)
            g_x = _plus_times(g_sum1, g_qkv, w_qkv) if ctx.needs_input_grad[0] else None
        (w_qkv, wo, wi, wd), (b_qkv, bo, bi, bd) = grads_of_linear[:4], grads_of_linear[4:]
        linear = [g for pair in zip(w_qkv.chunk(3), b_qkv.chunk(3), strict=True) for g in pair]
        linear += [wo, bo, g_norm1, g_shift1, wi, bi, wd, bd]
        return g_x, None, g_bias, None, None, None, *linear, g_norm2, g_shift2


def _prepared(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Weight and bias of each product in ``dtype``, those of the first three one below the other; and of the norms."""
    *qkv, wo, bo, norm1, shift1, wi, bi, wd, bd, norm2, shift2 = weights
    bias_dtype = bo.dtype if bo.device.type == "cpu" else dtype  # a CPU's product takes a wider one
    into, parts = [], []
    for same, kind in ((qkv[0::2], dtype), (qkv[1::2], bias_dtype)):
        into.append(same[0].new_empty(sum(map(len, same)), *same[0].shape[1:], dtype=kind))
        parts += list(zip(into[-1].split([*map(len, same)]), same, strict=True))
    for weight, kind in zip((wo, bo, wi, bi, wd, bd), (dtype, bias_dtype) * 3, strict=True):
        into.append(weight if weight.dtype == kind else torch.empty_like(weight, dtype=kind))
        parts += [] if into[-1] is weight else [(into[-1], weight)]
    torch._foreach_copy_([low for low, _ in parts], [weight for _, weight in parts])
    return into, [norm1, shift1, norm2, shift2]


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if tensors[0].dtype == dtype:
        return tensors
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, tensors)
    return cast


def _add_dropped(x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, list[Tensor], float]:
    """x + dropout(y), its mask if there is one, and by what it multiplies what it keeps; y may be written over."""
    if x.device.type == "cpu":
        masks, grow = draw_masks([y.numel()], rate, y.dtype)
        for mask in masks:
            y *= mask.view_as(y).to(y.dtype)
        return torch.add(x, y, alpha=grow), masks, grow
    if not rate:
        return x + y, [], 1.0
    dropped, mask = torch.native_dropout(y, rate, True)
    return x + dropped, [mask], 1.0 / (1.0 - rate)


def _drop(grad: Tensor, masks: list[Tensor], grow: float) -> Tensor:
    for mask in masks:
        if grad.device.type == "cpu":
            grad = torch.addcmul(grad.new_zeros(()), grad, mask.view_as(grad).to(grad.dtype), value=grow)
        else:
            grad = torch.ops.aten.native_dropout_backward(grad, mask, grow)
    return grad


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, which may be of a wider type."""
    if _onednn is not None and x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES:
        product: Tensor = _onednn(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _plus_times(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """x + grad @ weight."""
    if _onednn is not None and grad.device.type == "cpu" and grad.dtype == torch.float32:
        product: Tensor = _onednn.binary(grad, x, weight.t(), None, "add")
        return product
    return x + grad @ weight
