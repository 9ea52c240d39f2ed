"""A network on uint8 images, as it is evaluated and used: preprocessing, running statistics, pooled features."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ssl_kd.models import Network, NetworkSpec
from ssl_kd.models.layers import BatchNorm, Features


def preprocess(images: jax.Array, size: int) -> jax.Array:
    """uint8 (B, H, W, 3) → float32 (B, size, size, 3) in [0, 1]: the centre of larger images, smaller ones enlarged."""
    _, height, width, _ = images.shape
    top, left = max(0, height - size) // 2, max(0, width - size) // 2
    x = images[:, top : top + min(height, size), left : left + min(width, size)].astype(jnp.float32) / 255
    return x if x.shape[1:3] == (size, size) else jax.image.resize(x, (x.shape[0], size, size, 3), "bilinear")


def pooled_features(spec: NetworkSpec, size: int) -> Callable[[Any, jax.Array], jax.Array]:
    """Pure function (variables, uint8 images) → pooled features (B, D) float32."""
    network = Network(spec)

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        features = network.apply(variables, preprocess(images, size), norm="running", method="features")
        return cast(Features, features).pooled

    return apply


def batch_calibrated(spec: NetworkSpec, variables: Any, images: np.ndarray, size: int) -> Any:
    """Variables whose running statistics are those of one batch: a random network's fair chance as a baseline.

    Running statistics move as r ← a r + (1 − a) b, so b follows from the statistics before and after one batch.
    """
    network = Network(dataclasses.replace(spec, bn_groups=1))
    _, after = network.apply(
        variables, preprocess(jnp.asarray(images), size), norm="batch", method="features", mutable=["batch_stats"]
    )
    a = BatchNorm.momentum
    stats = jax.tree.map(lambda r, new: (new - a * r) / (1 - a), variables["batch_stats"], after.get("batch_stats", {}))
    return {**variables, "batch_stats": stats}
