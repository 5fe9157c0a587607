"""Label retrieval: are the texts that lie nearest to a text of its class?"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.evaluation.base import Evaluator, Rows
from trainer.evaluation.topk import top_k

_QUERIES = 512  # whose ranked lists are held at once


class LabelRetrieval(Evaluator):
    """Each text searches all others, by cosine; those with its label are right (Musgrave et al., ECCV 2020,
    https://arxiv.org/abs/2003.08505).

    Of a text whose class has R others: `precision@1` (the nearest is right), `r_precision` (the share of right ones
    among the R nearest), `map@r` (the mean over these R places of the precision up to a place, or 0 where the place is
    wrong). All are means over the texts; those that are alone in their class search for nothing and are left out.
    Equal similarities rank by their row.
    """

    columns = ("text", "label")
    text_columns = ("text",)
    primary = "map@r"
    metrics = ("precision@1", "r_precision", "map@r")

    def refuse_rows(self, rows: Rows) -> None:
        labels = rows["label"][:]
        if len(set(labels)) == len(labels):
            raise ValueError(
                f"LabelRetrieval: the {len(labels)} texts have {len(labels)} labels, each its own; "
                "give two texts or more of a label"
            )

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        self.refuse_rows(rows)
        (text_ND,) = self.split(embeddings_ND, rows)
        _, label_N, num_C = torch.tensor(rows["label"][:]).unique(return_inverse=True, return_counts=True)
        right_N = num_C[label_N] - 1
        asking = right_N.nonzero()[:, 0]
        total_3 = torch.zeros(3, dtype=torch.float64)
        depth = int(right_N.max())
        for query_Q in asking.split(_QUERIES):
            # One more than asked for: a text is found, too, and mostly first.
            found_Qk = top_k(text_ND[query_Q], text_ND, k=depth + 1, query_chunk=_QUERIES).ids_Qk
            others = found_Qk != query_Q[:, None]
            others[others.all(dim=1), -1] = False  # of texts equal to it, more came first than there is room for
            found_QR = found_Qk[others].view(len(query_Q), depth)
            total_3 += _sums(label_N[found_QR] == label_N[query_Q, None], right_N[query_Q])
        precision, r_precision, map_r = (total_3 / len(asking)).tolist()
        return {"precision@1": precision, "r_precision": r_precision, "map@r": map_r}


def _sums(is_right_QR: Tensor, right_Q: Tensor) -> Tensor:
    """The three metrics of ranked lists, summed over the queries; a query's list counts as far as its R."""
    place_R = torch.arange(1, is_right_QR.shape[1] + 1)
    is_right_QR = (is_right_QR & (place_R <= right_Q[:, None])).double()
    precision_QR = is_right_QR.cumsum(1) / place_R * is_right_QR
    return torch.stack(
        [is_right_QR[:, 0].sum(), (is_right_QR.sum(1) / right_Q).sum(), (precision_QR.sum(1) / right_Q).sum()]
    )
