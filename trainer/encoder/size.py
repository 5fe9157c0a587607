"""How large a backbone is, by its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig

from trainer.encoder.folder import read_config
from trainer.encoder.spec import EncoderSpec
from trainer.encoder.trainable import restrict

_GATED_MODEL_TYPES = frozenset(
    {"eurobert", "gemma3_text", "gte", "llama", "mistral", "modernbert", "nomic_bert", "qwen2", "qwen3"}
)
# What counting raises for an architecture that transformers lacks, or whose config has other names for its sizes, or
# says them for each layer apart.
UNCOUNTED = (ValueError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class BackboneSize:
    """Attributes:
    num_parameters: all of them, adapters included.
    num_trained: those that get a gradient: not a pooler, which is no part of an embedding, nor what is frozen.
    num_pieces: rows of the embedding matrix.
    piece_width: their width, which need not be that of the stream (ALBERT).
    trains_pieces: whether the embedding matrix gets a gradient.
    hidden, intermediate: width of the stream and of the feed-forward layers.
    attention: width of all heads together.
    is_gated: the feed-forward layers multiply two branches (SwiGLU and the like).
    num_layers: blocks of attention and feed-forward.
    num_frozen: the first of them, which keep nothing for a backward.
    """

    num_parameters: int
    num_trained: int
    num_pieces: int
    piece_width: int
    trains_pieces: bool
    hidden: int
    intermediate: int
    attention: int
    is_gated: bool
    num_layers: int
    num_frozen: int


def meta_backbone(spec: EncoderSpec) -> Any:
    """The backbone on the meta device: nothing is allocated, no weight is read.

    Raises:
        ValueError: transformers has no such architecture.
    """
    config: Any = read_config(spec)
    encoder_only = _encoder_only(config)
    with torch.device("meta"):
        model: Any = (
            AutoModel.from_config(config, trust_remote_code=spec.trust_remote_code)
            if encoder_only is None
            else encoder_only(config)
        )
        restrict(model, spec)
    return model


def _encoder_only(config: PretrainedConfig) -> Any:
    """The class that sentence-transformers loads of a backbone with a decoder (T5) whose encoder it takes; else
    None."""
    from sentence_transformers.base.modules.transformer import _ENCODER_ONLY_MODELS

    for kind, module, name in _ENCODER_ONLY_MODELS:
        if isinstance(config, kind):
            return getattr(import_module(module), name)
    return None


def attention_width(config: Any) -> int:
    """Width of the queries of all heads together."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * config.num_attention_heads)


def backbone_size(spec: EncoderSpec) -> BackboneSize:
    """Counts the parameters on the meta device.

    Raises:
        ValueError: transformers has no such architecture.
        AttributeError: its config has other names for its sizes.
        RuntimeError: its config says them for each layer apart.
    """
    model: Any = meta_backbone(spec)
    config = model.config
    hidden = config.hidden_size
    embeddings = model.get_input_embeddings().weight
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * hidden
    return BackboneSize(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_pieces=embeddings.shape[0],
        piece_width=embeddings.shape[1],
        trains_pieces=embeddings.requires_grad,
        hidden=hidden,
        intermediate=intermediate,
        attention=attention_width(config),
        is_gated=config.model_type in _GATED_MODEL_TYPES,
        num_layers=config.num_hidden_layers,
        num_frozen=spec.freeze or 0,
    )
