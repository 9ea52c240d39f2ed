"""Images on a canvas, and their resampling: Pillow's, whatever the canvas."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ssl_kd.images import Images, resample_weights

GOLDEN = np.load(Path(__file__).parent / "golden" / "augment.npz")
QUICK = {"xla_backend_optimization_level": 0}

weights = jax.jit(resample_weights, static_argnames=("in_size", "out_size", "interpolation"), compiler_options=QUICK)
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def noise(*shape):
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def test_images_are_counted_and_taken_as_rows_of_an_array():
    pixels, size = noise(5, 6, 8, 3), np.int32([[6, 8], [1, 1], [2, 8], [6, 3], [4, 4]])
    images = Images(pixels, size)
    assert len(images) == 5 and images.canvas == (6, 8)
    some = jax.jit(lambda images, rows: images[rows])(images, np.int32([3, 0]))
    np.testing.assert_array_equal(some.pixels, pixels[[3, 0]])
    np.testing.assert_array_equal(some.size, size[[3, 0]])
    assert len(images[1:]) == 4 and images[2].canvas == (6, 8)


def test_whole_images_fill_their_canvas():
    images = Images.whole(noise(2, 3, 6, 8, 3))
    assert images.size.dtype == np.int32
    np.testing.assert_array_equal(images.size, np.broadcast_to([6, 8], (2, 3, 2)))


def test_resampling_is_pillows():
    image = GOLDEN["image"][..., 0].astype(np.float32) / 255
    for number, (left, top, right, bottom) in enumerate(GOLDEN["resize_boxes"]):
        expected = GOLDEN[f"resize_{number}"]
        rows = weights(float(top), float(bottom - top), 40.0, 40, expected.shape[0])
        columns = weights(float(left), float(right - left), 60.0, 60, expected.shape[1])
        np.testing.assert_allclose(np.asarray(rows) @ image @ np.asarray(columns).T, expected, atol=1e-5)


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(
    ("start", "length", "out"), [(0, 30, 12), (5, 20, 20), (3, 7, 16), (29, 1, 4), (0.25, 29.5, 5)]
)
def test_what_lies_beyond_an_image_takes_no_part(interpolation, start, length, out):
    """30 pixels on a canvas of 41 that is white beyond them, against Pillow's resize of the 30 alone."""
    line = np.random.default_rng(2).random((1, 30), np.float32)
    resized = Image.fromarray(line).resize((out, 1), PILLOW[interpolation], (start, 0, start + length, 1))
    found = weights(float(start), float(length), 30, 41, out, interpolation)
    white = np.pad(line[0], (0, 11), constant_values=1e6)
    np.testing.assert_allclose(np.asarray(found) @ white, np.asarray(resized)[0], atol=2e-6)
    np.testing.assert_allclose(np.asarray(found).sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("interpolation", PILLOW)
def test_resampling_pixels_to_their_own_size_changes_nothing(interpolation):
    """Exactly: evaluation on an image of a network's own size is that image."""
    found = weights(jnp.int32(2), jnp.int32(17), jnp.int32(20), 23, 17, interpolation)
    np.testing.assert_array_equal(found, np.eye(17, 23, 2))
