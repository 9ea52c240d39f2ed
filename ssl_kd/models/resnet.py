"""ResNet (He et al., arXiv 1512.03385) in torchvision's v1.5 layout: a bottleneck strides in its 3×3 convolution.

Modules carry torchvision's names with '_' for '.', so that checkpoints map name by name.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ssl_kd.losses import promote
from ssl_kd.models.convolution import max_pool
from ssl_kd.models.layers import BatchNorm, Conv, Features, Norm, classify, pick_stem, scaled


@dataclass(frozen=True)
class _Stem:
    kernel: int
    stride: int
    pool: bool  # 3×3 stride-2 max-pool


_STEMS = {
    "imagenet": _Stem(kernel=7, stride=2, pool=True),
    "small": _Stem(kernel=3, stride=1, pool=False),
    "small_s2": _Stem(kernel=3, stride=2, pool=False),
}
_EXPANSION = {"basic": 1, "bottleneck": 4}


class _Block(nn.Module):
    """Residual block: (B, H, W, C) -> (B, ⌈H / stride⌉, ⌈W / stride⌉, planes · expansion)."""

    kind: Literal["basic", "bottleneck"]
    planes: int
    stride: int
    bn_groups: int
    zero_init_residual: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        features = self.planes * _EXPANSION[self.kind]
        conv = partial(Conv, dtype=self.dtype)
        batch_norm = partial(BatchNorm, groups=self.bn_groups, dtype=self.dtype)
        last_scale = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        convs: tuple[tuple[int, int, int], ...]  # features, kernel, stride
        if self.kind == "basic":
            convs = ((self.planes, 3, self.stride), (features, 3, 1))
        else:
            convs = ((self.planes, 1, 1), (self.planes, 3, self.stride), (features, 1, 1))

        y = x
        for i, (width, kernel, stride) in enumerate(convs, 1):
            last = i == len(convs)
            y = conv(width, kernel, stride, name=f"conv{i}")(y)
            scale_init = last_scale if last else nn.initializers.ones
            y = batch_norm(scale_init=scale_init, name=f"bn{i}")(y, norm=norm)
            if not last:
                y = nn.relu(y)
        if self.stride > 1 or x.shape[-1] != features:
            x = conv(features, 1, self.stride, name="downsample_0")(x)
            x = batch_norm(name="downsample_1")(x, norm=norm)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """(B, H, W, 3) -> Features: `stages` are layer1, layer2, …; `pooled` the mean of the last map over space, float32.

    `width` scales every layer. stem="imagenet": 7×7 stride 2 and a 3×3 stride-2 max-pool; "small": 3×3 stride 1, no
    pool (the usual CIFAR form); "small_s2": 3×3 stride 2, no pool, a quarter of the work.
    """

    stage_sizes: tuple[int, ...]
    block: Literal["basic", "bottleneck"]
    channels: int = 64  # of the stem and inside the blocks of layer1, twice as many in each later layer
    width: float = 1.0
    stem: str = "imagenet"
    bn_groups: int = 1
    remat: bool = False  # recompute each block in the backward pass instead of keeping what is inside it
    zero_init_residual: bool = False
    classes: int = 0
    dtype: DTypeLike = jnp.float32

    transformer: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = False
    stochastic_depth: ClassVar[bool] = False

    @property
    def min_size(self) -> int:
        """Smallest useful image side in pixels: the total stride, below which the last maps hold mostly padding."""
        stem = pick_stem(_STEMS, self.stem)
        return stem.stride * (2 if stem.pool else 1) * 2 ** (len(self.stage_sizes) - 1)

    @property
    def pooled_dim(self) -> int:
        """Width of `pooled`."""
        return self._planes(len(self.stage_sizes) - 1) * _EXPANSION[self.block]

    def _planes(self, stage: int) -> int:
        return scaled(self.channels * 2**stage, self.width)

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm, dropout: bool = False) -> Features:
        del dropout  # ResNets have none
        stem = pick_stem(_STEMS, self.stem)
        x = Conv(self._planes(0), stem.kernel, stem.stride, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="bn1")(x, norm=norm))
        if stem.pool:
            x = max_pool(x, 3, 2, padding=1)
        block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block  # 2 is norm; 0 the module
        stages = []
        for stage, blocks in enumerate(self.stage_sizes):
            for i in range(blocks):
                x = block(
                    kind=self.block,
                    planes=self._planes(stage),
                    stride=2 if stage > 0 and i == 0 else 1,
                    bn_groups=self.bn_groups,
                    zero_init_residual=self.zero_init_residual,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{i}",
                )(x, norm)
            stages.append(x)
        pooled = promote(x).mean((1, 2))
        return Features(tuple(stages), pooled, classify(pooled, self.classes, "fc"))


ResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2), block="basic")
ResNet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block="basic")
ResNet50 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block="bottleneck")
ResNet101 = partial(ResNet, stage_sizes=(3, 4, 23, 3), block="bottleneck")
ResNet152 = partial(ResNet, stage_sizes=(3, 8, 36, 3), block="bottleneck")
ResNet50w2 = partial(ResNet50, channels=128)  # SwAV's, arXiv 2006.09882: all layers twice as wide
