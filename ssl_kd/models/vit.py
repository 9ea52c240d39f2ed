"""Vision transformer (Dosovitskiy et al., arXiv 2010.11929) as in timm, DINO and DINOv2 (arXiv 2304.07193), and what
MOKD's T-Heads share with it.

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
from ssl_kd.models.layers import Features, Norm, branch_scales, classify, pick_stem

# DINO draws from a normal distribution truncated at ±2, which is ±100 standard deviations: a plain one.
_normal = nn.initializers.normal(0.02)
normal_dense = partial(nn.Dense, kernel_init=_normal)
# Flax's fast variance, E[x²] − E[x]², would cancel where the mean is large.
layer_norm = partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


def interpolate_positions(positions: jax.Array, grid: tuple[int, int], *, antialias: bool = False) -> jax.Array:
    """Position embeddings (1, n · n, D) of a square grid, sampled for another: (1, h · w, D); as they are for n × n.

    DINO's and MOKD's torch call: bicubic with a = −.75, no antialiasing, edges repeated, and a step of n / (g + .1)
    where n / g would be expected. The .1 was meant to save rounding, and checkpoints are trained with it: DINOv2's
    too, but for those with registers, whose `antialias` is torch's: a = −.5, a step of n / g, wider where g < n.
    """
    n = _side(positions.shape[1])
    if grid == (n, n):
        return positions
    weights = _antialiased if antialias else _bicubic
    rows, columns = (jnp.asarray(weights(n, g), positions.dtype) for g in grid)
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
    matrix = np.zeros((g, n))
    # Unlike +=, it adds every tap where several are clipped to one edge.
    np.add.at(matrix, (np.arange(g)[:, None], taps.clip(0, n - 1)), _cubic(at[:, None] - taps, -0.75))
    return matrix


def _antialiased(n: int, g: int) -> np.ndarray:
    """(g, n): row i holds the weights of the n samples in output i, at (i + .5) n / g − .5."""
    at = (np.arange(g) + 0.5) * n / g - 0.5
    matrix = _cubic((at[:, None] - np.arange(n)) / max(1, n / g), -0.5)
    return matrix / matrix.sum(1, keepdims=True)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' convolution kernel."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def position_embedding(
    module: nn.Module, grid: tuple[int, int], dim: int, *, before: int = 0, antialias: bool = False
) -> jax.Array:
    """`module`'s parameter 'pos_embed' for an h × w grid: (1, before + h · w, dim), float32 as parameters are.

    The parameter belongs to the grid at initialisation, which is square (UserError if not); for another grid it is
    interpolated (`antialias`: see there). The first `before` positions are those of tokens outside the grid, a class
    token, and stay.
    """
    # Flax refuses a parameter whose shape is not the one asked for, and this one's is not the current grid's but that
    # of the first: where it is stored, ask for what is there.
    if module.has_variable("params", "pos_embed"):
        tokens: int = module.get_variable("params", "pos_embed").shape[1]
    else:
        tokens = before + _side(grid[0] * grid[1]) ** 2
    positions = module.param("pos_embed", _normal, (1, tokens, dim), jnp.float32)
    patches = interpolate_positions(positions[:, before:], grid, antialias=antialias)
    return jnp.concatenate([positions[:, :before], patches], axis=1)


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


class LayerScale(nn.Module):
    """(…, D) times a learnt `gamma` (D,), which starts as `start`."""

    start: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.constant(self.start), x.shape[-1:], jnp.float32)
        return x * gamma.astype(self.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: x += attn(LN x), x += mlp(LN x); (B, N, D) -> (B, N, D).

    `layer_scale` above 0 is what the LayerScales of both branches start as. `scales` (2, B) multiply the branches of
    each row: stochastic depth.
    """

    heads: int
    mlp_ratio: int = 4
    layer_scale: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, scales: jax.Array | None = None) -> jax.Array:
        layers = (Attention(self.heads, dtype=self.dtype, name="attn"), Mlp(self.mlp_ratio, self.dtype, name="mlp"))
        for i, layer in enumerate(layers, 1):
            y = layer(layer_norm(dtype=self.dtype, name=f"norm{i}")(x))
            if self.layer_scale:
                y = LayerScale(self.layer_scale, dtype=self.dtype, name=f"ls{i}")(y)
            x = x + (y if scales is None else y * scales[i - 1, :, None, None].astype(y.dtype))
        return x


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


