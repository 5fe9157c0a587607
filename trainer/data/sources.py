"""Rows of texts as a config names them, and what is refused of that before anything is read."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional, Union

from trainer.data.columns import is_position
from trainer.data.values import rule
from trainer.messages import did_you_mean

_TEXT = re.compile(r"text|anchor|positive|negative(_[1-9]\d*)?")
_CANDIDATE_SCORE = re.compile(r"score_[1-9]\d*")
_LISTS = ("positives", "negatives")
_KNOWN = (
    "text", "anchor", "positive", "negative", "negative_1", *_LISTS, "label", "score", "score_1", "group", "id",
)  # fmt: skip
# What columns are often called in the data -> the key that they go below.
_THEIRS = {
    **dict.fromkeys(("sentence1", "query", "question", "premise", "source", "english"), "anchor"),
    **dict.fromkeys(
        ("sentence2", "answer", "hypothesis", "passage", "document", "response", "target", "pos"), "positive"
    ),
    "neg": "negative",
}


@dataclass
class Source:
    """Rows of paired texts.

    Attributes:
        path: file, glob or folder of JSON lines, CSV, TSV, Parquet or Arrow (also .gz), or a hub data set id.
        columns: canonical name -> column in the data: its name, its position from 0, or a field inside it
            (translation.en, hits.0, passages.text). The first line of a CSV or TSV is its header, never a row. Texts
            are text, or anchor, positive, negative, negative_1, ...; lists of texts are positives (each makes a row)
            and negatives; targets are label (class number), score, score_1, score_2, ... (a teacher's of each
            candidate: scores.0, ...) and group (rows with the same value: the positive of one is no negative of
            another). id is kept beside the text, as text.
        score_range: lowest and highest score of the data, mapped linearly to 0..1; unset: left as they are.
        label_map: value in the data -> number; feeds score where columns has score, else label.
        split: of a hub data set, a saved DatasetDict, or a folder whose file names say train, dev, test.
        subset: configuration of a hub data set.
        revision: branch, tag or commit of a hub data set.
        on_bad_row: fail names the bad rows and stops, skip leaves them out and counts them.
        max_bad_rows: most rows that skip leaves out.
        where: column in the data (its name, or its position from 0, in quotes: "3") -> the value, the values, or the
            comparison ('>= 0.7') that a row must meet.
        triplets: [label of a positive, label of a negative]: the rows of one anchor, e.g. NLI's premise with its
            hypotheses, become triplets; columns names anchor, positive (both kinds) and label. Negatives take the
            prompt and the length of positive, unless negative has its own.
        holdout: share of the rows that a training source leaves out and a validation source of the same path keeps.
        holdout_by: text column whose hash decides, so that equal texts stay together; unset: the first.
        max_rows: most rows, drawn evenly over the whole source.
        max_negatives: most texts taken of a row's negatives, the first ones; a row may have fewer.
        prompts: text column -> what is put before each of its texts (query:, passage:); it is pooled like the text.
        rows_per_label: a batch takes so many rows of each of its labels, for losses whose positives are the rows of a
            label.
        max_lengths: text column -> pieces kept of each of its texts while training, special ones included (anchor: 64);
            unset: model.encoder.max_length.
        loss: which of model.losses trains on this source; unset: model.loss.
        weight: share of the steps under data.mixing weighted; elsewhere there is none.
        streaming: read while training instead of first. Parquet and Arrow files, here, on the hub or at an address of
            fsspec (s3://...), keep an order that resumes anywhere; other files are read from front to back.
    """

    path: str
    columns: dict[str, Union[int, str]]
    score_range: Optional[tuple[float, float]] = None
    label_map: Optional[dict[str, float]] = None
    split: str = "train"
    subset: Optional[str] = None
    revision: Optional[str] = None
    on_bad_row: Literal["fail", "skip"] = "fail"
    max_bad_rows: int = 100
    where: Optional[dict[Union[int, str], Union[list[Union[bool, int, float, str]], bool, int, float, str]]] = None
    triplets: Optional[tuple[Union[int, str], Union[int, str]]] = None
    holdout: float = 0.0
    holdout_by: Optional[str] = None
    max_rows: Optional[int] = None
    max_negatives: Optional[int] = 7
    prompts: Optional[dict[str, str]] = None
    rows_per_label: Optional[int] = None
    max_lengths: Optional[dict[str, int]] = None
    loss: Optional[str] = None
    keeps_holdout: ClassVar[bool] = False
    weight: float = 1.0
    streaming: bool = False

    def __post_init__(self) -> None:
        for name in self.columns:
            if not _TEXT.fullmatch(name) and name not in _KNOWN and not _CANDIDATE_SCORE.fullmatch(name):
                ours = _THEIRS.get(name.lower())
                hint = (
                    f" Keys are names of ours, values are columns of the data: write {ours}: {self.columns[name]}"
                    if ours
                    else did_you_mean(name, _KNOWN, cutoff=0.75)
                )
                raise ValueError(
                    f"{self.path}: columns has '{name}', which is none of text, anchor, positive, negative, "
                    f"negative_1, ..., positives, negatives, label, score, score_1, ..., group, id.{hint}"
                )
        expected = tuple(f"score_{number + 1}" for number in range(len(self.candidate_scores)))
        if self.candidate_scores != expected:
            raise ValueError(
                f"{self.path}: columns has {', '.join(self.candidate_scores)}; number them {', '.join(expected)}"
            )
        self._check_lists()
        texts = self.text_columns
        if texts != ("text",) and texts[:2] != ("anchor", "positive"):
            raise ValueError(
                f"{self.path}: columns must name either text, or anchor and positive (and negatives); "
                f"it names {', '.join(self.columns) or 'nothing'}"
            )
        if self.score_range is not None:
            low, high = self.score_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"{self.path}: score_range is {low:g}..{high:g}; write [lowest, highest]")
            if "score" not in self.columns:
                why = ", and score_1, ... are left on the teacher's scale" if self.candidate_scores else ""
                raise ValueError(
                    f"{self.path}: score_range maps the column score, which columns lacks{why}; it has "
                    f"{', '.join(self.columns)}: leave score_range out, or map score"
                )
        self._check_label_map()
        self._check_least(max_bad_rows=0, max_rows=1)
        if self.rows_per_label is not None:
            self._check_rows_per_label(self.rows_per_label)
        for values in (self.where or {}).values():
            rule(values)
        self._check_derivation()

    def _check_least(self, **least: int) -> None:
        for name, lowest in least.items():
            number = getattr(self, name)
            if number is not None and number < lowest:
                raise ValueError(f"{self.path}: {name} is {number}; it must be {lowest} or more")

    def _check_lists(self) -> None:
        for plural in self.lists:
            if single := [name for name in self.columns if name != plural and name.startswith(plural[:-1])]:
                raise ValueError(f"{self.path}: columns has {plural} and {single[0]}; name one of the two")
        self._check_least(max_negatives=1)
        if "negatives" not in self.columns and self.max_negatives not in (None, type(self).max_negatives):
            raise ValueError(
                f"{self.path}: max_negatives is {self.max_negatives}, which counts texts of the list negatives, and "
                f"columns has {', '.join(self.columns)}: leave it out; a column less is a negative less"
            )
        if "positives" in self.columns and self.targets:
            name = self.targets[0]
            raise ValueError(
                f"{self.path}: {name} does not go with positives, for that of a row would stand beside each of its "
                f"positives; write a row for each positive, with its {name.partition('_')[0]} and a group"
            )
        if "positives" in self.columns and self.streaming:
            raise ValueError(
                f"{self.path}: positives does not go with streaming: true, for rows are numbered before they are read; "
                "write a row for each positive, with a group, or set streaming: false"
            )

    def _check_rows_per_label(self, rows: int) -> None:
        if rows < 2:
            raise ValueError(f"{self.path}: rows_per_label is {rows}; a positive of a text takes 2 rows or more")
        if "label" not in self.canonical_columns:
            raise ValueError(f"{self.path}: rows_per_label needs a column label; columns has {', '.join(self.columns)}")
        if self.streaming:
            raise ValueError(
                f"{self.path}: rows_per_label does not go with streaming: true, for the label of a row is known when "
                "it is read; set streaming: false"
            )

    def _check_derivation(self) -> None:
        planned = {"where": self.where, "triplets": self.triplets, "holdout": self.holdout, "max_rows": self.max_rows}
        planned |= dict.fromkeys(self.candidate_scores, True)
        if self.streaming and (asked := [name for name, value in planned.items() if value]):
            raise ValueError(
                f"{self.path}: {asked[0]} does not go with streaming: true, for rows are numbered before they are "
                "read; write a data set with these rows, or set streaming: false"
            )
        if self.triplets is not None:
            if set(self.columns) != {"anchor", "positive", "label"} or self.label_map is not None:
                raise ValueError(
                    f"{self.path}: triplets need columns anchor, positive and label, without label_map; "
                    f"columns has {', '.join(self.columns)}"
                )
            if str(self.triplets[0]) == str(self.triplets[1]):
                raise ValueError(f"{self.path}: triplets names '{self.triplets[0]}' as positive and as negative")
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"{self.path}: holdout is {self.holdout:g}; it is a share of the rows, 0 to below 1")
        if self.holdout_by and self.key_of(self.holdout_by) == "negatives":
            sure = [name for name in self.text_columns if self.key_of(name) != "negatives"]
            raise ValueError(
                f"{self.path}: holdout_by names '{self.holdout_by}', which a row with few negatives lacks; there are "
                f"{', '.join(sure)}"
            )
        columns = self.text_columns
        for key, names, known in (
            ("holdout_by", [self.holdout_by] if self.holdout_by else [], columns),
            ("prompts", self.prompts or [], (*columns, *self.lists)),
            ("max_lengths", self.max_lengths or [], (*columns, *self.lists)),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(
                    f"{self.path}: {key} names '{unknown[0]}', which is no text column; there are {', '.join(columns)}"
                )
        if self.holdout_by and not self.holdout:
            raise ValueError(
                f"{self.path}: holdout_by is set, but holdout is 0, so no row is left out: set holdout, or leave "
                "holdout_by out"
            )

    def _check_label_map(self) -> None:
        if self.label_map is None:
            return
        if not self.label_map or not {"label", "score"} & set(self.columns):
            raise ValueError(f"{self.path}: label_map needs entries, and a score or a label in columns to feed")
        for value, number in self.label_map.items():
            if isinstance(value, bool):
                raise ValueError(
                    f"{self.path}: label_map has the truth value {str(value).lower()} as a key: "
                    "YAML reads yes, no, on, off, true and false so; quote it"
                )
            whole = "score" in self.columns or (float(number).is_integer() and number >= 0)
            if not math.isfinite(number) or not whole:
                raise ValueError(
                    f"{self.path}: label_map gives '{value}' the number {number:g}; "
                    "a label is a class number 0, 1, 2, ...; for fractions name the column score"
                )
        self.label_map = {str(value): float(number) for value, number in self.label_map.items()}

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Canonical names of the texts of a row, in their order; without max_negatives, negatives of a list have none
        before the rows are read."""

        def place(name: str) -> tuple[int, int]:
            base, _, number = name.partition("_")
            return ("text", "anchor", "positive", "negative").index(base), int(number or 0)

        made = ["negative"] if self.triplets else []
        if "positives" in self.columns:
            made.append("positive")
        if "negatives" in self.columns:
            made += [f"negative_{number + 1}" for number in range(self.max_negatives or 0)]
        return tuple(sorted((*(name for name in self.columns if _TEXT.fullmatch(name)), *made), key=place))

    @property
    def lists(self) -> list[str]:
        """The columns that hold lists of texts."""
        return [name for name in _LISTS if name in self.columns]

    @property
    def candidate_scores(self) -> tuple[str, ...]:
        """The columns score_1, score_2, ... in their order."""
        names = (name for name in self.columns if _CANDIDATE_SCORE.fullmatch(name))
        return tuple(sorted(names, key=lambda name: int(name.partition("_")[2])))

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns that only a loss, or an evaluator, reads."""
        named = () if self.triplets else ("score", "label", *self.candidate_scores)
        return tuple(name for name in named if name in self.columns)

    @property
    def canonical_columns(self) -> tuple[str, ...]:
        made = {"group"} if "positives" in self.columns else set()
        others = ("id",) if self.triplets else ("group", "id")
        return (*self.text_columns, *self.targets, *(name for name in others if name in {*self.columns, *made}))

    def key_of(self, name: str) -> str:
        """The key of ``columns`` that a canonical column comes from: one of a list for the texts of lists."""
        if name in self.columns:
            return name
        return next((plural for plural in self.lists if name.startswith(plural[:-1])), name)

    @property
    def may_lack_texts(self) -> bool:
        """Whether a row may have no text in some column."""
        return "negatives" in self.columns

    @property
    def draws_queries(self) -> bool:
        """Whether max_rows counts anchors, each with all of its rows."""
        return False

    @property
    def mapped_column(self) -> Optional[str]:
        """The target that label_map feeds."""
        if self.label_map is None:
            return None
        return "score" if "score" in self.columns else "label"

    def prompt_of(self, column: str) -> str:
        """What is put before each text of a column."""
        prompts = self.prompts or {}
        return prompts.get(column, prompts.get(self._like(column), ""))

    def max_length_of(self, column: str) -> Optional[int]:
        """Pieces that are kept of each text of a column; None: what the encoder keeps."""
        lengths = self.max_lengths or {}
        return lengths.get(column, lengths.get(self._like(column)))

    def _like(self, column: str) -> str:
        """The key of prompts and max_lengths that counts for a column they don't name: where its texts come from."""
        return "positive" if self.triplets and column == "negative" else self.key_of(column)

    def prompted(self, column: str, texts: Sequence[str]) -> list[str]:
        """Texts of a column behind its prompt."""
        prompt = self.prompt_of(column)
        return [prompt + text for text in texts]

    @property
    def asked(self) -> list[tuple[str, Union[int, str]]]:
        """Columns of the data, each behind the key that asks for it."""
        return [
            *((f"columns.{name}", column) for name, column in self.columns.items()),
            *(("where", column) for column in self.where or {}),
        ]

    @property
    def read_columns(self) -> Optional[set[str]]:
        """Columns of the data to read, None for all: a position has no name before the file is open."""
        names = [str(column) for _, column in self.asked]
        if any(map(is_position, names)):
            return None
        return {part for name in names for part in (name, name.split(".")[0])}
