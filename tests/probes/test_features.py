import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.tree_util import Partial

from ssl_kd.errors import UserError
from ssl_kd.probes.features import extract, require_labels

IMAGES = np.random.default_rng(0).integers(0, 256, (37, 5, 4, 3), dtype=np.uint8)


def row_sums(images):
    return images.astype(jnp.float32).sum(axis=2).reshape(len(images), -1)


EXPECTED = IMAGES.astype(np.float32).sum(axis=2).reshape(37, -1)


class ListSource:
    def __init__(self, images):
        self.images, self.read = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        return {"image": self.images[index], "label": 0}


@pytest.mark.parametrize("batch_size", [1, 5, 37, 64])
def test_every_row_in_order_whatever_the_batch(batch_size):
    features = extract(row_sums, IMAGES, batch_size=batch_size)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, EXPECTED)


def test_a_source_is_read_once_per_image():
    source = ListSource(IMAGES)
    np.testing.assert_array_equal(extract(row_sums, source, batch_size=8), EXPECTED)
    assert source.read == [0, *range(37)]  # 0 once more, for the image size


def test_a_memory_map_is_an_array(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    features = extract(row_sums, np.load(tmp_path / "images.npy", mmap_mode="r"), batch_size=8)
    np.testing.assert_array_equal(features, EXPECTED)


@pytest.mark.parametrize("wrap", [lambda images: images, ListSource])
def test_a_mesh_gives_the_same_features(wrap):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    np.testing.assert_array_equal(extract(row_sums, wrap(IMAGES), batch_size=9, mesh=mesh), EXPECTED)


def test_weights_may_lie_on_one_device_of_a_mesh():
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    weights = jax.device_put(np.float32(2), jax.devices()[0])  # committed, as what a checkpoint gives
    apply = jax.tree_util.Partial(lambda weights, images: weights * row_sums(images), weights)
    np.testing.assert_array_equal(extract(apply, IMAGES, mesh=mesh), 2 * EXPECTED)


def test_one_compilation_for_all_sets_and_weights():
    traces = []

    def scaled(scale, images):
        traces.append(images.shape)
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
        (IMAGES.astype(np.float32), "uint8"),
        (IMAGES[..., 0], "uint8"),
        (ListSource([IMAGES[0], IMAGES[1, :3]]), "image 1 is"),
    ],
)
def test_unfit_images_are_a_user_error(images, message):
    with pytest.raises(UserError, match=message):
        extract(row_sums, images)


def test_features_that_are_not_finite_are_a_user_error():
    images = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    with pytest.raises(UserError, match="images 16 to 31 are not finite"):
        extract(lambda x: jnp.where(x[:, 0, 0] == 20, jnp.inf, 0.0), images, batch_size=16)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, "needs labels"), ([0, -1, 1], "1 of its 3"), ([0, 1], "pair them"), ([0, 1, 4], "num_classes is 4")],
)
def test_absent_or_wrong_labels_are_a_user_error(labels, message):
    with pytest.raises(UserError, match=message):
        require_labels("the set", np.zeros((3, 2)), labels, 4)
