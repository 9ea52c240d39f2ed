"""The embedded set, parquet directories as Hugging Face writes them, prepared TFDS sets, and every bad input."""

import gc
import io
import json
import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssl_kd.data.readers.parquet import ParquetReader
from ssl_kd.data.sources import Source, arrays, open_source
from ssl_kd.errors import UserError


def encode(image: np.ndarray, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def decoded(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Images of one size, uint8 (N, H, W, 3), and their labels."""
    images, labels = arrays(source)
    np.testing.assert_array_equal(images.size, np.broadcast_to(source.canvas, (len(source), 2)))
    return images.pixels, labels


def noise(n: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def write_parquet(path, images: list[bytes | None], labels=None, features=None, image="image", label="label", group=3):
    """A shard in the Hugging Face layout; `features` is the dict its metadata declares."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    columns = {image: pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        columns[label] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)


def write_raw(path, **columns):
    pq.write_table(pa.table(columns), path)


# --- embedded -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return {split: decoded(open_source("embedded", split)) for split in ("train", "test")}


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 400)])
def test_embedded_counts_and_grey_channels(embedded, split, per_class):
    images, labels = embedded[split]
    assert images.shape == (10 * per_class, 28, 28, 3) and images.dtype == np.uint8 and labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(labels), [per_class] * 10)
    np.testing.assert_array_equal(images[..., 0], images[..., 1])
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    assert open_source("embedded", split).num_classes == 10


def test_embedded_train_and_test_share_no_image(embedded):
    train, test = ({image.tobytes() for image in embedded[split][0]} for split in ("train", "test"))
    assert len(train) == 10_000 and len(test) == 4_000 and not train & test


def test_embedded_labels_belong_to_the_images(embedded):
    """Nearest class mean of raw pixels: about .68 on Fashion-MNIST, .1 if tiles and labels were out of step."""
    (train, label), (test, truth) = embedded["train"], embedded["test"]
    means = np.stack([train[label == c, ..., 0].mean(0).ravel() for c in range(10)])
    flat = test[..., 0].reshape(len(test), -1).astype(np.float32)
    nearest = np.argmin((means**2).sum(-1) - 2 * flat @ means.T, axis=1)
    assert (nearest == truth).mean() > 0.6


def test_embedded_prefixes_are_balanced_and_items_are_rows(embedded):
    source = open_source("embedded", "train[100:150]")
    assert len(source) == 50
    np.testing.assert_array_equal(source.image(7), embedded["train"][0][107])
    assert source.label(7) == source.labels()[7] == embedded["train"][1][107] == 7
    np.testing.assert_array_equal(np.bincount(decoded(source)[1]), [5] * 10)
    with pytest.raises(IndexError):
        source.image(50)
    some = source.take(np.array([7, 7, 0]))
    np.testing.assert_array_equal(decoded(some)[0], embedded["train"][0][[107, 107, 100]])


# --- slices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("test", range(4000)),
        ("test[:10]", range(10)),
        ("test[3990:]", range(3990, 4000)),
        ("test[-10:]", range(3990, 4000)),
        ("test[:-3990]", range(10)),
        ("test[50%:75%]", range(2000, 3000)),
        ("test[-1%:]", range(3960, 4000)),
        ("test[:100%]", range(4000)),
    ],
)
def test_slices(split, rows):
    np.testing.assert_array_equal(open_source("embedded", split).rows, rows)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test[5:5]", "empty"),
        ("test[10:5]", "empty"),
        ("test[:4001]", "there are 4000 rows"),
        ("test[-4001:]", "there are 4000 rows"),
        ("test[:101%]", "there are 4000 rows"),
        ("test[-0%:]", "empty"),
        ("test[5]", "not understood"),
        ("test[10%:10.]", "not understood"),
        ("test+train", "not understood"),
        ("", "not understood"),
        ("validation", "it has 'train' and 'test'"),
    ],
)
def test_bad_slices(split, message):
    with pytest.raises(UserError, match=message):
        open_source("embedded", split)


@pytest.mark.parametrize("spec", ["cifar10", "embedded:x", "hf", "hf:", "tfds:", "synthetic", "", "HF:x"])
def test_unknown_spec_lists_the_valid_ones(spec):
    with pytest.raises(UserError, match=r"'embedded', 'folder:PATH', .*'tfds:NAME' or 'synthetic:SIDExCOUNT'"):
        open_source(spec, "train")


