"""Label-free signs of collapse in frozen features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ssl_kd.errors import UserError

ROWS = 2048  # the rank cannot exceed the rows: keep it one number so that runs compare


def health(features: np.ndarray) -> dict[str, float]:
    """Two numbers of features (N, D), each row L2-normalised first.

    feature_std      the standard deviation over the rows, averaged over dimensions, times sqrt(D): 1 when directions
                     fill the sphere evenly, 0 when every image has the same one (SimSiam, arXiv:2011.10566, 4.1).
    effective_rank   exp of the entropy of the singular values divided by their sum (Roy & Vetterli, EUSIPCO 2007):
                     from 1, all rows on one line, to min(N, D), evenly spread. Rows are not centred, as in RankMe
                     (arXiv:2210.02885), so a mean direction that all images share lowers it.

    Above 2048 rows, 2048 spaced evenly through the set stand for it: its order may follow the classes.
    Raises UserError if there is no row.
    """
    if len(features) == 0:
        raise UserError("the set of features to check is empty: check its path and split.")
    spread = np.linspace(0, len(features) - 1, min(len(features), ROWS)).astype(int)
    rows = np.asarray(features[spread], np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    # From the smaller Gram matrix, 4x quicker than an SVD; what is below 1e-6 of the greatest is float32 rounding.
    squared = np.linalg.eigvalsh(gram)
    singular = np.sqrt(squared[squared > 1e-12 * squared.max()])
    share = singular / singular.sum()
    entropy = -(share * np.log(share)).sum()
    return {
        "feature_std": float(rows.std(axis=0).mean() * np.sqrt(rows.shape[1])),
        "effective_rank": float(np.exp(entropy)),
    }


def signs_of_collapse(found: Mapping[str, float], floors: Mapping[str, float]) -> str:
    """Which numbers of `health` are under their floor, in words; '' if none is."""
    return " and ".join(f"{name} {found[name]:.2g} is under {at:g}" for name, at in floors.items() if found[name] < at)
