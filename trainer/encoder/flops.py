"""What a training step computes, by arithmetic: FLOPs of the linear layers and of the attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from trainer.encoder.size import attention_width, meta_backbone
from trainer.encoder.spec import EncoderSpec


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of a backbone; a multiplication and its addition count two.

    Linear layers take 2 for each weight and token going forward; going back the same for the gradient of the weight
    where it is trained, and for that of the input where something below is. Attention takes 4 A for each query and key
    of a text and layer, width A of all heads together, and twice that going back. What is small beside these is left
    out (norms, softmax, optimizer, loss, pooling), and so is what only some ways to compute it do: padding, a second
    forward of chunks. Causal masks and sliding windows are not deducted.
    Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311.

    Attributes:
        forward_token, backward_token: of a token in all linear layers.
        forward_pair, backward_pair: of a query and a key in all layers.
    """

    forward_token: int
    backward_token: int
    forward_pair: int
    backward_pair: int

    def forward(self, lengths: Sequence[int]) -> int:
        """Of texts of so many tokens each."""
        return _flops(lengths, self.forward_token, self.forward_pair)

    def step(self, lengths: Sequence[int]) -> int:
        """Forward and backward of texts of so many tokens each."""
        return _flops(lengths, self.forward_token + self.backward_token, self.forward_pair + self.backward_pair)


def _flops(lengths: Sequence[int], per_token: int, per_pair: int) -> int:
    lengths_S = np.asarray(lengths, dtype=np.int64)
    return per_token * int(lengths_S.sum()) + per_pair * int(lengths_S @ lengths_S)


def count_arithmetic(spec: EncoderSpec) -> Arithmetic:
    """Reads the backbone's config alone, as ``backbone_size`` does.

    Raises:
        ValueError: transformers has no such architecture.
        AttributeError: its config has other names for its sizes.
        RuntimeError: its config says them for each layer apart.
    """
    backbone = meta_backbone(spec)
    pooler = getattr(backbone, "pooler", None)  # no part of the embedding
    left_out = {id(module) for module in pooler.modules()} if isinstance(pooler, nn.Module) else set()
    layers = backbone.config.num_hidden_layers
    groups = getattr(getattr(backbone, "encoder", None), "albert_layer_groups", ())  # whose layers share their weights
    num_uses = {id(module): layers // len(groups) for group in groups for module in group.modules()}
    forward = backward = 0
    is_trained_below = False
    for module in backbone.modules():  # from the embeddings upwards
        if isinstance(module, nn.Linear) and id(module) not in left_out:
            num = module.weight.numel() * num_uses.get(id(module), 1)
            forward += 2 * num
            backward += 2 * num * (module.weight.requires_grad + is_trained_below)
        is_trained_below |= any(p.requires_grad for p in module.parameters(recurse=False))
    per_pair = 4 * attention_width(backbone.config)
    return Arithmetic(forward, backward, per_pair * layers, 2 * per_pair * (layers - (spec.freeze or 0)))
