"""AlexNet with batch norm, the student of ReKD (arXiv 2112.04174) and of the SeLa line of work, and torchvision's.

The first is a reconstruction: five convolutions 96–256–384–384–256, each with batch norm (hence no bias) and ReLU; two
fully connected layers of 4096 with bias and ReLU but neither batch norm nor dropout. The small stems are ours.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ssl_kd.losses import promote
from ssl_kd.models.convolution import max_pool
from ssl_kd.models.layers import BatchNorm, Conv, Features, Norm, classify, pick_stem, scaled


@dataclass(frozen=True)
class _Flavour:
    convs: tuple[str, ...]  # names of the five convolutions
    channels: tuple[int, ...]  # theirs
    fcs: tuple[str, ...]  # names of the fully connected layers, the classifier last
    batch_norm: bool  # after every convolution; else biases, and dropout of 1 / 2 before the first two of `fcs`
    grid: int | None  # side that the last map is averaged to; None = it stays, and the weights fix the image size


_BATCH_NORM = _Flavour(
    convs=("conv1", "conv2", "conv3", "conv4", "conv5"),
    channels=(96, 256, 384, 384, 256),
    fcs=("fc6", "fc7", "fc8"),
    batch_norm=True,
    grid=None,
)
_TORCHVISION = _Flavour(
    convs=("features_0", "features_3", "features_6", "features_8", "features_10"),
    channels=(64, 192, 384, 256, 256),
    fcs=("classifier_1", "classifier_4", "classifier_6"),
    batch_norm=False,
    grid=6,
)


@dataclass(frozen=True)
class _Stem:
    kernel: int
    stride: int
    pool: int  # window of the stride-2 max-pools
    pooled_convs: tuple[int, ...]  # a pool follows these convolutions, counted from 1
    min_size: int


_STEMS = {
    "imagenet": _Stem(kernel=11, stride=4, pool=3, pooled_convs=(1, 2, 5), min_size=63),
    "small": _Stem(kernel=5, stride=2, pool=2, pooled_convs=(1, 2), min_size=7),
    "small_s2": _Stem(kernel=5, stride=4, pool=2, pooled_convs=(1, 2), min_size=13),
}
_KERNELS = (5, 3, 3, 3)  # of conv2 … conv5


class AlexNet(nn.Module):
    """(B, H, W, 3) -> Features: `stages` are conv1 … conv5 after ReLU and before pooling, `pooled` is fc7 after ReLU.

    `width` scales every layer. stem="imagenet": conv1 11×11 stride 4, 3×3 stride-2 pools after conv1, conv2, conv5.
    For images up to about 64 px, "small": conv1 5×5 stride 2, 2×2 pools after conv1 and conv2; "small_s2": stride 4.
    Fully connected layers see channels before rows and columns, as torch flattens. Kernels start as He's (arXiv
    1502.01852), also in torchvision's flavour.
    """

    flavour: _Flavour = _BATCH_NORM
    width: float = 1.0
    stem: str = "imagenet"
    bn_groups: int = 1
    remat: bool = False  # accepted, as by every backbone: there are no blocks worth computing twice
    classes: int = 0
    dtype: DTypeLike = jnp.float32

    transformer: ClassVar[bool] = False
    stochastic_depth: ClassVar[bool] = False

    @property
    def fixed_size(self) -> bool:
        """Whether images must have the size of those at initialisation."""
        return self.flavour.grid is None

    @property
    def min_size(self) -> int:
        """Smallest image side (pixels) that leaves a non-empty last map."""
        return pick_stem(_STEMS, self.stem).min_size

    @property
    def pooled_dim(self) -> int:
        """Width of `pooled`."""
        return scaled(4096, self.width)

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm, dropout: bool = False) -> Features:
        flavour, stem = self.flavour, pick_stem(_STEMS, self.stem)
        stages = []
        layers = zip(flavour.convs, flavour.channels, (stem.kernel, *_KERNELS), strict=True)
        for i, (name, features, kernel) in enumerate(layers, 1):
            first = {"stride": stem.stride, "padding": 2} if i == 1 else {}
            bias = not flavour.batch_norm
            x = Conv(scaled(features, self.width), kernel, **first, use_bias=bias, dtype=self.dtype, name=name)(x)
            if flavour.batch_norm:
                x = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=f"bn{i}")(x, norm=norm)
            x = nn.relu(x)
            stages.append(x)
            if i in stem.pooled_convs:
                x = max_pool(x, stem.pool, 2)
        if flavour.grid:
            x = _mean_grid(x, flavour.grid)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        *names, classifier = flavour.fcs
        for name in names:
            if dropout and not flavour.batch_norm:
                x = nn.Dropout(0.5, deterministic=False)(x)
            fc = nn.Dense(self.pooled_dim, dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name=name)
            x = nn.relu(fc(x))
        pooled = promote(x)
        return Features(tuple(stages), pooled, classify(pooled, self.classes, classifier))


def _mean_grid(x: jax.Array, side: int) -> jax.Array:
    """torch's adaptive average pool: (B, H, W, C) -> (B, side, side, C), means of overlapping windows."""

    def means(n: int) -> jax.Array:
        pixel, window = np.arange(n), np.arange(side)[:, None]
        inside = (pixel >= window * n // side) & (pixel < -(-(window + 1) * n // side))
        return jnp.asarray(inside / inside.sum(1, keepdims=True), x.dtype)

    return jnp.einsum("ih,jw,bhwc->bijc", means(x.shape[1]), means(x.shape[2]), x)


AlexNetTV = partial(AlexNet, _TORCHVISION)
