"""Rules on rows and texts: how many, how often, in which language, and what validation shares with training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from trainer.check.finding import Finding, Prompts, Situation, name_of
from trainer.data.columnfacts import ColumnFacts
from trainer.data.facts import SourceFacts
from trainer.losses import Loss

# Seen with right tokenizers (stsb, jsts, tanaka): below 2 % and 1.05; with wrong ones (amharic, korsts): 88 % and 1.8.
MOSTLY_UNKNOWN, SOME_UNKNOWN, FRAGMENTED = 0.5, 0.05, 1.3
_PER_CENT = 0.01
_FEW_NEGATIVES = 7


def few_rows_many_epochs(situation: Situation) -> Iterator[Finding]:
    num_rows = sum(facts.num_rows for facts in situation.sources)
    if situation.epochs >= 10 and num_rows < 1000:
        yield Finding(
            "few_rows_many_epochs", "error" if situation.epochs >= 20 and num_rows < 100 else "warning", "",
            f"{num_rows:,} rows are seen {situation.epochs:g} times each: the model learns them by heart",
            "gather more rows, or stop earlier",
            "trainer:\n  max_epochs: 3",
        )  # fmt: skip


def batch_over_rows(situation: Situation) -> Iterator[Finding]:
    for path, facts in situation.each():
        if facts.num_rows < situation.batch_size:
            yield Finding(
                "batch_over_rows", "warning", path,
                f"{facts.num_rows} rows are fewer than data.batch_size {situation.batch_size}: each epoch takes one "
                f"short step of {facts.num_rows} rows",
                "lower data.batch_size, or gather more rows",
            )  # fmt: skip


def bad_rows_skipped(situation: Situation) -> Iterator[Finding]:
    for path, facts in situation.each():
        if facts.num_skipped:
            yield Finding(
                "bad_rows_skipped", "warning", path,
                f"{facts.num_skipped:,} bad rows are left out (on_bad_row: skip)", "mend them",
            )  # fmt: skip


def false_negatives(situation: Situation) -> Iterator[Finding]:
    for path, facts, loss in situation.judged():
        rows = min(situation.batch_size, facts.num_rows)
        expected = facts.clash_share * rows * (rows - 1)
        if loss.in_batch_negatives and not (_masks(loss) or situation.no_duplicates) and expected >= _PER_CENT * rows:
            yield Finding(
                "false_negatives", "warning", path,
                f"in a batch of {rows} rows {expected:.1f} times a row is punished for what another row calls right, "
                "because texts stand in several rows",
                "put batches together without them, or keep one row of each text", "data:\n  no_duplicates: true",
            )  # fmt: skip


def right_negatives(situation: Situation) -> Iterator[Finding]:
    for path, facts, _ in situation.judged():
        if facts.num_right_negatives >= max(1, _PER_CENT * facts.num_looked_at):
            yield Finding(
                "right_negatives", "warning", path,
                f"{facts.num_right_negatives:,} of {facts.num_looked_at:,} rows have their own anchor or positive as a "
                "negative: nothing tells the two apart",
                "leave these rows out, or mine their negatives anew (trainer mine)",
            )  # fmt: skip


def rows_without_place(situation: Situation) -> Iterator[Finding]:
    for (path, facts), (num_rows, told) in zip(situation.each(), situation.left_out, strict=bool(situation.left_out)):
        if num_rows >= _PER_CENT * facts.num_rows:
            yield Finding("rows_without_place", "warning", path, told, "gather more rows, or lower data.batch_size")


def untrained_source(situation: Situation) -> Iterator[Finding]:
    for (path, _), num_steps in zip(situation.each(), situation.steps, strict=False):
        if num_steps == 0:  # only of mixing weighted: the shares are the same in every epoch
            yield Finding(
                "untrained_source", "warning", path,
                f"none of the {sum(situation.steps):,} steps of an epoch takes its rows, for its weight is too small: "
                "the run never trains on it",
                "raise its weight, lower data.batch_size, or leave the source out",
            )  # fmt: skip


def unused_columns(situation: Situation) -> Iterator[Finding]:
    for path, facts in situation.each():
        used = [column.name for column in facts.columns if column.num_texts]
        if len(used) < len(facts.columns):
            num_negatives = sum(name.startswith("negative") for name in used)
            yield Finding(
                "unused_columns", "warning", path,
                f"no row has more than {num_negatives} negatives, but {len(facts.columns) - len(used)} more are "
                "embedded for each row, as placeholders",
                "lower max_negatives", f"data:\n  train:\n    - max_negatives: {max(1, num_negatives)}",
            )  # fmt: skip


def few_negatives(situation: Situation) -> Iterator[Finding]:
    for path, facts, loss in situation.judged():
        negatives = num_negatives(loss, facts, situation.batch_size)
        if negatives is None:
            continue
        right = facts.clash_share * (min(situation.batch_size, facts.num_rows) - 1)
        if negatives < _FEW_NEGATIVES:
            yield Finding(
                "few_negatives", "warning", path,
                f"a query has {negatives} negatives; {name_of(loss)} learns from many",
                "raise data.batch_size; max_tokens bounds the memory", "data:\n  batch_size: 64",
            )  # fmt: skip
        elif _masks(loss) and not situation.no_duplicates and negatives - right < _FEW_NEGATIVES:
            yield Finding(
                "few_negatives", "warning", path,
                f"a query has {negatives - right:.3g} of {negatives} negatives, for {right:.3g} are right answers "
                f"whose texts stand in several rows; {name_of(loss)} learns from many",
                "map other columns to anchor and positive, or keep fewer rows of a text",
            )  # fmt: skip


def _masks(loss: Loss) -> bool:
    """Whether it leaves out the false negatives that texts tell."""
    return any(getattr(part, "mask_false_negatives", False) for part in loss.parts())


def num_negatives(loss: Loss, facts: SourceFacts, batch_size: int) -> int | None:
    """Texts that an anchor is told apart from in a full batch; None where the loss takes none from the batch."""
    if not loss.in_batch_negatives:
        return None
    rows = min(batch_size, facts.num_rows)
    candidates = sum(column.num_texts for column in facts.columns[1:]) / facts.num_looked_at  # of a row, on average
    return round(rows * candidates) - 1


def duplicate_rows(situation: Situation) -> Iterator[Finding]:
    for path, facts in situation.each():
        if facts.num_duplicates >= _PER_CENT * facts.num_looked_at:
            yield Finding(
                "duplicate_rows", "warning", path,
                f"{facts.num_duplicates:,} of {facts.num_looked_at:,} rows say the same as another row",
                "leave them out",
            )  # fmt: skip


# -- texts ------------------------------------------------------------------------------------------------


def unknown_pieces(situation: Situation) -> Iterator[Finding]:
    for path, facts in situation.each():
        most = max(column.unknown_share for column in facts.columns)
        if most >= SOME_UNKNOWN:
            told = [column for column in facts.columns if column.unknown_share >= 0.005]  # else it would say 0%
            shares = _listed(told, lambda column: f"{column.unknown_share:.0%} of the pieces")
            yield Finding(
                "unknown_pieces", "error" if most >= MOSTLY_UNKNOWN else "warning", path,
                f"the tokenizer of '{situation.backbone}' does not know {shares}: the model can't read them",
                "take a backbone that was trained on this language", _MULTILINGUAL,
            )  # fmt: skip


def unlike_prompts(situation: Situation) -> Iterator[Finding]:
    for (path, _, loss), prompts in zip(situation.judged(), situation.prompts, strict=bool(situation.prompts)):
        if loss.in_batch_negatives or "teacher" not in loss.needs:  # who imitates a teacher tells no texts apart
            yield from _unlike_prompts(path, prompts, f"{name_of(loss)} need not read the texts", "train")
    for name, prompts in situation.asked_prompts.items():
        yield from _unlike_prompts(name, prompts, "its metrics say little of the texts", "validation")


def _unlike_prompts(where: str, prompts: Prompts, so: str, key: str) -> Iterator[Finding]:
    positive, of_positive = next(((name, p) for name, p in prompts if name.startswith("positive")), ("", ""))
    negative, of_negative = next(
        ((name, p) for name, p in prompts if name.startswith("negative") and p != of_positive), ("", of_positive)
    )
    if of_negative != of_positive:
        yield Finding(
            "unlike_prompts", "error", where,
            f"{_prompt(positive, of_positive)}, {_prompt(negative, of_negative)}: the prompt alone tells right from "
            f"wrong, and {so}",
            "give both the same prompt",
            f"data:\n  {key}:\n    - prompts: {{anchor: ..., {positive}: ..., {negative}: ...}}",
        )  # fmt: skip


def _prompt(column: str, prompt: str) -> str:
    return f"'{column}' has the prompt '{prompt[:40]}'" if prompt else f"'{column}' has no prompt"


def fragmented_texts(situation: Situation) -> Iterator[Finding]:
    for path, facts in situation.each():
        known = max(column.unknown_share for column in facts.columns) < SOME_UNKNOWN
        if known and max(column.pieces_per_character for column in facts.columns) >= FRAGMENTED:
            shares = _listed(facts.columns, lambda column: f"{column.pieces_per_character:.1f} pieces a character")
            yield Finding(
                "fragmented_texts", "warning", path,
                f"the tokenizer of '{situation.backbone}' breaks the texts into {shares}: it was not made for this "
                "language",
                "take a backbone that was trained on it", _MULTILINGUAL,
            )  # fmt: skip


def _listed(columns: Sequence[ColumnFacts], tell: Callable[[ColumnFacts], str]) -> str:
    """``tell`` of each column with its name and scripts."""
    scripts = [", ".join(list(column.scripts)[:3]) or "no letters" for column in columns]
    told = [f"{tell(c)} in '{c.name}' ({s})" for c, s in zip(columns, scripts, strict=True)]
    return " and ".join(told)


_MULTILINGUAL = "model:\n  encoder: {backbone: sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2}"


def truncated_texts(situation: Situation) -> Iterator[Finding]:
    for path, facts in situation.each():
        for column in facts.columns:
            share = column.num_truncated / max(1, column.num_texts)
            if share >= _PER_CENT:
                yield Finding(
                    "truncated_texts", "warning", path,
                    f"{column.num_truncated} of {column.num_texts} texts of column '{column.name}' ({share:.1%}) "
                    f"are longer than max_length {column.max_length} and lose their end",
                    "raise it (max_lengths of the source, or model.encoder.max_length) as far as the backbone goes, or "
                    "split the texts",
                )  # fmt: skip


# -- validation -------------------------------------------------------------------------------------------


def leak(situation: Situation) -> Iterator[Finding]:
    for facts in situation.leaks:
        if facts.num_known_rows:
            share = facts.num_known_rows / facts.num_rows
            yield Finding(
                "leak", "error" if share >= 0.5 else "warning", facts.name,
                f"{facts.num_known_rows:,} of {facts.num_rows:,} validation {facts.unit} ({share:.1%}) "
                f"{'are training rows' if facts.unit == 'rows' else 'stand in training'} too: "
                "its metrics measure memory",
                "take them out of the training set",
            )  # fmt: skip


def no_validation(situation: Situation) -> Iterator[Finding]:
    if not situation.leaks:
        yield Finding(
            "no_validation", "warning", "",
            "there is no validation set: nothing says which checkpoint is the best, or whether training helps",
            "keep some rows out of the training set",
            "data:\n  validation:\n    - {name: dev, path: dev.jsonl.gz, columns: {...}, evaluator: STS}",
        )  # fmt: skip
