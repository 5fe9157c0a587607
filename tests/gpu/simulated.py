"""A GPU for machines without one: tensors that say they are on cuda:0, with true numbers behind them.

Such a tensor is torch's FakeTensor, which has a device and no memory, so that torch itself refuses what a GPU would:
tensors of two devices in one operation. Beside it stands a tensor of the host, its shadow, and every operation is done
on the shadows too. Whatever reads a number of the device on the host is written down. The kernels that only GPUs have
are attention's; they are written out here.

What it does not see: whether a kernel takes these strides and sizes, streams, several GPUs, memory, and time. To be
imported where ``load_device`` has made the device.

Shape suffixes: T tokens, N heads, D head dimension, L queries or keys of a segment.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.cuda.amp import common as amp
from torch.nested._internal import nested_tensor, sdpa
from torch.nn.attention import varlen  # noqa: F401  # which makes torch.ops.torch_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA, HOST = torch.device("cuda:0"), torch.device("cpu")
READS = {aten._local_scalar_dense.default, aten.equal.default}


class SimulatedGPU(TorchDispatchMode):
    """A context in which cuda:0 is there.

    Attributes:
        reads: how often the host has read a number of the device, by the function of trainer/ that asked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, nested_tensor.NestedTensor) for kind in types):
            return NotImplemented  # its own operations come here again
        kwargs = kwargs or {}
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, FakeTensor)]
        device = torch.device(kwargs.get("device") or HOST)
        if not inputs and device.type != "cuda":
            return func(*args, **kwargs)
        shadows, shadow_kwargs = tree_map(_shadow, (args, kwargs))
        if "device" in kwargs:
            shadow_kwargs["device"] = HOST
        to_host = func is aten._to_copy.default and "device" in kwargs and device.type == "cpu"
        if to_host or func in READS or (func is aten.copy_.default and not isinstance(args[0], FakeTensor)):
            self._note()
            return func(*shadows, **shadow_kwargs)
        kernel = KERNELS.get(func)
        found = tree_leaves((kernel or func)(*shadows, **shadow_kwargs))
        if _has_unknown_size(func, shadows):
            self._note()
            made = [self._on_device(value) for value in found]
            return made[0] if len(made) == 1 else tuple(made)
        if func is aten._efficient_attention_backward.default:  # its fake does not take its own arguments
            return (*(self._on_device(value) for value in found), None)
        with self._fake:
            out = func(*args, **kwargs)
        fakes = [value for value in tree_leaves(out) if isinstance(value, FakeTensor)]
        if kernel:  # what is not its result are notes for its backward
            found += [torch.zeros(fake.shape, dtype=fake.dtype) for fake in fakes[len(found) :]]
        found = [one for one in found if isinstance(one, Tensor)]
        if func is aten.native_layer_norm.default:  # its fake has moments in half precision, as no device has
            return tuple(map(self._on_device, found))
        for fake, value in zip(fakes, found, strict=True):
            assert (fake.shape, fake.dtype) == (value.shape, value.dtype), (func, fake, value)
            if not any(fake is one for one in inputs):  # written in place, as its shadow was
                fake._shadow = value  # type: ignore[attr-defined]
        return out

    def _on_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with self._fake:
            fake: Any = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        fake._shadow = value
        return fake

    def _note(self) -> None:
        ours = [frame for frame in traceback.extract_stack() if "/trainer/" in frame.filename]
        self.reads[f"{Path(ours[-1].filename).name}: {ours[-1].name}" if ours else "elsewhere"] += 1


def _shadow(value: Any) -> Any:
    return value._shadow if isinstance(value, FakeTensor) else value  # type: ignore[attr-defined]


