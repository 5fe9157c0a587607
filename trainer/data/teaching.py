"""A teacher embeds the texts of a source, once: it is frozen, so nothing of it is needed while a model trains.

Shape suffixes: U distinct texts, S texts of one forward, D embedding.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from trainer.data.cache import place_of, use
from trainer.data.collate import pack_texts, plan_rounds
from trainer.data.progress import shown_progress
from trainer.data.sources import Source
from trainer.data.table import TokenTable
from trainer.data.teacher import TeacherTable
from trainer.data.tokens import tokenize
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.folder import backbone_folder
from trainer.encoder.spec import errors_about
from trainer.encoder.text import load_text_preparation
from trainer.encoder.weights import refuse_missing_weights
from trainer.files import sha256_of
from trainer.interruption import stop_if_asked

_VERSION = 1  # of the files: raise it when the same texts and teacher give other numbers
_FEW_TEXTS = 1000  # are embedded without a word
# What changes neither texts nor embeddings, or stands in the key already.
_NOT_IN_KEY = ("backbone", "revision", "compact_vocabulary", "dropout")


def teach(
    source: Source, spec: EncoderSpec, cache_dir: Path, max_tokens: int, device: torch.device, verify: bool = False
) -> TeacherTable:
    """The teacher's embeddings of ``source``; the first call makes them in ``cache_dir``, on ``device``.

    Args:
        source: rows of texts; its prompts are the student's, and the teacher reads the texts behind its own.
        spec: the teacher.
        cache_dir: where tables lie.
        max_tokens: of one forward.
        device: of the teacher.
        verify: read embeddings that are there, and make them again where a file is damaged.

    Raises:
        ValueError: a streamed source, or a teacher that can't be read.
    """
    if source.streaming:
        raise ValueError(
            f"{source.path}: a teacher embeds all texts before the training, which does not go with streaming: true; "
            "set it to false"
        )
    source = replace(source, prompts=None)
    with errors_about("model.teacher"):
        text = load_text_preparation(spec)
    tokens = tokenize(source, text, cache_dir, verify)
    settings = {name: value for name, value in asdict(spec).items() if name not in _NOT_IN_KEY}
    parts = [_VERSION, tokens.folder.name, settings, _contents(spec.backbone, spec.revision)]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    folder = place_of(cache_dir, "teacher", key)
    use(folder, partial(_embed, source, spec, tokens, max_tokens, device), verify)
    return TeacherTable(folder, tokens)


@cache  # every source asks
def _contents(backbone: str, revision: str | None) -> list[str]:
    """Hashes of the files of a model, whatever its folder is called."""
    folder = backbone_folder(EncoderSpec(backbone, revision=revision))
    if folder is None:
        raise ValueError(f"model.teacher.backbone '{backbone}' is neither a model folder nor a hub id that was fetched")
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".bin", ".txt"))
    return [f"{path.relative_to(folder)} {sha256_of(path)}" for path in files]


def _embed(
    source: Source, spec: EncoderSpec, tokens: TokenTable, max_tokens: int, device: torch.device, folder: Path
) -> None:
    # Building modules draws numbers: the heads of the run would be others than after a start that finds these files.
    with errors_about("model.teacher"), torch.random.fork_rng(devices=[]):
        encoder = Encoder(spec, max_tokens).to(device).eval()
        refuse_missing_weights(spec, encoder.backbone)
    texts = tokens.distinct_texts()
    shape = (len(texts), encoder.embedding_dimension)
    embeddings_UD = np.memmap(folder / "embeddings.float32", np.float32, "w+", shape=shape)
    what = f"{source.path}: the teacher embeds {len(texts):,} texts"
    with torch.inference_mode(), shown_progress(what, len(texts), "texts", len(texts) > _FEW_TEXTS) as advance:
        for (numbers,) in plan_rounds(texts.lengths_S.tolist(), 1, max_tokens):
            embeddings_SD = encoder.embed(pack_texts([texts[i].tolist() for i in numbers]).to(device))
            embeddings_UD[numbers] = embeddings_SD.cpu().numpy()
            advance(len(numbers))
            stop_if_asked()
    embeddings_UD.flush()
    report = {"source": source.path, "num_rows": tokens.num_rows}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
