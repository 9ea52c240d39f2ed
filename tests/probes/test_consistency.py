"""Neighbours in common: closed forms, chance, the naive loop, and the second view."""

import jax
import numpy as np
import pytest
from conftest import source_of
from jax.sharding import AxisType

from ssl_kd.images import Images
from ssl_kd.models.embed import preprocess
from ssl_kd.probes import consistency as module
from ssl_kd.probes.consistency import consistency, mirrored_centres, shared_neighbours

RNG = np.random.default_rng(0)


def naive(first, second, k):
    shared = 0
    for i in range(len(first)):
        nearest = []
        for space in (first, second):
            unit = [row / np.linalg.norm(row) for row in space.astype(np.float64)]
            sims = {j: unit[i] @ unit[j] for j in range(len(unit)) if j != i}
            nearest.append(set(sorted(sims, key=sims.__getitem__)[-k:]))
        shared += len(nearest[0] & nearest[1])
    return shared / k / len(first)


@pytest.mark.parametrize("k", [1, 7, 30])
def test_equals_the_naive_loop(k):
    first = RNG.standard_normal((40, 6)).astype(np.float32)
    second = np.hstack([first + 0.5 * RNG.standard_normal(first.shape), RNG.standard_normal((40, 1))])
    found = shared_neighbours(first, second.astype(np.float32), k)
    assert 0 < found < 1
    np.testing.assert_allclose(found, naive(first, second, k), rtol=1e-12)


def test_the_same_directions_have_the_same_neighbours():
    features = RNG.standard_normal((300, 8)).astype(np.float32)
    rotation = np.linalg.qr(RNG.standard_normal((8, 8)))[0].astype(np.float32)
    lengths = np.float32(2) ** RNG.integers(-5, 5, (300, 1))
    assert shared_neighbours(features, lengths * features, 10) == 1
    np.testing.assert_allclose(shared_neighbours(features, features @ rotation, 10), 1, atol=0.01)  # it rounds


def test_all_others_are_always_shared():
    first, second = RNG.standard_normal((2, 9, 4)).astype(np.float32)
    assert shared_neighbours(first, second, 8) == 1


def test_independent_features_share_what_chance_gives():
    """Mean of 10 · 500 hits of probability 10 / 499: standard error about 0.002."""
    first, second = RNG.standard_normal((2, 500, 16)).astype(np.float32)
    np.testing.assert_allclose(shared_neighbours(first, second, 10), 10 / 499, atol=4 * 0.002)


def test_a_collapsed_network_gains_nothing():
    same = np.ones((100, 4), np.float32)
    assert shared_neighbours(same, same, 10) <= 10 / 99


def mesh():
    return jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])


def test_the_second_view_is_the_mirrored_centre():
    pixels = np.zeros((2, 12, 12, 3), np.uint8)
    pixels[0, :10, :5] = image = RNG.integers(0, 256, (10, 5, 3), np.uint8)
    pixels[1, :1, :1] = 9
    found = mirrored_centres(Images(pixels, np.int32([[10, 5], [1, 1]])))
    np.testing.assert_array_equal(found.size, [[8, 4], [1, 1]])
    np.testing.assert_array_equal(found.pixels[0, :8, :4], image[1:9, 0:4][:, ::-1])
    assert found.pixels.shape == pixels.shape and found.size.dtype == np.int32
    assert found.pixels[0].sum() == found.pixels[0, :8, :4].sum()
    np.testing.assert_array_equal(found.pixels[1], pixels[1])


@pytest.mark.parametrize("short", [20, 28, 32, 40])
def test_what_is_evaluated_of_it_is_tighter(short):
    """An image of left to right 0 … 1 keeps less of that range, backwards."""
    ramp = np.round(np.linspace(0, 255, short)).astype(np.uint8)
    images = Images.whole(np.broadcast_to(ramp[None, None, :, None], (1, short, short, 3)))
    views = images, mirrored_centres(images)
    centre = jax.jit(lambda view: preprocess(view, 28, 7 / 8, "bilinear")[0, 14, :, 0])
    first, second = (np.asarray(centre(view)) for view in views)
    assert second[0] < first[-1] - 0.01 and second[-1] > first[0] + 0.01
    assert (np.diff(second) < 0).all()


@pytest.mark.parametrize("of", [Images.whole, source_of])
@pytest.mark.parametrize("count", [60, 230])
def test_images_in_memory_and_of_a_source_in_batches(of, count, monkeypatch):
    monkeypatch.setattr(module, "IMAGES", 100)
    pixels = RNG.integers(0, 256, (count, 10, 10, 3), np.uint8)
    project = RNG.standard_normal((300, 5)).astype(np.float32)

    def apply(images: Images):
        return images.pixels.reshape(len(images), -1) @ project

    features = np.asarray(apply(Images.whole(pixels)))
    some = np.linspace(0, count - 1, min(count, 100)).astype(int)
    second = np.asarray(apply(mirrored_centres(Images.whole(pixels[some]))))
    found = consistency(apply, of(pixels), features, batch_size=32, mesh=mesh())
    assert found["nn_chance"] == 10 / (len(some) - 1)
    np.testing.assert_allclose(found["nn_consistency"], naive(features[some], second, 10), atol=0.002)


def test_few_images():
    pixels = RNG.integers(0, 256, (3, 4, 4, 3), np.uint8)

    def apply(images: Images):
        return images.pixels.reshape(len(images), -1) / 255

    features = pixels.reshape(3, -1) / 255
    found = consistency(apply, Images.whole(pixels), features, batch_size=8, mesh=mesh())
    assert found == {"nn_consistency": 1.0, "nn_chance": 1.0}
    assert consistency(apply, Images.whole(pixels[:1]), features[:1], batch_size=8, mesh=mesh()) == {}
