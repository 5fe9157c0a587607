"""MPNet over packed segments. Its attention in transformers asks no interface, and its layers pass on nothing but a
mask and the bias by position that they share: the packing, which knows that bias, goes in its place.

The classes have the names of those whose forward they change, for an exported config.json says the name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet

from trainer.encoder.attention import Packing, packed_attention
from trainer.encoder.trainable import blocks


class MPNetSelfAttention(modeling_mpnet.MPNetSelfAttention):
    """Takes a packing in the place of the bias."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_bias: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """(1, T, H) to (1, T, H), in a tuple."""
        if not isinstance(position_bias, Packing):
            return super().forward(hidden_states, attention_mask, position_bias, *args, **kwargs)
        shape = 1, -1, self.num_attention_heads, self.attention_head_size
        query, key, value = (linear(hidden_states).view(shape).transpose(1, 2) for linear in (self.q, self.k, self.v))
        rate = self.dropout.p if self.training else 0.0
        attended, _ = packed_attention(self, query, key, value, None, rate, packing=position_bias)
        return (self.o(attended.flatten(2)),)


class MPNetModel(modeling_mpnet.MPNetModel):
    """Takes a packing, as other backbones do."""

    def forward(self, *args: Any, packing: Packing | None = None, **kwargs: Any) -> Any:
        if packing is None:
            return super().forward(*args, **kwargs)
        device = packing.device  # the function holds no packing, which holds it
        told = replace(
            packing, position_bias=lambda num: self.encoder.compute_position_bias(torch.empty(1, num, device=device))
        )
        hidden = self.embeddings(kwargs["input_ids"], kwargs["position_ids"])
        for layer in self.encoder.layer:
            (hidden,) = layer(hidden, position_bias=told)
        return BaseModelOutput(last_hidden_state=hidden)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set: a packing is in the call or not."""


def take_packing(backbone: PreTrainedModel) -> None:
    """Let MPNet run packed; others stay as they are."""
    if type(backbone) is modeling_mpnet.MPNetModel:
        backbone.__class__ = MPNetModel
        for layer in blocks(backbone):
            attention: Any = layer.attention
            attention.attn.__class__ = MPNetSelfAttention
