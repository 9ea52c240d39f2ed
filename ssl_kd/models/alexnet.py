"""AlexNet with batch norm, the student of ReKD (arXiv 2112.04174) and of the SeLa line of work.

A reconstruction: five convolutions 96–256–384–384–256, each with batch norm (hence no bias) and ReLU; two fully
connected layers of 4096 with bias and ReLU but neither batch norm nor dropout. The small stem is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ssl_kd.models.layers import BatchNorm, Conv, Features, Norm, max_pool, pick_stem, scaled


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
}
_CONVS = ((256, 5), (384, 3), (384, 3), (256, 3))  # features and kernel of conv2 … conv5


class AlexNet(nn.Module):
    """(B, H, W, 3) -> Features: `stages` are conv1 … conv5 after ReLU and before pooling, `pooled` is fc7 after ReLU.

    `width` scales every layer. stem="imagenet": conv1 11×11 stride 4, 3×3 stride-2 pools after conv1, conv2, conv5.
    stem="small", for images up to about 64 px: conv1 5×5 stride 2, 2×2 pools after conv1 and conv2.
    The fully connected layers fix the image size at initialisation.
    """

    width: float = 1.0
    stem: str = "imagenet"
    bn_groups: int = 1
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    transformer: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = True

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
        del dropout  # this variant has none; nor does remat change it: it has no blocks worth computing twice
        stem = pick_stem(_STEMS, self.stem)
        stages = []
        convs = ((96, stem.kernel), *_CONVS)
        for i, (features, kernel) in enumerate(convs, 1):
            first = {"stride": stem.stride, "padding": 2} if i == 1 else {}
            x = Conv(scaled(features, self.width), kernel, **first, dtype=self.dtype, name=f"conv{i}")(x)
            x = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=f"bn{i}")(x, norm=norm)
            x = nn.relu(x)
            stages.append(x)
            if i in stem.pooled_convs:
                x = max_pool(x, stem.pool, 2)
        x = x.reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            fc = nn.Dense(self.pooled_dim, dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name=name)
            x = nn.relu(fc(x))
        return Features(stages=tuple(stages), pooled=x.astype(jnp.promote_types(x.dtype, jnp.float32)))
