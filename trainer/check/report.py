"""The report on a run: facts of its data, numbers of its plan, findings. `trainer check` and fit make the same one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional

import numpy as np

from trainer.check import memory
from trainer.check.batches import count_false_negatives
from trainer.check.finding import Finding, Situation, name_of
from trainer.check.rules import findings, unfit_columns, unfit_validation
from trainer.check.texts import num_negatives
from trainer.data.evalsource import EvalSource
from trainer.data.facts import SourceFacts, source_facts
from trainer.data.leaks import LeakFacts, leak_facts
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.distributed.strategies import ZeRO
from trainer.encoder.folder import normalizes, public_name
from trainer.encoder.size import UNCOUNTED, backbone_size
from trainer.model_refusals import refuse_dimension, refuse_idle, refuse_layers, refuse_teacher_size
from trainer.module import EmbeddingModule
from trainer.tracking.redact import redact_text

VERSION = 1  # of the JSON: raised when a key changes its meaning or goes
FILE_NAME = "check.json"
_SAMPLED_STEPS = 200
STREAMED_STEPS = 10


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        batch_size: rows of a global step.
        num_ranks: that share it.
        steps_per_epoch, num_steps: optimizer steps.
        epochs: passes over the data.
        tokens_per_step: pieces of a step on all ranks, mean of a sample of steps.
        max_tokens_per_step: the largest of that sample.
        max_tokens_of_towers: the same of what each encoder takes: of all texts, or of queries and of documents.
        padding_efficiency: share of real pieces where each column of those steps is padded; packed it is 1.
        num_used_pieces, num_pieces: pieces that training texts use (None with streaming), of those the tokenizer has;
            of separate towers the sums over both.
        num_negatives: for each source the negatives of a query; None where the loss takes none from the batch.
        false_negatives: those among them that are right answers, because a text stands twice in the batch; the mean of
            that sample of steps.
        num_left_out: for each source the rows of an epoch that no batch can hold.
    """

    batch_size: int
    num_ranks: int
    steps_per_epoch: int
    num_steps: int
    epochs: float
    tokens_per_step: float
    max_tokens_per_step: int
    max_tokens_of_towers: list[int]
    padding_efficiency: float
    num_used_pieces: Optional[int]
    num_pieces: int
    num_negatives: list[Optional[int]]
    false_negatives: list[Optional[float]]
    num_left_out: list[int]


@dataclass(frozen=True)
class Report:
    """Attributes:
    loss: name of it; several with "and" between them.
    backbone: as the config names it.
    paths: of the training sources, and ``sources`` their facts.
    leaks: of each validation set.
    plan: of the run.
    memory: of one device; None where the backbone's size can't be told.
    findings: errors first.
    """

    loss: str
    backbone: str
    paths: Sequence[str]
    sources: Sequence[SourceFacts]
    leaks: Sequence[LeakFacts]
    plan: Plan
    memory: Optional[memory.Memory]
    findings: Sequence[Finding]

    @property
    def errors(self) -> list[Finding]:
        """Those that stop a run."""
        return [finding for finding in self.findings if finding.stops]

    @property
    def warnings(self) -> list[Finding]:
        """The others, errors that were allowed included."""
        return [finding for finding in self.findings if not finding.stops]

    def to_json(self, measured: str = "") -> str:
        """All of it; ``measured`` is what a probe found."""
        content: dict[str, Any] = {
            "version": VERSION,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "findings": [asdict(finding) for finding in self.findings],
            "loss": self.loss,
            "backbone": self.backbone,
            "train": [
                {"path": redact_text(path), **asdict(facts)}
                for path, facts in zip(self.paths, self.sources, strict=True)
            ],
            "validation": [asdict(leak) for leak in self.leaks],
            "plan": asdict(self.plan),
            "memory": self.memory and {**asdict(self.memory), "total": self.memory.total},
            "measured": measured or None,
        }
        return json.dumps(content, indent=1, ensure_ascii=False)


def make_report(
    module: EmbeddingModule,
    data: PairData,
    steps_per_epoch: int,
    num_steps: int,
    num_ranks: int,
    is_half: bool,
    strategy: object,
    allow: Sequence[str] = (),
) -> Report:
    """The report on a run whose ``data`` is set up; neither weights nor a trainer are needed.

    Args:
        steps_per_epoch, num_steps: of the run.
        num_ranks: that share a batch.
        is_half: bf16 or fp16 autocast.
        strategy: of the run; ZeRO shares memory out.
        allow: names of errors that shall not stop it.
    """
    sources, leaks = read_facts(data)
    situation = Situation(
        paths=[source.path for source in data.train_sources],
        sources=sources,
        losses=[module.loss_of(source) for source in data.train_sources],
        leaks=leaks,
        batch_size=data.batch_size,
        epochs=num_steps / steps_per_epoch,
        normalized=all(normalizes(spec) for spec in module.encoder_specs),
        backbone=public_name(module.encoder_specs),  # a cause may stand in a model card
        no_duplicates=data.no_duplicates,
        by_label=[source.rows_per_label is not None for source in data.train_sources],
        left_out=[(n, part.tell_left_out(n)) for n, part in zip(data.rows_without_place, data.parts, strict=True)],
        steps=data.order.steps_by_source,
        prompts=[_prompts(source) for source in data.train_sources],
        targets=[source.targets for source in data.train_sources],
        score_ranges=[source.score_range for source in data.train_sources],
        asked_prompts={one.name: _prompts(one) for one in data.validation_sources if _embeds_negatives(one)},
    )
    unfit = [f for source, table in zip(data.train_sources, data.tables, strict=True)
             for f in unfit_columns(module.loss_of(source), source, table)]  # fmt: skip
    unfit += [f for held_out in data.validation_sources for f in unfit_validation(held_out)]
    refuse_idle(module.losses, data.train_sources)
    refuse_layers(module.encoder_specs, module.all_losses)
    refuse_dimension(module.all_losses, module.encoder_spec)
    refuse_teacher_size(module.all_losses, module.encoder_spec, module.teacher_spec)
    module.refuse_classifiers(data)
    plan = _plan(situation, data, steps_per_epoch, num_steps, num_ranks)
    return Report(
        loss=" and ".join(dict.fromkeys(map(name_of, situation.losses))),
        backbone=" and ".join(spec.backbone for spec in module.encoder_specs),
        paths=situation.paths,
        sources=sources,
        leaks=leaks,
        plan=plan,
        memory=_memory(module, data, plan, is_half, strategy),
        findings=unfit + [replace(f, allowed=f.severity == "error" and f.name in allow) for f in findings(situation)],
    )


