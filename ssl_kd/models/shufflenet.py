"""ShuffleNetV2 (arXiv 1807.11164), as in torchvision.

Modules carry torchvision's names with '_' for '.', so that checkpoints map name by name.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ssl_kd.losses import promote
from ssl_kd.models.convolution import max_pool
from ssl_kd.models.layers import BatchNorm, Conv, Features, Norm, classify, pick_stem


@dataclass(frozen=True)
class _Stem:
    stride: int
    pool: bool  # 3×3 stride-2 max-pool


_STEMS = {
    "imagenet": _Stem(stride=2, pool=True),
    "small": _Stem(stride=1, pool=False),
    "small_s2": _Stem(stride=2, pool=False),
}


class _Block(nn.Module):
    """(B, H, W, C) -> (B, ⌈H / stride⌉, ⌈W / stride⌉, features), half of the features from each of two branches.

    With stride 1 the first branch is the first half of the input as it is, and the second sees the other half alone.
    Features of the branches alternate in the output, so that the next block mixes them.
    """

    features: int
    stride: int
    bn_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        def branch(x: jax.Array, name: str, kernels: tuple[int, ...]) -> jax.Array:
            place = 0  # in torch's Sequential, where a ReLU counts
            for kernel in kernels:
                conv = partial(Conv, dtype=self.dtype, name=f"{name}_{place}")
                batch_norm = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=f"{name}_{place + 1}")
                if kernel == 1:
                    x, place = nn.relu(batch_norm(conv(self.features // 2, 1)(x), norm=norm)), place + 3
                else:
                    depthwise = conv(x.shape[-1], kernel, self.stride, groups=x.shape[-1])
                    x, place = batch_norm(depthwise(x), norm=norm), place + 2
            return x

        if self.stride == 1:
            first, x = jnp.split(x, 2, axis=-1)
        else:
            first = branch(x, "branch1", (3, 1))
        second = branch(x, "branch2", (1, 3, 1))
        return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], self.features)


class ShuffleNetV2(nn.Module):
    """(B, H, W, 3) -> Features: `stages` are stage2, stage3, stage4, conv5; `pooled` conv5's mean over space, float32.

    `width` scales every layer, to even numbers for the two branches. stem="imagenet": 3×3 stride 2 and a 3×3 stride-2
    max-pool; for images up to about 64 px "small": 3×3 stride 1, no pool; "small_s2": 3×3 stride 2, no pool.
    """

    channels: tuple[int, ...]  # of conv1, stage2, stage3, stage4, conv5
    repeats: tuple[int, ...] = (4, 8, 4)  # blocks of stage2, stage3, stage4; the first of each has stride 2
    width: float = 1.0
    stem: str = "imagenet"
    bn_groups: int = 1
    remat: bool = False  # recompute each block in the backward pass instead of keeping what is inside it
    classes: int = 0
    dtype: DTypeLike = jnp.float32

    transformer: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = False
    stochastic_depth: ClassVar[bool] = False

    @property
    def min_size(self) -> int:
        """Smallest useful image side in pixels: the total stride, below which the last maps hold mostly padding."""
        stem = pick_stem(_STEMS, self.stem)
        return stem.stride * (2 if stem.pool else 1) * 2 ** len(self.repeats)

    @property
    def pooled_dim(self) -> int:
        """Width of `pooled`."""
        return self._scaled(self.channels[-1])

    def _scaled(self, channels: int) -> int:
        return max(8, 2 * round(channels * self.width / 2))

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm, dropout: bool = False) -> Features:
        del dropout  # ShuffleNets have none
        stem = pick_stem(_STEMS, self.stem)
        first, *inner, last = (self._scaled(channels) for channels in self.channels)

        def rectified(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=name)(x, norm=norm))

        x = rectified(Conv(first, 3, stem.stride, dtype=self.dtype, name="conv1_0")(x), "conv1_1")
        if stem.pool:
            x = max_pool(x, 3, 2, padding=1)
        block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block  # 2 is norm; 0 the module
        stages = []
        for stage, (features, repeats) in enumerate(zip(inner, self.repeats, strict=True), 2):
            for i in range(repeats):
                stride = 2 if i == 0 else 1
                x = block(features, stride, self.bn_groups, self.dtype, name=f"stage{stage}_{i}")(x, norm)
            stages.append(x)
        x = rectified(Conv(last, 1, dtype=self.dtype, name="conv5_0")(x), "conv5_1")
        pooled = promote(x).mean((1, 2))
        return Features((*stages, x), pooled, classify(pooled, self.classes, "fc"))


ShuffleNetV2x1_0 = partial(ShuffleNetV2, (24, 116, 232, 464, 1024))
ShuffleNetV2x0_5 = partial(ShuffleNetV2, (24, 48, 96, 192, 1024))
