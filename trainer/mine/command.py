"""``trainer mine``: hard negatives for pairs, by the embeddings of a trained model, over all ranks."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import interruption
from trainer.config_files import ConfigError
from trainer.mine.select import Rules
from trainer.predict.command import choose_prompt, encoder_spec, on_first_rank, said_once, said_when_stopped, start
from trainer.predict.flags import Flags, add_encoder, add_place, add_reading, at_least, finite
from trainer.run_dir import is_first_rank
from trainer.run_lock import release_lock, take_lock

if TYPE_CHECKING:
    import torch

    from trainer.encoder import Encoder, EncoderSpec
    from trainer.mine.pairs import Pairs

_TASKS = {"query": "query", "corpus": "document"}  # kind of text -> whose prompt, or whose encoder, it takes


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
    add("--range-min", type=at_least(0), default=0, help="skip this many of the nearest")
    add("--range-max", type=at_least(1), help="look at no more (enough for the rest)")
    add("--margin", type=finite, help="least difference in similarity to the positive")
    add("--relative-margin", type=finite, help="the same as a share (0.05 is usual)")
    add("--min-score", type=finite, help="lowest similarity of a negative")
    add("--max-score", type=finite, help="highest similarity of a negative")
    for kind, task in _TASKS.items():
        add(f"--{kind}-prompt", help=f"before {'anchors' if kind == 'query' else 'documents'}")
        add(f"--{kind}-prompt-name", help=f"the same by its name in the model ({task})")
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
    rules = Rules(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Rules)})
    _refuse(options, rules)
    from trainer.distributed import gather
    from trainer.mine.columns import embed_columns, read_columns
    from trainer.mine.pairs import number_pairs
    from trainer.mine.search import CHUNK_ANCHORS, search

    interruption.stop_if_asked()  # the imports took seconds
    with said_once():
        columns = read_columns(options)
        specs = _specs(options)
        if specs:
            _warn_of_similarity(specs["query"])
    encoder, device = _start(options, specs)
    work = options.out.with_name(options.out.name + ".work")
    on_first_rank(lambda: take_lock(work, os.environ))
    try:
        vectors, about = embed_columns(options, columns, specs, encoder, device, work)
        del encoder
        tables = {name: column.rows.data.table for name, column in columns.items()}
        corpus = tables.get("corpus")
        pairs = number_pairs(
            tables["anchor"]["anchor"], tables["positive"]["positive"], None if corpus is None else corpus["text"]
        )
        facts = json.dumps([dataclasses.asdict(rules), about, CHUNK_ANCHORS], sort_keys=True)
        parts = work / f"parts-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
        with said_when_stopped():
            search(pairs, vectors, rules, parts, device)
        if gather.rank() == 0:
            _finish(options, pairs, tables, parts, work)
    finally:
        release_lock(work, os.environ)
        with suppress(OSError):
            work.rmdir()  # where there is nothing to go on with
    return 0


def _refuse(options: argparse.Namespace, rules: Rules) -> None:
    try:
        rules.resolved(0)  # before the embeddings: no number of positives makes a --range-max wide enough
    except ValueError as error:
        raise ConfigError(str(error)) from error
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


def _specs(options: argparse.Namespace) -> dict[str, EncoderSpec]:
    """Kind of text -> the encoder with its prompt; none where no model is named."""
    if options.model is None:
        return {}
    specs = {}
    for kind, task in _TASKS.items():
        prompt, name = getattr(options, f"{kind}_prompt"), getattr(options, f"{kind}_prompt_name")
        specs[kind] = choose_prompt(encoder_spec(options, task), prompt, name, task)
    return specs


def _warn_of_similarity(spec: EncoderSpec) -> None:
    """Say that mining takes the cosine where the model's folder names a distance."""
    from trainer.encoder.folder import read_json

    named = (read_json(spec, "config_sentence_transformers.json") or {}).get("similarity_fn_name")
    if named in ("euclidean", "manhattan") and is_first_rank(os.environ):
        print(
            f"note: '{spec.backbone}' compares by {named} distance (similarity_fn_name of "
            "config_sentence_transformers.json); mining takes the cosine, for its bounds too",
            flush=True,
        )


def _start(options: argparse.Namespace, specs: dict[str, EncoderSpec]) -> tuple[Encoder | None, torch.device]:
    from trainer.distributed.launch import start_ranks

    if specs:
        return start(options, specs["query"])
    with said_once():
        return None, start_ranks(options.accelerator, options.devices, options.nodes)


def _finish(options: argparse.Namespace, pairs: Pairs, tables: dict[str, Any], parts: Path, work: Path) -> None:
    """Write the rows and say what they are; the work folder is not needed any more."""
    from trainer.mine.search import read_chunks
    from trainer.mine.write import NoRowsError, write_rows

    bounds = (options.range_max, options.margin, options.relative_margin, options.min_score, options.max_score)
    is_bounded = any(bound is not None for bound in bounds)
    remedy = "raise --range-max, or loosen margins and scores"
    if not is_bounded:  # the range is then wide enough: no documents were left
        remedy = "give more documents: --corpus FILE --text COLUMN"
    try:
        report = write_rows(
            options.out,
            read_chunks(pairs, parts),
            pairs,
            tables["positive"],
            tables.get("corpus"),
            options.output_format,
            options.output_scores,
        )
    except NoRowsError as error:
        print("\n".join(error.report.lines()))
        raise ValueError(f"no anchor has got enough negatives, so {options.out} is not written; {remedy}") from error
    print("\n".join(report.lines()))
    found = sum(count for num, count in report.num_anchors.items() if num)
    print(
        f"{options.out}: {report.num_rows:,} rows; {found:,} of {pairs.num_anchors:,} anchors have negatives, out of "
        f"{pairs.num_documents:,} documents"
    )
    if lacking := sum(count for num, count in report.num_anchors.items() if num < options.num_negatives):
        print(f"{lacking:,} anchors have fewer than --num-negatives {options.num_negatives}: {remedy}")
    shutil.rmtree(work)
