"""WebDataset shards by pattern, their labels and offsets; and archives that are cut, compressed or hostile."""

import gzip
import io
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pictures import encode, noise

from ssl_kd.data.decode import decode
from ssl_kd.data.readers import open_reader
from ssl_kd.data.readers.files import expand
from ssl_kd.data.splits import held_out
from ssl_kd.errors import UserError

PNG = encode(noise(1, 4, 5)[0])


def tar(path, members, fmt=tarfile.GNU_FORMAT):
    """A shard of (name, bytes) pairs, or ready members without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=fmt) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def opened(pattern, split="all"):
    return open_reader(f"tar:{pattern}", split)


def members(reader):
    return [reader.where(row).partition(" in ")[0] for row in range(len(reader))]


# --- samples and labels


def test_samples_are_members_that_agree_up_to_the_first_dot(tmp_path):
    images = [encode(image) for image in noise(7, 3, 3)]
    tar(
        tmp_path / "a.tar",
        [
            ("000.jpg", images[0]),
            ("000.cls", b"3\n"),
            ("x/001.json", b'{"label": 1, "caption": "a.b"}'),
            ("x/001.PNG", images[1]),
            ("x.y/002.webp", images[2]),
            ("x.y/002.json", b'{"cls": 0}'),
            ("003.seg.png", b"a mask"),
            ("003.jpeg", images[3]),
            ("003.json", b'{"caption": "none"}'),
            ("004.bmp", images[4]),
            ("004.png", b"a second image"),
            ("./005.jpg", images[5]),
            ("005.txt", b"words"),
            ("006.json", b"[1]"),
            ("006.jpg", images[6]),
            ("._007.jpg", b"of the Finder"),
            ("008.cls", b"9"),
        ],
    )
    reader = opened(tmp_path / "a.tar")
    assert members(reader) == [
        "000.jpg",
        "x/001.PNG",
        "x.y/002.webp",
        "003.jpeg",
        "004.bmp",
        "./005.jpg",
        "006.jpg",
    ]
    assert [reader.read(row) for row in range(7)] == images
    assert reader.labels().tolist() == [3, 1, 0, -1, -1, -1, -1] and reader.labels().dtype == np.int32
    assert reader.num_classes == 4 and reader.label_of(1) == 1
    assert reader.where(1) == f"x/001.PNG in {tmp_path}/a.tar"


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_dialect(tmp_path, fmt):
    names = [f"{'d' * 90}/{'e' * 60}/{k}.jpg" for k in range(3)]
    if fmt != tarfile.USTAR_FORMAT:
        names += ["ü" * 120 + ".jpg"]
    tar(tmp_path / "a.tar", [(name, PNG) for name in names], fmt)
    reader = opened(tmp_path)
    assert members(reader) == names and all(reader.read(row) == PNG for row in range(len(names)))
    assert reader.num_classes is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0.cls", b"cat"),
        ("0.cls", b""),
        ("0.cls", b"-2"),
        ("0.cls", b"9999999999"),
        ("0.json", b'{"label":'),
        ("0.json", b"[" * 99_999),
    ],
)
def test_labels_that_are_none(tmp_path, name, content):
    tar(tmp_path / "a.tar", [("0.jpg", PNG), (name, content)])
    with pytest.raises(
        UserError, match=rf"^label {name} in .*a\.tar cannot be read \(.+\); write an integer from 0 on$"
    ):
        opened(tmp_path)


# --- shards and splits


def test_shards_by_directory_glob_and_range(tmp_path):
    for k in range(8, 12):
        tar(tmp_path / f"s-{k:03}.tar", [(f"{k}.jpg", PNG)])
    everything = ["8.jpg", "9.jpg", "10.jpg", "11.jpg"]
    assert members(opened(tmp_path)) == everything
    assert members(opened(f"{tmp_path}/s-*.tar")) == everything
    assert members(opened(f"{tmp_path}/s-{{008..011}}.tar")) == everything
    assert members(opened(f"{tmp_path}/s-{{009..010}}.tar")) == everything[1:3]
    assert members(opened(f"{tmp_path}/s-010.tar")) == ["10.jpg"]
    with pytest.raises(UserError, match=r"lacks 2 of 6 files, the first .*s-012\.tar; fetch them"):
        opened(f"{tmp_path}/s-{{008..013}}.tar")


def test_ranges_combine():
    assert expand("a{08..10}.{1..2}") == ["a08.1", "a08.2", "a09.1", "a09.2", "a10.1", "a10.2"]
    assert expand("a{9..10}") == ["a9", "a10"] and expand("a{b}") == ["a{b}"] and expand("a{3..2}") == []


def test_shards_called_like_splits(tmp_path):
    for name in ("train-000", "train-001", "val_0"):
        tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", PNG)])
    assert members(opened(tmp_path, "train")) == ["train-000.jpg", "train-001.jpg"]
    assert members(opened(tmp_path, "validation")) == members(opened(tmp_path, "test")) == ["val_0.jpg"]
    assert members(opened(f"{tmp_path}/train-{{000..001}}.tar", "train")) == ["train-000.jpg", "train-001.jpg"]
    with pytest.raises(UserError, match=r"tar:.* has no split 'test'; the splits there are train"):
        opened(f"{tmp_path}/train-*.tar", "test")


def test_other_shards_hold_out_a_tenth_by_name(tmp_path):
    names = [f"{k:04}.jpg" for k in range(200)]
    for part in range(2):
        samples = [(name, PNG) for name in names[part::2]]
        labels = [(name.replace("jpg", "cls"), b"%d" % (int(name[:4]) % 5)) for name in names[part::2]]
        tar(tmp_path / f"{part}.tar", [member for pair in zip(samples, labels, strict=True) for member in pair])
    stored = names[0::2] + names[1::2]
    for split in ("train", "test"):
        reader = opened(tmp_path, split)
        assert members(reader) == [stored[row] for row in held_out([name.encode() for name in stored], split)]
        assert reader.labels().tolist() == [int(name[:4]) % 5 for name in members(reader)]
        assert reader.num_classes == 5
        assert {reader.where(row)[-5:] for row in range(len(reader))} == {"0.tar", "1.tar"}


# --- processes and threads


def test_readers_travel_and_serve_many_threads(tmp_path):
    images = [os.urandom(500 + k) for k in range(300)]
    for part in range(3):
        tar(tmp_path / f"{part}.tar", [(f"{k:03}.jpg", images[k]) for k in range(100 * part, 100 * part + 100)])
    reader = opened(tmp_path)
    sent = pickle.dumps(reader)
    assert len(sent) < 300 * 60 + 3000
    copy = pickle.loads(sent)
    order = np.random.default_rng(0).integers(0, 300, 2000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.read, order)) == [images[row] for row in order]


# --- bad archives


def test_only_plain_members_count_and_names_are_no_paths(tmp_path):
    tar(
        tmp_path / "a.tar",
        [
            special("directory.jpg", tarfile.DIRTYPE),
            special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            special("hard.jpg", tarfile.LNKTYPE, "ok.jpg"),
            special("fifo.jpg", tarfile.FIFOTYPE),
            special("device.jpg", tarfile.CHRTYPE),
            ("../../outside.jpg", PNG),
            ("/absolute.jpg", PNG),
        ],
    )
    before = sorted(os.listdir(tmp_path))
    reader = opened(tmp_path)
    assert members(reader) == ["../../outside.jpg", "/absolute.jpg"]
    assert [reader.read(row) for row in range(2)] == [PNG, PNG] and sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused_with_the_remedy(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", f"w:{mode}") as archive:
        archive.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(
        UserError, match=r"a\.tar is compressed, so that no image can be read alone; run: (gunzip|bunzip2|unxz) "
    ):
        opened(tmp_path)


def test_a_compressed_shard_of_another_name(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match=r"matches no files; give a directory of \.tar files, a glob or a brace range"):
        opened(tmp_path)
    with pytest.raises(UserError, match="is compressed"):
        opened(tmp_path / "a.tar.gz")


def test_truncated_shards_are_named(tmp_path):
    """Wherever they are cut, also between members; only of the zeros after the first block of them is none missed."""
    tar(tmp_path / "whole.tar", [(f"{k}.jpg", bytes([k + 1]) * 700) for k in range(3)])
    whole = (tmp_path / "whole.tar").read_bytes()
    used = 3 * (512 + 1024)
    for cut in (0, 1, 511, 512, 513, 1300, 1536, 1536 + 512, 2 * 1536, used - 1, used, used + 511):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"^.*cut\.tar is corrupt or truncated \(.+\); fetch it again$"):
            opened(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: used + 512])
    assert len(opened(tmp_path / "cut.tar")) == 3


def test_damaged_headers_are_noticed(tmp_path):
    """Those of the second and later members would else end the archive silently."""
    tar(tmp_path / "a.tar", [(f"{k}.jpg", bytes(700)) for k in range(3)])
    whole = (tmp_path / "a.tar").read_bytes()
    for member in range(3):
        for byte in (0, 100, 124, 148, 156):
            damaged = bytearray(whole)
            damaged[member * 1536 + byte] ^= 0x41
            (tmp_path / "a.tar").write_bytes(damaged)
            with pytest.raises(UserError, match=r"a\.tar is corrupt or truncated"):
                opened(tmp_path)


def test_a_negative_size_does_not_loop(tmp_path):
    header = bytearray(special("0.jpg", tarfile.REGTYPE).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(10_240))
    with pytest.raises(UserError, match=r"a\.tar is corrupt or truncated"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["text", "fifo", "directory", "none"])
def test_what_is_no_shard(tmp_path, kind):
    path = tmp_path / "x" / "a.tar"
    path.parent.mkdir()
    if kind == "text":
        path.write_text("hello " * 500)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    message = {"text": "corrupt or truncated", "none": "matches no files"}.get(kind, r"is no regular file; narrow")
    with pytest.raises(UserError, match=message):
        opened(f"{path.parent}/*.tar")


def test_a_shard_without_images(tmp_path):
    tar(tmp_path / "a.tar", [("0.cls", b"1"), ("0.txt", b"words")])
    with pytest.raises(UserError, match=r"tar:.* holds no images \(members KEY\.jpg, KEY\.jpeg, KEY\.png"):
        opened(tmp_path)


def test_a_shard_that_shrank_and_an_image_that_is_cut_are_named(tmp_path):
    tar(tmp_path / "a.tar", [("0.png", PNG[:40]), ("1.png", b"")])
    reader = opened(tmp_path)
    for row in range(2):
        with pytest.raises(UserError, match=rf"^{row}\.png in .*a\.tar is not a readable image"):
            decode(reader.read(row), lambda row=row: reader.where(row))
    os.truncate(tmp_path / "a.tar", 520)
    with pytest.raises(UserError, match=r"a\.tar has become shorter since it was listed"):
        reader.read(0)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match=r"a\.tar cannot be read \(No such file or directory\)"):
        reader.read(0)
