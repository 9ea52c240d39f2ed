"""Parquet directories as Hugging Face writes them, and every bad one."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encode, noise

from ssl_kd.data.decode import decode
from ssl_kd.data.readers import ParquetReader, open_reader
from ssl_kd.errors import UserError


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


def opened(path, split="train"):
    return open_reader(f"hf:{path}", split)


def pixels(reader):
    return [decode(reader.read(row), lambda row=row: reader.where(row)) for row in range(len(reader))]


@pytest.mark.parametrize("folder", ["", "data", "plain_text"])
def test_files_and_row_groups_in_order(tmp_path, folder):
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
    reader = opened(tmp_path)
    np.testing.assert_array_equal(pixels(reader), images)
    assert reader.labels().dtype == np.int32
    np.testing.assert_array_equal(reader.labels(), np.arange(20) % 5)
    assert [reader.label_of(row) for row in range(20)] == reader.labels().tolist()
    assert reader.num_classes == 6 and reader.class_names == tuple("abcdef")  # six declared, five seen
    assert reader.where(9) == f"row 2 of {tmp_path / folder}/train-00002-of-00003-0a1b2c.parquet"


def test_cache_of_one_group_and_pickling(tmp_path, monkeypatch):
    images = noise(20, 6, 6)
    write_parquet(tmp_path / "train.parquet", [encode(image) for image in images])
    monkeypatch.setattr(ParquetReader, "CACHE_BYTES", 1)
    reader = opened(tmp_path)
    for row in np.random.default_rng(1).permutation(20):
        np.testing.assert_array_equal(decode(reader.read(row), str), images[row])
        assert reader.label_of(row) == -1
    assert len(reader._cache) == 1 and reader.num_classes is None
    np.testing.assert_array_equal(pixels(pickle.loads(pickle.dumps(reader))), images)


def test_columns_without_metadata(tmp_path):
    images = noise(4, 3, 3)
    write_raw(
        tmp_path / "train-0.parquet",
        width=[3] * 4,
        thumbnail=[b"no"] * 4,
        image=[encode(image) for image in images],
        label=pa.array([2, None, 0, 1]),
    )
    reader = opened(tmp_path)
    np.testing.assert_array_equal(pixels(reader), images)
    np.testing.assert_array_equal(reader.labels(), [2, -1, 0, 1])
    assert reader.num_classes == 3 and reader.class_names is None


def test_test_falls_back_to_validation(tmp_path):
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", [encode(noise(1, 2, 2)[0])], [-1])
    reader = opened(tmp_path, "test")
    assert len(reader) == 1 and reader.num_classes is None  # every label is -1


def test_missing_directory_and_split(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        opened(tmp_path / "none")
    with pytest.raises(UserError, match="has no parquet files at all"):
        opened(tmp_path)
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [encode(noise(1, 2, 2)[0])])
    with pytest.raises(UserError, match="split 'unsupervised'; the splits there are train, validation"):
        opened(tmp_path, "unsupervised")


def test_missing_shards_and_two_configurations(tmp_path):
    data = [encode(noise(1, 2, 2)[0])]
    write_parquet(tmp_path / "a" / "train-00001-of-00002.parquet", data)
    with pytest.raises(UserError, match="1 of the 2 files"):
        opened(tmp_path)
    write_parquet(tmp_path / "b" / "train.parquet", data)
    with pytest.raises(UserError, match=r"several folders; choose one of hf:.*a, hf:.*b"):
        opened(tmp_path)
    assert len(opened(tmp_path / "b")) == 1


def test_truncated_or_corrupt_files_are_named(tmp_path):
    file = tmp_path / "train-00000-of-00001.parquet"
    write_parquet(file, [encode(image) for image in noise(8, 30, 30)], group=8)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet is corrupt or truncated"):
        opened(tmp_path)
    damaged = bytearray(whole)
    damaged[4:64] = b"\xff" * 60  # the first page's header
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet is corrupt or truncated"):
        pixels(opened(tmp_path))


@pytest.mark.parametrize("kind", ["jpeg cut", "png cut", "text", "empty", "null"])
def test_a_corrupt_image_names_file_and_row(tmp_path, kind):
    image = noise(1, 20, 20)[0]
    jpeg, png = encode(image, "JPEG"), encode(image)
    bad = {"jpeg cut": jpeg[:300], "png cut": png[:200], "text": b"<html>", "empty": b"", "null": None}[kind]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [png] * 5)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [png] * 4 + [bad])
    with pytest.raises(UserError, match=r"row 4 of .*train-00001-of-00002.parquet (is not a readable|has no image)"):
        pixels(opened(tmp_path))


def test_no_image_column_and_disagreeing_files(tmp_path):
    write_raw(tmp_path / "test.parquet", text=["a"], label=[1])
    with pytest.raises(UserError, match=r"test.parquet has no image column \(it has text, label\)"):
        opened(tmp_path, "test")
    write_parquet(tmp_path / "train-0.parquet", [encode(noise(1, 2, 2)[0])])
    write_parquet(tmp_path / "train-1.parquet", [encode(noise(1, 2, 2)[0])], image="picture")
    with pytest.raises(UserError, match=r"train-1.parquet lacks the column 'image.bytes' of train-0.parquet"):
        pixels(opened(tmp_path))


def test_a_label_beyond_the_declared_classes(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    write_parquet(tmp_path / "train.parquet", [encode(noise(1, 2, 2)[0])] * 2, [1, 2], features)
    with pytest.raises(UserError, match="label 2, but its metadata names only 2 classes"):
        opened(tmp_path)
