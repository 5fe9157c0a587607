"""``trainer predict``: the embeddings of a corpus, over all ranks, in files that others load."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer import interruption
from trainer.predict.flags import Flags, add_encoder, add_place, add_reading, at_least, in_flags

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from trainer.encoder import Encoder, EncoderSpec
    from trainer.predict.embed import Settings, Work
    from trainer.predict.shards import Shards

Value = TypeVar("Value")


def flags() -> Flags:
    """All flags of the subcommand."""
    parser = Flags("predict")
    add = parser.add_argument
    add("--model", required=True, help="folder, hub id, or run directory")
    add("--data", required=True, help="file, glob, folder or hub data set")
    add("--text", required=True, help="column of the texts")
    add("--id", help="column of the ids (row numbers)")
    add("--out", type=Path, required=True, help="folder of the shards and their manifest")
    add("--format", default="parquet", choices=("parquet", "npy"), help="or npy")
    add("--dtype", default="float32", choices=("float32", "float16"), help="or float16, of the written numbers")
    add("--shard-rows", type=at_least(1), default=10000, help="rows of a file")
    add("--task", choices=("query", "document"), help="its prompt, or its encoder if it has one of its own")
    add("--prompt", help="put before every text (the model's default)")
    add("--prompt-name", help="the same by its name in the model")
    add("--normalize", action="store_true", help="scale to length 1, after truncation")
    add("--truncate-dim", type=at_least(1), help="keep the first so many numbers (Matryoshka)")
    add_encoder(parser)
    add_reading(parser)
    add_place(parser)
    return parser


def predict(args: Sequence[str]) -> int:
    """Embeds ``--data`` into ``--out`` and prints what was done; the exit status is 0.

    Raises:
        ConfigError: the flags can't be meant.
        ValueError: data, model or folder can't be used.
        Interrupted: asked to stop; finished shards are kept.
    """
    options = flags().read(args)
    from trainer.data.cache import default_cache_dir
    from trainer.data.loading import fingerprint, load, num_skipped
    from trainer.data.sources import Source
    from trainer.predict.ids import about_ids
    from trainer.predict.shards import Shards
    from trainer.run_dir import is_first_rank

    interruption.stop_if_asked()  # the imports took seconds
    with said_once():
        text = Source(options.data, {"text": options.text}, split=options.split, on_bad_row=options.on_bad_row)
        source = replace(text, columns={**text.columns, "id": options.id}) if options.id else text
        cache_dir = options.cache_dir or default_cache_dir()
        rows, skipped = load(source, cache_dir, verify=True), num_skipped(source, cache_dir)
        spec = choose_prompt(encoder_spec(options, options.task), options.prompt, options.prompt_name, options.task)
    encoder, device = start(options, spec)
    settings = read_settings(options, encoder)
    shards = Shards(
        options.out,
        options.format,
        num_rows=len(rows),
        shard_rows=options.shard_rows,
        dimension=settings.truncate_dim or encoder.embedding_dimension,
        dtype=options.dtype,
        has_ids=bool(options.id),
    )
    # The texts alone: whoever uses the embeddings asks whether they are those of a column.
    begin(shards, encoder, spec, settings, {"data": fingerprint(text), "id": options.id, "skipped": skipped})
    if is_first_rank(os.environ) and (said := about_ids(rows, skipped)):
        print(f"note: {said}", flush=True)
    work = embed(encoder, rows, "text", shards, settings, device)
    report(shards, work, encoder.text.max_length)
    return 0


# -- parts, which mining uses too -------------------------------------------------------------------------


@contextmanager
def said_once() -> Iterator[None]:
    """What all ranks find wrong, each by itself, is said by the first one."""
    from trainer.distributed import gather

    try:
        yield
    except ValueError as error:
        raise gather.SharedError(in_flags(str(error))) from error


def on_first_rank(function: Callable[[], Value]) -> Value:
    """What rank 0 finds, on all ranks.

    Raises:
        SharedError: it has refused.
    """
    from trainer.config_files import ConfigError
    from trainer.distributed import gather

    found: Any = None
    refused = ""
    if gather.rank() == 0:
        try:
            found = function()
        except (ConfigError, ValueError) as error:  # whatever it is, nobody may wait for this rank
            refused = in_flags(str(error))
        except OSError as error:
            refused = f"{error.filename}: {error.strerror}; name another place" if error.filename else str(error)
    found, refused = gather.broadcast_object((found, refused))
    if refused:
        raise gather.SharedError(refused)
    return found


def encoder_spec(options: argparse.Namespace, task: str | None) -> EncoderSpec:
    """What --model means: a model, or the model/ that a fit has written into its run directory; of one with separate
    encoders that of the task, query or document.

    Raises:
        ValueError: it can't be read, or has separate encoders and no task was named.
    """
    from trainer.encoder.folder import read_routes
    from trainer.encoder.spec import EncoderSpec
    from trainer.encoder.text import load_text_preparation
    from trainer.run_dir import holds_run, refuse_folder_of_runs

    model = Path(options.model)
    if not (model / "modules.json").exists():
        if (model / "model" / "modules.json").exists():
            model = model / "model"
        elif not (model / "config.json").exists():
            refuse_folder_of_runs(model)
            if holds_run(model):
                raise ValueError(
                    f"--model {model} is a run that has written no {model / 'model'} yet, which a fit does at its end: "
                    f"trainer export {model} OUT, and name OUT"
                )
    name = str(model) if model.is_dir() else options.model
    spec = EncoderSpec(
        name,
        max_length=options.max_length,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    if read_routes(spec):
        spec = replace(spec, route=task)
    load_text_preparation(replace(spec, prompt=""))  # what is wrong with it is said before anything starts
    return spec


def choose_prompt(spec: EncoderSpec, prompt: str | None, name: str | None, task: str | None) -> EncoderSpec:
    """The encoder with the prompt that the flags name; without any, with that of the task, and without a task
    with the model's default.

    Raises:
        ValueError: the model has no prompt of that name, both were given, or a prompt leaves no room for a text.
    """
    from trainer.encoder.folder import read_prompts
    from trainer.encoder.text import load_text_preparation, task_prompt
    from trainer.messages import did_you_mean

    if prompt is not None and name is not None:
        raise ValueError("--prompt and --prompt-name were both given; give one of them")
    prompts = read_prompts(spec)
    if name is None:
        if prompt is None and task is not None:
            prompt = task_prompt(prompts, task)
    elif name not in prompts:
        raise ValueError(
            f"'{spec.backbone}' has no prompt '{name}'; it has {', '.join(prompts) or 'none'}."
            f"{did_you_mean(name, prompts)} Or write it out: --prompt '{name}: '"
        )
    else:
        prompt = prompts[name] or ""
    chosen = replace(spec, prompt=prompt)
    if prompt:
        load_text_preparation(chosen)  # mining would find out about documents when its queries are embedded
    return chosen


def start(options: argparse.Namespace, spec: EncoderSpec) -> tuple[Encoder, torch.device]:
    """The ranks, and the encoder on the device of this one."""
    import transformers

    from trainer.distributed.launch import start_ranks

    with said_once():
        device = start_ranks(options.accelerator, options.devices, options.nodes)
    transformers.utils.logging.disable_progress_bar()
    encoder = load_encoder(spec, options.max_tokens, device)
    interruption.stop_if_asked()
    return encoder, device


def load_encoder(spec: EncoderSpec, max_tokens: int, device: torch.device) -> Encoder:
    """An encoder to embed with, on a device."""
    from trainer.encoder import Encoder
    from trainer.encoder.weights import refuse_missing_weights

    with said_once():
        encoder = Encoder(spec, max_tokens)
        refuse_missing_weights(spec, encoder.backbone)
    return encoder.eval().to(device)


def read_settings(options: argparse.Namespace, encoder: Encoder) -> Settings:
    from trainer.distributed import gather
    from trainer.predict.embed import Settings

    full = encoder.embedding_dimension
    if options.truncate_dim is not None and options.truncate_dim > full:
        raise gather.SharedError(f"--truncate-dim is {options.truncate_dim}, but the model's embeddings have {full}")
    return Settings(options.precision, options.normalize, options.truncate_dim, options.max_tokens)


def begin(
    shards: Shards,
    encoder: Encoder,
    spec: EncoderSpec,
    settings: Settings,
    about_rows: Mapping[str, Any],
    remedy: str = "",
) -> None:
    """Shards to write, in a folder that nobody else writes into; or to go on with. ``remedy`` as of `start_shards`."""
    from trainer.predict.embed import about_towers, fingerprint
    from trainer.predict.shards import start_shards
    from trainer.run_lock import take_lock

    def claim() -> None:
        about_model = {
            "model": fingerprint(encoder),
            "prompt": encoder.text.prompt,
            "max_length": encoder.text.max_length,
            "precision": settings.precision,
            "normalize": settings.normalize,
            **about_towers(spec),
        }
        start_shards(shards, {**about_rows, **about_model}, remedy)
        if said := take_lock(shards.folder, os.environ):
            print(f"note: {said}")
        shards.sweep()

    on_first_rank(claim)


def embed(
    encoder: Encoder, rows: Dataset, column: str, shards: Shards, settings: Settings, device: torch.device
) -> Work:
    """As `embed_rows`, with errors in the words of the flags; then others may write into the folder."""
    from trainer.predict.embed import embed_rows
    from trainer.run_lock import release_lock

    try:
        with said_when_stopped():
            return embed_rows(encoder, rows, column, shards, settings, device)
    except ValueError as error:
        raise ValueError(in_flags(str(error))) from error
    finally:
        release_lock(shards.folder, os.environ)


@contextmanager
def said_when_stopped() -> Iterator[None]:
    """That the work can go on, where it was asked to stop."""
    from trainer.run_dir import is_first_rank

    try:
        yield
    except interruption.Interrupted as stop:
        if is_first_rank(os.environ):
            print(f"stopped by {stop.received.name}; the same command goes on (exit {stop.code})", flush=True)
        raise


def report(shards: Shards, work: Work, max_length: int) -> None:
    """What was done, on the first rank."""
    from trainer.distributed import gather

    if gather.rank():
        return
    before = shards.num_shards - work.num_shards
    there = f"; {before:,} of them were there before" if before else ""
    if work.num_shards:
        ranks = gather.world_size()
        print(
            f"{work.num_texts:,} texts, {work.num_tokens:,} tokens in {work.seconds:.1f} s on {ranks} "
            f"rank{'s' * (ranks > 1)}: {work.num_texts / work.seconds:,.0f} texts/s, "
            f"{work.num_tokens / work.seconds:,.0f} tokens/s"
        )
    if work.num_full:
        print(
            f"{work.num_full:,} of {work.num_texts:,} texts have {max_length:,} pieces or more with the prompt; "
            "--max-length keeps that many"
        )
    print(
        f"{shards.folder}: {shards.num_rows:,} rows of {shards.dimension} {shards.dtype} numbers in "
        f"{shards.num_shards:,} {shards.format} file{'s' * (shards.num_shards > 1)}{there}"
    )
