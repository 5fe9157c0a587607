"""What the optimizer works on, the length of its run, and its clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict[str, Any]]:
    """All trained parameters: those that decay, and, unless ``decay_all``, biases, norms and single numbers, which do
    not. A group without parameters is left out."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    norms = {id(p) for m in module.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # A single number is a scale or an offset, as a norm's weights and biases are.
            single = parameter.numel() == 1 or id(parameter) in norms or name.endswith("bias")
            exempt = single and not decay_all
            (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def count_steps(steps_per_epoch: int, max_epochs: int, max_steps: int) -> int:
    """Optimizer steps of a whole run; -1 is no limit.

    Raises:
        ValueError: neither limit is set.
    """
    if max_epochs < 0 and max_steps < 0:
        raise ValueError("trainer.max_epochs is -1 and trainer.max_steps is not set: give one of them")
    steps = steps_per_epoch * max_epochs if max_epochs > 0 else max_steps
    return min(steps, max_steps) if max_steps > 0 else steps


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients."""
    grads = [p.grad for p in parameters if p.grad is not None]
    # On a CPU torch reduces a tensor to one number on one core, but its rows on all of them.
    rows = [torch.linalg.vector_norm(g, dim=-1) if g.device.type == "cpu" and g.dim() > 1 else g for g in grads]
    return nn.utils.get_total_norm(rows)


def clip(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients of this global norm to the limit, if they are over it; a fused optimizer does it on its way."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)  # type: ignore[attr-defined]
    else:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
