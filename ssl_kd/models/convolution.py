"""Convolutions and pooling as every platform is fast at them: plain on accelerators, lowered by hand on the CPU.

Which lowering takes which shape rests on benchmarks/convolutions.md. Images and maps are NHWC.
"""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Generator, Iterable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_convolutions() -> Generator[None]:
    """What is traced inside has every convolution as it is on an accelerator: for counting FLOPs, for comparisons."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, groups: int = 1) -> jax.Array:
    """2-D cross-correlation of x (B, H, W, C) with kernel (k, k, C / groups, O), zero padding on all sides.

    On the CPU the same sums are taken, in at least float32, by whatever is faster than XLA's convolution and its
    gradients there; all of it is chosen while tracing, and only speed hangs on the choice. What decided it is measured
    in benchmarks/convolutions.md.
    """
    depthwise = groups == x.shape[-1] == kernel.shape[-1]
    if _plain.get() or jax.default_backend() != "cpu" or (groups > 1 and not depthwise):
        return _convolve(x, kernel, stride, padding, groups)
    k, channels, features = kernel.shape[0], x.shape[-1], kernel.shape[-1]
    batch, height, width = x.shape[0], *((n + 2 * padding - k) // stride + 1 for n in x.shape[1:3])
    dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    x = _pad(x.astype(wide), padding, 0) if depthwise else x.astype(wide)  # here, it is one pass with what made x
    # Else XLA may fuse the layers around with the many slices of x and of the gradient, and repeat them for each.
    x, kernel = lax.optimization_barrier((x, kernel.astype(wide)))
    if depthwise:
        out = _depthwise(x, kernel, stride)
    elif k == 1 or max(height, width) <= (3 if stride == 1 else max(3, channels // 16)):
        out = _convolve_by_taps(x, kernel, stride, padding)
    elif (k, stride, padding) == (3, 1, 1) and min(channels, features) >= 128 and batch * height * width >= 512:
        out = _winograd(x, kernel)
    else:
        out = _convolve_by_parts(x, kernel, stride, padding, _batch_parts(batch, height * width, channels))
    return lax.optimization_barrier(out).astype(dtype)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _convolve_by_taps(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """A convolution as one matrix product per element of the kernel, of those pixels alone that the element meets.

    On a small map most elements meet little but padding, of which a convolution computes the products too: 5 / 9 of
    them for 3×3 on a 2×2 map, 2 / 5 on 3×3. On larger maps adding up the products costs more than is saved.
    """
    (batch, *size, channels), k = x.shape, kernel.shape[0]
    out_size = [(n + 2 * padding - k) // stride + 1 for n in size]

    def met(tap: int, axis: int) -> tuple[int, int, int]:
        """The first and the last + 1 output of which element `tap` meets a pixel, and the first such pixel."""
        first = max(0, -((tap - padding) // stride))
        end = min(out_size[axis], (size[axis] - 1 - tap + padding) // stride + 1)
        return first, end, first * stride + tap - padding

    out = jnp.zeros((batch, *out_size, kernel.shape[-1]), x.dtype)
    for i, j in itertools.product(range(k), repeat=2):
        (top, bottom, y), (left, right, z) = met(i, 0), met(j, 1)
        rows, columns = bottom - top, right - left
        if rows > 0 and columns > 0:
            pixels = x[:, y : y + (rows - 1) * stride + 1 : stride, z : z + (columns - 1) * stride + 1 : stride]
            product = (pixels.reshape(-1, channels) @ kernel[i, j]).reshape(batch, rows, columns, -1)
            out += jnp.pad(product, ((0, 0), (top, out_size[0] - bottom), (left, out_size[1] - right), (0, 0)))
    return out


# Winograd's F(2×2, 3×3) (Lavin and Gray, arXiv 1509.09308): per dimension, 2 outputs of a 3-tap kernel take the 4 sums
# of a patch of 4 inputs, times 4 sums of the kernel, summed to 2: 16 products for 2×2 outputs where 36 are direct.
_OF_PATCH = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OF_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_TO_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))


@jax.custom_vjp
def _winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution, 3×3, stride 1, padding 1, with 16 / 36 of the products; no forward mode.

    Errors are those of the convolution (5e-7 of the largest value, 128 channels); larger tiles lose a digit. Sums of
    few channels cost more than the products that they save: hence from 128 channels.
    """
    spread = _kernel_sums(kernel)

    def part(_, x):
        return None, _from_tiles(jnp.einsum("tpc,tco->tpo", _patch_sums(x), spread), x.shape)

    return _joined(lax.scan(part, None, _split(x, kernel))[1])


