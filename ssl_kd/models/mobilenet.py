"""MobileNetV2 (arXiv 1801.04381) and V3 (arXiv 1905.02244): tables of inverted residual blocks, built by `MobileNet`.

Modules carry timm's names with '_' for '.', so that checkpoints map name by name. EfficientNets are further tables.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ssl_kd.losses import promote
from ssl_kd.models.layers import (
    BatchNorm,
    Conv,
    Features,
    Norm,
    Pointwise,
    SqueezeExcite,
    branch_scales,
    classify,
    pick_stem,
    scaled,
)

Activation = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Row:
    """Equal blocks.

    Attributes:
      repeats: how many.
      kernel: side of the depthwise kernels.
      stride: of the first; the others have 1.
      expansion: width inside a block, in widths of its input; 1 = there is no expanding convolution.
      channels: width of the outputs.
      squeeze: whether there is squeeze-and-excitation after the depthwise convolution.
      relu: ReLU in place of the network's own activation.
    """

    repeats: int
    kernel: int
    stride: int
    expansion: float
    channels: int
    squeeze: bool = False
    relu: bool = False


@dataclass(frozen=True)
class Squeeze:
    """A network's squeeze-and-excitation: its width, from a block's at the input and inside, and its nonlinearities."""

    hidden: Callable[[int, int], int]
    activation: Activation
    gate: Activation


@dataclass(frozen=True)
class Architecture:
    """Everything in which networks of inverted residual blocks differ.

    Attributes:
      stem: channels of the first convolution.
      stages: rows of blocks; timm's blocks.0, blocks.1, …
      head: width of the pooled feature.
      activation: after every batch norm but a block's last.
      squeeze: of the rows that have it.
      late: channels of V3's convolution after the blocks, whose mean over space the head then takes; 0 = none.
      epsilon: of every batch norm.
      padding: None as torch, 'SAME' as TensorFlow.
    """

    stem: int
    stages: tuple[tuple[Row, ...], ...]
    head: int
    activation: Activation
    squeeze: Squeeze | None = None
    late: int = 0
    epsilon: float = 1e-5
    padding: Literal["SAME"] | None = None

    @property
    def blocks(self) -> dict[str, Row]:
        """Every block by its name, as a row."""
        named = {}
        for i, rows in enumerate(self.stages):
            single = (replace(row, stride=row.stride if k == 0 else 1) for row in rows for k in range(row.repeats))
            named.update({f"blocks_{i}_{j}": row for j, row in enumerate(single)})
        return named


class _Block(nn.Module):
    """Expand, convolve depthwise, squeeze-excite, project: (B, H, W, C) -> (B, ⌈H / stride⌉, ⌈W / stride⌉, features).

    Where the shape stays the input is added, and `scale` (B,), if given, multiplies the branch: stochastic depth.
    """

    row: Row
    features: int
    stride: int
    activation: Activation
    squeeze: Squeeze | None
    conv: Callable[..., Conv]
    batch_norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm, scale: jax.Array | None) -> jax.Array:
        given = x.shape[-1]
        inside = scaled(given, self.row.expansion)
        depthwise = self.conv(inside, self.row.kernel, self.stride, groups=inside, name="conv_dw")
        if self.row.expansion == 1:
            convs = [depthwise, self.conv(self.features, 1, name="conv_pw")]
        else:
            convs = [self.conv(inside, 1, name="conv_pw"), depthwise, self.conv(self.features, 1, name="conv_pwl")]
        y = x
        for i, layer in enumerate(convs, 1):
            y = self.batch_norm(name=f"bn{i}")(layer(y), norm=norm)
            if i < len(convs):
                y = self.activation(y)
            if layer is depthwise and self.squeeze:
                hidden = self.squeeze.hidden(given, inside)
                y = SqueezeExcite(hidden, self.squeeze.activation, self.squeeze.gate, y.dtype, name="se")(y)
        if self.stride > 1 or given != self.features:
            return y
        return x + (y if scale is None else y * scale[:, None, None, None].astype(y.dtype))


class _ConvNorm(nn.Module):
    """1×1 convolution, batch norm, activation: (B, H, W, C) -> (B, H, W, features)."""

    features: int
    activation: Activation
    conv: Callable[..., Conv]
    batch_norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        return self.activation(self.batch_norm(name="bn1")(self.conv(self.features, 1, name="conv")(x), norm=norm))


_STEMS = {"imagenet": (2, 2), "small": (1, 1), "small_s2": (2, 1)}  # strides of the stem and of the first striding row


class MobileNet(nn.Module):
    """(B, H, W, 3) -> Features of a network of inverted residual blocks.

    `stages` are timm's `features_only`: for stem="imagenet" the last map of each resolution, 1 / 2 … 1 / 32, before
    the head. `pooled` is what the classifier sees, float32: the mean over space of the head's convolution, or in V3
    the head of the mean.

    `width` scales every layer. The other stems, for images up to about 64 px, leave out halvings of the resolution:
    "small" those of the first convolution and of the first striding row (total stride 8), "small_s2" the latter alone
    (total stride 16), a quarter of the work. `drop_path` is stochastic depth by timm's rule: in calls with `dropout`,
    block i of n is left out of a row with probability drop_path · i / n.
    """

    architecture: Architecture
    width: float = 1.0
    stem: str = "imagenet"
    bn_groups: int = 1
    remat: bool = False  # recompute each block in the backward pass instead of keeping what is inside it
    drop_path: float = 0.0
    classes: int = 0
    dtype: DTypeLike = jnp.float32

    transformer: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = False
    stochastic_depth: ClassVar[bool] = True

    @property
    def min_size(self) -> int:
        """Smallest useful image side in pixels: the total stride, below which the last maps hold mostly padding."""
        striding = sum(row.stride > 1 for row in self.architecture.blocks.values())
        return math.prod(pick_stem(_STEMS, self.stem)) * 2 ** (striding - 1)

    @property
    def pooled_dim(self) -> int:
        """Width of `pooled`."""
        return scaled(self.architecture.head, self.width)

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm, dropout: bool = False) -> Features:
        a = self.architecture
        conv = partial(Conv, padding=a.padding, dtype=self.dtype)
        batch_norm = partial(BatchNorm, epsilon=a.epsilon, groups=self.bn_groups, dtype=self.dtype)
        stem_stride, first_stride = pick_stem(_STEMS, self.stem)
        x = conv(scaled(a.stem, self.width), 3, stem_stride, name="conv_stem")(x)
        x = a.activation(batch_norm(name="bn1")(x, norm=norm))

        block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block  # 2 is norm; 0 the module
        strides = itertools.chain([first_stride], itertools.repeat(2))
        scales = self._scales(x.shape[0]) if dropout and self.drop_path else [None] * len(a.blocks)
        stages = []
        for (name, row), scale in zip(a.blocks.items(), scales, strict=True):
            if row.stride > 1:
                stages.append(x)
            x = block(
                row=row,
                features=scaled(row.channels, self.width),
                stride=next(strides) if row.stride > 1 else 1,
                activation=nn.relu if row.relu else a.activation,
                squeeze=a.squeeze if row.squeeze else None,
                conv=conv,
                batch_norm=batch_norm,
                name=name,
            )(x, norm, scale)
        if a.late:
            name = f"blocks_{len(a.stages)}_0"
            x = _ConvNorm(scaled(a.late, self.width), a.activation, conv, batch_norm, name=name)(x, norm)
            pooled = Pointwise(self.pooled_dim, dtype=self.dtype, name="conv_head")(x.mean((1, 2)))
            pooled = promote(a.activation(pooled))
        else:
            wide = conv(self.pooled_dim, 1, name="conv_head")(x)
            pooled = promote(a.activation(batch_norm(name="bn2")(wide, norm=norm))).mean((1, 2))
        return Features((*stages, x), pooled, classify(pooled, self.classes, "classifier"))

    def _scales(self, rows: int) -> jax.Array:
        """Stochastic depth (blocks, rows)."""
        blocks = len(self.architecture.blocks)
        counted = blocks + bool(self.architecture.late)  # timm counts V3's late convolution as a block
        return branch_scales(self.make_rng("dropout"), self.drop_path * np.arange(blocks) / counted, (rows,))


def _quarter(given: int, inside: int) -> int:
    """MobileNetV3's squeeze: of the width inside, a multiple of 8 that is not below nine tenths of the quarter."""
    del given
    nearest = max(8, (inside // 4 + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * inside / 4 else nearest + 8


_V2 = Architecture(
    stem=32,
    stages=(
        (Row(1, 3, 1, 1, 16),),
        (Row(2, 3, 2, 6, 24),),
        (Row(3, 3, 2, 6, 32),),
        (Row(4, 3, 2, 6, 64),),
        (Row(3, 3, 1, 6, 96),),
        (Row(3, 3, 2, 6, 160),),
        (Row(1, 3, 1, 6, 320),),
    ),
    head=1280,
    activation=nn.relu6,
)
_V3_LARGE = Architecture(
    stem=16,
    stages=(
        (Row(1, 3, 1, 1, 16, relu=True),),
        (Row(1, 3, 2, 4, 24, relu=True), Row(1, 3, 1, 3, 24, relu=True)),
        (Row(3, 5, 2, 3, 40, squeeze=True, relu=True),),
        (Row(1, 3, 2, 6, 80), Row(1, 3, 1, 2.5, 80), Row(2, 3, 1, 2.3, 80)),
        (Row(2, 3, 1, 6, 112, squeeze=True),),
        (Row(3, 5, 2, 6, 160, squeeze=True),),
    ),
    late=960,
    head=1280,
    activation=nn.hard_swish,
    squeeze=Squeeze(_quarter, nn.relu, nn.hard_sigmoid),
)
_V3_SMALL = replace(
    _V3_LARGE,
    stages=(
        (Row(1, 3, 2, 1, 16, squeeze=True, relu=True),),
        (Row(1, 3, 2, 4.5, 24, relu=True), Row(1, 3, 1, 3.67, 24, relu=True)),
        (Row(1, 5, 2, 4, 40, squeeze=True), Row(2, 5, 1, 6, 40, squeeze=True)),
        (Row(2, 5, 1, 3, 48, squeeze=True),),
        (Row(3, 5, 2, 6, 96, squeeze=True),),
    ),
    late=576,
    head=1024,
)

MobileNetV2 = partial(MobileNet, _V2)
MobileNetV3Large = partial(MobileNet, _V3_LARGE)
MobileNetV3Small = partial(MobileNet, _V3_SMALL)
# torchvision's weights are of networks with another epsilon.
MobileNetV3LargeTV = partial(MobileNet, replace(_V3_LARGE, epsilon=1e-3))
MobileNetV3SmallTV = partial(MobileNet, replace(_V3_SMALL, epsilon=1e-3))
