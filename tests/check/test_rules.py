"""Each rule: facts that it names, with the text, and the nearest facts that it lets pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from trainer.check.finding import Finding, Situation
from trainer.check.rules import RULES, findings, refuse_unknown
from trainer.data.columnfacts import ColumnFacts
from trainer.data.facts import LabelFacts, MarginFacts, ScoreFacts, SourceFacts
from trainer.data.leaks import LeakFacts
from trainer.losses import (
    BatchHardTriplet,
    Contrastive,
    CoSENT,
    CosineSimilarity,
    DistillKLDiv,
    EmbedDistill,
    GISTEmbed,
    InfoNCE,
    Loss,
    MarginMSE,
    Matryoshka,
    SigLIP,
    Softmax,
    Triplet,
    WeightedSum,
)

COLUMN = ColumnFacts("anchor", 1000, 5, 12, 30, 70, [1, 2], 0, 0.01, 0.3, {"Latin": 1.0}, 1000, 128)
SCORES = ScoreFacts(0.0, 1.0, [0.2, 0.5, 0.8], 40, None)
LABELS = LabelFacts(0, 1, 2, 400, 600, 0, 0.52, {"0": 400, "1": 600})
CLEAN = SourceFacts(1000, 1000, 0, [COLUMN, replace(COLUMN, name="positive")], 0, 0.0, None, None)


def look(loss: Loss, facts: SourceFacts = CLEAN, leak: LeakFacts | None = None, **settings: Any) -> list[Finding]:
    leaks = [leak or LeakFacts("dev", 100, 200, 0, 5)]
    values = {"batch_size": 16, "epochs": 2.0, "normalized": True, "backbone": "base", **settings}
    return findings(Situation(["x.jsonl"], [facts], [loss], **{"leaks": leaks, **values}))


def classes(*counts: int) -> LabelFacts:
    single, rows = sum(count == 1 for count in counts), sum(counts)
    pairs = sum(count * (count - 1) for count in counts) / (rows * (rows - 1))
    return LabelFacts(0, len(counts) - 1, len(counts), min(counts), max(counts), single, pairs, None)


def scores(*values: float) -> SourceFacts:
    counts = {f"{value:g}": 10 for value in values}
    return replace(CLEAN, scores=ScoreFacts(min(values), max(values), [0.0] * 3, len(values), counts))


def margins(low: float, high: float, is_constant: bool = False) -> SourceFacts:
    return replace(CLEAN, margins=MarginFacts(low, high, is_constant))


def negatives(*num_texts: int) -> list[ColumnFacts]:
    return [replace(COLUMN, name=f"negative_{i + 1}", num_texts=count) for i, count in enumerate(num_texts)]


TEXTS = replace(CLEAN, columns=[COLUMN])


def column(**changes: Any) -> SourceFacts:
    return replace(CLEAN, columns=[replace(COLUMN, **changes), COLUMN])


# rule: (finding's severity, its text, arguments that it names, arguments near by that it does not)
CASES: dict[str, list[tuple[str, str, dict[str, Any], dict[str, Any]]]] = {
    "constant_labels": [
        (
            "error",
            "x.jsonl: all 1,000 scores are 1: CosineSimilarity has nothing to tell apart",
            {"loss": CosineSimilarity(), "facts": scores(1.0)},
            {"loss": InfoNCE(), "facts": scores(1.0)},
        ),
        ("error", "CoSENT has nothing", {"loss": CoSENT(), "facts": scores(0.5)}, {"loss": CoSENT()}),
        (
            "error",
            "in all 1,000 rows the teacher scores the negatives like the positive: DistillKLDiv has nothing to tell",
            {"loss": DistillKLDiv(), "facts": margins(0.0, 0.0, True)},
            {"loss": InfoNCE(), "facts": margins(0.0, 0.0, True)},
        ),
        (
            "warning",
            "the margins of the teacher are the same in all 1,000 rows (2 to 5)",
            {"loss": MarginMSE(), "facts": margins(2.0, 5.0, True), "normalized": False},
            {"loss": MarginMSE(), "facts": margins(2.0, 5.0), "normalized": False},
        ),
    ],
    "label_range": [
        (
            "error",
            "x.jsonl: scores go from 0 to 2, but CosineSimilarity reaches -1 to 1; they look like classes: "
            "0 (10 rows), 1 (10 rows), 2 (10 rows)",
            {"loss": CosineSimilarity(), "facts": scores(0, 1, 2)},
            {"loss": CosineSimilarity(), "facts": scores(-1, 0, 1)},
        ),
        (
            "error",
            "scores go from 0 to 4.5, but CosineSimilarity reaches -1 to 1; map them to 0..1",
            {"loss": CosineSimilarity(), "facts": scores(0, 1, 4.5)},
            {"loss": CoSENT(), "facts": scores(0, 1, 4.5)},  # a ranking has no range
        ),
        (
            "warning",
            "CoSENT takes the scores as similarities; they look like classes",
            {"loss": CoSENT(), "facts": scores(0, 1, 2)},
            {"loss": CoSENT(), "facts": scores(0, 1)},
        ),
        (
            "error",
            "the margins of the teacher go from -2.5 to 9, but MarginMSE reaches -2 to 2: cosines differ by no more, "
            "nor do dot products of embeddings of length 1; divide the teacher's scores by 5 or more",
            {"loss": MarginMSE("cosine"), "facts": margins(-2.5, 9.0), "normalized": False},
            {"loss": MarginMSE("cosine"), "facts": margins(-2.0, 2.0), "normalized": False},
        ),
        (
            "error",
            "go from 1 to 9, but MarginMSE reaches",
            {"loss": MarginMSE("dot"), "facts": margins(1.0, 9.0)},
            {"loss": MarginMSE("dot"), "facts": margins(1.0, 9.0), "normalized": False},
        ),
        (
            "warning",
            "score_range is 0 to 5, but the highest score is 0.98: they may be 0 to 1 as they are, and "
            "CosineSimilarity gets none above 0.2; leave score_range out",
            {"loss": CosineSimilarity(), "facts": scores(0.0, 0.1, 0.196), "score_ranges": [(0.0, 5.0)]},
            {"loss": CosineSimilarity(), "facts": scores(0.0, 0.1, 0.204), "score_ranges": [(0.0, 5.0)]},
        ),
        (  # -1 to 1 and 0 to 1 say what they are
            "warning",
            "score_range is 0 to 100, but the highest score is 1",
            {"loss": CoSENT(), "facts": scores(0.0, 0.004, 0.01), "score_ranges": [(0.0, 100.0)]},
            {"loss": CoSENT(), "facts": scores(0.5, 0.6, 0.9), "score_ranges": [(-1.0, 1.0)]},
        ),
        (  # a distribution has no range, whatever its scores
            "error",
            "go from 1 to 9, but MarginMSE reaches",
            {"loss": Matryoshka(MarginMSE("dot"), [8]), "facts": margins(1.0, 9.0), "normalized": False},
            {"loss": DistillKLDiv(), "facts": margins(1.0, 9.0)},
        ),
    ],
    "unused_targets": [
        (
            "warning",
            "x.jsonl: InfoNCE does not read score and label: what stands there is not learnt; leave it out of columns",
            {"targets": [["score", "label"]]},
            {"targets": [[]]},
        ),
        (
            "warning",
            "CoSENT does not read label:",
            {"loss": CoSENT(), "targets": [["score", "label"]]},
            {"loss": WeightedSum([CoSENT(), Softmax(2)]), "targets": [["score", "label"]]},
        ),
        (
            "warning",
            "MarginMSE does not read score:",
            {"loss": MarginMSE(), "targets": [["score", "score_1", "score_2"]]},
            {"loss": Matryoshka(MarginMSE(), [8]), "targets": [["score"]]},
        ),
        (
            "warning",
            "InfoNCE does not read label:",
            {"targets": [["label"]], "by_label": [False]},
            {"targets": [["label"]], "by_label": [True]},
        ),
    ],
    "no_low_scores": [
        (
            "warning",
            "no pair scores below 0.5: nothing is pushed far apart",
            {"loss": CosineSimilarity(), "facts": scores(0.5, 0.75, 1.0)},
            {"loss": CoSENT(), "facts": scores(0.5, 0.75, 1.0)},
        )
    ],
    "single_class": [
        (
            "error",
            "all 1,000 rows have the label 0: BatchHardTriplet has no other class to tell them from",
            {"loss": BatchHardTriplet(1.0), "facts": replace(TEXTS, labels=classes(81))},
            {"loss": BatchHardTriplet(1.0), "facts": replace(TEXTS, labels=classes(80, 2))},
        ),
        (
            "error",
            "each of the 3 classes has one text: BatchHardTriplet has no positives",
            {"loss": BatchHardTriplet(1.0), "facts": replace(TEXTS, labels=classes(1, 1, 1))},
            {"loss": Softmax(), "facts": replace(CLEAN, labels=classes(1, 1, 1))},
        ),
    ],
    "imbalanced_classes": [
        (
            "warning",
            "the largest of 3 classes has 90 rows, the smallest 1, 1 have one row",
            {"loss": Softmax(), "facts": replace(CLEAN, labels=classes(90, 30, 1))},
            {"loss": Softmax(), "facts": replace(CLEAN, labels=classes(90, 30, 10))},
        )
    ],
    "unreachable_margin": [
        (
            "warning",
            "BatchHardTriplet asks for a margin of 5, but these distances are at most 2",
            {"loss": BatchHardTriplet(5.0), "facts": replace(TEXTS, labels=LABELS)},
            {"loss": BatchHardTriplet(5.0), "facts": replace(TEXTS, labels=LABELS), "normalized": False},
        ),
        (
            "warning",
            "a margin of 2, but",
            {"loss": BatchHardTriplet(2.0, "cosine"), "normalized": False},
            {"loss": BatchHardTriplet(1.9, "cosine")},
        ),
        (
            "warning",
            "Contrastive asks for a margin of 3, but these distances are at most 2",
            {"loss": WeightedSum([InfoNCE(), Contrastive(3.0)])},
            {"loss": Contrastive(3.0, "manhattan")},
        ),
        (
            "warning",
            "Triplet asks for a margin of 5",
            {"loss": Matryoshka(Triplet(5.0), [8])},
            {"loss": BatchHardTriplet("soft")},
        ),
        (  # scaled to length 1 by Matryoshka, not by the backbone; a sum beside it is not
            "warning",
            "Triplet asks for a margin of 5, but these distances are at most 2",
            {"loss": WeightedSum([Matryoshka(WeightedSum([Triplet(5.0)]), [8]), InfoNCE()]), "normalized": False},
            {"loss": WeightedSum([Matryoshka(InfoNCE(), [8]), Triplet(5.0)]), "normalized": False},
        ),
    ],
    "few_rows_many_epochs": [
        (
            "error",
            "7 rows are seen 50 times each: the model learns them by heart",
            {"loss": CosineSimilarity(), "facts": replace(scores(0, 1), num_rows=7), "epochs": 50.0},
            {"loss": CosineSimilarity(), "facts": replace(scores(0, 1), num_rows=7), "epochs": 3.0},
        ),
        ("warning", "500 rows are seen 10", {"facts": replace(CLEAN, num_rows=500), "epochs": 10.0}, {"epochs": 10.0}),
    ],
    "batch_over_rows": [
        (
            "warning",
            "x.jsonl: 5 rows are fewer than data.batch_size 8: each epoch takes one short step of 5 rows",
            {"facts": replace(CLEAN, num_rows=5), "batch_size": 8},
            {"facts": replace(CLEAN, num_rows=8), "batch_size": 8},
        )
    ],
    "bad_rows_skipped": [
        ("warning", "3 bad rows are left out (on_bad_row: skip)", {"facts": replace(CLEAN, num_skipped=3)}, {})
    ],
    "false_negatives": [
        (
            "warning",
            "in a batch of 16 rows 2.4 times a row is punished for what another row calls right",
            {"facts": replace(CLEAN, clash_share=0.01), "loss": InfoNCE(mask_false_negatives=False)},
            {"facts": replace(CLEAN, clash_share=0.01, scores=SCORES), "loss": CosineSimilarity()},
        ),
        (
            "warning",
            "put batches together without them",
            {"facts": replace(CLEAN, clash_share=0.01), "loss": InfoNCE(mask_false_negatives=False)},
            {"facts": replace(CLEAN, clash_share=0.01), "no_duplicates": True},
        ),
        (
            "warning",
            "put batches together without them",
            {"facts": replace(CLEAN, clash_share=0.01), "loss": InfoNCE(mask_false_negatives=False)},
            {"facts": replace(CLEAN, clash_share=0.01), "loss": InfoNCE()},
        ),
    ],
    "right_negatives": [
        (
            "warning",
            "10 of 1,000 rows have their own anchor or positive as a negative: nothing tells the two apart",
            {"facts": replace(CLEAN, num_right_negatives=10)},
            {"facts": replace(CLEAN, num_right_negatives=9)},
        ),
    ],
    "rows_without_place": [
        (
            "warning",
            "x.jsonl: 10 rows find no place; gather more rows, or lower data.batch_size",
            {"left_out": [(10, "10 rows find no place")]},
            {"left_out": [(9, "9 rows find no place")]},
        )
    ],
    "untrained_source": [
        (
            "warning",
            "x.jsonl: none of the 32 steps of an epoch takes its rows, for its weight is too small",
            {"steps": [0, 32]},
            {"steps": [1, 31]},
        )
    ],
    "unused_columns": [
        (
            "warning",
            "no row has more than 1 negatives, but 2 more are embedded for each row",
            {"facts": replace(CLEAN, columns=[*CLEAN.columns, *negatives(1000, 0, 0)])},
            {"facts": replace(CLEAN, columns=[*CLEAN.columns, *negatives(1000, 500, 1)])},
        )
    ],
    "few_positives": [
        (
            "warning",
            "in a random batch of 16 rows 87% of the rows have no other row of their label (100 classes)",
            {"loss": BatchHardTriplet(1.0), "facts": replace(TEXTS, labels=classes(*[10] * 100), num_rows=1000)},
            {"loss": BatchHardTriplet(1.0), "facts": replace(TEXTS, labels=classes(*[10] * 5))},
        ),
        (
            "warning",
            "let batches take some rows of each of their labels",
            {"loss": BatchHardTriplet(1.0), "facts": replace(TEXTS, labels=classes(*[10] * 100))},
            {"loss": BatchHardTriplet(1.0), "facts": replace(TEXTS, labels=classes(*[10] * 100)), "by_label": [True]},
        ),
    ],
    "few_negatives": [
        ("warning", "a query has 3 negatives; InfoNCE learns from many", {"batch_size": 4}, {"batch_size": 8}),
        (
            "warning",
            "a query has 0 of 15 negatives, for 15 are right answers whose texts stand in several rows; InfoNCE learns",
            {"facts": replace(CLEAN, clash_share=1.0)},
            {"facts": replace(CLEAN, clash_share=1.0), "loss": InfoNCE(mask_false_negatives=False)},
        ),
        (
            "warning",
            "a query has 4.5 of 15 negatives, for 10.5 are right answers",
            {"facts": replace(CLEAN, clash_share=0.7), "loss": Matryoshka(SigLIP(), [8])},
            {"facts": replace(CLEAN, clash_share=0.5), "loss": Matryoshka(SigLIP(), [8])},
        ),
    ],
    "duplicate_rows": [
        (
            "warning",
            "20 of 1,000 rows say the same as another row",
            {"facts": replace(CLEAN, num_duplicates=20)},
            {"facts": replace(CLEAN, num_duplicates=9)},
        )
    ],
    "unknown_pieces": [
        (
            "error",
            "the tokenizer of 'base' does not know 89% of the pieces in 'anchor' (Ethiopic) and 1% of the pieces in "
            "'anchor' (Latin): the model can't read them",
            {"facts": column(unknown_share=0.89, scripts={"Ethiopic": 1.0})},
            {"facts": column(unknown_share=0.04)},
        ),
        ("warning", "does not know 10% of the pieces", {"facts": column(unknown_share=0.1)}, {}),
        (
            "warning",
            "does not know 10% of the pieces in 'anchor' (Latin): the model",
            {"facts": replace(CLEAN, columns=[replace(COLUMN, unknown_share=s) for s in (0.1, 0.004)])},
            {},
        ),
    ],
    "fragmented_texts": [
        (
            "warning",
            "the tokenizer of 'base' breaks the texts into 1.8 pieces a character in 'anchor' (Hangul)",
            {"facts": column(pieces_per_character=1.8, scripts={"Hangul": 1.0})},
            {"facts": column(pieces_per_character=1.1, scripts={"Han": 1.0})},
        )
    ],
    "truncated_texts": [
        (
            "warning",
            "50 of 1000 texts of column 'anchor' (5.0%) are longer than max_length 128 and lose their end",
            {"facts": column(num_truncated=50)},
            {"facts": column(num_truncated=9)},
        )
    ],
    "unlike_prompts": [
        (
            "error",
            "x.jsonl: 'positive' has the prompt 'p: ', 'negative' has no prompt: the prompt alone tells right from "
            "wrong, and InfoNCE need not read the texts; give both the same prompt",
            {"prompts": [[("anchor", "q: "), ("positive", "p: "), ("negative", "")]]},
            {"prompts": [[("anchor", "q: "), ("positive", "p: "), ("negative", "p: ")]]},
        ),
        (
            "error",
            "'positives' has no prompt, 'negative_2' has the prompt 'n: '",
            {"prompts": [[("anchor", ""), ("positives", ""), ("negative_1", ""), ("negative_2", "n: ")]]},
            {"prompts": [[("anchor", "q: "), ("positive", "p: ")]]},
        ),
        (
            "error",
            "GISTEmbed need not read the texts",
            {"loss": GISTEmbed(), "prompts": [[("anchor", ""), ("positive", "p: "), ("negative", "")]]},
            {"loss": EmbedDistill(), "prompts": [[("anchor", ""), ("positive", "p: "), ("negative", "")]]},
        ),
        (
            "error",
            "dev: 'positive' has the prompt 'p: ', 'negative' has no prompt: the prompt alone tells right from wrong, "
            "and its metrics say little of the texts",
            {"asked_prompts": {"dev": [("anchor", "q: "), ("positive", "p: "), ("negative", "")]}},
            {"asked_prompts": {"dev": [("anchor", "q: "), ("positive", ""), ("negative", "")]}},
        ),
    ],
    "leak": [
        (
            "error",
            "dev: 60 of 100 validation rows (60.0%) are training rows too: its metrics measure memory",
            {"leak": LeakFacts("dev", 100, 200, 60, 150)},
            {"leak": LeakFacts("dev", 100, 200, 0, 200)},  # known texts in new pairs
        ),
        ("warning", "2 of 100 validation rows (2.0%)", {"leak": LeakFacts("dev", 100, 200, 2, 5)}, {}),
        (
            "warning",
            "2 of 100 validation queries (2.0%) stand in training too",
            {"leak": LeakFacts("dev", 100, 200, 2, 5, "queries")},
            {},
        ),
    ],
    "no_validation": [("warning", "there is no validation set", {"leaks": []}, {})],
}


@pytest.mark.parametrize("name", [rule.__name__ for rule in RULES])
def test_rule(name: str) -> None:
    """Named like its finding; its recipe is YAML that names only keys of a config."""
    for severity, text, arguments, near in CASES[name]:
        (found,) = [finding for finding in look(**{"loss": InfoNCE(), **arguments}) if finding.name == name]
        assert found.severity == severity
        assert text in str(found)
        assert found.remedy
        recipe = yaml.safe_load(found.recipe) or {}
        assert set(recipe) <= {"model", "data", "trainer"}
        assert name not in [finding.name for finding in look(**{"loss": InfoNCE(), **near})]


@pytest.mark.parametrize(
    ("loss", "facts"),
    [
        (InfoNCE(), CLEAN),
        (CosineSimilarity(), replace(CLEAN, scores=SCORES)),
        (CoSENT(), replace(CLEAN, scores=SCORES)),
        (Softmax(2), replace(CLEAN, labels=LABELS)),
        (BatchHardTriplet(0.3), replace(TEXTS, labels=LABELS)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_is_found_where_nothing_is_wrong(loss: Loss, facts: SourceFacts) -> None:
    assert look(loss, facts) == []


@pytest.mark.parametrize("by_label", [[True, False], [False, True]])
def test_two_sources_of_one_path_are_told_apart(by_label: list[bool]) -> None:
    facts = replace(TEXTS, labels=classes(*[10] * 100))
    situation = Situation(
        ["x.jsonl"] * 2, [facts] * 2, [BatchHardTriplet(1.0)] * 2, [], 16, 2.0, True, "base", by_label=by_label
    )
    assert [finding.name for finding in findings(situation)].count("few_positives") == 1


def test_errors_come_first() -> None:
    found = look(CosineSimilarity(), replace(scores(0, 1, 2), num_duplicates=500), leaks=[])
    assert [finding.severity for finding in found] == ["error", "warning", "warning"]


def test_a_name_that_no_rule_has() -> None:
    refuse_unknown(["leak", "label_range"])
    with pytest.raises(ValueError, match=r"'constant_label' is no finding. Did you mean 'constant_labels'\?"):
        refuse_unknown(["leak", "constant_label"])
    with pytest.raises(ValueError, match=r"check.allow: 'xyzzy' is no finding. There are: constant_labels, "):
        refuse_unknown(["xyzzy"])
