"""Projection heads: what a backbone's features pass through before a loss.

Those of the pooled feature are all called as `head(x, norm=)`; where there is no batch norm, `norm` changes nothing.
The weight-normalised last layers of MOKD's heads are the modules called `last`: an optimizer freezes them by that name.
"""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ssl_kd.errors import UserError
from ssl_kd.losses import HIGHEST, normalize, promote
from ssl_kd.models.layers import BatchNorm, Norm
from ssl_kd.models.vit import Block, gelu, layer_norm, normal_dense, position_embedding

# torch's nn.Linear: kernel and bias uniform in ±1 / sqrt(fan_in).
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _linear(fan_in: int, features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    bound = fan_in**-0.5

    def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, dtype=dtype, kernel_init=_kernel_init, bias_init=bias_init, name=name)


class MLPHead(nn.Module):
    """Linear–[BN–]ReLU–Linear with biases: (B, D) -> (B, out), at least float32, not normalised.

    MoCo-v2 (arXiv 2003.04297) with hidden = D, out = 128; DisCo's wide bottleneck (arXiv 2104.09124) with hidden 2048;
    SwAV (arXiv 2006.09882) with batch norm. `norm` and `bn_groups` are those of `BatchNorm`.
    """

    hidden: int
    out: int
    batch_norm: bool = False
    bn_groups: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm) -> jax.Array:
        x = _linear(x.shape[-1], self.hidden, self.dtype, "fc1")(x)
        if self.batch_norm:
            x = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="bn1")(x, norm=norm)
        return promote(_linear(self.hidden, self.out, self.dtype, "fc2")(nn.relu(x)))


class LinearHead(nn.Module):
    """One linear layer with bias: (B, D) -> (B, out), at least float32, not normalised."""

    out: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm) -> jax.Array:
        del norm
        return promote(_linear(x.shape[-1], self.out, self.dtype, "fc")(x))


class RegressionHead(nn.Module):
    """SimReg's regressor of a teacher's features: (B, d) -> (B, out), at least float32, not normalised.

    Four layers, as in the authors' code of "SimReg" (Navaneet et al., BMVC 2021): Linear to 2d, BN, ReLU, Linear to d,
    Linear to 2d, BN, ReLU, Linear to `out`. Two layers: Linear to 2d, Linear to `out`, with nothing between them.
    `norm` and `bn_groups` are those of `BatchNorm`. UserError for another number of layers.
    """

    out: int
    layers: Literal[2, 4] = 4
    bn_groups: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm) -> jax.Array:
        if self.layers not in (2, 4):
            raise UserError(f"a regression head has 2 or 4 layers, not {self.layers}.")
        d = x.shape[-1]
        hidden = 2 * d

        def rectified(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=name)(x, norm=norm))

        x = _linear(d, hidden, self.dtype, "fc1")(x)
        if self.layers == 4:
            x = _linear(hidden, d, self.dtype, "fc2")(rectified(x, "bn1"))
            x = _linear(d, hidden, self.dtype, "fc3")(x)
            x = rectified(x, "bn2")
        return promote(_linear(hidden, self.out, self.dtype, f"fc{self.layers}")(x))


class WeightNormLinear(nn.Module):
    """Weight-normalised linear layer without bias, y_o = g_o · (x · v_o / |v_o|): (B, in) -> (B, out), ≥ float32.

    `v` (in, out) starts as a torch Linear, as MOKD's and DINO's codes leave it; `g` starts at 1. With `fixed_norm` g is
    1 and no parameter. Else its shape is (1, out): like torch's (out, 1) it has two axes, by which the references
    decide that it decays.
    """

    out: int
    fixed_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        v = self.param("v", _kernel_init, (x.shape[-1], self.out), jnp.float32)
        kernel = v * jax.lax.rsqrt(jnp.sum(v * v, axis=0))
        if not self.fixed_norm:
            kernel = kernel * self.param("g", nn.initializers.ones, (1, self.out), jnp.float32)
        # A similarity to prototypes that a temperature of some hundredths is about to divide: not to be rounded.
        return jnp.matmul(promote(x), kernel, precision=HIGHEST)


class DINOHead(nn.Module):
    """MOKD's MLP-Head, DINO's without batch norm: (B, D) -> logits (B, out), at least float32.

    Linear–GELU–Linear–GELU–Linear, exact GELU, L2 normalisation, weight-normalised linear layer (Caron et al.,
    arXiv 2104.14294; Song et al., arXiv 2304.06461, and the authors' code, which fixes the last layer's norm for the
    CNN and trains it for the ViT).
    """

    fixed_norm: bool
    hidden: int = 2048
    bottleneck: int = 256
    out: int = 65536
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm) -> jax.Array:
        del norm
        linear = partial(normal_dense, dtype=self.dtype)
        for name in ("fc1", "fc2"):
            x = gelu(linear(self.hidden, name=name)(x))
        x = normalize(linear(self.bottleneck, name="fc3")(x))
        return WeightNormLinear(self.out, self.fixed_norm, name="last")(x)


class TokenReduce(nn.Module):
    """The 1×1 convolution before a CNN's T-Head: map (B, h, w, C) -> tokens (B, h · w, dim) by rows, at least float32.

    Their mean is the query that the CNN offers to the other model's T-Head (MOKD, arXiv 2304.06461).
    """

    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels)
        return promote(_linear(channels, self.dim, self.dtype, "patch_embed")(tokens))


class THead(nn.Module):
    """MOKD's T-Head: tokens (B, N, dim) of an h × w grid, by rows -> logits (B, out), at least float32.

    Position embedding, transformer blocks, final LayerNorm, mean over the tokens, weight-normalised linear layer with a
    trained norm (Song et al., arXiv 2304.06461; the authors' THead_CNN without its convolution, and THead_ViT).
    Tokens of another grid than at initialisation get interpolated position embeddings.

    A `query` (B, dim) searches the tokens for what the other model sees: it is prepended without a position, all attend
    to all, and the mean leaves it out. The authors call it cross-attention; it is the same self-attention.
    """

    dim: int
    heads: int
    out: int
    depth: int = 3
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, grid: tuple[int, int], query: jax.Array | None = None) -> jax.Array:
        x = tokens.astype(self.dtype) + position_embedding(self, grid, self.dim).astype(self.dtype)
        if query is not None:
            x = jnp.concatenate([query[:, None].astype(self.dtype), x], axis=1)
        for i in range(self.depth):
            x = Block(self.heads, mlp_ratio=self.mlp_ratio, dtype=self.dtype, name=f"blocks_{i}")(x)
        x = layer_norm(dtype=self.dtype, name="norm")(x)
        if query is not None:
            x = x[:, 1:]
        return WeightNormLinear(self.out, fixed_norm=False, name="last")(promote(x).mean(1))
