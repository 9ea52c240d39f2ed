"""Vision transformer (Dosovitskiy et al., arXiv 2010.11929) as in timm and DINO, and what MOKD's T-Heads share with it.

Modules carry timm's names with '_' for '.', so that checkpoints map name by name; `patch_embed` is patch_embed.proj.
Names inside: B batch, N tokens, D width of a token, h × w grid of patches.
"""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ssl_kd.errors import UserError
from ssl_kd.losses import HIGHEST, promote
from ssl_kd.models.layers import Features, Norm, pick_stem

# DINO draws from a normal distribution truncated at ±2, which is ±100 standard deviations: a plain one.
_normal = nn.initializers.normal(0.02)
normal_dense = partial(nn.Dense, kernel_init=_normal)
# Flax's fast variance, E[x²] − E[x]², would cancel where the mean is large.
layer_norm = partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


def interpolate_positions(positions: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Position embeddings (1, n · n, D) of a square grid, sampled for another: (1, h · w, D); as they are for n × n.

    DINO's and MOKD's torch call: bicubic with a = −.75, no antialiasing, edges repeated, and a step of n / (g + .1)
    where n / g would be expected. The .1 was meant to save rounding, and checkpoints are trained with it.
    """
    n = _side(positions.shape[1])
    if grid == (n, n):
        return positions
    rows, columns = (jnp.asarray(_bicubic(n, g), positions.dtype) for g in grid)
    maps = positions.reshape(1, n, n, -1)
    maps = jnp.einsum("hi,wj,bijd->bhwd", rows, columns, maps, precision=HIGHEST)
    return maps.reshape(1, grid[0] * grid[1], -1)


def _side(tokens: int) -> int:
    """√tokens; UserError where they do not fill a square."""
    side = round(tokens**0.5)
    if side**2 != tokens:
        raise UserError(f"{tokens} patches do not fill a square grid: initialise the network with square images.")
    return side


def _bicubic(n: int, g: int) -> np.ndarray:
    """(g, n): row i holds the weights of the n samples in output i, at (i + .5) n / (g + .1) − .5."""
    at = (np.arange(g) + 0.5) * n / (g + 0.1) - 0.5
    taps = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
    distance, a = np.abs(at[:, None] - taps), -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    matrix = np.zeros((g, n))
    # Unlike +=, it adds every tap where several are clipped to one edge.
    np.add.at(matrix, (np.arange(g)[:, None], taps.clip(0, n - 1)), np.where(distance <= 1, near, far))
    return matrix


def position_embedding(module: nn.Module, grid: tuple[int, int], dim: int, *, before: int = 0) -> jax.Array:
    """`module`'s parameter 'pos_embed' for an h × w grid: (1, before + h · w, dim), float32 as parameters are.

    The parameter belongs to the grid at initialisation, which is square (UserError if not); for another grid it is
    interpolated. The first `before` positions are those of tokens outside the grid, a class token, and stay.
    """
    # Flax refuses a parameter whose shape is not the one asked for, and this one's is not the current grid's but that
    # of the first: where it is stored, ask for what is there.
    if module.has_variable("params", "pos_embed"):
        tokens: int = module.get_variable("params", "pos_embed").shape[1]
    else:
        tokens = before + _side(grid[0] * grid[1]) ** 2
    positions = module.param("pos_embed", _normal, (1, tokens, dim), jnp.float32)
    return jnp.concatenate([positions[:, :before], interpolate_positions(positions[:, before:], grid)], axis=1)


def gelu(x: jax.Array) -> jax.Array:
    """x · Φ(x), exact, in the dtype of x and computed in at least float32.

    As x / 2 · (1 + erf(x / √2)), like torch, not flax's x / 2 · erfc(−x / √2), with which a whole `Mlp` takes XLA 2.5
    times as long on the CPU (forward and backward, 32 rows of 65 tokens, D 192).
    """
    wide = promote(x)
    return (wide / 2 * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class Attention(nn.Module):
    """Self-attention of all tokens: (B, N, D) -> (B, N, D), softmax in at least float32.

    The features of `qkv` are q, k, v, and head by head within each. UserError where `heads` does not divide D.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, dim = x.shape
        if dim % self.heads:
            raise UserError(f"{self.heads} attention heads do not divide {dim} features: choose a divisor.")
        qkv = normal_dense(3 * dim, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, dim // self.heads), 2, 0)
        wide = jnp.promote_types(q.dtype, jnp.float32)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
        weights = jax.nn.softmax(logits * (dim // self.heads) ** -0.5)
        x = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
        return normal_dense(dim, dtype=self.dtype, name="proj")(x.reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Linear–GELU–Linear, exact GELU, hidden width `ratio` · D: (B, N, D) -> (B, N, D)."""

    ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = normal_dense(self.ratio * x.shape[-1], dtype=self.dtype, name="fc1")(x)
        return normal_dense(x.shape[-1], dtype=self.dtype, name="fc2")(gelu(hidden))


class Block(nn.Module):
    """Pre-norm transformer block: x += attn(LN x), x += mlp(LN x); (B, N, D) -> (B, N, D).

    `scales` (2, B) multiply the branches of each row: stochastic depth.
    """

    heads: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, scales: jax.Array | None = None) -> jax.Array:
        y = Attention(self.heads, dtype=self.dtype, name="attn")(layer_norm(dtype=self.dtype, name="norm1")(x))
        x = x + (y if scales is None else y * scales[0, :, None, None].astype(y.dtype))
        y = Mlp(self.mlp_ratio, dtype=self.dtype, name="mlp")(layer_norm(dtype=self.dtype, name="norm2")(x))
        return x + (y if scales is None else y * scales[1, :, None, None].astype(y.dtype))


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride = `patch`: (B, H, W, C) -> (B, H // patch, W // patch, dim), rests cut off.

    Initialised as torch's Conv2d, uniform in ±1 / sqrt(fan_in), which DINO leaves as it is.
    """

    patch: int
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        p, h, w = self.patch, height // self.patch, width // self.patch
        fan_in = p * p * channels

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)

        kernel = self.param("kernel", init, (p, p, channels, self.dim)).astype(self.dtype)
        bias = self.param("bias", init, (self.dim,)).astype(self.dtype)
        # Patches do not overlap, so that the convolution is one matrix product: faster than XLA's convolution.
        patches = x[:, : h * p, : w * p].reshape(batch, h, p, w, p, channels).swapaxes(2, 3)
        return patches.reshape(batch, h, w, fan_in).astype(self.dtype) @ kernel.reshape(fan_in, self.dim) + bias


_PATCHES = {"imagenet": 16, "small": 4, "small_s2": 8}  # stem -> side in pixels


class ViT(nn.Module):
    """(B, H, W, 3) -> Features of a vision transformer with a class token, as DINO uses it.

    `stages` are maps (B, h, w, D) of the patch tokens: after a quarter, half and three quarters of the blocks, and
    last, after the final LayerNorm, those that a T-Head takes. `pooled` is the class token after it, float32.
    Images of another size than at initialisation get interpolated position embeddings; the first must be square.

    `width` multiplies the number of heads, whose width stays. stem="imagenet": 16-px patches; for images up to about
    64 px "small": 4 px, or "small_s2": 8 px, a quarter of the tokens. `drop_path` is the last block's probability of
    stochastic depth, rising linearly from 0 at the first; only calls with `dropout` drop. There is no batch norm:
    `bn_groups` and `norm` are accepted, as by every backbone, and change nothing.
    """

    embed_dim: int
    depth: int
    heads: int
    width: float = 1.0
    stem: str = "imagenet"
    bn_groups: int = 1
    remat: bool = False  # recompute each block in the backward pass instead of keeping what is inside it
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    transformer: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = False

    @property
    def min_size(self) -> int:
        """Smallest image side in pixels: one patch."""
        return pick_stem(_PATCHES, self.stem)

    @property
    def pooled_dim(self) -> int:
        """Width D of `pooled` and of every token."""
        return self.embed_dim // self.heads * self._heads

    @property
    def _heads(self) -> int:
        return max(1, round(self.heads * self.width))

    @nn.compact
    def __call__(self, x: jax.Array, *, norm: Norm, dropout: bool = False) -> Features:
        del norm
        dim = self.pooled_dim
        x = PatchEmbed(pick_stem(_PATCHES, self.stem), dim, dtype=self.dtype, name="patch_embed")(x)
        batch, h, w, _ = x.shape

        def patches(x: jax.Array) -> jax.Array:
            return x[:, 1:].reshape(batch, h, w, dim)

        cls_token = self.param("cls_token", _normal, (1, 1, dim), jnp.float32).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (batch, 1, dim)), x.reshape(batch, h * w, dim)], axis=1)
        x = x + position_embedding(self, (h, w), dim, before=1).astype(self.dtype)
        block = nn.remat(Block) if self.remat else Block
        scales = self.branch_scales(batch) if dropout and self.drop_path else [None] * self.depth
        stages = []
        for i in range(self.depth):
            x = block(self._heads, dtype=self.dtype, name=f"blocks_{i}")(x, scales[i])
            if i + 1 in {self.depth * quarters // 4 for quarters in (1, 2, 3)}:
                stages.append(patches(x))
        x = layer_norm(dtype=self.dtype, name="norm")(x)
        return Features(stages=(*stages, patches(x)), pooled=promote(x[:, 0]))

    def branch_scales(self, rows: int) -> jax.Array:
        """Stochastic depth (depth, 2, rows): 0 where a branch is left out of a row, 1 / (1 − p) where it stays.

        Drawn at once: a generator for every branch would double the time to compile.
        """
        keep = 1 - np.linspace(0, self.drop_path, self.depth)[:, None, None]
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (self.depth, 2, rows))
        return kept / keep


ViTTiny = partial(ViT, embed_dim=192, depth=12, heads=3)
ViTSmall = partial(ViT, embed_dim=384, depth=12, heads=6)
ViTBase = partial(ViT, embed_dim=768, depth=12, heads=12)
