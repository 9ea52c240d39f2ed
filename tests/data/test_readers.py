"""One protocol for every storage format, by its name; the embedded set and the synthetic one."""

import pickle

import numpy as np
import pytest

from ssl_kd.data.readers import READERS, open_reader
from ssl_kd.errors import UserError


@pytest.mark.parametrize(
    "spec", ["cifar10", "embedded:x", "hf", "hf:", "tfds:", "folder:", "tar", "synthetic", "", "HF:x"]
)
def test_an_unknown_source_lists_them_all(spec):
    with pytest.raises(UserError) as error:
        open_reader(spec, "train")
    assert str(error.value).startswith(f"data.source={spec!r} is unknown; use 'embedded', 'folder:PATH', ")
    assert all(f"'{kind}" in str(error.value) for kind in READERS)


@pytest.mark.parametrize("spec", ["embedded", "synthetic:6x20"])
def test_readers_agree_with_themselves(spec):
    reader = pickle.loads(pickle.dumps(open_reader(spec, "train")))
    labels = reader.labels()
    assert labels.shape == (len(reader),) and labels.dtype == np.int32
    assert [reader.label_of(row) for row in range(20)] == labels[:20].tolist() == [*range(10)] * 2
    assert reader.num_classes == 10
    image = reader.read(7)
    assert image.dtype == np.uint8 and image.shape[2] == 3


# --- embedded


def images(split: str) -> np.ndarray:
    reader = open_reader("embedded", split)
    return np.stack([reader.read(row) for row in range(len(reader))])


@pytest.fixture(scope="module")
def embedded():
    return {split: images(split) for split in ("train", "test")}


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 400)])
def test_embedded_counts_and_grey_channels(embedded, split, per_class):
    pixels = embedded[split]
    assert pixels.shape == (10 * per_class, 28, 28, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(open_reader("embedded", split).labels()), [per_class] * 10)
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 1])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_embedded_train_and_test_share_no_image(embedded):
    train, test = ({image.tobytes() for image in embedded[split]} for split in ("train", "test"))
    assert len(train) == 10_000 and len(test) == 4_000 and not train & test


def test_embedded_labels_belong_to_the_images(embedded):
    """Nearest class mean of raw pixels: about .68 on Fashion-MNIST, .1 if tiles and labels were out of step."""
    label, truth = (open_reader("embedded", split).labels() for split in ("train", "test"))
    means = np.stack([embedded["train"][label == c, ..., 0].mean(0).ravel() for c in range(10)])
    flat = embedded["test"][..., 0].reshape(len(truth), -1).astype(np.float32)
    nearest = np.argmin((means**2).sum(-1) - 2 * flat @ means.T, axis=1)
    assert (nearest == truth).mean() > 0.6


def test_embedded_has_two_splits():
    with pytest.raises(UserError, match="no split 'validation'; it has 'train' and 'test'"):
        open_reader("embedded", "validation")
    assert open_reader("embedded", "test").where(3) == "row 3 of the embedded test split"


# --- synthetic


def test_synthetic_images_are_functions_of_split_and_row():
    train, test = (open_reader("synthetic:6x20", split) for split in ("train", "test"))
    assert len(train) == 20 and train.read(0).shape == (6, 6, 3)
    np.testing.assert_array_equal(train.read(7), open_reader("synthetic:6x30", "train").read(7))
    assert (train.read(7) != test.read(7)).any() and (train.read(7) != train.read(8)).any()
    assert train.where(3) == "row 3 of the synthetic train split"


@pytest.mark.parametrize("name", ["64", "64x", "x3", "0x4", "axb"])
def test_synthetic_needs_side_and_count(name):
    with pytest.raises(UserError, match="SIDExCOUNT, as synthetic:64x10000"):
        open_reader(f"synthetic:{name}", "train")