_SMALL_PATCHES = {"small": 4, "small_s2": 8}  # stem -> side in pixels


class ViT(nn.Module):
    """(B, H, W, 3) -> Features of a vision transformer with a class token, as DINO and DINOv2 use it.

    `stages` are maps (B, h, w, D) of the patch tokens: after a quarter, half and three quarters of the blocks, and
    last, after the final LayerNorm, those that a T-Head takes. `pooled` is the class token after it, float32.
    Images of another size than at initialisation get interpolated position embeddings; the first must be square.

    `registers` further tokens are between class token and patches (arXiv 2309.16588); with them only patches have
    positions, and these are interpolated with antialiasing.

    `width` multiplies the number of heads, whose width stays. stem="imagenet": patches of `patch` px; for images up to
    about 64 px "small": 4 px, or "small_s2": 8 px, a quarter of the tokens. `drop_path` is the last block's probability
    of stochastic depth, rising linearly from 0 at the first; only calls with `dropout` drop. There is no batch norm:
    `bn_groups` and `norm` are accepted, as by every backbone, and change nothing.
    """

    embed_dim: int
    depth: int
    heads: int
    patch: int = 16
    layer_scale: float = 0.0  # what DINOv2's LayerScales start as; 0 = there are none
    registers: int = 0
    width: float = 1.0
    stem: str = "imagenet"
    bn_groups: int = 1
    remat: bool = False  # recompute each block in the backward pass instead of keeping what is inside it
    drop_path: float = 0.0
    classes: int = 0
    dtype: DTypeLike = jnp.float32

    transformer: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = False
    stochastic_depth: ClassVar[bool] = True

    @property
    def min_size(self) -> int:
        """Smallest image side in pixels: one patch."""
        return pick_stem({"imagenet": self.patch, **_SMALL_PATCHES}, self.stem)

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
        x = PatchEmbed(self.min_size, dim, dtype=self.dtype, name="patch_embed")(x)
        batch, h, w, _ = x.shape
        x = self._with_tokens_before(x.reshape(batch, h * w, dim), (h, w))

        def patches(x: jax.Array) -> jax.Array:
            return x[:, 1 + self.registers :].reshape(batch, h, w, dim)

        block = nn.remat(Block) if self.remat else Block
        scales = [None] * self.depth
        if dropout and self.drop_path:
            rates = np.linspace(0, self.drop_path, self.depth)
            scales = [*branch_scales(self.make_rng("dropout"), rates, (2, batch))]
        stages = []
        for i in range(self.depth):
            layer = block(self._heads, layer_scale=self.layer_scale, dtype=self.dtype, name=f"blocks_{i}")
            x = layer(x, scales[i])
            if i + 1 in {self.depth * quarters // 4 for quarters in (1, 2, 3)}:
                stages.append(patches(x))
        x = layer_norm(dtype=self.dtype, name="norm")(x)
        pooled = promote(x[:, 0])
        return Features((*stages, patches(x)), pooled, classify(pooled, self.classes, "head"))

    def _with_tokens_before(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Class token, registers and patches (B, h · w, D), with positions: (B, 1 + registers + h · w, D)."""
        batch, _, dim = x.shape

        def tokens(name: str, count: int) -> jax.Array:
            token = self.param(name, _normal, (1, count, dim), jnp.float32).astype(self.dtype)
            return jnp.broadcast_to(token, (batch, count, dim))

        cls_token = tokens("cls_token", 1)
        if self.registers:
            x = x + position_embedding(self, grid, dim, antialias=True).astype(self.dtype)
            return jnp.concatenate([cls_token, tokens("reg_token", self.registers), x], axis=1)
        x = jnp.concatenate([cls_token, x], axis=1)
        return x + position_embedding(self, grid, dim, before=1).astype(self.dtype)


ViTTiny = partial(ViT, embed_dim=192, depth=12, heads=3)
ViTSmall = partial(ViT, embed_dim=384, depth=12, heads=6)
ViTBase = partial(ViT, embed_dim=768, depth=12, heads=12)
ViTSmallDINOv2 = partial(ViTSmall, patch=14, layer_scale=1e-5)
ViTBaseDINOv2 = partial(ViTBase, patch=14, layer_scale=1e-5)
ViTSmallReg4DINOv2 = partial(ViTSmallDINOv2, registers=4)
ViTBaseReg4DINOv2 = partial(ViTBaseDINOv2, registers=4)
