"""A packed set is its source, reduced; whatever stops the packing, the same command ends with the same bytes."""

import dataclasses
import fcntl
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import simplejpeg
from pictures import encode, noise, smooth
from PIL import Image

from ssl_kd.data import prepare
from ssl_kd.data.decode import decode
from ssl_kd.data.prepare import JOURNAL, Packing, pack_set, verify
from ssl_kd.data.readers import open_reader
from ssl_kd.data.sources import open_source
from ssl_kd.errors import UserError

NOISE = Packing("synthetic:64x200", ["train"], format="raw", shard_mib=1)
"""2.4 MB of exact pixels, without files: three shards."""


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


def stored(out: Path, split: str = "train"):
    """The reader of a packed set, and its images as they are stored."""
    reader = open_reader(f"arrayrecord:{out}", split)
    return reader, [reader.read(row) for row in range(len(reader))]


@pytest.fixture
def photos(tmp_path):
    """Of two classes: small and large, standing, lying and turned, JPEG and PNG."""
    files = {
        "train/cat/1.jpg": encode(smooth(30, 40, 1), "JPEG"),
        "train/cat/2.jpg": encode(smooth(300, 200, 2), "JPEG"),
        "train/dog/3.png": encode(smooth(20, 30, 3)),
        "train/dog/4.png": encode(smooth(90, 400, 4)),
        "train/dog/5.jpg": encode(smooth(24, 36, 5), "JPEG", exif=turned()),
        "train/dog/6.jpg": encode(smooth(24, 36, 6)[..., 0], "JPEG"),
        "test/cat/7.jpg": encode(smooth(40, 40, 7), "JPEG", quality=60),
    }
    for name, data in files.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    return f"folder:{tmp_path}/photos", list(files.values())


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


# --- what is packed


def test_a_packed_set_is_its_source_reduced(photos, tmp_path):
    spec, files = photos
    out = tmp_path / "out"
    pack_set(Packing(spec, ["train", "test"], short=32), out)
    reader, images = stored(out)
    assert reader.labels().tolist() == [0, 0, 1, 1, 1, 1] and reader.class_names == ("cat", "dog")
    assert images[0] == files[0] and images[5] == files[5]  # upright JPEGs that are small enough: byte for byte
    assert stored(out, "test")[1][0] != files[6]  # 40 pixels, for 32
    sizes = [decode(image, str).shape[:2] for image in images]
    assert sizes == [(30, 40), (48, 32), (20, 30), (11, 48), (36, 24), (24, 36)]
    for row, image in enumerate(images):
        height, width = sizes[row]
        want = np.asarray(Image.fromarray(decode(files[row], str)).resize((width, height), Image.Resampling.BILINEAR))
        if row in (2, 3, 4):  # PNGs, and one that was turned
            assert image == simplejpeg.encode_jpeg(want, quality=90, colorsubsampling="420")
        else:  # row 1 was shrunk by its DCT first
            assert np.abs(decode(image, str).astype(int) - want).mean() < 4


def test_training_uses_all_of_it_as_it_is(photos, tmp_path):
    """At data.canvas = --short nothing is reduced again."""
    pack_set(Packing(photos[0], ["train"], short=32), tmp_path / "out")
    source = open_source(f"arrayrecord:{tmp_path}/out", "train", canvas=32)
    assert source.canvas == (48, 48)
    for i, image in enumerate(stored(tmp_path / "out")[1]):
        np.testing.assert_array_equal(source.image(i), decode(image, str))


