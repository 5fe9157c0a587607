"""``trainer mine``: hard negatives for pairs, by the embeddings of a trained model, over all ranks."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import interruption
from trainer.config_files import ConfigError
from trainer.mine.select import Rules
from trainer.predict.command import (
    begin,
    choose_prompt,
    embed,
    encoder_spec,
    end,
    on_first_rank,
    said_once,
    said_when_stopped,
    start,
)
from trainer.predict.flags import Flags, add_encoder, add_place, add_reading, at_least

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from trainer.encoder import Encoder, EncoderSpec
    from trainer.mine.pairs import Pairs
    from trainer.mine.search import Vectors
    from trainer.predict.shards import Shards

# Kind of text -> names that models give the prompt for it, as sentence-transformers looks for them.
_PROMPT_NAMES = {"query": ("query",), "corpus": ("document", "passage", "corpus")}
_SHARD_ROWS = 10_000


def flags() -> Flags:
    """All flags of the subcommand."""
    parser = Flags("mine")
    add = parser.add_argument
    add("--model", help="folder, hub id, or run directory")
    add("--data", required=True, help="pairs in a file, glob, folder or hub set")
    add("--anchor", required=True, help="column of the anchors")
    add("--positive", required=True, help="column of the positives")
    add("--corpus", help="more documents (the positives alone)")
    add("--text", help="column of the texts of --corpus")
    add("--out", type=Path, required=True, help="file to write, .jsonl or .jsonl.gz")
    add("--output-format", default="list", choices=("list", "n-tuple", "triplet"), help="or n-tuple, triplet")
    add("--output-scores", action="store_true", help="also write the similarities")
    add("--num-negatives", type=at_least(1), default=3, help="of each anchor")
    add("--sampling", default="top", choices=("top", "random"), help="or random, by --seed")
    add("--seed", type=at_least(0), default=42, help="of the draw")
    add("--range-min", type=at_least(0), default=0, help="pass over so many of the nearest")
    add("--range-max", type=at_least(1), help="look at no more (enough for the rest)")
    add("--margin", type=float, help="so much less similar than the positive")
    add("--relative-margin", type=float, help="the same as a share (0.05 is usual)")
    add("--min-score", type=float, help="lowest similarity of a negative")
    add("--max-score", type=float, help="highest similarity of a negative")
    for kind, names in _PROMPT_NAMES.items():
        add(f"--{kind}-prompt", help=f"before {'anchors' if kind == 'query' else 'documents'}")
        add(f"--{kind}-prompt-name", help=f"the same by its name in the model ({names[0]})")
    for name in ("anchor", "positive", "corpus"):
        add(f"--{name}-embeddings", type=Path, help="that trainer predict wrote for it")
    add_encoder(parser)
    add_reading(parser)
    add_place(parser)
    return parser


def mine(args: Sequence[str]) -> int:
    """Mines negatives for ``--data`` into ``--out`` and prints what was found; the exit status is 0.

    Embeddings and finished parts lie in ``OUT.work`` until ``--out`` is written, for a second start of the command.

    Raises:
        ConfigError: the flags can't be meant.
        ValueError: data, model or files can't be used.
        Interrupted: asked to stop; what is finished is kept.
    """
    options = flags().read(args)
    _refuse(options)
    from trainer.distributed import gather
    from trainer.mine.pairs import number_pairs
    from trainer.mine.search import CHUNK_ANCHORS, search

    interruption.stop_if_asked()  # the imports took seconds
    with said_once():
        columns = read_columns(options)
        rules = Rules(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Rules)})
        specs = _specs(options)
    encoder, device = _start(options, specs)
    work = options.out.with_name(options.out.name + ".work")
    vectors, about = _embed_columns(options, columns, specs, encoder, device, work)
    del encoder
    tables = {name: column.rows.data.table for name, column in columns.items()}
    corpus = tables.get("corpus")
    pairs = number_pairs(
        tables["anchor"]["anchor"], tables["positive"]["positive"], None if corpus is None else corpus["text"]
    )
    facts = json.dumps([dataclasses.asdict(rules), about, CHUNK_ANCHORS], sort_keys=True)
    parts = work / f"parts-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    with said_once():
        rules.resolved(pairs.most_positives)
    with said_when_stopped():
        search(pairs, vectors, rules, parts, device)
    if gather.rank() == 0:
        _finish(options, pairs, tables, parts, work)
    return 0


def _refuse(options: argparse.Namespace) -> None:
    if (options.corpus is None) != (options.text is None):
        raise ConfigError("--corpus and --text go together: a file, and the column of its texts")
    if options.corpus_embeddings and not options.corpus:
        raise ConfigError("--corpus-embeddings are of a --corpus; name it, and the column: --text")
    if not str(options.out).endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"--out is {options.out}; its name must end in .jsonl or .jsonl.gz")
    wanted = ["anchor", "positive", *(["corpus"] if options.corpus else [])]
    lacking = [name for name in wanted if getattr(options, f"{name}_embeddings") is None]
    if lacking and options.model is None:
        raise ConfigError(f"trainer mine also needs --model, or --{lacking[0]}-embeddings; see trainer mine --help")


# -- texts ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
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
    from trainer.data.cache import default_cache_dir
    from trainer.data.sources import Source, fingerprint, load

    cache = options.cache_dir or default_cache_dir()
    source = Source(
        options.data,
        {"anchor": options.anchor, "positive": options.positive},
        split=options.split,
        on_bad_row=options.on_bad_row,
    )
    rows = load(source, cache)

    def alone(name: str) -> str:
        return fingerprint(replace(source, columns={"text": name}))

    columns = {
        "anchor": TextColumn(rows, "anchor", alone(options.anchor), "query"),
        "positive": TextColumn(rows, "positive", alone(options.positive), "corpus"),
    }
    if options.corpus:
        more = replace(source, path=options.corpus, columns={"text": options.text})
        columns["corpus"] = TextColumn(load(more, cache), "text", fingerprint(more), "corpus")
    return columns


def _specs(options: argparse.Namespace) -> dict[str, EncoderSpec]:
    """Kind of text -> the encoder with its prompt; none where no model is named."""
    from trainer.encoder.text import read_prompts

    if options.model is None:
        return {}
    spec, specs = encoder_spec(options), {}
    prompts = read_prompts(spec)
    for kind, names in _PROMPT_NAMES.items():
        prompt, name = getattr(options, f"{kind}_prompt"), getattr(options, f"{kind}_prompt_name")
        if prompt is None and name is None:
            name = next((one for one in names if one in prompts), None)
        specs[kind] = choose_prompt(spec, prompt, name)
    return specs


# -- embeddings -------------------------------------------------------------------------------------------


def _start(options: argparse.Namespace, specs: dict[str, EncoderSpec]) -> tuple[Encoder | None, torch.device]:
    from trainer.distributed.launch import start_ranks

    if specs:
        return start(options, specs["query"])
    with said_once():
        return None, start_ranks(options.accelerator, options.devices, options.nodes)


def _embed_columns(
    options: argparse.Namespace,
    columns: dict[str, TextColumn],
    specs: dict[str, EncoderSpec],
    encoder: Encoder | None,
    device: torch.device,
    work: Path,
) -> tuple[Vectors, dict[str, dict[str, Any]]]:
    """Embeddings of all columns, those that were given and those that are made here, and what their manifests say."""
    from trainer.mine.search import Vectors
    from trainer.predict.shards import open_shards

    said: dict[str, dict[str, Any]] = {}
    opened: dict[str, Shards] = {}
    for name, column in columns.items():
        folder = getattr(options, f"{name}_embeddings")
        if folder is None:
            assert encoder is not None
            folder = work / name
            _embed_column(options, column, specs[column.kind], encoder, device, folder)
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
    from trainer.encoder.text import load_text_preparation
    from trainer.predict.embed import Settings
    from trainer.predict.shards import Shards

    encoder.text = load_text_preparation(spec)
    settings = Settings(options.precision, max_tokens=options.max_tokens)
    dimension = encoder.embedding_dimension
    shards = Shards(folder, "npy", len(column.rows), _SHARD_ROWS, dimension, "float32", has_ids=False)
    begin(shards, encoder, settings, {"data": column.fingerprint})
    try:
        embed(encoder, column.rows, column.column, shards, settings, device)
    finally:
        end(folder)


def _match(
    options: argparse.Namespace,
    columns: dict[str, TextColumn],
    opened: dict[str, Shards],
    said: dict[str, dict[str, Any]],
) -> None:
    """Refuse embeddings of other texts, or of different models."""
    for name, column in columns.items():
        if said[name].get("data") != column.fingerprint or opened[name].num_rows != len(column.rows):
            file, key = (options.corpus, options.text) if name == "corpus" else (options.data, getattr(options, name))
            raise ValueError(
                f"{opened[name].folder} holds {opened[name].num_rows:,} embeddings of other texts than column '{key}' "
                f"of {file} ({len(column.rows):,} rows); make them: trainer predict --data {file} --text {key}"
            )
    for key in ("model", "dimension"):
        if len({saved[key] for saved in said.values()}) > 1:
            listed = ", ".join(f"{shards.folder}: {said[name][key]}" for name, shards in opened.items())
            raise ValueError(f"the embeddings differ in their {key} ({listed}); embed all with one model")


# -- the end ----------------------------------------------------------------------------------------------


def _finish(options: argparse.Namespace, pairs: Pairs, tables: dict[str, Any], parts: Path, work: Path) -> None:
    """Write the rows and say what they are; the work folder is not needed any more."""
    from trainer.mine.search import read_chunks
    from trainer.mine.write import write_rows

    report = write_rows(
        options.out,
        read_chunks(pairs, parts),
        pairs,
        tables["positive"],
        tables.get("corpus"),
        options.output_format,
        options.output_scores,
    )
    print("\n".join(report.lines()))
    loosen = "raise --range-max, or loosen margins and scores"
    if not report.num_rows:
        options.out.unlink()
        raise ValueError(f"no anchor has got enough negatives, so {options.out} is not written; {loosen}")
    found = sum(count for num, count in report.num_anchors.items() if num)
    print(
        f"{options.out}: {report.num_rows:,} rows; {found:,} of {pairs.num_anchors:,} anchors have negatives, out of "
        f"{pairs.num_documents:,} documents"
    )
    if lacking := sum(count for num, count in report.num_anchors.items() if num < options.num_negatives):
        print(f"{lacking:,} anchors have fewer than --num-negatives {options.num_negatives}: {loosen}")
    shutil.rmtree(work)