def _has_unknown_size(func: Any, args: Any) -> bool:
    """A GPU computes the size of the result, and the host waits for it."""
    if func is aten.index.Tensor:
        return any(one is not None and one.dtype == torch.bool for one in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


# -- kernels of attention -----------------------------------------------------------------------------------


def attend(
    *tensors: Tensor, starts: Tensor | None, scale: float | None, is_causal: bool = False, window: Any = (-1, -1)
) -> list[Tensor]:
    """Attention of each segment to itself, or its gradient.

    Args:
        tensors: queries, keys and values, (T, N, D), or in batches, (B, L, N, D); for the gradient behind that of the
            result.
        starts: of the segments, and the end of the last; None: each of a batch is one.
        window: how far a query sees back and ahead; -1: as far as its segment goes.

    Returns:
        The result, or the gradients of queries, keys and values.
    """
    if tensors[0].dim() == 4:
        batch, longest = tensors[0].shape[:2]
        starts = torch.arange(batch + 1) * longest if starts is None else starts
        flat = [tensor.flatten(0, 1) for tensor in tensors]
        found = attend(*flat, starts=starts, scale=scale, is_causal=is_causal, window=window)
        return [one.unflatten(0, (batch, longest)) for one in found]
    assert starts is not None
    back, ahead = window
    parts: list[list[Tensor]] = []
    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        *grad_NLD, q_NLD, k_NLD, v_NLD = (tensor[start:stop].transpose(0, 1).float() for tensor in tensors)
        factor = q_NLD.shape[-1] ** -0.5 if scale is None else scale
        place_L = torch.arange(stop - start)
        distance_LL = place_L - place_L[:, None]  # of a key ahead of its query
        hidden_LL = (distance_LL > (0 if is_causal else len(place_L) if ahead < 0 else ahead)) | (
            -distance_LL > (len(place_L) if back < 0 else back)
        )
        weights_NLL = (factor * q_NLD @ k_NLD.mT).masked_fill(hidden_LL, -torch.inf).softmax(-1)
        if not grad_NLD:
            parts.append([weights_NLL @ v_NLD])
            continue
        g_weights_NLL = grad_NLD[0] @ v_NLD.mT
        g_weights_NLL -= (g_weights_NLL * weights_NLL).sum(-1, keepdim=True)
        g_scores_NLL = factor * weights_NLL * g_weights_NLL
        parts.append([g_scores_NLL @ k_NLD, g_scores_NLL.mT @ q_NLD, weights_NLL.mT @ grad_NLD[0]])
    joined = (torch.cat(part, 1).transpose(0, 1) for part in zip(*parts, strict=True))
    return [one.contiguous().to(tensors[-1].dtype) for one in joined]


def _as_kernel(num_tensors: int, starts: int, **places: int) -> Callable[..., list[Tensor]]:
    """``attend`` for operators whose arguments stand at these places; without dropout, which draws as it likes."""

    def kernel(*args: Any, scale: float | None = None, **kwargs: Any) -> list[Tensor]:
        given = {name: args[place] for name, place in places.items()}
        return attend(*args[:num_tensors], starts=args[starts], **{"scale": scale} | given)

    return kernel


KERNELS: dict[Any, Callable[..., list[Tensor]]] = {
    aten._flash_attention_forward.default: _as_kernel(3, 3, is_causal=8),
    aten._flash_attention_backward.default: _as_kernel(4, 6, is_causal=11),
    aten._efficient_attention_forward.default: _as_kernel(3, 4),
    aten._efficient_attention_backward.default: _as_kernel(4, 6),
    torch.ops.torch_attn._varlen_attn.default: _as_kernel(3, 3, is_causal=7, scale=8, window=9),
    torch.ops.torch_attn._varlen_attn_backward.default: _as_kernel(4, 6, is_causal=10, scale=12, window=13),
}

# -- what torch asks CUDA itself ----------------------------------------------------------------------------


class _Stream:
    """Or an event: nothing is late here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``, which would exchange what is inside of fake parameters."""
    moved: dict[Any, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in moved:
                moved[parameter] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
                if parameter.grad is not None:
                    moved[parameter].grad = function(parameter.grad)
            part._parameters[name] = None if parameter is None else moved[parameter]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else function(buffer)
    return module


def _host_memory(value: Any) -> Any:
    """What is saved to a file."""
    if isinstance(value, dict):
        return type(value)((key, _host_memory(one)) for key, one in value.items())
    return [_host_memory(one) for one in value] if isinstance(value, list) else _shadow(value)


def install() -> None:
    """Let torch find the GPU; for the rest of the process."""
    no_state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        **{"is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1},
        **{"current_device": 0, "get_device_capability": (9, 0), "get_device_name": "simulated GPU"},
        **{"get_rng_state": no_state, "get_rng_state_all": [no_state], "mem_get_info": (70 << 30, 80 << 30)},
        **{"get_device_properties": SimpleNamespace(name="simulated GPU", total_memory=80 << 30, major=9, minor=0)},
        **{"current_stream": _Stream(), "stream": _Stream()},
        **dict.fromkeys(("max_memory_allocated", "memory_allocated"), 1 << 30),
        **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "manual_seed", "manual_seed_all", "empty_cache")),
        **dict.fromkeys(("set_rng_state", "set_rng_state_all", "reset_peak_memory_stats")),
        "memory_stats": {},
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "Event", _Stream),
        (amp, "amp_definitely_not_available", lambda: False),
        (FakeTensorMode, "avoid_device_init", property(lambda self: True)),
        (nn.Module, "_apply", _apply),
        (Tensor, "pin_memory", lambda self, *args: self),
        (sdpa, "can_use_flash_attention", lambda asked, debug=False: asked.query.dtype != torch.float32),
        (sdpa, "can_use_efficient_attention", lambda asked, debug=False: True),
        (sdpa, "can_use_cudnn_attention", lambda asked, debug=False: False),
        (nested_tensor, "get_tensor_symint", _nested_size),
    ]
    for owner, name, value in patches:
        setattr(owner, name, value)
    save = torch.save
    torch.save = lambda value, *args, **kwargs: save(_host_memory(value), *args, **kwargs)  # type: ignore[assignment]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then comes to the mode


_nested_sizes: dict[int, Any] = {}


def _nested_size(boundaries: Tensor, *, coeff: int = 1) -> Any:
    """The length of a jagged dimension, which is equal where the boundaries are the same tensor."""
    if id(boundaries) not in _nested_sizes:
        number = torch._C._get_nested_int(len(_nested_sizes), coeff)  # type: ignore[attr-defined]
        _nested_sizes[id(boundaries)] = number, boundaries  # kept, or the number of another would be the same
    return _nested_sizes[id(boundaries)][0]
