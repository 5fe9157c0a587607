"""The texts of mining and their embeddings: those that were given, and those that are made here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.cache import default_cache_dir
from trainer.data.loading import fingerprint, load
from trainer.data.sources import Source
from trainer.encoder.text import load_text_preparation
from trainer.mine.search import Vectors
from trainer.predict.command import begin, embed, load_encoder, on_first_rank
from trainer.predict.embed import Settings
from trainer.predict.shards import Shards, open_shards

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from trainer.encoder import Encoder, EncoderSpec

_SHARD_ROWS = 10_000


@dataclass(frozen=True)
class TextColumn:
    """A column to embed.

    Attributes:
        rows: with the column, under this name.
        column: its canonical name.
        fingerprint: of its texts alone, as trainer predict notes it.
        kind: whose prompt stands before its texts: query or corpus.
    """

    rows: Dataset
    column: str
    fingerprint: str
    kind: str


def read_columns(options: argparse.Namespace) -> dict[str, TextColumn]:
    """The anchors, the positives, and the corpus if there is one."""
    cache = options.cache_dir or default_cache_dir()
    source = Source(
        options.data,
        {"anchor": options.anchor, "positive": options.positive},
        split=options.split,
        on_bad_row=options.on_bad_row,
    )
    rows = load(source, cache, verify=True)

    def alone(name: str) -> str:
        return fingerprint(replace(source, columns={"text": name}))

    columns = {
        "anchor": TextColumn(rows, "anchor", alone(options.anchor), "query"),
        "positive": TextColumn(rows, "positive", alone(options.positive), "corpus"),
    }
    if options.corpus:
        more = replace(source, path=options.corpus, columns={"text": options.text})
        columns["corpus"] = TextColumn(load(more, cache, verify=True), "text", fingerprint(more), "corpus")
    return columns


def embed_columns(
    options: argparse.Namespace,
    columns: dict[str, TextColumn],
    specs: Mapping[str, EncoderSpec],
    encoder: Encoder | None,
    device: torch.device,
    work: Path,
) -> tuple[Vectors, dict[str, dict[str, Any]]]:
    """Embeddings of all columns, those that were given and those that are made here, and what their manifests say."""
    said: dict[str, dict[str, Any]] = {}
    loaded = {specs["query"].route: encoder} if encoder is not None else {}
    opened: dict[str, Shards] = {}
    for name, column in columns.items():
        folder = getattr(options, f"{name}_embeddings")
        if folder is None:
            folder, spec = work / name, specs[column.kind]
            if spec.route not in loaded:  # documents have an encoder of their own
                loaded = {spec.route: load_encoder(spec, options.max_tokens, device)}
            _embed_column(options, column, spec, loaded[spec.route], device, folder)
        opened[name], said[name] = on_first_rank(lambda folder=folder: open_shards(folder))  # type: ignore[misc]
    on_first_rank(lambda: _match(options, columns, opened, said))
    return Vectors(opened["anchor"], opened["positive"], opened.get("corpus")), said


def _embed_column(
    options: argparse.Namespace,
    column: TextColumn,
    spec: EncoderSpec,
    encoder: Encoder,
    device: torch.device,
    folder: Path,
) -> None:
    encoder.text = load_text_preparation(spec)
    settings = Settings(options.precision, max_tokens=options.max_tokens)
    dimension = encoder.embedding_dimension
    shards = Shards(folder, "npy", len(column.rows), _SHARD_ROWS, dimension, "float32", has_ids=False)
    # All of it, for the other columns there are of that run too.
    remedy = f"remove {folder.parent}, or give another --out"
    begin(shards, encoder, spec, settings, {"data": column.fingerprint}, remedy)
    embed(encoder, column.rows, column.column, shards, settings, device)


def _match(
    options: argparse.Namespace,
    columns: dict[str, TextColumn],
    opened: dict[str, Shards],
    said: dict[str, dict[str, Any]],
) -> None:
    """Refuse embeddings of other texts, or of different models."""
    for name, column in columns.items():
        file, key = (options.corpus, options.text) if name == "corpus" else (options.data, getattr(options, name))
        has_its_texts = said[name].get("data") == column.fingerprint
        if has_its_texts and opened[name].num_rows != len(column.rows):
            raise ValueError(
                f"{opened[name].folder} holds {opened[name].num_rows:,} embeddings of column '{key}' of {file}, but "
                f"mining takes {len(column.rows):,} rows, for a row that is bad in any column is left out whole: "
                "mine with --model in place of the embeddings, or clean the file and embed again"
            )
        if not has_its_texts:
            raise ValueError(
                f"{opened[name].folder} holds {opened[name].num_rows:,} embeddings of other texts than column '{key}' "
                f"of {file} ({len(column.rows):,} rows); make them: trainer predict --data {file} --text {key}"
            )
        task, own = said[name].get("task"), "query" if column.kind == "query" else "document"
        if task not in (None, own):
            raise ValueError(
                f"{opened[name].folder} holds embeddings of the {task} encoder, but this column takes that of "
                f"{own}: trainer predict --task {own}"
            )
    # Two encoders of one model are one model.
    models = {name: saved.get("towers", saved["model"]) for name, saved in said.items()}
    for key, values in (("model", models), ("dimension", {name: saved["dimension"] for name, saved in said.items()})):
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{shards.folder}: {values[name]}" for name, shards in opened.items())
            raise ValueError(f"the embeddings differ in their {key} ({listed}); embed all with one model")
