"""The layers every backbone is built from, and the record a backbone returns. Images and maps are NHWC.

Parameters are float32; `dtype` is the compute dtype (float32 or bfloat16) of what a layer returns.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ssl_kd.errors import UserError

Norm = Literal["batch", "running"]

# torchvision's initialisation of ResNet convolutions: normal, variance 2 / (k · k · features).
he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Features(flax.struct.PyTreeNode):
    """What a backbone returns: `stages`, feature maps (B, H, W, C) from fine to coarse, and `pooled` (B, D) float32."""

    stages: tuple[jax.Array, ...]
    pooled: jax.Array

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


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, groups: int = 1) -> jax.Array:
    """2-D cross-correlation of x (B, H, W, C) with kernel (k, k, C / groups, O), zero padding on all sides.

    On the CPU the same sums are taken by whatever is faster than XLA's convolution and its gradients there: one matrix
    product (`_matmul_is_faster`), shifted multiply-adds where every channel has its own kernel, and a gradient of the
    kernel that is added up over parts of the batch (`_batch_parts`).
    """
    if jax.default_backend() != "cpu":
        return _convolve(x, kernel, stride, padding, groups)
    k, out_features = kernel.shape[0], kernel.shape[-1]
    batch, *size = x.shape[:-1]
    height, width = ((n + 2 * padding - k) // stride + 1 for n in size)
    if groups == x.shape[-1] == out_features:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        taps = kernel.astype(wide).reshape(k * k, out_features)
        windows = _windows(_pad(x.astype(wide), padding, 0), k, stride)
        return sum(window * tap for window, tap in zip(windows, taps, strict=True)).astype(x.dtype)
    if groups > 1:
        return _convolve(x, kernel, stride, padding, groups)
    if _matmul_is_faster(batch, height, width, k, x.shape[-1], stride):
        columns = jnp.concatenate(_windows(_pad(x, padding, 0), k, stride), axis=-1)
        product = columns.reshape(batch * height * width, -1) @ kernel.reshape(-1, out_features)
        return product.reshape(batch, height, width, out_features)
    parts = _batch_parts(batch, height * width, x.shape[-1])
    return _convolve_by_parts(x, kernel, stride, padding, parts) if parts > 1 else _convolve(x, kernel, stride, padding)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve_by_parts(x: jax.Array, kernel: jax.Array, stride: int, padding: int, parts: int) -> jax.Array:
    """A convolution whose kernel gradient is the sum of those of `parts` equal parts of the batch; no forward mode."""
    del parts
    return _convolve(x, kernel, stride, padding)


def _forward(x, kernel, stride, padding, parts):
    return _convolve_by_parts(x, kernel, stride, padding, parts), (x, kernel)


def _backward(stride, padding, parts, saved, gradient):
    x, kernel = saved
    (of_x,) = jax.linear_transpose(lambda x: _convolve(x, kernel, stride, padding), x)(gradient)
    # Every parts-th row, not consecutive ones: where a device has a multiple of `parts` rows, they stay on it.
    x, gradient = (a.reshape(-1, parts, *a.shape[1:]) for a in (x, gradient))
    of_kernel = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
    for i in range(parts):
        pull = jax.linear_transpose(lambda kernel, part=x[:, i]: _convolve(part, kernel, stride, padding), kernel)
        of_kernel += pull(gradient[:, i])[0]
    return of_x, of_kernel.astype(kernel.dtype)


_convolve_by_parts.defvjp(_forward, _backward)


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """torch's MaxPool2d (floor mode) of x (B, H, W, C). Equal maxima share the gradient on the CPU."""
    if jax.default_backend() != "cpu":
        return nn.max_pool(x, (window, window), (stride, stride), [(padding, padding)] * 2)
    first, *others = _windows(_pad(x, padding, -jnp.inf), window, stride)
    for other in others:
        first = jnp.maximum(first, other)
    return first


def _matmul_is_faster(batch: int, height: int, width: int, k: int, channels: int, stride: int) -> bool:
    """Whether slices and one matrix product are faster than XLA's convolution, of output height × width.

    Static: decided while tracing, so only speed hangs on it being right; value and gradient are equal.
    Forward + backward on 2 cores, float32, GFLOP/s, convolution -> matrix product:
      1×1 at 14×14, 64 -> 256             51 ->  93     3×3 at 2×2, 256 -> 256              11 -> 181
      stem 5×5 stride 2, 3 -> 48          52 ->  93     3×3 stride 2 to 2×2, 128 -> 256     22 -> 163
      stem 3×3, 3 -> 64 at 32×32          29 ->  48     3×3 stride 2, 32 -> 64 to 7×7       52 ->  92
    but the other way at stride 1, and where the slices outgrow the cache (4 Mi floats = 16 MiB):
      3×3 at 4×4, 128 -> 128             165 -> 138     5×5 at 7×7, batch 256, 48 -> 128    81 ->  51
      3×3 at 14×14, 32 -> 32              74 ->  45     stem 7×7 stride 2 at 224×224        73 ->  58
    """
    if k == 1 or max(height, width) <= 2:
        return True
    return (stride > 1 or channels == 3) and batch * height * width * k * k * channels <= 2**22


def _batch_parts(batch: int, pixels: int, channels: int) -> int:
    """Into how many parts to split the batch of a kernel gradient, of `pixels` outputs an image, on the CPU.

    It is a matrix product over batch · pixels rows that XLA does not block; parts of 512 rows or more keep in cache.
    3×3, float32, GFLOP/s a core of 1 -> 8 parts: batch 128, 14×14, 32 channels 36 -> 61 · 7×7, 64 channels 46 -> 70 ·
    batch 16, 56×56, 64 channels 56 -> 81; but batch 128, 28×28, 16 channels 37 -> 29.
    """
    parts = 8 if channels >= 24 else 1
    while parts > 1 and (batch % parts or batch * pixels < 512 * parts):
        parts //= 2
    return parts


def _pad(x: jax.Array, padding: int, value: float) -> jax.Array:
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=value)


def _windows(x: jax.Array, k: int, stride: int) -> list[jax.Array]:
    """The k² strided slices of x whose i-th holds element i of every k × k window, row by row."""
    batch, height, width, channels = x.shape
    bottom, right = height - k + 1, width - k + 1
    return [
        lax.slice(x, (0, i, j, 0), (batch, bottom + i, right + j, channels), (1, stride, stride, 1))
        for i in range(k)
        for j in range(k)
    ]


class Conv(nn.Module):
    """Square convolution of (B, H, W, C); `padding` None pads kernel // 2 on every side, as torch models do."""

    features: int
    kernel: int
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", he_fan_out, shape, jnp.float32)
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
