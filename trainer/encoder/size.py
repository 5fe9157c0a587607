"""How large a backbone is, by its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel

from trainer.encoder.spec import EncoderSpec
from trainer.encoder.text import read_config


@dataclass(frozen=True)
class BackboneSize:
    """Attributes:
    num_parameters: all of them.
    num_pooler: of the pooler, which is not part of an embedding and never trained.
    num_pieces: rows of the embedding matrix.
    hidden, intermediate: width of the stream and of the feed-forward layers.
    num_layers: blocks of attention and feed-forward.
    """

    num_parameters: int
    num_pooler: int
    num_pieces: int
    hidden: int
    intermediate: int
    num_layers: int


def backbone_size(spec: EncoderSpec) -> BackboneSize:
    """Counts the parameters on the meta device: nothing is allocated, no weight is read.

    Raises:
        ValueError: transformers has no such architecture.
    """
    config: Any = read_config(spec)
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config, trust_remote_code=spec.trust_remote_code)
    pooler = getattr(model, "pooler", None)
    hidden = config.hidden_size
    return BackboneSize(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_pooler=sum(p.numel() for p in pooler.parameters()) if pooler is not None else 0,
        num_pieces=model.get_input_embeddings().weight.shape[0],
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        num_layers=config.num_hidden_layers,
    )
