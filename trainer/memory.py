"""Out of memory: which batch, and what to turn."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.batch import PackedBatch

# How the host says it; torch.OutOfMemoryError is the device's. oneDNN fails like this when it finds no room for the
# code of a kernel that it has already chosen.
_MESSAGE = re.compile("[Cc]an(no|')t allocate memory|std::bad_alloc|could not create a (primitive|memory object)$")


@contextmanager
def explained_memory(doing: str, batch: PackedBatch, max_tokens: int) -> Iterator[None]:
    """Turns a lack of memory into a sentence.

    Args:
        doing: what the memory was for.
        batch: this rank's.
        max_tokens: of one forward, now.

    Raises:
        ValueError: the memory did not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _MESSAGE.search(str(error))):
            raise
        raise ValueError(_sentence(doing, batch, max_tokens)) from error


def _sentence(doing: str, batch: PackedBatch, max_tokens: int) -> str:
    lengths = [length for stream in batch.streams for length in stream.lengths]
    texts, tokens, longest = len(lengths), sum(lengths), max(lengths)
    num_rows = len(batch.lengths) // batch.num_columns
    # Above the size of the batch the knob does nothing; below the longest text neither.
    smaller = max(1, min(max_tokens, tokens) // 2)
    remedy = f"model.max_tokens is {max_tokens} now; try {smaller}"
    if smaller < longest:
        remedy += f", or model.encoder.max_length below {longest}"
    return (
        f"out of memory in {doing}, with a batch of {num_rows} rows, {texts} texts, {tokens} tokens, "
        f"longest text {longest} tokens: {remedy}"
    )