def test_raw_pixels_are_exact(photos, tmp_path):
    spec, files = photos
    pack_set(Packing(spec, ["train"], short=32, format="raw"), tmp_path / "out")
    _, images = stored(tmp_path / "out")
    for row in (0, 2, 4):
        np.testing.assert_array_equal(images[row], decode(files[row], str))
    want = Image.fromarray(decode(files[3], str)).resize((48, 11), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(images[3], want)


def test_rows_keep_their_order_over_shards_and_threads(tmp_path):
    out = tmp_path / "out"
    pack_set(NOISE, out, workers=5)
    source, (reader, images) = open_reader(NOISE.source, "train"), stored(out)
    assert sorted(file.name for file in out.glob("*.arrayrecord")) == [
        f"train-{k:05}-of-00003.arrayrecord" for k in range(3)
    ]
    assert [reader.where(row).partition(" of ")[0] for row in (65, 66, 199)] == ["record 65", "record 0", "record 66"]
    np.testing.assert_array_equal(reader.labels(), source.labels())
    for row, image in enumerate(images):
        np.testing.assert_array_equal(image, source.read(row))


def test_parts_of_splits(tmp_path):
    pack_set(Packing("embedded", ["train[5:9]", "test[:3]"], format="raw"), tmp_path / "out")
    assert stored(tmp_path / "out")[0].labels().tolist() == [5, 6, 7, 8]
    assert stored(tmp_path / "out", "test")[0].labels().tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"--splits=test,test\[:3\] names a split twice"):
        pack_set(Packing("embedded", ["test", "test[:3]"]), tmp_path / "two")