def _prompts(source: Source) -> list[tuple[str, str]]:
    # A validation set takes all negatives of a list: how many columns these are nobody knows before the rows are read.
    columns = (*source.text_columns, *(["negatives"] if source.may_lack_texts and source.max_negatives is None else []))
    return [(source.key_of(column), source.prompt_of(column)) for column in columns]


def _embeds_negatives(source: EvalSource) -> bool:
    return source.evaluator.takes_lists or any(name.startswith("negative") for name in source.evaluator.text_columns)


def read_facts(data: PairData) -> tuple[list[SourceFacts], list[LeakFacts]]:
    """Facts of all sets of a run; counted at the first call, read from the cache later."""
    sources = [
        source_facts(source, table, data.text_of(source), data.cache_dir, data.max_rows)
        for source, table in zip(data.train_sources, data.tables, strict=True)
    ]
    leaks = [leak_facts(one, data.train_sources, data.cache_dir, data.max_rows) for one in data.validation_sources]
    return sources, leaks


def _plan(situation: Situation, data: PairData, steps_per_epoch: int, num_steps: int, num_ranks: int) -> Plan:
    order, towers = data.order, data.text.towers
    used_ids = [data.used_ids(tower) for tower in towers]
    tokens, padded = [], []
    num_queries, num_false = np.zeros((2, len(data.tables)), np.int64)
    steps = range(0, order.steps_per_epoch, max(1, order.steps_per_epoch // _SAMPLED_STEPS))
    if used_ids[0] is None:  # streamed: far steps lie in blocks that nobody has fetched
        steps = range(min(order.steps_per_epoch, STREAMED_STEPS))
    for index in steps:
        step = order.step(0, index)
        table = data.tables[step.source]
        lengths = [[len(ids) for ids in table.ids(column, step.rows)] for column in table.columns]
        by_tower = dict.fromkeys(towers, 0)
        for column, found in zip(table.columns, lengths, strict=True):
            by_tower[data.text.tower_of(column)] += sum(found)
        tokens.append(list(by_tower.values()))
        padded.append(sum(max(column) * len(column) for column in lengths))
        if situation.losses[step.source].in_batch_negatives and len(table.columns) > 1:
            num_queries[step.source] += len(step.rows)
            num_false[step.source] += count_false_negatives(table.hashes(step.rows))
    totals = [sum(counts) for counts in tokens]
    return Plan(
        batch_size=data.batch_size,
        num_ranks=num_ranks,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        epochs=situation.epochs,
        tokens_per_step=float(np.mean(totals)),
        max_tokens_per_step=max(totals),
        max_tokens_of_towers=[max(counts) for counts in zip(*tokens, strict=True)],
        padding_efficiency=sum(totals) / sum(padded),
        num_used_pieces=None if used_ids[0] is None else sum(len(ids) for ids in used_ids if ids is not None),
        num_pieces=sum(len(text.tokenizer) for text in (data.text, data.text.documents) if text is not None),
        num_negatives=[num_negatives(loss, facts, data.batch_size) for _, facts, loss in situation.judged()],
        false_negatives=[float(n / of) if of else None for n, of in zip(num_false, num_queries, strict=True)],
        num_left_out=data.rows_without_place,
    )


def _memory(
    module: EmbeddingModule, data: PairData, plan: Plan, is_half: bool, strategy: object
) -> Optional[memory.Memory]:
    try:
        sizes = [backbone_size(spec) for spec in module.encoder_specs]
    except UNCOUNTED:  # an estimate less, no more
        return None
    parts = []
    for tower, spec, size, tokens in zip(
        data.text.towers, module.encoder_specs, sizes, plan.max_tokens_of_towers, strict=True
    ):
        used_ids = data.used_ids(tower) if spec.compact_vocabulary == "auto" else None
        parts.append(
            memory.estimate(
                size,
                None if used_ids is None else len(used_ids),
                min(module.max_tokens, -(-tokens // plan.num_ranks)),
                is_half,
                module.optimizer_name == "adamw",
            )
        )
    needed = memory.together(parts)
    if not isinstance(strategy, ZeRO):
        return needed
    return memory.Sharing(strategy.stage, plan.num_ranks, strategy.offload, strategy.live_parameters).of(needed)
