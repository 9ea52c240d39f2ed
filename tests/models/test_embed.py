"""Networks on images: the centre that they are evaluated on, and honest statistics for random weights."""

import jax
import numpy as np
import pytest
from conftest import drawn_network
from PIL import Image

from ssl_kd.images import Images
from ssl_kd.models import NetworkSpec
from ssl_kd.models.embed import batch_calibrated, pooled_features, preprocess

RNG = np.random.default_rng(0)


evaluated = jax.jit(preprocess, static_argnums=(1, 2, 3))


def on_canvas(images, height, width):
    """The images (B, h, w, 3) in the corner of a canvas, amid noise that nothing may see."""
    pixels = RNG.integers(0, 256, (len(images), height, width, 3), np.uint8)
    pixels[:, : images.shape[1], : images.shape[2]] = images
    return Images(pixels, np.broadcast_to(np.int32(images.shape[1:3]), (len(images), 2)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size", "top", "left"),
    [
        (256, 256, 224, 16, 16),
        (256, 300, 224, 16, 38),
        (250, 255, 224, 13, 15),  # 7/8 of it are less than a view: cut larger rather than enlarge it
        (32, 32, 32, 0, 0),
        (32, 47, 32, 0, 7),
    ],
)
def test_the_centre_of_the_size_of_a_view_comes_through_unchanged(height, width, size, top, left, interpolation):
    images = RNG.integers(0, 256, (2, height, width, 3), np.uint8)
    expected = np.float32(images[:, top : top + size, left : left + size]) / np.float32(255)
    for canvas in ((height, width), (height + 9, width + 4)):
        found = evaluated(on_canvas(images, *canvas), size, 7 / 8, interpolation)
        np.testing.assert_array_max_ulp(np.asarray(found), expected, 1)  # compiled, x / 255 may be x · (1 / 255)


@pytest.mark.parametrize(
    ("name", "kind"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
@pytest.mark.parametrize(
    ("height", "width", "fraction", "side"),
    [(64, 64, 7 / 8, 56), (80, 64, 7 / 8, 56), (50, 90, 0.9, 45), (41, 64, 1.0, 41), (7, 20, 0.5, 7), (1, 1, 7 / 8, 1)],
)
def test_a_larger_or_smaller_centre_is_resized_as_by_pillow_and_never_squashed(
    height, width, fraction, side, name, kind
):
    image = RNG.integers(0, 256, (1, height, width, 3), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    box = (left, top, left + side, top + side)
    planes = [Image.fromarray(np.float32(image[0, ..., c])).resize((24, 24), kind, box) for c in range(3)]
    found = evaluated(on_canvas(image, 90, 90), 24, fraction, name)[0]
    np.testing.assert_allclose(found, np.clip(np.stack(planes, -1) / 255, 0, 1), atol=1e-5)


def test_calibrated_statistics_are_those_of_the_batch():
    """The first batch-norm sees what the first convolution gives: its statistics can be taken by hand."""
    spec = NetworkSpec("tiny", width=0.125, stem="small_s2", dim=4, bn_groups=2)
    variables = drawn_network(spec, 0, 12)
    images = Images.whole(RNG.integers(0, 256, (32, 12, 12, 3), np.uint8))
    calibrated = jax.jit(lambda variables, images: batch_calibrated(spec, variables, images, 12))(variables, images)
    stats = calibrated["batch_stats"]["backbone"]["bn1"]
    x = (images.pixels / 255 - np.array((0.485, 0.456, 0.406))) / np.array((0.229, 0.224, 0.225))
    y = jax.lax.conv_general_dilated(
        x.astype(np.float32),
        variables["params"]["backbone"]["conv1"]["kernel"],
        (2, 2),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
    np.testing.assert_allclose(stats["mean"], y.mean(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(stats["var"], y.var(axis=0, ddof=1), rtol=1e-3)


def test_a_feature_does_not_depend_on_the_images_beside_it():
    spec = NetworkSpec("tiny", width=0.125, stem="small_s2", dim=4)
    variables = drawn_network(spec, 0, 12)
    apply = jax.jit(pooled_features(spec, 12))
    images = Images.whole(RNG.integers(0, 256, (5, 12, 12, 3), np.uint8))
    np.testing.assert_allclose(apply(variables, images)[3:4], apply(variables, images[3:4]), rtol=1e-4, atol=1e-6)
