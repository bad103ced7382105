"""Answers that hold the best of many (boxes, queries): two that are equal but for rounding may stand in another order in another runtime."""

from __future__ import annotations

from math import prod

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

SHARE = 0.05  # of the entries of an answer: so many may be others, where two are equal but for rounding
_MOST = 1000  # rows to be matched: of more, none are picked


def apart_in_any_order(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference between two arrays of one shape whose rows along some axis are matched, but for the `SHARE` of them that differ most.

    Rows are matched by the Hungarian method, of every index before that axis for themselves: samples have orders of their own. Infinite where
    no axis is short enough. What is not finite in `want` is left out.
    """
    finite = np.isfinite(want)
    got, want = (np.where(finite, values, 0).astype(np.float64) for values in (got, want))
    return min((_along(got, want, axis) for axis, rows in enumerate(want.shape) if 1 < rows <= _MOST), default=np.inf)


def _along(got: np.ndarray, want: np.ndarray, axis: int) -> float:
    shape = prod(want.shape[:axis]), want.shape[axis], prod(want.shape[axis + 1 :])
    worst = 0.0
    for mine, theirs in zip(got.reshape(shape), want.reshape(shape), strict=True):
        distances = cdist(mine, theirs, "chebyshev")
        matched = np.sort(distances[linear_sum_assignment(distances)])
        worst = max(worst, float(matched[len(matched) - 1 - int(len(matched) * SHARE)]))
    return worst
