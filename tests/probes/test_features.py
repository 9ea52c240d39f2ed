import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import source_of
from jax.sharding import AxisType
from jax.tree_util import Partial

from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.probes.features import extract, require_labels

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 5, 4, 3), dtype=np.uint8)
IMAGES = Images.whole(PIXELS)


def row_sums(images):
    """With the height, so that every array of an image counts."""
    return images.pixels.astype(jnp.float32).sum(axis=2).reshape(len(images), -1) + images.size[:, :1]


EXPECTED = PIXELS.astype(np.float32).sum(axis=2).reshape(37, -1) + 5


@pytest.mark.parametrize("batch_size", [1, 5, 37, 64])
def test_every_row_in_order_whatever_the_batch(batch_size):
    features = extract(row_sums, IMAGES, batch_size=batch_size)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, EXPECTED)


def test_a_source_is_read_once_per_image():
    source = source_of(PIXELS)
    np.testing.assert_array_equal(extract(row_sums, source, batch_size=8), EXPECTED)
    assert sorted(source.reader.rows_read) == list(range(37))


def test_a_memory_map_is_an_array(tmp_path):
    np.save(tmp_path / "images.npy", PIXELS)
    features = extract(row_sums, Images.whole(np.load(tmp_path / "images.npy", mmap_mode="r")), batch_size=8)
    np.testing.assert_array_equal(features, EXPECTED)


@pytest.mark.parametrize("wrap", [Images.whole, source_of])
def test_a_mesh_gives_the_same_features(wrap):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    np.testing.assert_array_equal(extract(row_sums, wrap(PIXELS), batch_size=9, mesh=mesh), EXPECTED)


def test_weights_may_lie_on_one_device_of_a_mesh():
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    weights = jax.device_put(np.float32(2), jax.devices()[0])  # committed, as what a checkpoint gives
    apply = jax.tree_util.Partial(lambda weights, images: weights * row_sums(images), weights)
    np.testing.assert_array_equal(extract(apply, IMAGES, mesh=mesh), 2 * EXPECTED)


def test_one_compilation_for_all_sets_and_weights():
    traces = []

    def scaled(scale, images):
        traces.append(images.pixels.shape)
        return scale * row_sums(images)

    for size, scale in ((37, 1.0), (16, 2.0), (3, 3.0)):
        features = extract(Partial(scaled, jnp.float32(scale)), IMAGES[:size], batch_size=16)
        np.testing.assert_array_equal(features, scale * EXPECTED[:size])
    assert traces == [(16, 5, 4, 3)]


def test_half_precision_features_become_float32():
    features = extract(lambda images: row_sums(images).astype(jnp.bfloat16), IMAGES)
    assert features.dtype == np.float32


def test_progress_counts_images():
    calls = []
    extract(row_sums, IMAGES, batch_size=16, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(16, 37), (32, 37), (37, 37)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:0], "empty"),
        (Images.whole(PIXELS.astype(np.float32)), "uint8"),
        (Images(PIXELS[..., 0], IMAGES.size), "uint8"),
    ],
)
def test_unfit_images_are_a_user_error(images, message):
    with pytest.raises(UserError, match=message):
        extract(row_sums, images)


def test_features_that_are_not_finite_are_a_user_error():
    images = Images.whole(np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8))
    with pytest.raises(UserError, match="images 16 to 31 are not finite"):
        extract(lambda x: jnp.where(x.pixels[:, 0, 0] == 20, jnp.inf, 0.0), images, batch_size=16)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, "needs labels"), ([0, -1, 1], "1 of its 3"), ([0, 1], "pair them"), ([0, 1, 4], "num_classes is 4")],
)
def test_absent_or_wrong_labels_are_a_user_error(labels, message):
    with pytest.raises(UserError, match=message):
        require_labels("the set", np.zeros((3, 2)), labels, 4)
