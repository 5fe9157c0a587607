"""Rules on scores and classes: what the loss can learn from them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainer.check.finding import INFONCE, Finding, Severity, Situation, name_of
from trainer.data.facts import ScoreFacts

_ROUNDED = 1e-5  # what float32 may lose of a score of 1 on its way to 0..1 and back


def constant_labels(situation: Situation) -> Iterator[Finding]:
    for path, facts, scores, loss in situation.scored():
        if scores.num_distinct == 1:
            yield Finding(
                "constant_labels", "error", path,
                f"all {facts.num_rows:,} scores are {scores.min:g}: {name_of(loss)} has nothing to tell apart, "
                "and embeddings that are all equal are its best answer (collapse)",
                "give scores that differ, or, where these are pairs that belong together, learn from in-batch "
                "negatives",
                INFONCE + "\ndata:\n  batch_size: 64",
            )  # fmt: skip
    for path, facts, margins, loss in situation.taught():
        if margins.min == margins.max == 0.0:
            yield Finding(
                "constant_labels", "error", path,
                f"in all {facts.num_rows:,} rows the teacher scores the negatives like the positive: {name_of(loss)} "
                "has nothing to tell apart, and embeddings that are all equal are its best answer (collapse)",
                "map other columns to score_1, score_2, ..., or learn without a teacher, from in-batch negatives",
                INFONCE + "\ndata:\n  batch_size: 64",
            )  # fmt: skip
        elif margins.is_constant:
            told = f"{margins.min:g}" + (f" to {margins.max:g}" if margins.max > margins.min else "")
            yield Finding(
                "constant_labels", "warning", path,
                f"the margins of the teacher are the same in all {facts.num_rows:,} rows ({told}): they tell no row "
                "from another",
                "map the columns of the teacher's scores to score_1, score_2, ...",
            )  # fmt: skip


def label_range(situation: Situation) -> Iterator[Finding]:
    for path, facts, scores, loss in situation.scored():
        classes = _classes(scores)
        reach = loss.score_range
        if reach is not None and (scores.min < reach[0] or scores.max > reach[1]):
            cause = (
                f"scores go from {scores.min:g} to {scores.max:g}, but {name_of(loss)} reaches "
                f"{reach[0]:g} to {reach[1]:g}"
            )
        elif reach is None and classes and len(classes) == 3:  # 0 and 1 may be a score; 0, 1, 2 is NLI's
            cause = f"{name_of(loss)} takes the scores as similarities"
        else:
            continue
        severity: Severity = "error" if reach is not None else "warning"
        if classes:
            text = ", ".join(f"{value:g} ({facts.scores.counts[f'{value:g}']:,} rows)" for value in classes)  # type: ignore[union-attr,index]
            yield Finding(
                "label_range", severity, path,
                f"{cause}; they look like classes: {text}",
                "name the column label and learn classes, or say with a label_map how similar each class is",
                f"model:\n  loss: {{class_path: Softmax, init_args: {{num_labels: {len(classes)}}}}}\n"
                "data:\n  train:\n    - columns: {anchor: ..., positive: ..., label: ...}   # label in place of score",
            )  # fmt: skip
        else:
            yield Finding(
                "label_range", severity, path, cause, "map them to 0..1",
                f"data:\n  train:\n    - score_range: [{scores.min:g}, {scores.max:g}]   # lowest and highest there is",
            )  # fmt: skip
    for (path, facts, loss), span in zip(situation.judged(), situation.score_ranges, strict=False):
        if span is None or facts.scores is None or "scores" not in loss.needs:
            continue
        low, high = span
        lowest, highest = (low + score * (high - low) for score in (facts.scores.min, facts.scores.max))
        if -_ROUNDED <= lowest < highest <= 1.0 + _ROUNDED < high:
            yield Finding(
                "label_range", "warning", path,
                f"score_range is {low:g} to {high:g}, but the highest score is {highest:.3g}: they may be 0 to 1 as "
                f"they are, and {name_of(loss)} gets none above {facts.scores.max:.2g}",
                f"leave score_range out, if no score of this kind goes up to {high:g}",
            )  # fmt: skip
    for path, _, margins, loss in situation.taught():
        largest = max(-margins.min, margins.max)
        for part, is_one in situation.lengths_are_one(loss).items():
            limit = part.teacher_margin_limit(is_one)
            if limit is not None and largest > limit:
                yield Finding(
                    "label_range", "error", path,
                    f"the margins of the teacher go from {margins.min:g} to {margins.max:g}, but {name_of(part)} "
                    f"reaches -{limit:g} to {limit:g}: cosines differ by no more, nor do dot products of embeddings of "
                    "length 1",
                    f"divide the teacher's scores by {math.ceil(largest / limit):,} or more, or compare by similarity: "
                    "dot with model.encoder.normalize: false, and without Matryoshka",
                )  # fmt: skip


def _classes(scores: ScoreFacts) -> list[float]:
    """The scores, where they look like class numbers 0, 1, ..., n; else none. Five and more are rather grades."""
    values = [float(value) for value in scores.counts or ()]
    return values if 2 <= len(values) <= 4 and values == list(range(len(values))) else []


def unused_targets(situation: Situation) -> Iterator[Finding]:
    by_label = situation.by_label or [False] * len(situation.paths)
    for path, targets, loss, planned in zip(
        situation.paths, situation.targets, situation.losses, by_label, strict=False
    ):
        read = {"label"} if planned or "labels" in loss.needs else set()
        if "candidate_scores" in loss.needs:  # score alone is the margin of one negative
            read |= {name for name in targets if name.startswith("score_")} or {"score"}
        if "scores" in loss.needs:
            read.add("score")
        if unused := [name for name in targets if name not in read]:
            yield Finding(
                "unused_targets", "warning", path,
                f"{name_of(loss)} does not read {' and '.join(unused)}: what stands there is not learnt",
                "leave it out of columns, or take a loss that reads it: Softmax or Contrastive a label, CoSENT a "
                "score, MarginMSE score_1, ...",
            )  # fmt: skip


def no_low_scores(situation: Situation) -> Iterator[Finding]:
    for path, _, scores, loss in situation.scored():
        if loss.score_range is not None and scores.num_distinct > 1 and 0.3 < scores.min <= 1.0:
            yield Finding(
                "no_low_scores", "warning", path,
                f"no pair scores below {scores.min:g}: nothing is pushed far apart",
                "add pairs that are not alike with scores near 0, or learn from in-batch negatives", INFONCE,
            )  # fmt: skip


# -- classes ----------------------------------------------------------------------------------------------


def single_class(situation: Situation) -> Iterator[Finding]:
    for path, facts, labels, loss in situation.classed():
        if labels.num_classes == 1:
            yield Finding(
                "single_class", "error", path,
                f"all {facts.num_rows:,} rows have the label {labels.min}: {name_of(loss)} has no other class "
                "to tell them from",
                "add texts of other classes; where none exist, pairs of texts that belong together teach more",
                INFONCE + "\ndata:\n  train:\n    - columns: {anchor: ..., positive: ...}",
            )  # fmt: skip
        elif loss.positives_by_label and labels.largest == 1:
            yield Finding(
                "single_class", "error", path,
                f"each of the {labels.num_classes:,} classes has one text: {name_of(loss)} has no positives",
                "give classes of several texts, or pairs",
                INFONCE + "\ndata:\n  train:\n    - columns: {anchor: ..., positive: ...}",
            )  # fmt: skip


def imbalanced_classes(situation: Situation) -> Iterator[Finding]:
    for path, _, labels, _ in situation.classed():
        if labels.num_classes > 1 and labels.largest >= 10 * labels.smallest:
            single = f", {labels.num_single:,} have one row" if labels.num_single else ""
            yield Finding(
                "imbalanced_classes", "warning", path,
                f"the largest of {labels.num_classes:,} classes has {labels.largest:,} rows, the smallest "
                f"{labels.smallest:,}{single}",
                "gather more of the small ones, or take fewer of the large ones",
            )  # fmt: skip


def few_positives(situation: Situation) -> Iterator[Finding]:
    is_planned = situation.by_label or [False] * len(situation.paths)
    for (path, facts, loss), planned in zip(situation.judged(), is_planned, strict=True):
        labels = facts.labels
        if labels is None or planned or not loss.positives_by_label or labels.largest == 1:
            continue
        # That none of the other rows of a random batch has the label of a row.
        share = (1.0 - labels.pair_share) ** (situation.batch_size - 1)
        if share > 0.1:
            yield Finding(
                "few_positives", "warning", path,
                f"in a random batch of {situation.batch_size} rows {share:.0%} of the rows have no other row of their "
                f"label ({labels.num_classes:,} classes): {name_of(loss)} learns nothing from those",
                "let batches take some rows of each of their labels",
                "data:\n  train:\n    - rows_per_label: 4   # data.batch_size / 4 labels in a batch",
            )  # fmt: skip


def unreachable_margin(situation: Situation) -> Iterator[Finding]:
    parts = {part: is_one for used in situation.losses for part, is_one in situation.lengths_are_one(used).items()}
    for loss, is_one in parts.items():
        limit = loss.margin_limit(is_one)
        margin = getattr(loss, "margin", None)
        if limit is not None and margin is not None and margin >= limit:
            yield Finding(
                "unreachable_margin", "warning", "",
                f"{name_of(loss)} asks for a margin of {margin:g}, but these distances are at most {limit:g}: no text "
                "ever counts as far enough",
                f"a margin well below {limit:g}",
                f"model:\n  loss: {{class_path: {name_of(loss)}, init_args: {{margin: {limit / 8:g}}}}}",
            )  # fmt: skip
