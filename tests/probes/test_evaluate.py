"""The baseline that needs no network."""

import jax
import numpy as np
from PIL import Image

from ssl_kd.images import Images
from ssl_kd.probes.evaluate import raw_pixels

RNG = np.random.default_rng(0)


def test_raw_pixels_of_small_images_are_the_images():
    images = RNG.integers(0, 256, (3, 28, 28, 3), np.uint8)
    np.testing.assert_allclose(jax.jit(raw_pixels)(Images.whole(images)), images.reshape(3, -1) / 255, rtol=1e-6)


def test_raw_pixels_of_larger_images_are_their_central_square_reduced():
    image = RNG.integers(0, 256, (80, 50, 3), np.uint8)
    canvas = np.zeros((1, 80, 80, 3), np.uint8)
    canvas[0, :, :50] = image
    found = jax.jit(raw_pixels)(Images(canvas, np.int32([[80, 50]])))
    expected = Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR, (0, 15, 50, 65))
    assert np.abs(255 * np.asarray(found)[0] - np.asarray(expected).ravel()).max() < 1.5  # Pillow rounds twice
