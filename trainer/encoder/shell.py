"""The sentence-transformers model around a backbone: what the folder says of it, and what the config says instead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import nn

from trainer.distributed import gather
from trainer.encoder.folder import ending_normalizes
from trainer.encoder.spec import EncoderSpec
from trainer.encoder.text import TextPreparation

logger = logging.getLogger(__name__)

_ST_POOLING = {"mean": "mean", "cls": "cls", "max": "max", "last": "lasttoken"}


def share_tokenizer(shell: SentenceTransformer, text: TextPreparation) -> Callable[[], None]:
    """Let the shell have the tokenizer of ``text`` instead of its own copy.

    Returns:
        What gives it the truncation and padding of its files again, which every use of a tokenizer changes.
    """
    transformer: Any = shell[0]
    unused = transformer.processor.backend_tokenizer
    truncation, padding = unused.truncation, unused.padding
    if not transformer.do_lower_case:  # ours lowers by itself
        transformer.processor = transformer.input_formatter.processor = text.tokenizer
    else:  # left out when it is saved, and tokenizers of most types make a normalizer anew when they are loaded
        transformer.config_keys = [*transformer.config_keys, "do_lower_case"]
    backend = transformer.processor.backend_tokenizer

    def restore() -> None:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)

    return restore


def drop_messages(shell: SentenceTransformer) -> None:
    """Let a plain backbone read bare texts: for its chat template, sentence-transformers would put each text into that,
    and so would a folder that is saved of it."""
    for transformer in shell.modules():
        if isinstance(transformer, Transformer) and transformer.modality_config.pop("message", None) is not None:
            transformer.input_formatter.supported_modalities = list(transformer.modality_config)
            gather.warn(
                logger,
                "the tokenizer has a chat template, which sentence-transformers puts around texts: training and the "
                "exported folder read bare texts",
            )


def take_route(shell: SentenceTransformer, route: str, prompt: str) -> SentenceTransformer:
    """One of the encoders of a Router as a model of its own."""
    modules: list[Any] = list(shell)
    router, *behind = modules
    prompts = dict.fromkeys(("query", "document", "default"), prompt) if prompt else None
    return SentenceTransformer(
        modules=[*router.sub_modules[route], *behind],
        device="cpu",
        prompts=prompts,
        default_prompt_name="default" if prompt else None,
        similarity_fn_name=shell.similarity_fn_name,
    )


def override_modules(shell: SentenceTransformer, spec: EncoderSpec) -> None:
    """Apply pooling and normalize of the spec to the folder's modules, and say what was overridden.

    Raises:
        ValueError: weights behind the pooling fit its width alone.
    """
    modules = list(shell.named_children())
    for place, (name, module) in enumerate(modules):
        if isinstance(module, Pooling) and spec.pooling != "auto":
            wanted = _ST_POOLING[spec.pooling]
            if module.pooling_mode != wanted:
                gather.warn(
                    logger,
                    f"pooling: the folder says {module.pooling_mode}, the config overrides it with {spec.pooling}",
                )
                replacement = Pooling(module.embedding_dimension, wanted, include_prompt=module.include_prompt)
                _refuse_width(spec, module, replacement, [one for _, one in modules[place + 1 :]])
                shell._modules[name] = replacement
    normalizes = [modules[place][0] for place in ending_normalizes([type(one).__name__ for one in shell.children()])]
    if spec.normalize is True and not normalizes:
        gather.warn(logger, "normalize: the folder does not, the config adds it")
        shell.append(Normalize())
    if spec.normalize is False and normalizes:
        gather.warn(logger, "normalize: the folder does, the config removes it")
        for name in normalizes:
            del shell._modules[name]


def _refuse_width(spec: EncoderSpec, old: Pooling, new: Pooling, behind: Sequence[nn.Module]) -> None:
    given, taken = new.get_embedding_dimension(), old.get_embedding_dimension()
    weighted = next((type(one).__name__ for one in behind if list(one.parameters())), None)
    if given != taken and weighted is not None:
        raise ValueError(
            f"model.encoder.pooling is {spec.pooling}, which gives {given:,} numbers, but the {weighted} behind the "
            f"pooling of '{spec.backbone}' takes {taken:,} ({' and '.join(old.pooling_mode)}): set pooling to auto"
        )
