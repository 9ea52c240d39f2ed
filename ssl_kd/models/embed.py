"""A network on images, as it is evaluated and used: preprocessing, running statistics, pooled features."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from ssl_kd.images import Images, resample_weights
from ssl_kd.models import Network, NetworkSpec
from ssl_kd.models.layers import BatchNorm, Features


def preprocess(images: Images, size: int, crop_fraction: float, interpolation: str) -> jax.Array:
    """The centre of B images, float32 (B, size, size, 3) in [0, 1].

    Args:
      size: pixels; what `crop_side` leaves of an image is resized to it.
      crop_fraction, interpolation: as a `NetworkSpec` has them.
    """
    side = crop_side(images, size, crop_fraction)
    return square(images, (images.size - side[:, None]) // 2, side, size, interpolation)


def crop_side(images: Images, size: int, crop_fraction: float) -> jax.Array:
    """Side of the square that is cut out of each image, int32 (B,) pixels: a fraction of the shorter side.

    But `size` at least, because there is nothing to gain from enlarging what could be cut larger; and the whole shorter
    side of an image that is smaller than that.
    """
    short = images.size.min(axis=1)
    return jnp.minimum(short, jnp.maximum(size, jnp.round(crop_fraction * short).astype(jnp.int32)))


def square(images: Images, corner: jax.Array, side: jax.Array, size: int, interpolation: str) -> jax.Array:
    """A square of each image, resized: float32 (B, size, size, 3) in [0, 1].

    Args:
      corner: int32 (B, 2), its top and left within the image, pixels.
      side: int32 (B,), pixels.
      interpolation: a key of `ssl_kd.images.INTERPOLATIONS`.
    """

    def weights(axis: int) -> jax.Array:
        def of_one(start: jax.Array, length: jax.Array, extent: jax.Array) -> jax.Array:
            return resample_weights(start, length, extent, images.canvas[axis], size, interpolation)

        return jax.vmap(of_one)(corner[:, axis], side, images.size[:, axis])

    pixels = images.pixels.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("bsh,bhwc,btw->bstc", weights(0), pixels, weights(1), precision=highest) / 255
    return jnp.clip(x, 0, 1)  # a cubic overshoots, and a row of weights may sum to 1 + 1e-7


def pooled_features(spec: NetworkSpec, size: int) -> Callable[[Any, Images], jax.Array]:
    """Pure function (variables, B images) → pooled features (B, D) float32."""
    network = Network(spec)

    def apply(variables: Any, images: Images) -> jax.Array:
        x = preprocess(images, size, spec.crop_fraction, spec.interpolation)
        return cast(Features, network.apply(variables, x, norm="running", method="features")).pooled

    return apply


def batch_calibrated(spec: NetworkSpec, variables: Any, images: Images, size: int) -> Any:
    """Variables whose running statistics are those of one batch: a random network's fair chance as a baseline.

    Running statistics move as r ← a r + (1 − a) b, so b follows from the statistics before and after one batch.
    """
    network = Network(dataclasses.replace(spec, bn_groups=1))
    x = preprocess(images, size, spec.crop_fraction, spec.interpolation)
    _, after = network.apply(variables, x, norm="batch", method="features", mutable=["batch_stats"])
    a = BatchNorm.momentum
    stats = jax.tree.map(lambda r, new: (new - a * r) / (1 - a), variables["batch_stats"], after.get("batch_stats", {}))
    return {**variables, "batch_stats": stats}
