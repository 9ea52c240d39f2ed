"""Frozen features of a set of images, and the check that labels go with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from ssl_kd.errors import UserError


class Source(Protocol):
    """Random access to examples; ``source[i]['image']`` is a uint8 (H, W, 3) array, one size for all i."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def _call(apply: Partial, images: jax.Array) -> jax.Array:
    return apply(images)


def extract(
    apply: Callable[[jax.Array], jax.Array],
    images: np.ndarray | Source,
    *,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features of every image, in order: float32 (N, D) on the host, whole on every process.

    ``apply`` is a pure function from uint8 (B, H, W, 3) to (B, D), preprocessing included and rows independent of each
    other. It compiles once for all sets of one image size: the last batch is padded with black images. Pass
    ``jax.tree_util.Partial(function, variables)`` to keep that compilation while the weights change from call to call;
    a closure compiles anew for each set of weights, which it embeds as constants.

    ``images`` is a uint8 (N, H, W, 3) array, memory maps included, or a ``Source``. With a ``mesh`` each batch is
    sharded over its axis 'data', ``batch_size`` rounded up to a multiple of it, and a process reads only its own rows.
    ``progress(done, total)`` is called after each batch.

    Raises UserError if there is no image, the images are not uint8 RGB of one size, or a feature is not finite.
    """
    total = len(images)
    if total == 0:
        raise UserError("the set of images to extract features from is empty: check its path and split.")
    shape = _image(images, 0).shape
    apply = apply if isinstance(apply, Partial) else Partial(apply)
    if mesh is None:
        step = jax.jit(_call)
    else:
        batch_size += -batch_size % mesh.shape["data"]
        sharding, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        apply = jax.device_put(apply, replicated)  # variables out of a checkpoint lie on one device
        step = jax.jit(_call, out_shardings=replicated)

    def batch(start: int) -> jax.Array:
        rows = range(start, start + batch_size)
        if mesh is None:
            return jnp.asarray(_rows(images, rows, shape))

        def shard(index: Any) -> np.ndarray:
            return _rows(images, rows[index[0]], shape)

        return jax.make_array_from_callback((batch_size, *shape), sharding, shard)

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


def _image(images: np.ndarray | Source, index: int) -> np.ndarray:
    image = images[index] if isinstance(images, np.ndarray) else np.asarray(images[index]["image"])
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"image {index} is {image.dtype} {image.shape}: features are extracted from uint8 (H, W, 3).")
    return image


def _rows(images: np.ndarray | Source, indices: range, shape: tuple[int, ...]) -> np.ndarray:
    """The images at consecutive ``indices``, black beyond the last one: uint8 (len(indices), *shape)."""
    rows = np.zeros((len(indices), *shape), np.uint8)
    if isinstance(images, np.ndarray):
        found = images[indices.start : indices.stop]
        rows[: len(found)] = found
        return rows
    for row, index in enumerate(range(indices.start, min(indices.stop, len(images)))):
        image = _image(images, index)
        if image.shape != shape:
            raise UserError(f"image {index} is {image.shape} but image 0 is {shape}: resize them to one size first.")
        rows[row] = image
    return rows


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
