"""Whether an image keeps its neighbours when it is looked at a little differently: a probe that needs no labels."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from ssl_kd.data.bags import mine
from ssl_kd.data.sources import Source
from ssl_kd.images import Images
from ssl_kd.probes.features import extract

NEIGHBOURS = 10

IMAGES = 2000
"""Most images that are compared: the chance level falls with their number, so keep it one number that runs compare."""

TIGHTER = 4 / 5
"""Sides of the second view's image over those of the first's.

Below every usual crop_fraction, 7/8 or more, so that evaluation's crop of it is a tighter one too; far above the scale
of training's random crops, so that it shows the same thing.
"""


def consistency(
    apply: Callable[[Images], jax.Array],
    images: Images | Source,
    features: np.ndarray,
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Nearest-neighbour consistency of features, and what chance would give.

    nn_consistency   `shared_neighbours` of every image's features in two deterministic views: as it is evaluated, and
                     the mirror image of its centre, 4/5 of each side. The mirror alone would test little, because most
                     methods train on mirrored pairs; a tighter crop changes scale and border, not what is shown.
    nn_chance        k / (N − 1), its expectation when the two sets of neighbours have nothing to do with each other.

    It measures what is kept, not what is meant: raw pixels keep neighbours as well. Compare it with theirs, and with
    those of random weights. k = 10 of at most 2000 images, spaced evenly through the set; of fewer than 11, all others
    are neighbours. Nothing ({}) of a single image.

    Args:
      apply, batch_size, mesh: as for `extract`.
      images: N of them.
      features: (N, D), what `extract` made of them.
    """
    some = np.linspace(0, len(images) - 1, min(len(images), IMAGES)).astype(int)
    neighbours = min(NEIGHBOURS, len(some) - 1)
    if neighbours == 0:
        return {}
    # One batch of images at a time is held, and what `extract` compiled for the first view serves the second.
    blocks = (some[start : start + batch_size] for start in range(0, len(some), batch_size))
    views = (mirrored_centres(images[block]) for block in blocks)
    second = np.concatenate([extract(apply, view, batch_size=batch_size, mesh=mesh) for view in views])
    return {
        "nn_consistency": shared_neighbours(features[some], second, neighbours),
        "nn_chance": neighbours / (len(some) - 1),
    }


def shared_neighbours(first: np.ndarray, second: np.ndarray, k: int) -> float:
    """The share in [0, 1] of an image's k nearest others in one feature space that are among those in another; mean.

    Nearest by cosine, as `mine` finds them. On a tie the lower index is the nearer in the first space, the higher in
    the second: features that are the same for all images share what chance gives, or less.

    Args:
      first, second: (N, D) and (N, D'), row i of the same image; finite.
      k: from 1 to N − 1.
    """
    ours = mine(first, k)
    theirs = len(second) - 1 - mine(second[::-1], k)[::-1]
    return float((ours[:, :, None] == theirs[:, None, :]).any(axis=2).mean())


def mirrored_centres(images: Images) -> Images:
    """The centre of each image, 4/5 of its sides, mirrored; on the host, on a canvas of the same size."""
    sizes = np.maximum(1, np.round(TIGHTER * images.size)).astype(np.int32)
    corners = (images.size - sizes) // 2
    pixels = np.zeros_like(images.pixels)
    for found, image, (height, width), (top, left) in zip(pixels, images.pixels, sizes, corners, strict=True):
        found[:height, :width] = image[top : top + height, left : left + width][:, ::-1]
    return Images(pixels, sizes)