def test_synthetic_images_are_functions_of_split_and_row():
    train, again, test = (open_source("synthetic:6x20", split) for split in ("train", "train[5:]", "test"))
    assert len(train) == 20 and train.canvas == (6, 6) and train.num_classes == 10
    np.testing.assert_array_equal(train.image(7), again.image(2))
    assert train.label(13) == 3
    assert (train.image(7) != test.image(7)).any() and (train.image(7) != train.image(8)).any()


@pytest.mark.parametrize("name", ["64", "64x", "x3", "0x4", "axb"])
def test_synthetic_needs_side_and_count(name):
    with pytest.raises(UserError, match="SIDExCOUNT, as synthetic:64x10000"):
        open_source(f"synthetic:{name}", "train")


@pytest.mark.parametrize("canvas", [0, -1])
def test_a_canvas_without_pixels(canvas):
    with pytest.raises(UserError, match=rf"data.canvas={canvas} must be 0 \(8/7 of the largest view\) or a side"):
        open_source("embedded", "train", canvas)


# --- parquet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "data", "plain_text"])
def test_parquet_files_and_row_groups_in_order(tmp_path, folder):
    images = noise(20, 5, 4)
    features = {"img": {"_type": "Image"}, "fine": {"_type": "ClassLabel", "names": list("abcdef")}}
    for f, (lo, hi) in enumerate([(0, 7), (7, 7), (7, 20)]):  # the second file is empty
        write_parquet(
            tmp_path / folder / f"train-{f:05}-of-00003-0a1b2c.parquet",
            [encode(image) for image in images[lo:hi]],
            [i % 5 for i in range(lo, hi)],
            features,
            image="img",
            label="fine",
        )
    source = open_source(f"hf:{tmp_path}", "train")
    got, labels = decoded(source)
    np.testing.assert_array_equal(got, images)
    np.testing.assert_array_equal(labels, np.arange(20) % 5)
    assert source.num_classes == 6 and source.canvas == (5, 4)  # six declared, five seen


def test_parquet_cache_of_one_group_and_pickling(tmp_path, monkeypatch):
    images = noise(20, 6, 6)
    write_parquet(tmp_path / "train.parquet", [encode(image) for image in images])
    monkeypatch.setattr(ParquetReader, "CACHE_BYTES", 1)
    source = open_source(f"hf:{tmp_path}", "train[2:]")
    for i in np.random.default_rng(1).permutation(18):
        np.testing.assert_array_equal(source.image(i), images[i + 2])
        assert source.label(i) == -1
    assert len(source.reader._cache) == 1 and source.num_classes is None
    np.testing.assert_array_equal(decoded(pickle.loads(pickle.dumps(source)))[0], images[2:])


def test_parquet_columns_without_metadata(tmp_path):
    images = noise(4, 3, 3)
    write_raw(
        tmp_path / "train-0.parquet",
        width=[3] * 4,
        thumbnail=[b"no"] * 4,
        image=[encode(image) for image in images],
        label=pa.array([2, None, 0, 1]),
    )
    source = open_source(f"hf:{tmp_path}", "train")
    got, labels = decoded(source)
    np.testing.assert_array_equal(got, images)
    np.testing.assert_array_equal(labels, [2, -1, 0, 1])
    assert source.num_classes == 3


def test_split_test_falls_back_to_validation(tmp_path):
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", [encode(noise(1, 2, 2)[0])], [-1])
    source = open_source(f"hf:{tmp_path}", "test")
    assert len(source) == 1 and source.num_classes is None  # every label is -1


def test_image_encodings(tmp_path):
    """JPEG as Pillow decodes it; grey, palette, alpha, 16-bit and CMYK become RGB."""
    rgb = noise(1, 16, 16)[0]
    smooth = np.asarray(Image.fromarray(rgb[:4, :4]).resize((16, 16), Image.Resampling.BICUBIC))
    grey = rgb[..., 0]
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    palette, cmyk = io.BytesIO(), io.BytesIO()
    Image.fromarray(grey).convert("P").save(palette, "PNG")
    Image.fromarray(smooth).convert("CMYK").save(cmyk, "JPEG", quality=95)
    files = {
        "jpeg": (encode(smooth, "JPEG"), np.asarray(Image.open(io.BytesIO(encode(smooth, "JPEG"))))),
        "grey jpeg": (encode(grey, "JPEG"), Image.open(io.BytesIO(encode(grey, "JPEG"))).convert("RGB")),
        "grey": (encode(grey), np.stack([grey] * 3, -1)),
        "rgba": (encode(np.dstack([rgb, grey])), rgb),
        "palette": (palette.getvalue(), np.stack([grey] * 3, -1)),
        "16 bit": (encode(deep), np.stack([np.arange(256).reshape(16, 16)] * 3, -1)),
        "webp": (encode(rgb, "WEBP", lossless=True), rgb),
    }
    write_parquet(tmp_path / "train.parquet", [data for data, _ in files.values()] + [cmyk.getvalue()])
    source = open_source(f"hf:{tmp_path}", "train")
    for i, (name, (_, want)) in enumerate(files.items()):
        np.testing.assert_array_equal(source.image(i), np.asarray(want), err_msg=name)
    assert np.abs(source.image(len(files)).astype(int) - smooth).mean() < 4


