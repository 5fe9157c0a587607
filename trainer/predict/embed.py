"""All rows of a data set through an encoder into shards, shared out over the ranks while they are embedded.

Shape suffixes: B rows of a shard, U distinct texts of it, S texts of a forward, D embedding.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize

from trainer import interruption
from trainer.batch import PackedBatch
from trainer.data.progress import shown_progress
from trainer.data.workers import map_ahead
from trainer.distributed import gather
from trainer.distributed.shared_work import SharedWork
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.folder import backbone_folder
from trainer.evaluation.sharded import TokenizedTexts, embed, tokenize
from trainer.files import sha256_of
from trainer.manifest import tensor_digest
from trainer.memory import explained_memory
from trainer.predict.shards import Shards

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_REPORT_S = 30.0  # between two lines where there is no terminal
_SHOWN_ROWS = 2000  # fewer are embedded before a bar is drawn


@dataclass(frozen=True)
class Settings:
    """How embeddings are computed.

    Attributes:
        precision: of the products; bf16 and fp16 by autocast, as in training and validation.
        normalize: scale each embedding to length 1, at last.
        truncate_dim: keep the first so many numbers of each embedding.
        max_tokens: of one forward.
    """

    precision: Precision = "fp32"
    normalize: bool = False
    truncate_dim: int | None = None
    max_tokens: int = 16_384


@dataclass
class Work:
    """What was done: by one rank, or by all. Full texts have max_length pieces: they were cut, unless they just fit."""

    num_shards: int = 0
    num_texts: int = 0
    num_full: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


def fingerprint(encoder: Encoder) -> str:
    """Hash of what embeds: weights, architecture, tokenizer, pooling. Not of prompt and max_length, in which queries
    and documents of one model may differ."""
    config = encoder.backbone.config.to_diff_dict()
    for key in ("transformers_version", "_name_or_path", "dtype"):
        config.pop(key, None)
    about = [
        replace(encoder.text, prompt="", max_length=0).fingerprint,
        str(encoder.head),
        json.dumps(config, sort_keys=True, default=str),
    ]
    return tensor_digest(sorted(encoder.state_dict().items()), "\0".join(about))[:24]


def about_towers(spec: EncoderSpec) -> dict[str, Any]:
    """Of a model with separate encoders: which one it is, and a hash of the whole model, which is the same for both."""
    folder = backbone_folder(spec) if spec.route is not None else None
    if folder is None:
        return {}
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".bin"))
    digests = [(str(path.relative_to(folder)), sha256_of(path)) for path in files]
    return {"task": spec.route, "towers": hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:24]}


def embed_rows(
    encoder: Encoder, rows: Dataset, column: str, shards: Shards, settings: Settings, device: torch.device
) -> Work:
    """Write the shards that are not there yet. All ranks call it together; each takes the next one when it is free.

    Args:
        encoder: in evaluation mode, on ``device``.
        rows: as ``trainer.data.loading.load`` gives them.
        column: of the texts.
        shards: begun; the order of the rows and the values do not depend on the number of ranks.
        settings: how.
        device: of this rank.

    Returns:
        The work of all ranks, the time of this one.

    Raises:
        ValueError: an embedding is not finite, a text has no token, or the folder can't be written.
        Interrupted: a rank was asked to stop; its shard is dropped, those of the others are finished.
    """
    begin = time.perf_counter()
    left = gather.broadcast_object(shards.unfinished() if gather.rank() == 0 else [])
    work = Work()
    num_rows = sum(len(range(shards.num_rows)[shards.rows_of(number)]) for number in left)

    def read(place: int) -> tuple[int, TokenizedTexts]:
        texts = rows.data.table[column].slice(shards.rows_of(left[place]).start, shards.shard_rows).to_pylist()
        tokenized = tokenize(texts, encoder.text)
        if not (lengths_U := tokenized.ids_U.lengths_S).all():
            row = int((tokenized.text_N == int(lengths_U.argmin())).nonzero()[0])
            raise ValueError(f"the text {texts[row][:40]!r} has no token; leave its row out")
        return place, tokenized

    what = f"{shards.folder}: embedding {num_rows:,} texts"
    shown = gather.rank() == 0 and num_rows >= _SHOWN_ROWS
    said_at, finished = begin, 0
    with (
        SharedWork(len(left)) as places,
        ThreadPoolExecutor(1) as pool,
        shown_progress(what, num_rows, "texts", shown) as advance,
        _arithmetic(settings, device),
    ):
        for place, texts in map_ahead(pool, read, places, ahead=2):
            _write(shards, left[place], _embed_shard(encoder, texts, settings, device), rows)
            work.num_shards += 1
            work.num_texts += len(texts.text_N)
            is_full_U = texts.ids_U.lengths_S >= encoder.text.max_length
            work.num_full += int(is_full_U[texts.text_N.numpy()].sum())
            work.num_tokens += int(texts.ids_U.lengths_S.sum())
            # Shards are handed out in order: all but a few before this one are finished too.
            done = max(finished, min((place + 1) * shards.shard_rows, num_rows))
            advance(done - finished)
            finished, now = done, time.perf_counter()
            if shown and now - said_at > _REPORT_S and not sys.stderr.isatty():
                print(f"{finished:,} of {num_rows:,} texts, {finished / (now - begin):,.0f}/s", file=sys.stderr)
                said_at = now
    everyone = gather.gather_objects(work)
    return Work(
        num_shards=sum(one.num_shards for one in everyone),
        num_texts=sum(one.num_texts for one in everyone),
        num_full=sum(one.num_full for one in everyone),
        num_tokens=sum(one.num_tokens for one in everyone),
        seconds=time.perf_counter() - begin,
    )


def _arithmetic(settings: Settings, device: torch.device) -> torch.autocast:
    """One context around all forwards: half-precision copies of the weights, which do not change, are made once."""
    dtype = _DTYPES[settings.precision]
    return torch.autocast(device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


@torch.no_grad()
def _embed_shard(encoder: Encoder, texts: TokenizedTexts, settings: Settings, device: torch.device) -> Tensor:
    """Embeddings of the texts, (B, D) float32 on the CPU; each distinct text is embedded once."""

    def encode(batch: PackedBatch) -> Tensor:
        interruption.stop_if_asked()
        with explained_memory("embedding", batch, settings.max_tokens):
            embeddings_SD = encoder.embed(batch.to(device))
        if settings.truncate_dim is not None:
            embeddings_SD = embeddings_SD[:, : settings.truncate_dim]
        return normalize(embeddings_SD, dim=-1) if settings.normalize else embeddings_SD

    # Every rank has a shard of its own: there is nothing to gather.
    embeddings_UD = embed(encode, texts, rank=0, world_size=1, max_tokens=settings.max_tokens)
    return embeddings_UD[texts.text_N]


def _write(shards: Shards, number: int, embeddings_BD: Tensor, rows: Dataset) -> None:
    values = embeddings_BD.to(getattr(torch, shards.dtype))
    here = shards.rows_of(number)
    if not bool((finite := torch.isfinite(values).all(dim=1)).all()):
        row = here.start + int((~finite).nonzero()[0]) + 1
        raise ValueError(
            f"row {row}: its embedding is not finite in {shards.dtype}; take --precision bf16 or fp32 instead of fp16, "
            "and --dtype float32, or another checkpoint: the weights may have diverged"
        )
    ids = rows.data.table["id"].slice(here.start, shards.shard_rows).to_pylist() if shards.has_ids else None
    shards.write(number, values.numpy(), ids)
