"""Encoders and losses that can't be trained together, or on this data: each is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from trainer.data.sources import Source
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.folder import embedding_dimension
from trainer.encoder.size import UNCOUNTED, meta_backbone
from trainer.encoder.spec import errors_about
from trainer.encoder.trainable import restrict
from trainer.losses import Loss


def refuse_names(names: Iterable[str]) -> None:
    """Raises ValueError where torch can't name a part of a module so."""
    if wrong := [name for name in names if not name.isidentifier() or hasattr(nn.ModuleDict, name)]:
        raise ValueError(f"model.losses can't have the name '{wrong[0]}'; take another, of letters, digits and '_'")


def refuse_missing_teacher(losses: Sequence[Loss], teacher: EncoderSpec | None) -> None:
    """Raises ValueError where a loss lacks a teacher, or there is one that no loss asks for, or one to be trained."""
    taught = [type(loss).__name__ for loss in losses if "teacher" in loss.needs]
    if taught and teacher is None:
        raise ValueError(f"{taught[0]} learns from a teacher, but there is none: set model.teacher.backbone")
    if teacher is not None and not taught:
        raise ValueError(
            f"model.teacher is set, but {_names(losses)} asks for no teacher: leave it out, or name MSE, "
            "EmbedDistill or GISTEmbed"
        )
    for key in ("freeze", "lora"):
        if getattr(teacher, key, None) is not None:
            raise ValueError(f"model.teacher.{key} is set, but a teacher is never trained: leave it out")


def refuse_teacher_size(losses: Sequence[Loss], encoder: EncoderSpec, teacher: EncoderSpec | None) -> None:
    """Raises ValueError where a loss can't compare with a teacher of this size; nothing is embedded for that."""
    if teacher is None:
        return
    try:
        ours, theirs = embedding_dimension(encoder), embedding_dimension(teacher)
    except (*UNCOUNTED, OSError):  # whoever loads the model says what is wrong with it, and the loss compares again
        return
    for loss in losses:
        for part in loss.parts():
            part.refuse_teacher(ours, theirs)


def refuse_dimension(losses: Sequence[Loss], encoder: EncoderSpec) -> None:
    """Raises ValueError where embeddings have too few dimensions for a loss; no weights are read for that."""
    try:
        dimension = embedding_dimension(encoder)
    except (*UNCOUNTED, OSError):  # whoever loads the model says what is wrong with it, and the loss looks again
        return
    for loss in losses:
        for part in loss.parts():
            part.refuse_dimension(dimension)


def refuse_layers(specs: Sequence[EncoderSpec], losses: Sequence[Loss]) -> None:
    """Raises ValueError where a backbone lacks the layers to freeze or to adapt, or nothing is left to train; no
    weights are read for that."""
    if all(spec.freeze is None and spec.lora is None for spec in specs):
        return
    whole = nn.ModuleList()
    for spec, part in zip(specs, ("model.encoder", "model.document_encoder"), strict=False):
        try:
            backbone = meta_backbone(replace(spec, freeze=None, lora=None))
        except UNCOUNTED:  # whoever loads the model says what is wrong with it, and looks again
            return
        with errors_about(part), torch.device("meta"):
            restrict(backbone, spec)
        whole.append(backbone)
    if not any(parameter.requires_grad for parameter in whole.parameters()):
        with torch.device("meta"):
            for loss in map(deepcopy, losses):
                loss.build(embedding_dimension(specs[0]))
                whole.append(loss)
        refuse_all_frozen(whole, specs, losses)


def refuse_idle(names: Iterable[str], sources: Sequence[Source]) -> None:
    """Raises ValueError where no training source names one of model.losses."""
    named = {source.loss for source in sources}
    if idle := [name for name in names if name not in named]:
        raise ValueError(
            f"model.losses has '{idle[0]}', but no source of data.train names it: give one loss: {idle[0]}, or "
            "leave it out"
        )


def refuse_prompts(sources: Sequence[Source], specs: Sequence[EncoderSpec], encoders: Sequence[Encoder]) -> None:
    """Raises ValueError where a column has a prompt and an encoder leaves prompts out of its embedding."""
    for source in sources:
        for spec, encoder in zip(specs, encoders, strict=True):
            if not encoder.pools_prompt and any((source.prompts or {}).values()):
                raise ValueError(
                    f"{source.path}: prompts of columns are pooled like the text, but '{spec.backbone}' "
                    "leaves its prompt out of the embedding: give one prompt as model.encoder.prompt, or set "
                    "include_prompt to true in its 1_Pooling/config.json"
                )


def refuse_all_frozen(module: nn.Module, specs: Sequence[EncoderSpec], losses: Sequence[Loss]) -> None:
    """Raises ValueError where ``module``, with its encoders and losses, has nothing left to train."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        return
    keys = ["model.encoder.freeze", "model.document_encoder.freeze"][: len(specs)]
    frozen = " and ".join(f"{key} {spec.freeze}" for key, spec in zip(keys, specs, strict=True))
    raise ValueError(
        f"nothing is left to train: {frozen} is all layers, and {_names(losses)} has no weights of its own; lower "
        "freeze, or take a loss with a head (Softmax)"
    )


def refuse_compiled(specs: Sequence[EncoderSpec]) -> None:
    """Raises ValueError where layers are compiled, whose weights ZeRO stage 3 gathers while they run."""
    if any(spec.compile_layers for spec in specs):
        raise ValueError(
            "model.encoder.compile_layers is true, but ZeRO stage 3 gathers the weights of a layer while it "
            "runs: set it to false, or take stage 2 (configs/hardware/zero2.yaml)"
        )


def refuse_layerdrop(encoders: Iterable[Encoder]) -> None:
    """Raises ValueError where ranks may leave out different layers, whose gradients ZeRO sums in the order of their
    coming."""
    for encoder in encoders:
        if encoder.drops_layers:
            raise ValueError(
                f"'{encoder.backbone.config.model_type}' drops whole layers in training (layerdrop in config.json), "
                "other ones on each rank, which ZeRO can't train: set model.encoder.dropout to 0, or take DDP "
                "(configs/hardware/ddp.yaml)"
            )


def refuse_idle_heads(losses: Sequence[Loss]) -> None:
    """Raises ValueError where a step takes the weights of one of several losses that are built: under ZeRO stage 3
    every step has to take the same ones."""
    heads = [type(loss).__name__ for loss in losses if list(loss.parameters())]
    if len(losses) > 1 and heads:
        raise ValueError(
            f"model.losses: {heads[0]} has weights of its own, which ZeRO stage 3 gathers only in steps that use "
            "them: take stage 2 (configs/hardware/zero2.yaml)"
        )


def _names(losses: Sequence[Loss]) -> str:
    return ", ".join(type(loss).__name__ for loss in losses)
