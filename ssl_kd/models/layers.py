"""The layers every backbone is built from, and the record a backbone returns. Images and maps are NHWC.

Parameters are float32; `dtype` is the compute dtype (float32 or bfloat16) of what a layer returns.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ssl_kd.errors import UserError
from ssl_kd.models.convolution import convolve

Norm = Literal["batch", "running"]


class Features(flax.struct.PyTreeNode):
    """What a backbone returns: `stages`, feature maps (B, H, W, C) from fine to coarse, and `pooled` (B, D) float32.

    `logits` (B, classes), float32, are those of a backbone that was given `classes`, None without.
    """

    stages: tuple[jax.Array, ...]
    pooled: jax.Array
    logits: jax.Array | None = None

    @property
    def map(self) -> jax.Array:
        """The last feature map (B, H, W, C)."""
        return self.stages[-1]


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8, at least 8."""
    return max(8, 8 * round(channels * width / 8))


def pick_stem(stems: Mapping[str, Any], stem: str) -> Any:
    """The entry of a backbone's table of stems; UserError for a stem it does not have."""
    if stem not in stems:
        raise UserError(f"stem={stem!r} does not exist for this network: choose one of {', '.join(stems)}.")
    return stems[stem]


def he_fan_out(groups: int = 1) -> nn.initializers.Initializer:
    """Normal, variance 2 / (k · k · features of a group): torchvision's ResNets and timm's EfficientNets start so."""
    return nn.initializers.variance_scaling(2.0 * groups, "fan_out", "normal")


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros that TensorFlow's 'SAME' puts before and after `size` pixels."""
    zeros = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return zeros // 2, zeros - zeros // 2


class Conv(nn.Module):
    """Square convolution of (B, H, W, C); `padding` None pads kernel // 2 on every side, as torch models do.

    padding="SAME" pads as TensorFlow: to ⌈H / stride⌉ × ⌈W / stride⌉ outputs, an odd rest at the bottom and the right.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: int | Literal["SAME"] | None = None
    groups: int = 1
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", he_fan_out(self.groups), shape, jnp.float32)
        if self.padding == "SAME":
            margins = [_same_padding(n, self.kernel, self.stride) for n in x.shape[1:3]]
            x, padding = jnp.pad(x, ((0, 0), *margins, (0, 0))), 0
        else:
            padding = self.kernel // 2 if self.padding is None else self.padding
        x = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=padding,
            groups=self.groups,
        )
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return x


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (torch's BatchNorm, channels last).

    norm="batch" normalises by the statistics of the batch: mean and biased two-pass variance in at least float32,
    taken separately in `groups` contiguous groups of rows, as the per-GPU batch norm of the reference codes does.
    The running statistics ('batch_stats': mean, var) then move by 1 − momentum towards the groups' mean, variance
    unbiased; where 'batch_stats' is not mutable the move is dropped. norm="running" uses and leaves them.

    UserError where the rows do not divide into `groups`, or leave a group one value a channel.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    groups: int = 1
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm) -> jax.Array:
        channels = x.shape[-1:]
        scale = self.param("scale", self.scale_init, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)

        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if norm == "running":
            mean, var = running_mean.value, running_var.value
        elif norm == "batch":
            wide = wide.reshape(self.groups, self._rows_per_group(x), *x.shape[1:])
            axes = tuple(range(1, wide.ndim - 1))
            mean = wide.mean(axes, keepdims=True)
            var = jnp.square(wide - mean).mean(axes, keepdims=True)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                count = x.size // (self.groups * x.shape[-1])
                self._move(running_mean, mean)
                self._move(running_var, var * (count / (count - 1)))
        else:
            raise ValueError(f"norm is 'batch' or 'running', not {norm!r}")
        normalised = (wide - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        return normalised.reshape(x.shape).astype(self.dtype)

    def _rows_per_group(self, x: jax.Array) -> int:
        rows = x.shape[0]
        if rows % self.groups:
            raise UserError(f"bn_groups={self.groups} does not divide the batch of {rows} rows: choose a divisor.")
        if x.size == self.groups * x.shape[-1] and not self.is_initializing():
            raise UserError(
                f"bn_groups={self.groups} on a batch of {rows} rows leaves one value per channel to normalise by: "
                "raise the batch size or lower bn_groups."
            )
        return rows // self.groups

    def _move(self, running: nn.Variable, batch: jax.Array) -> None:
        batch = lax.stop_gradient(batch).reshape(self.groups, -1).mean(0)
        moved = self.momentum * running.value + (1 - self.momentum) * batch
        running.value = moved.astype(running.value.dtype)


class Pointwise(nn.Module):
    """A 1×1 convolution with bias of single pixels (B, C), as a matrix product; the kernel is (1, 1, C, features)."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", he_fan_out(), (1, 1, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return x.astype(self.dtype) @ kernel[0, 0].astype(self.dtype) + bias.astype(self.dtype)


class SqueezeExcite(nn.Module):
    """Every channel of (B, H, W, C) times `gate` of a two-layer network of all channels' means (arXiv 1709.01507)."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    gate: Callable[[jax.Array], jax.Array]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weights = self.activation(Pointwise(self.hidden, dtype=self.dtype, name="conv_reduce")(x.mean((1, 2))))
        weights = self.gate(Pointwise(x.shape[-1], dtype=self.dtype, name="conv_expand")(weights))
        return x * weights[:, None, None]


def classify(pooled: jax.Array, classes: int, name: str) -> jax.Array | None:
    """Logits (B, classes) of a linear layer called `name`, in the dtype of `pooled`; None for 0 classes.

    It starts as MoCo's and DINO's linear classifiers do: normal with deviation .01, no bias.
    """
    if not classes:
        return None
    return nn.Dense(classes, dtype=pooled.dtype, kernel_init=nn.initializers.normal(0.01), name=name)(pooled)


def branch_scales(key: jax.Array, rates: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Stochastic depth (arXiv 1603.09382): (branches, *shape), 0 where a branch is left out, else 1 / (1 − its rate).

    Drawn at once: a generator for every branch would double the time to compile.
    """
    keep = 1 - np.reshape(rates, (-1, *(1 for _ in shape)))
    return jax.random.bernoulli(key, keep, (len(rates), *shape)) / keep
