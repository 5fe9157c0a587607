"""What stands in a batch that an in-batch negative must not be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.hashes import NO_TEXT


def count_false_negatives(texts_BC: NDArray[np.int64]) -> int:
    """Candidates of other rows that are right answers to an anchor, summed over the anchors of a batch.

    A candidate of another row is one where it is the anchor's own positive once more, or the positive of a row with the
    same anchor.

    Args:
        texts_BC: hashes of the texts of each row, C 2 or more: anchor, positive, negatives; NO_TEXT where it has none.
    """
    anchors, positives, candidates = texts_BC[:, 0], texts_BC[:, 1], texts_BC[:, 1:]
    # A row may name its positive among its own negatives, which is another fault.
    own = int((candidates == positives[:, None]).sum())
    equal = _count(candidates[candidates != NO_TEXT], positives) - own
    same_anchor = _count(anchors, anchors) - len(anchors)
    rows = np.unique(texts_BC[:, :2], axis=0, return_inverse=True)[1].ravel()
    return equal + same_anchor - (_count(rows, rows) - len(rows))


def _count(among: NDArray[np.int64], wanted: NDArray[np.int64]) -> int:
    """How often each of ``wanted`` stands in ``among``, summed."""
    among = np.sort(among)
    return int((np.searchsorted(among, wanted, "right") - np.searchsorted(among, wanted, "left")).sum())