def test_sets_without_labels(tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(3):
        (tmp_path / "in" / f"{k}.png").write_bytes(encode(noise(1, 5, 5, k)[0]))
    pack_set(Packing(f"folder:{tmp_path}/in", ["all"]), tmp_path / "out")
    reader = open_reader(f"arrayrecord:{tmp_path}/out", "all")
    assert reader.num_classes is None and reader.class_names is None and reader.labels().tolist() == [-1] * 3


# --- stopped and resumed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    pack_set(NOISE, out)
    return content(out)


KILLED = """
import os, signal, sys
from pathlib import Path
from ssl_kd.data.prepare import Packing, pack_set

def record(self, reader, row, packed=Packing.record, seen=[]):
    seen.append(row)
    if len(seen) == 64 + 150:  # the sample first; the second shard ends with row 132, and 8 are packed ahead
        os.kill(os.getpid(), signal.SIGKILL)
    return packed(self, reader, row)

Packing.record = record
pack_set(Packing("synthetic:64x200", ["train"], format="raw", shard_mib=1), Path(sys.argv[1]), workers=1)
"""


def test_a_killed_command_goes_on_with_the_first_missing_shard(finished, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = {name: (out / name).stat() for name in finished if "of-00003" in name and (out / name).exists()}
    assert sorted(whole) == ["train-00000-of-00003.arrayrecord", "train-00001-of-00003.arrayrecord"]
    assert not (out / "dataset.json").exists()
    with pytest.raises(UserError, match="is not packed to its end; give that command again"):
        stored(out)
    pack_set(NOISE, out)
    assert content(out) == finished
    for name, status in whole.items():
        assert (out / name).stat().st_mtime_ns == status.st_mtime_ns, f"{name} was packed again"


def test_stopped_anywhere_else_it_ends_with_the_same_bytes(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    for owner, name in ((prepare.Journal, "add"), (prepare, "open_writer"), (prepare, "write_index")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, stop)
            pack_set(NOISE, out)
        with (out / JOURNAL).open("a") as file:
            file.write('{"shard": {"na')  # half a line
        (out / "train-00001-of-00003.arrayrecord.partial").write_bytes(b"half a shard")
        if name == "add":  # a shard in its place that was not noted
            assert (out / "train-00000-of-00003.arrayrecord").exists()
            pack_until(out, shards=1, monkeypatch=monkeypatch)
        elif name == "open_writer":
            pack_until(out, shards=3, monkeypatch=monkeypatch)
    pack_set(NOISE, out)
    assert content(out) == finished
    pack_set(NOISE, out)
    assert content(out) == finished


def pack_until(out: Path, shards: int, monkeypatch) -> None:
    """Stops when so many shards are noted."""
    add = prepare.Journal.add

    def added(self, *args):
        add(self, *args)
        if len(self.whole) == shards:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.Journal, "add", added)
        pack_set(NOISE, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short": 20}, r"another packing: short \(64 there, 20 now\)\. Use the same"),
        ({"format": "jpeg", "quality": 80}, r"format \('raw' there, 'jpeg' now\); quality \(90 there, 80 now\)\. Use"),
        ({"source": "synthetic:64x30"}, r"source \('synthetic:64x20' there, 'synthetic:64x30' now\)\. Use"),
        ({"splits": ["test"]}, r"splits \(\['train'\] there, \['test'\] now\)"),
    ],
)
def test_another_packing_is_refused(change, message, tmp_path):
    settings = {"source": "synthetic:64x20", "splits": ["train"], "short": 64, "format": "raw"}
    pack_set(Packing(**settings), tmp_path)
    before = content(tmp_path)
    with pytest.raises(UserError, match=message):
        pack_set(Packing(**{**settings, **change}), tmp_path)
    assert content(tmp_path) == before


def test_a_source_that_has_changed_is_refused(photos, tmp_path):
    packing = Packing(photos[0], ["train"])
    pack_set(packing, tmp_path / "out")
    added = tmp_path / "photos/train/dog/9.png"
    added.write_bytes(encode(noise(1, 5, 5)[0]))
    with pytest.raises(UserError, match=r"another packing: images \(\{'train': 6\} there, \{'train': 7\} now\)"):
        pack_set(packing, tmp_path / "out")
    added.rename(tmp_path / "photos/train/dog/6.jpg")
    with pytest.raises(UserError, match=r"another packing: sample \(.*\)\. Use the same"):
        pack_set(packing, tmp_path / "out")


def test_a_directory_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="holds other things; choose an empty directory"):
        pack_set(NOISE, tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*packing\.jsonl \(.+\); make room or choose another OUT"):
        pack_set(NOISE, tmp_path / "thesis.tex" / "out")
    assert content(tmp_path) == {"thesis.tex": b"years"}


def test_two_commands_do_not_pack_into_one_place(tmp_path):
    with (tmp_path / JOURNAL).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another command is packing into"):
            pack_set(NOISE, tmp_path)


def test_a_damaged_journal_is_one_sentence(tmp_path):
    (tmp_path / JOURNAL).write_text("years\n")
    with pytest.raises(UserError, match=r"packing\.jsonl is damaged \(.+\); delete"):
        pack_set(NOISE, tmp_path)


# --- checksums


def test_a_set_that_is_not_finished_cannot_be_verified(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json cannot be read \(No such file or directory\)"):
        verify(tmp_path)


def test_damaged_shards_are_named_and_made_again(finished, tmp_path, capsys):
    for name, data in finished.items():
        (tmp_path / name).write_bytes(data)
    verify(tmp_path)
    assert "200 images in 3 shards, all as written" in capsys.readouterr().out
    shards = [name for name in finished if "of-00003" in name]
    damaged, missing = (tmp_path / f"train-0000{k}-of-00003.arrayrecord" for k in (0, 2))
    data = bytearray(damaged.read_bytes())
    data[5000] ^= 1
    damaged.write_bytes(data)
    missing.unlink()
    with pytest.raises(UserError) as error:
        verify(tmp_path)
    assert "2 of 3 shards are damaged: train-00000-of-00003.arrayrecord (its bytes have changed), " in str(error.value)
    assert "train-00002-of-00003.arrayrecord (No such file or directory); delete them" in str(error.value)
    damaged.unlink()
    pack_set(NOISE, tmp_path)
    verify(tmp_path)
    repaired = content(tmp_path)
    assert repaired.keys() == finished.keys() and all(repaired[name] == finished[name] for name in shards)


# --- room


def test_a_set_that_will_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9 << 20, 8 << 20, 1 << 20))
    with pytest.raises(UserError, match=r"needs about 2\.3 MiB and has 1\.0 MiB free; make room"):
        pack_set(NOISE, tmp_path)
    assert sorted(content(tmp_path)) == [JOURNAL]
    pack_set(dataclasses.replace(NOISE, short=16), tmp_path)  # as the sentence says
    assert stored(tmp_path)[1][0].shape == (16, 16, 3)


