"""The texts of the global batch as candidates of this rank's rows, and which of them are no negatives.

Shape suffixes: B rows of this rank, b of the global batch, C text columns, N candidates, D embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.distributed.gather import gather_columns, gather_rows
from trainer.losses.logsumexp import LEFT_OUT, log_sum_exp, tiles
from trainer.losses.similarity import Similarity

# In place of what is known of a negative's row: what is right for a row is no more right for its negatives.
NOT_RIGHT = torch.iinfo(torch.int64).min
# Of the queries and candidates of a tile: which candidates are meant for which queries, bool (B, N).
Judge = Callable[[slice, slice], Tensor]


@dataclass(frozen=True)
class Candidates:
    """Queries of this rank and their candidates from the global batch.

    Attributes:
        queries_BD, candidates_ND: their products are the similarities.
        row_B, row_N: rows of the global batch they stand in.
        column_N: text column of each candidate.
        own_B: of each query the candidate that it belongs with, the positive of an anchor, the anchor of a positive.
        has_own: whether there is one; else own_B is any text of the row, and no text of the row is a candidate, for
            the queries' own column is among the candidates.
        own_texts_B2: numbers of each row's anchor and positive; None: no text is compared.
        text_N: number of each candidate's text.
        row_texts_N2: of an anchor or positive the numbers of its row's anchor and positive; NOT_RIGHT of a negative.
        group_B, group_N: None: there are no groups.
        present_N: None: all candidates are there.
        judge: names further false negatives.
    """

    queries_BD: Tensor
    candidates_ND: Tensor
    row_B: Tensor
    row_N: Tensor
    column_N: Tensor
    own_B: Tensor
    has_own: bool
    own_texts_B2: Tensor | None
    text_N: Tensor | None
    row_texts_N2: Tensor | None
    group_B: Tensor | None
    group_N: Tensor | None
    present_N: Tensor | None
    judge: Judge | None = None

    def same_row(self, rows: slice, columns: slice) -> Tensor:
        """Whether query and candidate stand in one row, (B, N)."""
        return self.row_B[rows, None] == self.row_N[columns]

    def own(self, rows: slice, columns: slice) -> Tensor:
        """Which candidate is each query's own, (B, N)."""
        number_N = torch.arange(len(self.row_N), device=self.row_N.device)
        return self.own_B[rows, None] == number_N[columns]

    def absent(self, rows: slice, columns: slice) -> Tensor | None:
        """Which are no candidates at all, (B, N); None: every text is one."""
        absent = None if self.has_own else self.same_row(rows, columns)
        if self.present_N is not None:
            missing = ~self.present_N[columns]
            absent = missing.expand(len(self.row_B[rows]), -1) if absent is None else absent | missing
        return absent

    def false_negatives(self, rows: slice, columns: slice) -> Tensor | None:
        """Which would be punished for being right, (B, N); None: nothing is known of that.

        The row's own anchor or positive text once more; anchors and positives of rows that share its anchor, its
        positive or its group; what the judge names. Never the own candidate.
        """
        found = []
        if self.own_texts_B2 is not None:
            assert self.text_N is not None
            assert self.row_texts_N2 is not None
            anchors_N, positives_N = self.row_texts_N2[columns].unbind(dim=1)
            anchor_B1, positive_B1 = self.own_texts_B2[rows].split(1, dim=1)
            found += [self.text_N[columns] == anchor_B1, self.text_N[columns] == positive_B1]
            found += [anchors_N == anchor_B1, positives_N == positive_B1]
        if self.group_B is not None:
            assert self.group_N is not None
            found.append(self.group_B[rows, None] == self.group_N[columns])
        if self.judge is not None:
            found.append(self.judge(rows, columns))
        if not found:
            return None
        false = functools.reduce(torch.logical_or, found)
        if self.has_own:
            false = false & ~self.own(rows, columns)
        absent = self.absent(rows, columns)
        return false if absent is None else false & ~absent

    def left_out(self, rows: slice, columns: slice) -> Tensor | None:
        """Which must not enter a sum over candidates, (B, N); None: all do."""
        absent, false = self.absent(rows, columns), self.false_negatives(rows, columns)
        return false if absent is None else absent if false is None else absent | false

    def sums(
        self, scale: float, max_whole: int, raised: Judge | None = None, strength: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Log of the sum over candidates of exp(scale * similarity), and the logit of the own one, (B,) each.

        Args:
            scale: inverse temperature.
            max_whole: logits up to which they are kept whole.
            raised: whose logits grow by ``strength`` times their similarity, without a gradient.
            strength: of that.
        """

        def logits(rows: slice, columns: slice, similarities: Tensor) -> Tensor:
            logits = scale * similarities
            if raised is not None:
                logits = logits + strength * similarities.detach() * raised(rows, columns)
            left_out = self.left_out(rows, columns)
            return logits if left_out is None else logits.masked_fill(left_out, LEFT_OUT)

        return log_sum_exp(self.queries_BD, self.candidates_ND, scale, logits, self.own_B, max_whole)

    def metrics(self, weight: float) -> dict[str, Tensor]:
        """``false_negative_rate``: share of false negatives among the candidates that are not the own one, ``weight``
        times its sum over queries, so that the mean over ranks is that of the global batch. Empty if not known.
        """
        if self.own_texts_B2 is None and self.group_B is None and self.judge is None:
            return {}
        num_others = len(self.row_N) if self.present_N is None else self.present_N.sum()
        total = self.queries_BD.new_zeros(())
        for rows, columns in tiles(len(self.row_B), len(self.row_N)):
            false = self.false_negatives(rows, columns)
            assert false is not None
            total += false.sum()
        return {"false_negative_rate": weight * total / torch.as_tensor(num_others - 1).clamp(min=1)}


class InBatch:
    """The columns of a batch, those of all ranks at hand.

    Args:
        columns: (B, D) embeddings of this rank.
        targets: of the same rows.
        similarity: cosine scales the embeddings to length 1.
        mask_false_negatives: whether texts and groups of the targets tell false negatives.
        with_anchors: whether anchors are candidates too; else they are not gathered.
    """

    def __init__(
        self,
        columns: Sequence[Tensor],
        targets: Targets,
        similarity: Similarity,
        mask_false_negatives: bool,
        with_anchors: bool = False,
    ) -> None:
        columns = [F.normalize(column, dim=-1) for column in columns] if similarity == "cosine" else columns
        self.columns_BD = columns
        self.targets = targets
        gathered = gather_columns(columns[0 if with_anchors else 1 :], targets.rows_per_rank)
        self._columns_bD = dict(zip(range(len(columns))[0 if with_anchors else 1 :], gathered, strict=True))
        known = {
            "texts": targets.texts_BC if mask_false_negatives else None,
            "groups": targets.groups_B[:, None] if mask_false_negatives and targets.groups_B is not None else None,
            "present": targets.present_BC,
        }
        here = {name: values for name, values in known.items() if values is not None}
        self._known_b: dict[str, Tensor] = {}
        if here:  # numbers, all of them: they cross the ranks together
            numbers_bK = gather_rows(torch.cat([v.long() for v in here.values()], dim=1), targets.rows_per_rank)
            parts = numbers_bK.split([values.shape[1] for values in here.values()], dim=1)
            self._known_b = dict(zip(here, parts, strict=True))

    @property
    def documents(self) -> range:
        """The columns behind the anchors."""
        return range(1, len(self.columns_BD))

    def candidates(self, query: int, among: range, judge: Judge | None = None) -> Candidates:
        """The texts of column ``query`` of this rank, and those of the columns ``among`` of all ranks."""
        device, first = self.columns_BD[0].device, self.targets.first_row
        num_rows, num_global = len(self.columns_BD[0]), self.targets.num_global_rows
        columns = [self._columns_bD[column] for column in among]
        texts_bC, groups_b1 = self._known_b.get("texts"), self._known_b.get("groups")
        present_bC = self._known_b.get("present")
        chosen, mine = slice(among.start, among.stop), slice(first, first + num_rows)

        def flat(values_bC: Tensor) -> Tensor:
            return values_bC[:, chosen].T.reshape(-1)

        def of_rows(values_bK: Tensor) -> Tensor:
            return torch.cat([values_bK if c < 2 else torch.full_like(values_bK, NOT_RIGHT) for c in among])

        row_B = torch.arange(first, first + num_rows, device=device)
        has_own = query not in among
        return Candidates(
            queries_BD=self.columns_BD[query],
            candidates_ND=columns[0] if len(columns) == 1 else torch.cat(columns),
            row_B=row_B,
            row_N=torch.arange(num_global, device=device).repeat(len(columns)),
            column_N=torch.arange(among.start, among.stop, device=device).repeat_interleave(num_global),
            own_B=row_B + (among.index(1 - query) * num_global if has_own else 0),
            has_own=has_own,
            own_texts_B2=None if texts_bC is None else texts_bC[mine, :2],
            text_N=None if texts_bC is None else flat(texts_bC),
            row_texts_N2=None if texts_bC is None else of_rows(texts_bC[:, :2]),
            group_B=None if groups_b1 is None else groups_b1[mine, 0],
            group_N=None if groups_b1 is None else of_rows(groups_b1)[:, 0],
            present_N=None if present_bC is None else flat(present_bC).bool(),
            judge=judge,
        )
