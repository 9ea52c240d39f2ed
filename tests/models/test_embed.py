"""Networks on uint8 images: the centre of what is larger, and honest statistics for random weights."""

import jax
import numpy as np

from ssl_kd.models import NetworkSpec, init_network
from ssl_kd.models.embed import batch_calibrated, pooled_features, preprocess

RNG = np.random.default_rng(0)


def test_preprocess_takes_the_centre_of_larger_images_and_enlarges_smaller_ones():
    images = RNG.integers(0, 256, (2, 10, 14, 3), np.uint8)
    np.testing.assert_allclose(preprocess(images, 8), images[:, 1:9, 3:11] / 255, rtol=1e-6)
    flat = np.full((1, 4, 4, 3), 51, np.uint8)
    np.testing.assert_allclose(preprocess(flat, 9), np.full((1, 9, 9, 3), 0.2), rtol=1e-5)


def test_calibrated_statistics_are_those_of_the_batch():
    """The first batch-norm sees what the first convolution gives: its statistics can be taken by hand."""
    spec = NetworkSpec("tiny", width=0.125, stem="small_s2", dim=4, bn_groups=2)
    variables = init_network(spec, jax.random.key(0), 12)
    images = RNG.integers(0, 256, (32, 12, 12, 3), np.uint8)
    stats = batch_calibrated(spec, variables, images, 12)["batch_stats"]["backbone"]["bn1"]
    x = (preprocess(images, 12) - np.array((0.485, 0.456, 0.406))) / np.array((0.229, 0.224, 0.225))
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
    variables = init_network(spec, jax.random.key(0), 12)
    apply = pooled_features(spec, 12)
    images = RNG.integers(0, 256, (5, 12, 12, 3), np.uint8)
    np.testing.assert_allclose(apply(variables, images)[3:4], apply(variables, images[3:4]), rtol=1e-4, atol=1e-6)
