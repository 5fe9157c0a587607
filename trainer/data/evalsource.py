"""Validation sets as a config names them, and what is refused of that before anything is read."""

import re
from dataclasses import dataclass, field, fields
from typing import ClassVar, Optional, Union

from jsonargparse import lazy_instance

from trainer.data.sources import Source
from trainer.encoder.spec import EncoderSpec
from trainer.evaluation.base import Evaluator
from trainer.evaluation.search import Search
from trainer.evaluation.sts import STS
from trainer.messages import did_you_mean

# What a set that is searched has: of the queries, of the corpus, of the judgements.
_SEARCH_COLUMNS = (
    "query_id", "query", "document_id", "title", "document", "judged_query", "judged_document", "relevance",
)  # fmt: skip


@dataclass(kw_only=True)
class EvalSource(Source):
    """A set to evaluate on. Where its evaluator searches, path is the queries, or a folder or hub data set that holds
    queries, corpus and qrels of one set or of many; columns names what is not found by its usual name.

    Attributes:
        name: of the set; its metrics are logged as eval/<name>/<metric>.
        evaluator: what to measure.
        corpus: documents to search, where path is a file of queries.
        qrels: which documents are relevant to which query: a table, or lines of TREC.
        max_rows: most rows, drawn evenly; of Reranking and of a search most queries, each with all of its candidates.
        max_negatives: most texts taken of a row's negatives, the first ones; unset: all.
        corpus_size: search this many documents only, the judged ones among them; for a quick look while training.
        teacher: of an evaluator that compares with one.
    """

    columns: dict[str, Union[int, str]] = field(default_factory=dict, kw_only=False)
    name: str
    # Lazy, because jsonargparse can write only such a default into config.yaml.
    evaluator: Evaluator = field(default_factory=lambda: lazy_instance(STS))
    corpus: Optional[str] = None
    qrels: Optional[str] = None
    max_negatives: Optional[int] = None
    corpus_size: Optional[int] = None
    teacher: Optional[EncoderSpec] = None

    keeps_holdout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        kind = type(self.evaluator).__name__
        if lacking := [name for name in ("columns", "text_columns", "primary") if not hasattr(self.evaluator, name)]:
            raise ValueError(
                f"{self.path}: {kind} has no {lacking[0]}; an evaluator names columns, text_columns and its primary "
                "metric"
            )
        if self.lists and not self.evaluator.takes_lists:
            raise ValueError(
                f"{self.path}: {self.lists[0]} is for data.train and Reranking; {kind} takes one text in a column"
            )
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"validation set name '{self.name}': letters, digits, '.', '_' and '-' are allowed")
        if self.evaluator.teacher_column is not None and self.teacher is None:
            raise ValueError(f"{self.path}: {kind} compares with a teacher; name it: teacher: {{backbone: ...}}")
        if self.evaluator.teacher_column is None and self.teacher is not None:
            raise ValueError(f"{self.path}: {kind} compares with no teacher; leave teacher out")
        of_training = (("loss", None), ("weight", 1.0), ("rows_per_label", None))
        if asked := [name for name, unset in of_training if getattr(self, name) != unset]:
            raise ValueError(
                f"{self.path}: {asked[0]} is for data.train; nothing is learnt from a validation set: leave it out"
            )
        if self.searches:
            self._check_search()
            return
        super().__post_init__()
        planned = {"corpus": self.corpus, "qrels": self.qrels, "corpus_size": self.corpus_size}
        if asked := [name for name, value in planned.items() if value is not None]:
            raise ValueError(
                f"{self.path}: {asked[0]} is for an evaluator that searches (InformationRetrieval), {kind} does not"
            )

    @property
    def draws_queries(self) -> bool:
        return self.evaluator.takes_lists and "anchor" in self.columns

    @property
    def missing_columns(self) -> list[str]:
        """Those that the evaluator wants and the rows lack; of a search none."""
        return [] if self.searches else [name for name in self.evaluator.columns if name not in self.canonical_columns]

    @property
    def searches(self) -> bool:
        """Whether the set is queries, documents and judgements instead of rows of texts."""
        return isinstance(self.evaluator, Search)

    def _check_search(self) -> None:
        for name in self.columns:
            if name not in _SEARCH_COLUMNS:
                raise ValueError(
                    f"{self.path}: columns has '{name}', which is none of {', '.join(_SEARCH_COLUMNS)}."
                    f"{did_you_mean(name, _SEARCH_COLUMNS)}"
                )
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        for name in (
            "score_range", "label_map", "where", "triplets", "holdout", "holdout_by", "streaming", "max_negatives",
        ):  # fmt: skip
            if name in given:
                raise ValueError(f"{self.path}: {name} does not go with an evaluator that searches; leave it out")
        if (self.corpus is None) != (self.qrels is None):
            lacking = "corpus" if self.corpus is None else "qrels"
            raise ValueError(
                f"{self.path}: {lacking} is missing; name queries (path), corpus and qrels, or a folder of them (path)"
            )
        self._check_least(max_rows=1, corpus_size=1)
        for name in self.prompts or ():
            if name not in self.text_columns:
                raise ValueError(f"{self.path}: prompts names '{name}'; there are {', '.join(self.text_columns)}")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Canonical names of the texts of a row, in their order; of a set that is searched, its two kinds of text."""
        return Search.text_columns if self.searches else super().text_columns
