"""The linear probe: one softmax layer on frozen features, its hyper-parameters chosen without the test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ssl_kd.errors import UserError
from ssl_kd.probes.features import require_labels

MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearResult:
    """Test accuracy in [0, 1] and how it was reached."""

    accuracy: float  # on the test set, by the layer trained on all of train
    lr: float  # the winning pair
    weight_decay: float
    holdout_accuracy: float  # of the winning pair, on the held-out rows that chose it
    at_edge: bool  # a value just outside the grid might do better: widen it
    epochs: int


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    num_classes: int,
    lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    weight_decays: Sequence[float] = (0.0, 1e-3, 1e-2, 1e-1),
    epochs: int = 30,
    batch_size: int = 256,
    holdout: float = 0.1,
    seed: int = 0,
) -> LinearResult:
    """Top-1 accuracy of a linear classifier trained on features (N, D) with labels in [0, num_classes).

    Features are standardised per dimension by the mean and standard deviation of train: a BatchNorm without affine, as
    in SeLa-style probes, so that one grid of learning rates suits every network; a constant dimension becomes 0.
    Softmax cross-entropy, SGD with momentum 0.9, weight decay added to the gradient as in torch, cosine decay to 0,
    zero initialisation. An epoch is the whole batches of that epoch's permutation.

    Every pair of ``lrs`` and ``weight_decays`` trains at once on train less a class-stratified share ``holdout``, where
    the best is chosen, the earlier pair on a tie. That pair then trains on all of train and is scored on test, once.

    Raises UserError if a set is empty or unlabelled, train has fewer than two classes, or no row can be held out.
    """
    train_y = require_labels("the linear probe's training set", train_x, train_y, num_classes)
    test_y = require_labels("the linear probe's test set", test_x, test_y, num_classes)
    if len(np.unique(train_y)) < 2:
        raise UserError(f"the linear probe needs two classes or more, but every training label is {train_y[0]}.")
    mean, scale = standardisation(train_x)
    x = jnp.asarray((train_x - mean) * scale)

    fit, held = stratified_split(train_y, holdout, seed)
    grid = [(lr, decay) for lr in lrs for decay in weight_decays]
    layers = train(x, train_y, fit, grid, num_classes, epochs=epochs, batch_size=batch_size, seed=seed)
    chosen = accuracy(layers, x[held], train_y[held])
    lr, decay = grid[int(chosen.argmax())]

    rows = np.arange(len(train_y))
    layer = train(x, train_y, rows, [(lr, decay)], num_classes, epochs=epochs, batch_size=batch_size, seed=seed)
    return LinearResult(
        accuracy=float(accuracy(layer, jnp.asarray((test_x - mean) * scale), test_y)[0]),
        lr=lr,
        weight_decay=decay,
        holdout_accuracy=float(chosen.max()),
        at_edge=_at_edge(lr, lrs) or (decay > 0 and _at_edge(decay, weight_decays)),
        epochs=epochs,
    )


def standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / standard deviation of each dimension, float32 (D,) both; 0 in place of 1 / 0."""
    mean = features.mean(axis=0, dtype=np.float64)
    # Summed in float64 without a float64 copy of the features.
    square = np.einsum("nd,nd->d", features, features, dtype=np.float64) / len(features)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    # What rounding leaves of a constant dimension's std is about 1e-8 of its mean.
    varies = std > 1e-6 * np.abs(mean)
    return mean.astype(np.float32), np.where(varies, 1 / np.where(varies, std, 1), 0).astype(np.float32)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows held out, sorted and disjoint: of each class ``share``, rounded, but at least one.

    A class with one row keeps it for fitting. Raises UserError if ``share`` is not in (0, 1) or no row is held out.
    """
    if not 0 < share < 1:
        raise UserError(f"the linear probe's holdout is {share}: it must be between 0 and 1.")
    rng = np.random.default_rng(seed)
    held = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held.append(rows[: min(max(1, round(share * len(rows))), len(rows) - 1)])
    held_rows = np.sort(np.concatenate(held))
    if len(held_rows) == 0:
        raise UserError("the linear probe cannot hold out rows from one image per class: give it more training images.")
    return np.setdiff1d(np.arange(len(labels)), held_rows), held_rows


Layers = dict[str, jax.Array]  # G linear layers: weight (D, G, C) and bias (G, C)


def train(
    x: jax.Array,
    y: np.ndarray,
    rows: np.ndarray,
    grid: Sequence[tuple[float, float]],
    num_classes: int,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> Layers:
    """One layer per (learning rate, weight decay) of ``grid``, all on the same batches of x[rows] (N, D), y[rows]."""
    lr, decay = jnp.asarray(grid, jnp.float32).T
    batch = min(batch_size, len(rows))
    steps = len(rows) // batch
    layers = {
        "weight": jnp.zeros((x.shape[1], len(grid), num_classes)),
        "bias": jnp.zeros((len(grid), num_classes)),
    }
    velocity = jax.tree.map(jnp.zeros_like, layers)
    rng = np.random.default_rng(seed)
    labels = jnp.asarray(y)
    for epoch in range(epochs):
        order = rng.permutation(rows)[: steps * batch].reshape(steps, batch)
        cosine = 0.5 * (1 + np.cos(np.pi * (epoch * steps + np.arange(steps)) / (epochs * steps)))
        layers, velocity = _epoch(layers, velocity, x, labels, order, cosine.astype(np.float32), lr, decay)
    return layers


@partial(jax.jit, donate_argnums=(0, 1))
def _epoch(
    layers: Layers,
    velocity: Layers,
    x_NxD: jax.Array,
    y_N: jax.Array,
    order_SxB: jax.Array,
    cosine_S: jax.Array,
    lr_G: jax.Array,
    decay_G: jax.Array,
) -> tuple[Layers, Layers]:
    def loss(layers: Layers, x_BxD: jax.Array, y_B: jax.Array) -> jax.Array:
        # The layers share nothing, so the gradient of their summed losses is each one's own, from one wide product.
        logp_BxGxC = jax.nn.log_softmax(_logits(layers, x_BxD))
        return -jnp.take_along_axis(logp_BxGxC, y_B[:, None, None], axis=2).sum() / len(y_B)

    def step(carry: tuple[Layers, Layers], batch: tuple[jax.Array, jax.Array]) -> tuple[tuple[Layers, Layers], None]:
        layers, velocity = carry
        rows, cosine = batch
        grads = jax.grad(loss)(layers, x_NxD[rows], y_N[rows])
        velocity = jax.tree.map(lambda v, g, w: MOMENTUM * v + g + decay_G[:, None] * w, velocity, grads, layers)
        layers = jax.tree.map(lambda w, v: w - (cosine * lr_G)[:, None] * v, layers, velocity)
        return (layers, velocity), None

    return jax.lax.scan(step, (layers, velocity), (order_SxB, cosine_S))[0]


def _logits(layers: Layers, x_BxD: jax.Array) -> jax.Array:
    weight_DxGxC = layers["weight"]
    return jnp.einsum("bd,dgc->bgc", x_BxD, weight_DxGxC, precision=jax.lax.Precision.HIGHEST) + layers["bias"]


def accuracy(layers: Layers, x: jax.Array, y: np.ndarray) -> np.ndarray:
    """Top-1 accuracy of each layer on x (N, D), y (N,): float64 (G,), 0 for a layer that diverged."""
    return np.asarray(_correct(layers, x, y)) / len(y)


@jax.jit
def _correct(layers: Layers, x_NxD: jax.Array, y_N: jax.Array) -> jax.Array:
    # One layer at a time: all logits of a large set at once would not fit.
    def one(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        weight_DxC, bias_C = layer
        logits = jnp.matmul(x_NxD, weight_DxC, precision=jax.lax.Precision.HIGHEST) + bias_C
        return jnp.where(jnp.isfinite(logits).all(), (logits.argmax(axis=1) == y_N).sum(), 0)

    return jax.lax.map(one, (layers["weight"].swapaxes(0, 1), layers["bias"]))


def _at_edge(value: float, tried: Sequence[float]) -> bool:
    return len(set(tried)) > 1 and value in (min(tried), max(tried))