def test_missing_directory_and_split(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        open_source(f"hf:{tmp_path}/none", "train")
    with pytest.raises(UserError, match="no parquet files at all"):
        open_source(f"hf:{tmp_path}", "train")
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [encode(noise(1, 2, 2)[0])])
    with pytest.raises(UserError, match="split 'unsupervised'; the splits there are train, validation"):
        open_source(f"hf:{tmp_path}", "unsupervised")


def test_missing_shards_and_two_configurations(tmp_path):
    data = [encode(noise(1, 2, 2)[0])]
    write_parquet(tmp_path / "a" / "train-00001-of-00002.parquet", data)
    with pytest.raises(UserError, match="1 of the 2 files"):
        open_source(f"hf:{tmp_path}", "train")
    write_parquet(tmp_path / "b" / "train.parquet", data)
    with pytest.raises(UserError, match=r"several folders; choose one of hf:.*a, hf:.*b"):
        open_source(f"hf:{tmp_path}", "train")
    assert len(open_source(f"hf:{tmp_path}/b", "train")) == 1


def test_truncated_or_corrupt_parquet_names_the_file(tmp_path):
    file = tmp_path / "train-00000-of-00001.parquet"
    write_parquet(file, [encode(image) for image in noise(8, 30, 30)], group=8)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet is corrupt or truncated"):
        open_source(f"hf:{tmp_path}", "train")
    damaged = bytearray(whole)
    damaged[4:64] = b"\xff" * 60  # the first page's header
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet is corrupt or truncated"):
        decoded(open_source(f"hf:{tmp_path}", "train"))


@pytest.mark.parametrize("kind", ["jpeg cut", "png cut", "text", "empty", "null"])
def test_corrupt_image_names_file_and_row(tmp_path, kind):
    image = noise(1, 20, 20)[0]
    jpeg, png = encode(image, "JPEG"), encode(image)
    bad = {"jpeg cut": jpeg[:300], "png cut": png[:200], "text": b"<html>", "empty": b"", "null": None}[kind]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [png] * 5)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [png] * 4 + [bad])
    with pytest.raises(UserError, match=r"row 4 of .*train-00001-of-00002.parquet (is not a readable|has no image)"):
        open_source(f"hf:{tmp_path}", "train").image(9)


def test_no_image_column_and_disagreeing_files(tmp_path):
    write_raw(tmp_path / "test.parquet", text=["a"], label=[1])
    with pytest.raises(UserError, match=r"test.parquet has no image column \(it has text, label\)"):
        open_source(f"hf:{tmp_path}", "test")
    write_parquet(tmp_path / "train-0.parquet", [encode(noise(1, 2, 2)[0])])
    write_parquet(tmp_path / "train-1.parquet", [encode(noise(1, 2, 2)[0])], image="picture")
    with pytest.raises(UserError, match=r"train-1.parquet lacks the column 'image.bytes' of train-0.parquet"):
        open_source(f"hf:{tmp_path}", "train").image(1)


