"""Semantic textual similarity: does the similarity of two texts follow the score people gave?"""

import math
import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, spearmanr
from torch import Tensor

from trainer.evaluation.base import SIMILARITIES, Evaluator, Rows


class STS(Evaluator):
    """Pearson and Spearman correlation of similarities with gold scores.

    Metrics are named as in sentence-transformers: `spearman_cosine`, `pearson_dot`, ..., and the best over
    the similarities as `spearman_max`, `pearson_max`. A similarity that is the same for all rows has no
    correlation: its metrics are nan.
    """

    columns = ("anchor", "positive", "score")
    text_columns = ("anchor", "positive")
    primary = "spearman_cosine"
    metrics = tuple(f"{kind}_{name}" for kind in ("pearson", "spearman") for name in (*SIMILARITIES, "max"))

    def refuse_rows(self, rows: Rows) -> None:
        self._gold(rows)

    def _gold(self, rows: Rows) -> NDArray[np.float64]:
        gold = np.asarray(rows["score"], dtype=np.float64)
        if len(gold) < 2 or np.ptp(gold) == 0:
            raise ValueError(
                f"Correlation needs at least two different scores; the {len(gold)} rows hold "
                f"{len(np.unique(gold))}. Check the score column and score_range of this validation set."
            )
        return gold

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        gold = self._gold(rows)
        anchor_BD, positive_BD = self.split(embeddings_ND, rows)
        metrics: dict[str, float] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            warnings.simplefilter("ignore", NearConstantInputWarning)
            for name, similarity in SIMILARITIES.items():
                values = similarity(anchor_BD, positive_BD).numpy()
                metrics[f"pearson_{name}"] = float(pearsonr(gold, values)[0])
                metrics[f"spearman_{name}"] = float(spearmanr(gold, values)[0])
        for kind in ("pearson", "spearman"):
            found = [metrics[f"{kind}_{name}"] for name in SIMILARITIES]
            metrics[f"{kind}_max"] = max((x for x in found if not math.isnan(x)), default=math.nan)
        return metrics
