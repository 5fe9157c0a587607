"""Sources that can't be trained on, or evaluated, as the config says: each is refused in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trainer.data.evalsource import EvalSource
from trainer.data.files import is_hub_id
from trainer.data.sources import Source
from trainer.encoder.text import TextPreparation
from trainer.messages import refuse_not_positive


def refuse_training(source: Source, no_duplicates: bool, mixing: str, has_documents: bool) -> None:
    """Raises ValueError where settings of a training source do not go with each other, or with those of its batches.

    Args:
        source: of data.train.
        no_duplicates: data.no_duplicates.
        mixing: data.mixing.
        has_documents: documents have an encoder of their own.
    """
    _refuse_hub_keys(source)
    if source.streaming and source.on_bad_row == "skip":
        raise ValueError(
            f"{source.path}: on_bad_row: skip does not go with streaming: true, for rows are numbered before "
            "they are read; set on_bad_row: fail, or streaming: false"
        )
    if no_duplicates and source.streaming:
        raise ValueError(
            f"{source.path}: data.no_duplicates does not go with streaming: true, for the texts of a batch are "
            "known when they are read; set one of them to false"
        )
    if no_duplicates and source.rows_per_label:
        raise ValueError(
            f"{source.path}: data.no_duplicates does not go with rows_per_label: a batch is put together in "
            "one of the two ways; leave one out"
        )
    refuse_not_positive(f"{source.path}: weight", source.weight)
    if mixing != "weighted" and source.weight != 1.0:
        raise ValueError(
            f"{source.path}: weight is {source.weight:g}, which counts under data.mixing weighted alone, and "
            f"data.mixing is {mixing}; set data.mixing to weighted, or leave weight out"
        )
    if source.max_negatives is None:
        raise ValueError(f"{source.path}: max_negatives null is for data.validation; give a number")
    if has_documents and "anchor" not in source.text_columns:
        raise ValueError(
            f"{source.path}: model.document_encoder separates documents (positive, ...) from queries (anchor), "
            f"but the texts are {', '.join(source.text_columns)}: leave document_encoder out, or give "
            "pairs"
        )


def refuse_held_out(sources: Sequence[EvalSource]) -> None:
    """Raises ValueError where two validation sets share a name, or one has settings of training."""
    paths: dict[str, str] = {}
    for held_out in sources:
        if held_out.name in paths:
            raise ValueError(
                f"data.validation has two sets of the name '{held_out.name}', {paths[held_out.name]} and "
                f"{held_out.path}: the metrics of one would replace those of the other; give each a name of its own"
            )
        paths[held_out.name] = held_out.path
        _refuse_hub_keys(held_out)
        if held_out.streaming:
            raise ValueError(
                f"{held_out.path}: streaming: true is for data.train; an evaluation takes all rows: set it to false"
            )
        if held_out.max_lengths:
            raise ValueError(
                f"{held_out.path}: max_lengths is for data.train; an evaluation embeds as the exported model will, "
                "with model.encoder.max_length: leave it out"
            )


def _refuse_hub_keys(source: Source) -> None:
    for key in ("subset", "revision"):
        value = getattr(source, key)
        if value is not None and not is_hub_id(source.path):
            raise ValueError(
                f"{source.path}: {key} is {value}, which chooses from a data set of the hub; path names files, which "
                f"are read whole: leave {key} out, or set it to null"
            )


def refuse_full(source: Source, column: str, text: TextPreparation) -> None:
    """Raises ValueError where the prompt of a column takes all pieces that are kept of its texts."""
    prompt = source.prompt_of(column)
    least = replace(text, prompt=text.prompt + prompt).shortest if prompt else 0
    if text.max_length <= least:
        raise ValueError(
            f"{source.path}: prompts puts '{prompt[:40]}{'...' * (len(prompt) > 40)}' before '{column}', which makes "
            f"{least} pieces with the special ones, and {text.max_length} are kept: no text is left; take a shorter "
            f"prompt, or keep {least + 1} or more (max_lengths, model.encoder.max_length)"
        )
