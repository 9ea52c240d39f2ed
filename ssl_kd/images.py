"""Images of many sizes in one array, and the weights that resample them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("pixels", "size"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images, each in the top left corner of a canvas of one size for all, with zeros beyond it.

    A pytree of arrays on the host or on the device, counted and indexed by images, as an array of them would be.

    Attributes:
      pixels: uint8 (..., H, W, 3) RGB.
      size: int32 (..., 2), the height and width of each image, from (1, 1) to (H, W). Signed, because what is computed
        with them are differences; beside a canvas their eight bytes are nothing.
    """

    pixels: Any
    size: Any

    @classmethod
    def whole(cls, pixels: Any) -> "Images":
        """Images (..., H, W, 3) that fill their canvas."""
        *count, height, width, _ = pixels.shape
        return cls(pixels, np.broadcast_to(np.array([height, width], np.int32), (*count, 2)))

    @property
    def canvas(self) -> tuple[int, int]:
        """H and W."""
        return self.pixels.shape[-3:-1]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Any) -> "Images":
        return Images(self.pixels[rows], self.size[rows])


def _triangle(distance: Array) -> Array:
    return jnp.maximum(0, 1 - distance)


def _cubic(distance: Array) -> Array:
    """Keys' cubic with a = -1/2, of Pillow's BICUBIC."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0))


INTERPOLATIONS = {"bilinear": _triangle, "bicubic": _cubic}
"""Name → weight of a pixel by its distance from where a value is wanted, in pixels of the coarser grid."""


def resample_weights(
    start: Array | float,
    length: Array | float,
    extent: Array | float,
    in_size: int,
    out_size: int,
    interpolation: str = "bilinear",
) -> Array:
    """The antialiased resize of Pillow's `Image.resize(box=…)`, along one axis of a canvas.

    A kernel whose support grows with the scale when the box is shrunk. As in Pillow, the image's pixels next to the box
    take part in its border (torchvision cuts the box out first and renormalises there); what lies beyond the image
    takes no part, and the weights of the others sum to 1 without it.

    Args:
      start, length: the box along this axis, in pixels of the image; 0 <= start, start + length <= extent.
      extent: pixels of the image along this axis, at most in_size.
      in_size, out_size: pixels of the canvas and of the output.
      interpolation: a key of INTERPOLATIONS.

    Returns:
      float32 (out_size, in_size), rows that sum to 1: output = weights @ input.
    """
    scale = length / out_size
    centres = start + (jnp.arange(out_size, dtype=jnp.float32) + 0.5) * scale
    pixels = jnp.arange(in_size, dtype=jnp.float32) + 0.5
    weights = INTERPOLATIONS[interpolation](jnp.abs(pixels[None, :] - centres[:, None]) / jnp.maximum(scale, 1))
    weights = jnp.where(pixels < extent, weights, 0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)
