"""Projection heads: what a backbone's `pooled` passes through before a loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# torch's nn.Linear: kernel and bias uniform in ±1 / sqrt(fan_in).
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _linear(fan_in: int, features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    bound = fan_in**-0.5

    def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, dtype=dtype, kernel_init=_kernel_init, bias_init=bias_init, name=name)


class MLPHead(nn.Module):
    """Linear–ReLU–Linear with biases: (B, D) -> (B, out), at least float32, not normalised.

    MoCo-v2 (arXiv 2003.04297) with hidden = D, out = 128; DisCo's wide bottleneck (arXiv 2104.09124) with hidden 2048.
    """

    hidden: int
    out: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(_linear(x.shape[-1], self.hidden, self.dtype, "fc1")(x))
        x = _linear(self.hidden, self.out, self.dtype, "fc2")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
