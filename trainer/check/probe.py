"""One real step on the longest batch: what memory a run takes, measured."""

from __future__ import annotations

from dataclasses import replace

import torch

from trainer.batch import PackedBatch
from trainer.check.report import STREAMED_STEPS
from trainer.data.batches import StepBatches
from trainer.data.module import PairData
from trainer.encoder.towers import load_encoder
from trainer.memory import explained_memory
from trainer.module import EmbeddingModule
from trainer.tracking.about import device_name, peak_memory

_MAX_STEPS = 2000  # that the longest batch is sought among


def probe(module: EmbeddingModule, data: PairData, num_ranks: int, precision: str) -> str:
    """Forward, backward and optimizer step of one rank's share of the longest batch, on the GPU where there is one.

    Args:
        precision: of the run; its 16 bits are those of bf16 here.

    Raises:
        ValueError: no weights, or not enough memory; says the batch and the knob.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.encoder = load_encoder(module.encoder_spec, module.document_spec, module.max_tokens, data.text)
    for loss in module.all_losses:
        loss.build(module.encoder.embedding_dimension)
    module.compact_vocabularies(data)
    module.to(device).train()
    optimizer = module.make_optimizer(precision)
    module.open_teachers(data, device, verify=True)
    batch = _longest_batch(data, num_ranks)
    with explained_memory("the probe", batch, module.max_tokens):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled="16" in precision):
            loss = module.loss_of(data.train_sources[batch.source])
            value = loss(module.encoder(batch.to(device)), batch.targets.to(device))
        value.backward()
        optimizer.step()
    size = f"{batch.num_rows:,} rows, {batch.num_tokens:,} tokens"
    peaks = peak_memory(device)
    if device.type == "cuda":
        peak = peaks["train/device_peak_gib"]
        return f"{peak:.2f} GiB at most on {device_name(device)}, with a batch of {size}"
    return f"{peaks['train/host_peak_gib']:.2f} GiB at most, the whole process on the CPU, with a batch of {size}"


def _longest_batch(data: PairData, num_ranks: int) -> PackedBatch:
    """Rank 0's share of the global batch with the most tokens, as a run of one rank would see it; of a
    streamed source only the first batches are looked at."""
    order = data.order
    steps = range(0, order.steps_per_epoch, -(-order.steps_per_epoch // _MAX_STEPS))
    if data.used_ids() is None:  # streamed: far steps lie in blocks that nobody has fetched
        steps = range(min(order.steps_per_epoch, STREAMED_STEPS))

    def num_tokens(index: int) -> int:
        step = order.step(0, index)
        table = data.tables[step.source]
        return sum(len(ids) for column in table.columns for ids in table.ids(column, step.rows))

    longest = max(steps, key=num_tokens)
    batch = StepBatches(data.tables, order, order.steps_per_epoch, 0, num_ranks, data.teachers)[longest]
    return replace(batch, targets=replace(batch.targets, rows_per_rank=(batch.num_rows,)))
