"""What is wrong with the data for this loss and this run: one small function for each finding, named like it.

A rule reads facts and what the loss declares of itself, never its name: it works for a loss it has not heard of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.check import labels, texts
from trainer.check.finding import Finding, Situation
from trainer.data.evalsource import EvalSource
from trainer.data.opaque import OpaqueStream
from trainer.data.sources import Source
from trainer.data.streaming import StreamedTable
from trainer.data.table import TokenTable
from trainer.losses import Loss
from trainer.messages import did_you_mean

RULES = (
    labels.constant_labels,
    labels.label_range,
    labels.single_class,
    texts.few_rows_many_epochs,
    texts.unknown_pieces,
    texts.unlike_prompts,
    texts.leak,
    labels.unused_targets,
    labels.no_low_scores,
    labels.imbalanced_classes,
    labels.few_positives,
    labels.unreachable_margin,
    texts.batch_over_rows,
    texts.bad_rows_skipped,
    texts.false_negatives,
    texts.right_negatives,
    texts.rows_without_place,
    texts.untrained_source,
    texts.unused_columns,
    texts.few_negatives,
    texts.duplicate_rows,
    texts.fragmented_texts,
    texts.truncated_texts,
    texts.no_validation,
)

# Targets of a loss -> the columns that any of them comes from; what is not here comes from elsewhere.
_COLUMNS_OF = {"scores": ("score",), "labels": ("label",), "candidate_scores": ("score_1", "score")}


def findings(situation: Situation) -> list[Finding]:
    """All of them, errors first."""
    found = [finding for rule in RULES for finding in rule(situation)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def refuse_unknown(names: Sequence[str]) -> None:
    """Raises ValueError for a name that no rule has."""
    known = [rule.__name__ for rule in RULES]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f" There are: {', '.join(known)}"
            raise ValueError(f"check.allow: '{name}' is no finding.{hint}")


def unfit_validation(source: EvalSource) -> Iterator[Finding]:
    """Columns that the evaluator lacks: the run would stop at its first evaluation."""
    missing = source.missing_columns
    if missing:
        kind = type(source.evaluator).__name__
        columns = "columns" if len(missing) > 1 else "column"
        cause = f"{kind} needs {columns} {', '.join(missing)}, {source.path} has {', '.join(source.canonical_columns)}"
        remedy = "map it in data.validation columns, or choose another evaluator"
        yield Finding("unfit_columns", "error", source.name, cause, remedy)


def unfit_columns(loss: Loss, source: Source, table: TokenTable | StreamedTable | OpaqueStream) -> Iterator[Finding]:
    """Columns that the loss does not take, columns it lacks or that contradict each other, classes it has no place for:
    no run can start so."""
    name, low, high = type(loss).__name__, loss.min_columns, loss.max_columns

    def finding(cause: str, remedy: str) -> Finding:
        return Finding("unfit_columns", "error", "", cause, remedy)

    found = f"{source.path} has {', '.join(sorted(source.columns))}"
    if len(table.columns) < low or (high is not None and len(table.columns) > high):
        wanted = f"{low}" if high == low else f"{low} or more" if high is None else f"{low} to {high}"
        columns = "text column" if wanted == "1" else "text columns"
        yield finding(f"{name} takes {wanted} {columns}, {found}", "change data.train columns")
    positive = source.columns.get("positive", source.columns.get("positives"))
    for key, column in source.columns.items():
        if key.startswith("negative") and str(column) == str(positive):
            yield finding(
                f"{source.path} maps {key} to '{column}', the column of its positives: each text would be pulled and "
                "pushed",
                "map another column in data.train columns, or leave it out",
            )
    for need in sorted(loss.needs & _COLUMNS_OF.keys()):
        if not any(column in source.columns for column in _COLUMNS_OF[need]):
            wanted = " or ".join(f"'{column}'" for column in _COLUMNS_OF[need])
            yield finding(f"{name} needs a column {wanted}, {found}", "map it in data.train columns")
    num_candidates, num_scores = len(table.columns) - 1, len(source.candidate_scores) or int("score" in source.columns)
    for part in loss.parts() if num_scores else ():
        taken = part.scores_taken(num_candidates)
        if taken is not None and num_scores not in taken:
            yield finding(
                f"{type(part).__name__} takes {' or '.join(map(str, taken))} scores a row beside {num_candidates} "
                f"candidates, {source.path} has {num_scores}",
                "map score_1, score_2, ... in data.train columns",
            )
    if source.may_lack_texts and not loss.absent_texts:
        yield finding(
            f"{name} takes rows that have all texts, but those of {source.path} may lack some negatives",
            "name negative, negative_1, ... in data.train columns, or learn from in-batch negatives (InfoNCE)",
        )
    num_labels, labels = loss.num_labels, table.labels
    if num_labels is not None and labels is not None:
        low_label, high_label = int(labels.min()), int(labels.max())
        if low_label < 0 or high_label >= num_labels:
            yield finding(
                f"{source.path} has labels {low_label} to {high_label}, but {name} has {num_labels} classes 0 to "
                f"{num_labels - 1}",
                "set num_labels or a label_map" if "num_labels" in vars(loss) else "set a label_map",
            )
