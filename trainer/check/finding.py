"""What a rule finds, and what it looks at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Optional

from trainer.data.facts import LabelFacts, MarginFacts, ScoreFacts, SourceFacts
from trainer.data.leaks import LeakFacts
from trainer.losses import Loss
from trainer.losses.matryoshka import Matryoshka

Severity = Literal["error", "warning"]
Prompts = Sequence[tuple[str, str]]
# A recipe that several findings end in.
INFONCE = "model:\n  loss: {class_path: InfoNCE, init_args: {scale: 20.0}}   # the other rows' positives are negatives"


@dataclass(frozen=True)
class Finding:
    """Something wrong with the data of a run.

    Attributes:
        name: stable, what check.allow names.
        severity: an error stops the run.
        where: path of the source, or name of the validation set; empty: the whole run.
        cause: with numbers, without paths: a model card may show it.
        remedy: what to do.
        recipe: lines of a config to paste; empty where there are none.
        allowed: whether check.allow turned the error into a warning.
    """

    name: str
    severity: Severity
    where: str
    cause: str
    remedy: str
    recipe: str = ""
    allowed: bool = False

    @property
    def stops(self) -> bool:
        return self.severity == "error" and not self.allowed

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}; {self.remedy}" if self.where else f"{self.cause}; {self.remedy}"


@dataclass(frozen=True)
class Situation:
    """What the rules look at; what has a value for each source is empty where it is not known.

    Attributes:
        paths: of the training sources.
        sources: their facts.
        losses: theirs, with their settings.
        leaks: of each validation set.
        batch_size: rows of a global batch.
        epochs: passes over the data, a fraction where max_steps ends them.
        normalized: whether embeddings have length 1.
        backbone: hub id, or name of the folder.
        no_duplicates: whether batches are put together without texts that stand twice.
        by_label: for each source whether batches take some rows of each of their labels.
        left_out: for each source the rows of an epoch that no batch can hold, and what is told of them.
        steps: of each source in an epoch.
        prompts: for each source the keys of its text columns, each with its prompt.
        targets: for each source its columns score, label, score_1, ...
        score_ranges: for each source what its scores were mapped from, or None.
        asked_prompts: of each validation set that embeds negatives, by its name, the same.
    """

    paths: Sequence[str]
    sources: Sequence[SourceFacts]
    losses: Sequence[Loss]
    leaks: Sequence[LeakFacts]
    batch_size: int
    epochs: float
    normalized: bool
    backbone: str
    no_duplicates: bool = False
    by_label: Sequence[bool] = ()
    left_out: Sequence[tuple[int, str]] = ()
    steps: Sequence[int] = ()
    prompts: Sequence[Prompts] = ()
    targets: Sequence[Sequence[str]] = ()
    score_ranges: Sequence[Optional[tuple[float, float]]] = ()
    asked_prompts: Mapping[str, Prompts] = field(default_factory=dict)

    def each(self) -> Iterator[tuple[str, SourceFacts]]:
        """Path and facts of the sources."""
        return zip(self.paths, self.sources, strict=True)

    def judged(self) -> Iterator[tuple[str, SourceFacts, Loss]]:
        """The same, with the loss of each."""
        return zip(self.paths, self.sources, self.losses, strict=True)

    def scored(self) -> Iterator[tuple[str, SourceFacts, ScoreFacts, Loss]]:
        """The sources whose scores their loss wants."""
        for path, facts, loss in self.judged():
            if facts.scores is not None and "scores" in loss.needs:
                yield path, facts, facts.scores, loss

    def classed(self) -> Iterator[tuple[str, SourceFacts, LabelFacts, Loss]]:
        """The sources whose classes their loss wants."""
        for path, facts, loss in self.judged():
            if facts.labels is not None and "labels" in loss.needs:
                yield path, facts, facts.labels, loss

    def taught(self) -> Iterator[tuple[str, SourceFacts, MarginFacts, Loss]]:
        """The sources whose loss wants a teacher's scores of the candidates."""
        for path, facts, loss in self.judged():
            if facts.margins is not None and "candidate_scores" in loss.needs:
                yield path, facts, facts.margins, loss

    def lengths_are_one(self, whole: Loss) -> dict[Loss, bool]:
        """For each part of a loss whether its embeddings have length 1: Matryoshka scales what it cuts, whatever the
        backbone does."""
        scaled = {part for one in whole.parts() if isinstance(one, Matryoshka) for part in one.parts()}
        return {part: self.normalized or part in scaled for part in whole.parts()}


def name_of(loss: Loss) -> str:
    return type(loss).__name__
