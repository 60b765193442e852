"""Win rates against a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def wins(scores: Sequence[float] | np.ndarray, baseline: Sequence[float] | np.ndarray) -> np.ndarray:
    """For each item, 1 where `scores` is larger, 0 where `baseline` is, 1/2 for a tie; the mean is the win rate.

    Ties count half, as in AlpacaEval, so that the win rates of the two sides sum to 1.
    """
    ours, theirs = np.asarray(scores, dtype=float), np.asarray(baseline, dtype=float)
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise ValueError(f"both sides need one score per item: got the shapes {ours.shape} and {theirs.shape}")
    missing = np.flatnonzero(np.isnan(ours) | np.isnan(theirs))
    if missing.size:
        raise ValueError(f"item {missing[0]}: NaN is neither a win nor a loss")
    return np.where(ours == theirs, 0.5, ours > theirs)
