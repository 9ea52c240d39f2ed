"""The record format, its shards with and without a dataset.json, and what may be wrong with both."""

import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pictures import encode, noise

from ssl_kd.data.decode import decode
from ssl_kd.data.readers import ArrayRecordReader, open_reader
from ssl_kd.data.readers.arrayrecord import Index, Shard, open_writer, pack, read_index, unpack, write_index
from ssl_kd.data.splits import held_out
from ssl_kd.errors import UserError

PNG = encode(noise(1, 4, 5)[0])


def write(path, images, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = open_writer(path)
    for image, label in zip(images, labels, strict=True):
        writer.write(pack(label, image))
    writer.close()
    return Shard(path.name, len(labels), hashlib.sha256(path.read_bytes()).hexdigest(), list(labels))


def opened(pattern, split="all"):
    return open_reader(f"arrayrecord:{pattern}", split)


# --- records


def test_the_record_format_never_changes():
    """Golden: packed sets outlive this code."""
    assert pack(258, b"image") == b"KD\x01\x00\x02\x01\x00\x00image"
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)[:, :1]
    assert pack(-1, pixels) == b"KD\x01\x01\xff\xff\xff\xff\x02\x00\x01\x00" + bytes([0, 1, 2, 6, 7, 8])


def test_records_unpack_to_what_was_packed():
    label, image = unpack(pack(7, PNG))
    assert label == 7 and image == PNG and isinstance(image, memoryview)
    for pixels in (noise(1, 3, 5)[0], noise(1, 300, 1)[0], noise(1, 6, 6)[0][:, ::-2]):
        label, image = unpack(pack(-1, pixels))
        assert label == -1 and image.dtype == np.uint8
        np.testing.assert_array_equal(image, pixels)
    assert unpack(pack(0, b""))[1] == b""


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "not a record that launch/prepare.py wrote"),
        (b"KD\1\0", "not a record"),
        (b"\x89PNG" + bytes(99), "not a record"),
        (b"KD\2" + pack(0, PNG)[3:], "format 2, kind 0; this version reads format 1"),
        (b"KD\1\2" + pack(0, PNG)[4:], "format 1, kind 2"),
        (pack(0, noise(1, 3, 5)[0])[:-1], "reshape"),
        (pack(0, noise(1, 3, 5)[0]) + b"\0", "reshape"),
        (pack(0, noise(1, 3, 5)[0])[:10], "cut short"),
    ],
)
def test_other_records_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        unpack(record)


# --- sets


@pytest.fixture
def packed(tmp_path):
    """train: two shards, one of files and one of pixels; test: one without labels."""
    files, pixels = [encode(image) for image in noise(5, 4, 4)], list(noise(3, 6, 5, seed=1))
    shards = [
        write(tmp_path / "train-00000-of-00002.arrayrecord", files, [0, 1, 0, 1, -1]),
        write(tmp_path / "train-00001-of-00002.arrayrecord", pixels, [1, 0, 1]),
    ]
    test = write(tmp_path / "test-00000-of-00001.arrayrecord", files[:2], [-1, -1])
    test = Shard(test.name, test.records, test.sha256, None)
    index = Index(3, ["cat", "dog", "eel"], {"train": 8, "test": 2}, {"train": shards, "test": [test]})
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    return tmp_path, files + pixels


@pytest.mark.parametrize("pattern", ["", "/*.arrayrecord", "/train-{00000..00001}-of-00002.arrayrecord"])
def test_rows_of_several_shards(packed, pattern):
    folder, images = packed
    reader = opened(f"{folder}{pattern}", "train")
    assert len(reader) == 8 and reader.labels().dtype == np.int32
    assert reader.labels().tolist() == [0, 1, 0, 1, -1, 1, 0, 1] and reader.label_of(4) == -1
    assert reader.num_classes == (2 if pattern else 3)  # the index knows of a class without images
    assert reader.class_names == (None if pattern else ("cat", "dog", "eel"))
    for row, image in enumerate(images):
        np.testing.assert_array_equal(decode(reader.read(row), str), decode(image, str))
    assert reader.where(6) == f"record 1 of {folder}/train-00001-of-00002.arrayrecord"


def test_splits_of_an_index(packed):
    folder, images = packed
    test = opened(folder, "test")
    assert len(test) == 2 and test.labels().tolist() == [-1, -1]
    assert test.num_classes is None and test.class_names is None
    assert bytes(test.read(1)) == images[1]
    with pytest.raises(UserError, match=r"arrayrecord:.* has no split 'all'; the splits there are test, train"):
        opened(folder)


def test_what_an_index_says(packed):
    content = json.loads((packed[0] / "dataset.json").read_text())
    assert content.keys() == {"format", "num_classes", "class_names", "rows", "splits"} and content["format"] == 1
    assert content["rows"] == {"train": 8, "test": 2}
    shard = content["splits"]["train"][0]
    assert shard["name"] == "train-00000-of-00002.arrayrecord" and shard["records"] == 5
    assert shard["labels"] == [0, 1, 0, 1, -1]
    assert shard["sha256"] == hashlib.sha256((packed[0] / shard["name"]).read_bytes()).hexdigest()