def _winograd_forward(x, kernel):
    return _winograd(x, kernel), (x, kernel)


def _winograd_backward(saved, gradient):
    x, kernel = saved
    spread = _kernel_sums(kernel[::-1, ::-1])

    def part(products, rows):
        x, gradient = rows
        of_x = _from_tiles(jnp.einsum("tpo,tco->tpc", _patch_sums(gradient), spread), x.shape)
        return products + jnp.einsum("tpc,tpo->tco", _patch_sums(x), _tile_sums(gradient)), of_x

    products = jnp.zeros(spread.shape, spread.dtype)
    products, of_x = lax.scan(part, products, (_split(x, kernel), _split(gradient, kernel)))
    columns = _sums(zip(*_OF_KERNEL, strict=True), products.reshape(4, 4, *kernel.shape[2:]), 1)
    return _joined(of_x), _sums(zip(*_OF_KERNEL, strict=True), columns, 0)


_winograd.defvjp(_winograd_forward, _winograd_backward)


def _split(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Equal parts (parts, rows, H, W, C) of x, small enough for a part's sums to stay in cache: up to 4 MiB.

    Forward at 28×28, 128 channels, batch 32, on one core: 104 ms whole, 59 ms in parts; XLA's convolution 78 ms.
    Every so many rows make a part, not consecutive ones: where a device has a multiple of `parts`, they stay on it.
    """
    batch, height, width, _ = x.shape
    image = (height + 1) // 2 * ((width + 1) // 2) * max(kernel.shape[2:])
    rows = next(n for n in range(batch, 0, -1) if batch % n == 0 and (n == 1 or n * image <= 2**16))
    return x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1)


def _joined(parts: jax.Array) -> jax.Array:
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def _sums(matrix: Iterable[Sequence[float]], terms: Iterable[jax.Array], axis: int) -> jax.Array:
    """The sums of `terms` weighted by each row of `matrix`, stacked along `axis`."""
    terms = list(terms)
    rows = [[weight * term for weight, term in zip(row, terms, strict=True) if weight] for row in matrix]
    return jnp.stack([sum(row[1:], start=row[0]) for row in rows], axis)


def _patch_sums(x: jax.Array) -> jax.Array:
    """(16, tiles, C): the sums of every 4×4 patch, two pixels apart, of x (B, H, W, C) with one pixel of padding."""
    _, height, width, channels = x.shape
    down, across = -(-height // 2), -(-width // 2)
    margins = ((0, 0), (1, 2 * down + 1 - height), (1, 2 * across + 1 - width), (0, 0))
    x = jnp.pad(x, margins)
    rows = _sums(_OF_PATCH, (x[:, i : i + 2 * down - 1 : 2] for i in range(4)), 0)
    return _sums(_OF_PATCH, (rows[:, :, :, j : j + 2 * across - 1 : 2] for j in range(4)), 0).reshape(16, -1, channels)


def _kernel_sums(kernel: jax.Array) -> jax.Array:
    """(16, C, O), in the order of `_patch_sums`: columns before rows."""
    rows = _sums(_OF_KERNEL, kernel, 0)
    return _sums(_OF_KERNEL, rows.swapaxes(0, 1), 0).reshape(16, *kernel.shape[2:])


def _tile_sums(x: jax.Array) -> jax.Array:
    """The transpose of `_from_tiles`: (B, H, W, C) -> (16, tiles, C)."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    rows = _sums(zip(*_TO_OUTPUT, strict=True), (x[:, i::2] for i in range(2)), 0)
    columns = _sums(zip(*_TO_OUTPUT, strict=True), (rows[:, :, :, j::2] for j in range(2)), 0)
    return columns.reshape(16, -1, x.shape[-1])


def _from_tiles(products: jax.Array, shape: Sequence[int]) -> jax.Array:
    """(16, tiles, C) products -> the map (B, H, W, C) of 2×2 outputs each, where `shape` gives B, H and W."""
    batch, height, width, _ = shape
    down, across = -(-height // 2), -(-width // 2)
    columns = _sums(_TO_OUTPUT, products.reshape(4, 4, batch, down, across, -1), 4)
    x = _sums(_TO_OUTPUT, columns, 2).reshape(batch, 2 * down, 2 * across, -1)
    return x[:, :height, :width]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution of every channel of x, padded, with its own kernel as k² shifted multiply-adds; no forward mode."""
    k = len(kernel)
    first, *others = (window * kernel[i // k, i % k] for i, window in enumerate(_windows(x, k, stride)))
    return sum(others, start=first)


def _depthwise_forward(x, kernel, stride):
    return _depthwise(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, saved, gradient):
    """Forward and backward of 5×5 at 28×28, 120 channels, batch 8: 6 ms, against 62 with gradients derived by JAX."""
    x, kernel = saved
    channels = kernel.shape[-1]
    # XLA sums over all but the last axis one value at a time: add up parts of the batch, the rest by a matrix product.
    parts = math.gcd(x.shape[0], 8)
    ones, of_kernel = jnp.ones((1, gradient.size // (parts * channels)), gradient.dtype), []
    for window in _windows(x, len(kernel), stride):
        added = sum(window[i::parts] * gradient[i::parts] for i in range(parts))
        of_kernel.append(ones @ lax.optimization_barrier(added).reshape(-1, channels))
    return _spread(gradient, kernel, stride, x.shape), jnp.concatenate(of_kernel).reshape(kernel.shape)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _spread(gradient: jax.Array, kernel: jax.Array, stride: int, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of `_depthwise` in x, whose shape is given, without the zeros of a gradient spread by the stride.

    Row stride · q + r of x meets element i of the kernel, where i % stride == r, in output q − i // stride; columns
    alike. So each of the stride² interleaved parts of x takes a plain sum of shifted gradients.
    """
    (batch, height, width, channels), (k, reach) = shape, (len(kernel), (len(kernel) - 1) // stride)
    down, across = -(-height // stride), -(-width // stride)
    below, right = down - gradient.shape[1], across - gradient.shape[2]
    gradient = lax.optimization_barrier(jnp.pad(gradient, ((0, 0), (reach, below), (reach, right), (0, 0))))

    def part(first_row: int, first_column: int) -> jax.Array:
        total = jnp.zeros((batch, down, across, channels), gradient.dtype)
        for i, j in itertools.product(range(first_row, k, stride), range(first_column, k, stride)):
            top, left = reach - i // stride, reach - j // stride
            total += gradient[:, top : top + down, left : left + across] * kernel[i, j]
        return total

    rows = (jnp.stack([part(row, column) for column in range(stride)], 3) for row in range(stride))
    return jnp.stack(list(rows), 2).reshape(batch, stride * down, stride * across, channels)[:, :height, :width]


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
    of_kernel = jnp.zeros(kernel.shape, kernel.dtype)
    for i in range(parts):
        pull = jax.linear_transpose(lambda kernel, part=x[:, i]: _convolve(part, kernel, stride, padding), kernel)
        of_kernel += pull(gradient[:, i])[0]
    return of_x, of_kernel


_convolve_by_parts.defvjp(_forward, _backward)


def _batch_parts(batch: int, pixels: int, channels: int) -> int:
    """Into how many parts to split the batch of a kernel gradient, of `pixels` outputs an image, on the CPU.

    It is a matrix product over batch · pixels rows that XLA does not block; parts of 512 rows or more keep in cache.
    Float32, GFLOP/s a core of 1 -> 8 parts: 3×3, batch 128, 14×14, 32 channels 36 -> 61 · 7×7, 64 channels 46 -> 70 ·
    stem 7×7 at 224×224 46 -> 74; but batch 128, 28×28, 16 channels 59 -> 38.
    """
    parts = 1 if 3 < channels < 24 else 8
    while parts > 1 and (batch % parts or batch * pixels < 512 * parts):
        parts //= 2
    return parts


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """torch's MaxPool2d (floor mode) of x (B, H, W, C). Equal maxima share the gradient on the CPU."""
    if jax.default_backend() != "cpu":
        return nn.max_pool(x, (window, window), (stride, stride), [(padding, padding)] * 2)
    first, *others = _windows(_pad(x, padding, -jnp.inf), window, stride)
    for other in others:
        first = jnp.maximum(first, other)
    return first


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
