"""Frozen features of a set of images, and the check that labels go with them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial

from ssl_kd.data.sources import Source
from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.mesh import REPLICATED, SHARDED, own_rows, place, spread


def _call(apply: Partial, images: Images) -> jax.Array:
    return apply(images)


def extract(
    apply: Callable[[Images], jax.Array],
    images: Images | Source,
    *,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features of every image, in order: float32 (N, D) on the host, whole on every process.

    ``apply`` is a pure function from B ``Images`` to (B, D), preprocessing included and rows independent of each
    other. It compiles once for all sets on one size of canvas: the last batch is filled up with black images. Pass
    ``jax.tree_util.Partial(function, variables)`` to keep that compilation while the weights change from call to call;
    a closure compiles anew for each set of weights, which it embeds as constants.

    ``images`` are N on the host, memory maps included, or a ``Source``. With a ``mesh`` each batch is sharded over its
    axis 'data', ``batch_size`` rounded up to a multiple of it, and a process reads only its own rows.
    ``progress(done, total)`` is called after each batch.

    Raises UserError if there is no image, one cannot be read, they are not uint8 RGB, or a feature is not finite.
    """
    total = len(images)
    if total == 0:
        raise UserError("the set of images to extract features from is empty: check its path and split.")
    if isinstance(images, Images) and (images.pixels.dtype != np.uint8 or images.pixels.shape[3:] != (3,)):
        found = f"{images.pixels.dtype} {images.pixels.shape}"
        raise UserError(f"the images are {found}: features are extracted from uint8 (N, H, W, 3).")
    apply = apply if isinstance(apply, Partial) else Partial(apply)
    if mesh is None:
        step = jax.jit(_call)
    else:
        batch_size += -batch_size % mesh.shape["data"]
        replicated = NamedSharding(mesh, REPLICATED)
        apply = spread(apply, replicated)  # variables out of a checkpoint lie on one device
        step = jax.jit(_call, out_shardings=replicated)

    def batch(start: int) -> Images:
        return place(_rows(images, start + own_rows(batch_size, mesh)), mesh, SHARDED)

    features = np.empty((0, 0), np.float32)
    starts = range(0, total, batch_size)
    running = step(apply, batch(0))
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        # The device works on the following batch while the host waits for and stores this one.
        done, running = running, None if following is None else step(apply, batch(following))
        if start == 0:
            features = np.empty((total, done.shape[1]), np.float32)
        stop = min(start + batch_size, total)
        features[start:stop] = np.asarray(done)[: stop - start]
        if not np.isfinite(features[start:stop]).all():
            raise UserError(
                f"the features of images {start} to {stop - 1} are not finite: the network has diverged, or the loaded "
                "weights do not belong to it; probe an earlier checkpoint."
            )
        if progress is not None:
            progress(stop, total)
    return features


def _rows(images: Images | Source, rows: np.ndarray) -> Images:
    """The images of these ascending numbers; beyond the last one they are black and fill their canvas."""
    there = rows[rows < len(images)]
    found = images[there]
    black = np.zeros((len(rows) - len(there), *found.pixels.shape[1:]), np.uint8)
    return jax.tree.map(lambda *parts: np.concatenate(parts), found, Images.whole(black))


def require_labels(what: str, features: np.ndarray, labels: np.ndarray | None, num_classes: int) -> np.ndarray:
    """The labels as int32 (N,), after checking that each of the (N, D) features has one in [0, num_classes).

    Raises UserError, naming ``what``, if there are no rows, or labels are absent, unknown (-1), too few or too large.
    """
    if len(features) == 0:
        raise UserError(f"{what} is empty: check its path and split.")
    labels = np.full(len(features), -1) if labels is None else np.asarray(labels)
    if labels.shape != (len(features),):
        raise UserError(f"{what} has {len(features)} rows of features but labels of shape {labels.shape}: pair them.")
    if labels.min() < 0:
        raise UserError(
            f"{what} needs labels, but {(labels < 0).sum()} of its {len(labels)} rows have none: probe a labelled set."
        )
    if labels.max() >= num_classes:
        raise UserError(f"{what} has the label {labels.max()} but num_classes is {num_classes}: raise num_classes.")
    return labels.astype(np.int32)