def test_label_beyond_the_declared_classes(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    write_parquet(tmp_path / "train.parquet", [encode(noise(1, 2, 2)[0])] * 2, [1, 2], features)
    with pytest.raises(UserError, match="label 2, but its metadata names only 2 classes"):
        open_source(f"hf:{tmp_path}", "train")


def test_empty_set(tmp_path):
    write_parquet(tmp_path / "train.parquet", [])
    with pytest.raises(UserError, match="empty"):
        open_source(f"hf:{tmp_path}", "train")


# --- the canvas ---------------------------------------------------------------------------------------------------


def pictures(tmp_path, *sizes: tuple[int, int]) -> tuple[str, list[np.ndarray]]:
    """A data source of noise of these sizes, and its images."""
    images = [noise(1, *size, seed=k)[0] for k, size in enumerate(sizes)]
    write_parquet(tmp_path / "train.parquet", [encode(image) for image in images])
    return f"hf:{tmp_path}", images


@pytest.mark.parametrize("canvas", [12, 20, 224])
def test_images_of_one_size_have_no_canvas_but_their_own(tmp_path, canvas):
    spec, images = pictures(tmp_path, *[(12, 15)] * 70)
    source = open_source(spec, "train", canvas)
    assert source.canvas == (12, 15) and source.nbytes == 70 * 12 * 15 * 3
    np.testing.assert_array_equal(decoded(source)[0], images)


def test_images_of_one_larger_size_are_reduced_to_one_smaller(tmp_path):
    spec, images = pictures(tmp_path, *[(24, 30)] * 3)
    source = open_source(spec, "train", canvas=12)
    assert source.canvas == (12, 15)
    for found, image in zip(decoded(source)[0], images, strict=True):
        halved = Image.fromarray(image).resize((15, 12), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found, halved)


def test_images_of_several_sizes_lie_whole_in_the_corner_of_a_square(tmp_path):
    """What fits 12 = 3/2 of 8 stays; else shorter sides reduced to 8, longer ones to 12; nothing enlarged or cut."""
    sizes = {(9, 12): (9, 12), (12, 9): (12, 9), (5, 4): (5, 4), (18, 20): (8, 9), (60, 20): (12, 4), (1, 1): (1, 1)}
    spec, images = pictures(tmp_path, *sizes)
    source = open_source(spec, "train", canvas=8)
    assert source.canvas == (12, 12)
    found, _ = arrays(source)
    np.testing.assert_array_equal(found.size, list(sizes.values()))
    for k, (image, (height, width)) in enumerate(zip(images, sizes.values(), strict=True)):
        expected = np.zeros((12, 12, 3), np.uint8)
        reduced = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        expected[:height, :width] = image if image.shape[:2] == (height, width) else reduced
        np.testing.assert_array_equal(found.pixels[k], expected)


def test_an_image_that_was_not_looked_at_fits_all_the_same(tmp_path):
    """64 of 200 decide on a canvas that lies; among the others one stands, one is larger and one smaller."""
    sizes = [(12, 15)] * 200
    standing, larger, smaller, *_ = sorted(set(range(200)) - set(np.linspace(0, 199, 64).astype(int).tolist()))
    sizes[standing], sizes[larger], sizes[smaller] = (15, 12), (40, 40), (3, 4)
    spec, _ = pictures(tmp_path, *sizes)
    source = open_source(spec, "train", canvas=20)
    assert source.canvas == (12, 15)
    images, _ = arrays(source)
    found = {k: tuple(images.size[k]) for k in (standing, larger, smaller)}
    assert found == {standing: (12, 10), larger: (12, 12), smaller: (3, 4)}


# --- TFDS ---------------------------------------------------------------------------------------------------------


def test_tfds_reads_a_prepared_set_without_tensorflow(tmp_path, monkeypatch):
    # While TFDS imports itself lazily nothing else may import: finalise what grain's workers left behind before.
    gc.collect()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    images = noise(5, 6, 8)

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            label = tfds.features.ClassLabel(num_classes=3)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(images):  # an open file is stored as it is; an array would need TensorFlow
                yield i, {"image": io.BytesIO(encode(image)), "label": i % 3}

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = pickle.loads(pickle.dumps(open_source("tfds:tiny", "train")))
    got, labels = decoded(source)
    assert source.num_classes == 3 and source.canvas == (6, 8)
    order = [next(i for i, image in enumerate(images) if (image == g).all()) for g in got]  # TFDS shuffles by key
    assert sorted(order) == list(range(5))
    np.testing.assert_array_equal(labels, np.array(order) % 3)
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        open_source("tfds:tiny", "test")
    with pytest.raises(UserError, match=r"'tfds:cifar10' is not prepared in .*download_and_prepare\(\)"):
        open_source("tfds:cifar10", "train")
    assert "tensorflow" not in sys.modules


def test_tfds_unknown_or_not_installed(monkeypatch):
    with pytest.raises(UserError, match="'tfds:nonesuch' cannot be opened"):
        open_source("tfds:nonesuch", "train")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="run: pip install tensorflow-datasets"):
        open_source("tfds:cifar10", "train")
