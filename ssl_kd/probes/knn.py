"""Weighted nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ssl_kd.errors import UserError
from ssl_kd.probes.features import require_labels


def knn(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    num_classes: int,
    ks: Sequence[int] = (10, 20, 200),
    temperature: float = 0.07,
    query_block: int = 512,
    bank_block: int = 16384,
) -> dict[int, float]:
    """Top-1 accuracy in [0, 1] for each k, of the weighted kNN of Wu et al. 2018 (arXiv:1805.01978, section 3.4).

    The k rows of ``bank`` (N, D) with the greatest cosine similarity s to a query of ``queries`` (M, D) each vote
    exp(s / temperature) for their label; the class with the greatest sum wins, the lower class on a tie. A k above N
    lets all N rows vote. Labels are integers in [0, num_classes).

    Exact, in float32, and the same whatever the blocks: they only bound the device's memory, which holds one block of
    the bank, ``query_block * bank_block`` similarities, the queries, and their nearest rows so far.

    Raises UserError if a set is empty or unlabelled, a k is below 1 or the temperature is not positive.
    """
    bank_labels = require_labels("the kNN bank (training set)", bank, bank_labels, num_classes)
    query_labels = require_labels("the kNN query set (test set)", queries, query_labels, num_classes)
    if min(ks) < 1:
        raise UserError(f"ks is {tuple(ks)}: every k of the kNN probe must be at least 1.")
    if temperature <= 0:
        raise UserError(f"the kNN temperature is {temperature}: it must be positive (0.07 is usual).")

    used = {k: min(k, len(bank)) for k in ks}
    most = max(used.values())
    query_blocks = [_unit(block) for block in _blocks(queries, query_block, 0.0)]
    nearest = [(jnp.full((len(q), most), -jnp.inf), jnp.zeros((len(q), most), jnp.int32)) for q in query_blocks]
    # The bank, the larger set by far, is outermost: each of its rows goes to the device once.
    for rows, labels in zip(_blocks(bank, bank_block, 0.0), _blocks(bank_labels, bank_block, -1), strict=True):
        rows = _unit(rows)
        nearest = [_merge(found, q, rows, labels) for found, q in zip(nearest, query_blocks, strict=True)]

    levels = tuple(sorted(set(used.values())))
    votes = [_vote(*found, levels=levels, num_classes=num_classes, temperature=temperature) for found in nearest]
    predicted = np.concatenate(votes, axis=1)[:, : len(queries)]
    accuracy = dict(zip(levels, (predicted == query_labels).mean(axis=1), strict=True))
    return {k: float(accuracy[used[k]]) for k in ks}


def _blocks(rows: np.ndarray, most: int, fill: float) -> list[np.ndarray]:
    """Consecutive blocks of one length, at most ``most``, the last filled up with ``fill``."""
    count = -(-len(rows) // most)
    size = -(-len(rows) // count)
    whole = [rows[start : start + size] for start in range(0, len(rows), size)]
    missing = size - len(whole[-1])
    whole[-1] = np.pad(whole[-1], [(0, missing)] + [(0, 0)] * (rows.ndim - 1), constant_values=fill)
    return whole


@jax.jit
def _unit(rows: jax.Array) -> jax.Array:
    rows = rows.astype(jnp.float32)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@partial(jax.jit, donate_argnums=0)
def _merge(
    nearest: tuple[jax.Array, jax.Array], q_QxD: jax.Array, bank_BxD: jax.Array, labels_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The similarities and labels (Q, k) of each query's nearest rows, best first, after seeing one more block."""
    # lax.top_k is exact, and on a CPU 20x quicker than a full sort; preselecting by group maxima gains nothing.
    k = nearest[0].shape[1]
    sims_QxB = jnp.matmul(q_QxD, bank_BxD.T, precision=jax.lax.Precision.HIGHEST)
    sims_QxB = jnp.where(labels_B >= 0, sims_QxB, -jnp.inf)  # fill rows
    sims, columns = jax.lax.top_k(sims_QxB, min(k, len(bank_BxD)))
    sims = jnp.concatenate([nearest[0], sims], axis=1)
    labels = jnp.concatenate([nearest[1], labels_B[columns]], axis=1)
    sims, columns = jax.lax.top_k(sims, k)
    return sims, jnp.take_along_axis(labels, columns, axis=1)


@partial(jax.jit, static_argnames=("levels", "num_classes"))
def _vote(
    sims_Qxk: jax.Array, labels_Qxk: jax.Array, *, levels: tuple[int, ...], num_classes: int, temperature: float
) -> jax.Array:
    """The winning class of the first k columns, for each k of the ascending ``levels``: int32 (len(levels), Q)."""
    weights = jnp.exp((sims_Qxk - sims_Qxk[:, :1]) / temperature)  # relative to the nearest: no overflow, same winner
    query = jnp.arange(len(sims_Qxk))[:, None]
    scores = jnp.zeros((len(sims_Qxk), num_classes))
    winners = []
    for start, stop in zip((0, *levels), levels, strict=False):
        scores = scores.at[query, labels_Qxk[:, start:stop]].add(weights[:, start:stop])
        winners.append(scores.argmax(axis=1))
    return jnp.stack(winners).astype(jnp.int32)