def test_plain_shards_hold_out_a_tenth_by_row(tmp_path):
    for part in range(2):
        write(tmp_path / f"{part}.arrayrecord", [b"%d" % k for k in range(60 * part, 60 * part + 60)], [3] * 60)
    for split in ("train", "test", "all"):
        reader = opened(tmp_path, split)
        rows = held_out((b"%d" % k for k in range(120)), split)
        assert [int(bytes(reader.read(row))) for row in range(len(reader))] == rows.tolist()
        assert reader.num_classes == 4


def test_readers_travel_and_serve_many_threads_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(ArrayRecordReader, "OPEN_SHARDS", 2)
    images = [os.urandom(500 + k) for k in range(150)]
    for part in range(5):
        write(tmp_path / f"{part}.arrayrecord", images[30 * part : 30 * part + 30], [0] * 30)
    copy = pickle.loads(pickle.dumps(opened(tmp_path)))
    order = np.random.default_rng(0).integers(0, 150, 1000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: bytes(copy.read(row)), order)) == [images[row] for row in order]
    assert len(copy._shards) == 2


# --- bad sets


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "missing", "fifo", "directory"])
def test_bad_shards_are_named(packed, kind):
    folder, _ = packed
    file = folder / "train-00001-of-00002.arrayrecord"
    whole = file.read_bytes()
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes({"empty": b"", "text": b"records\n" * 20_000, "cut": whole[: len(whole) // 2]}[kind])
    reader = opened(folder, "train")
    assert len(reader.read(0)) > 0
    with pytest.raises(
        UserError, match=r"train-00001-of-00002\.arrayrecord is (no ArrayRecord file|missing or no reg)"
    ):
        reader.read(5)
    if kind != "missing":
        with pytest.raises(UserError, match=r"train-00001-of-00002\.arrayrecord"):
            opened(f"{folder}/train-*", "train")


def test_a_flipped_bit_is_noticed(tmp_path):
    file = tmp_path / "a.arrayrecord"
    images = [os.urandom(3000) for _ in range(40)]
    write(file, images, [0] * 40)
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(images[20]) + 1500] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.arrayrecord cannot be read \(.+\); pack the set again"):
        opened(tmp_path)
    write_index(tmp_path, Index(None, None, {"train": 40}, {"train": [Shard("a.arrayrecord", 40, "", None)]}))
    reader = opened(tmp_path, "train")
    assert bytes(reader.read(19)) == images[19]
    with pytest.raises(UserError, match=r"^record 20 of .*a\.arrayrecord cannot be read \(.+\); pack the set again$"):
        reader.read(20)


def test_shards_of_others(tmp_path):
    writer = open_writer(tmp_path / "a.arrayrecord")
    writer.write(b"an example of TensorFlow's")
    writer.close()
    with pytest.raises(
        UserError, match=r"a\.arrayrecord cannot be read \(not a record that launch/prepare\.py wrote\)"
    ):
        opened(tmp_path)


def test_an_index_that_promises_more_records(packed):
    folder, _ = packed
    shard = Shard("test-00000-of-00001.arrayrecord", 3, "", None)
    write_index(folder, Index(None, None, {"train": 3}, {"train": [shard]}))
    with pytest.raises(UserError, match=r"^record 2 of .*test-00000-of-00001\.arrayrecord cannot be read"):
        opened(folder, "train").read(2)


SHARD = {"name": "test-00000-of-00001.arrayrecord", "records": 2, "sha256": "", "labels": [0, 1]}
INDEX = {"format": 1, "num_classes": 2, "class_names": None, "rows": {"test": 2}, "splits": {"test": [SHARD]}}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '"x"', "{}", *({key: INDEX[key] for key in INDEX if key != missing} for missing in INDEX)]
    + [
        {**INDEX, **change}
        for change in (
            {"format": 2},
            {"splits": {"test": ["a"]}},
            {"splits": []},
            {"num_classes": 1},
            {"num_classes": None},
            {"class_names": ["cat"]},
            {"class_names": ["cat", 5]},
            {"class_names": 2},
            {"more": 1},
        )
    ]
    + [
        {**INDEX, "splits": {"test": [{**SHARD, **change}]}}
        for change in (
            {"labels": [0]},
            {"labels": [0, -2]},
            {"labels": ["0", "1"]},
            {"labels": 3},
            {"records": "2", "labels": None},
            {"records": 3},
            {"name": 5},
            {"name": "../test-00000-of-00001.arrayrecord"},
            {"more": 1},
        )
    ],
    ids=str,
)
def test_a_damaged_index_is_one_sentence(packed, content):
    folder, _ = packed
    (folder / "dataset.json").write_text(json.dumps(INDEX))
    assert len(opened(folder, "test")) == 2
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=r"^.*dataset\.json cannot be read \(.+\); pack the set again$"):
        opened(folder, "test")


def test_an_index_is_written_whole_or_not_at_all(packed, monkeypatch):
    folder, _ = packed
    before = (folder / "dataset.json").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_index(folder, Index(None, None, {}, {}))
    assert (folder / "dataset.json").read_bytes() == before


def test_nothing_there(tmp_path):
    for pattern in (tmp_path, tmp_path / "none", f"{tmp_path}/*.arrayrecord"):
        with pytest.raises(
            UserError, match=r"arrayrecord:.* matches no files; give a directory of \.arrayrecord files"
        ):
            opened(pattern)