@pytest.mark.parametrize("moment", ["write", "close"])
def test_a_full_disk_leaves_whole_shards(moment, finished, tmp_path, monkeypatch):
    opened = []

    class Full:
        """The second shard's writer, as array_record fails."""

        def __init__(self, path):
            path.write_bytes(b"half a shard")

        def write(self, record):
            self.fail("write")

        def close(self):
            self.fail("close")

        def fail(self, name):
            if name == moment:
                raise RuntimeError(f"{name}() failed: No space left on device; writing train-00001")

    def open_writer(path, real=prepare.open_writer):
        opened.append(path)
        return Full(path) if len(opened) == 2 else real(path)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "open_writer", open_writer)
        with pytest.raises(UserError, match=r"^cannot write .*00001-of-00003\.arrayrecord \(.*No space left on device"):
            pack_set(NOISE, tmp_path)
    assert sorted(content(tmp_path)) == [JOURNAL, "train-00000-of-00003.arrayrecord"]
    pack_set(NOISE, tmp_path)
    assert content(tmp_path) == finished


# --- images that cannot be read


@pytest.fixture
def spoilt(tmp_path):
    """120 images, of which 12 are no images."""
    for k in range(120):
        folder = tmp_path / "in" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k:03}.png").write_bytes(b"no image" if k % 10 == 3 else encode(np.full((4, 4, 3), k, np.uint8)))
    return f"folder:{tmp_path}/in"


def test_bad_images_are_left_out_and_named(spoilt, tmp_path, capsys):
    out = tmp_path / "out"
    pack_set(Packing(spoilt, ["all"], format="raw"), out, max_bad=0.2)
    reader, images = stored(out, "all")
    want = [k for k in [*range(0, 120, 2), *range(1, 120, 2)] if k % 10 != 3]
    assert [image[0, 0, 0] for image in images] == want and reader.labels().tolist() == [k % 2 for k in want]
    assert json.loads((out / "dataset.json").read_text())["rows"] == {"all": 120}
    lines = (out / "bad.txt").read_text().splitlines()
    assert len(lines) == 12 and lines[0].startswith(f"{tmp_path}/in/b/003.png is not a readable image (not a JPEG, ")
    assert "108 images in" in (said := capsys.readouterr().out) and "(12 left out, see" in said
    pack_set(Packing(spoilt, ["all"], format="raw"), out)
    assert (out / "bad.txt").read_text().splitlines() == lines


def test_too_many_bad_images_stop_the_work(spoilt, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"^10 of 107 images cannot be read, each named in .*bad\.txt; mend the source"):
        pack_set(Packing(spoilt, ["all"], format="raw"), out, max_bad=0.09)
    assert len((out / "bad.txt").read_text().splitlines()) == 10
    pack_set(Packing(spoilt, ["all"], format="raw"), out, max_bad=0.11)
    assert len((out / "bad.txt").read_text().splitlines()) == 12 and len(stored(out, "all")[1]) == 108


def test_nine_bad_images_never_stop_it_but_nothing_else_does(tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(9):
        (tmp_path / "in" / f"{k}.jpg").write_bytes(b"")
    packing = Packing(f"folder:{tmp_path}/in", ["all"])
    with pytest.raises(UserError, match=r"none of 9 images of folder:.* all can be read: .*0\.jpg is not a readable"):
        pack_set(packing, tmp_path / "out")
    (tmp_path / "in" / "9.png").write_bytes(encode(noise(1, 4, 4)[0]))
    pack_set(packing, tmp_path / "out", max_bad=0.0)
    assert len(stored(tmp_path / "out", "all")[1]) == 1


# --- the command


def test_the_command(tmp_path):
    words = ["synthetic:8x70", str(tmp_path / "out"), "--splits=test", "--format=raw", "--workers=1"]
    done = runs.launch("prepare", *words)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("70 test images in 1 shard: about 0.0 MiB to write and 0.0 min; ")
    assert last == f"70 images in {tmp_path}/out; train with --config.data.source=arrayrecord:{tmp_path}/out"
