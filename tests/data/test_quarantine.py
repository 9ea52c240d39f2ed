"""Bad images: others stand in for them, alike however the set is read; each is named once; too many stop the run."""

import json
import pickle
import struct
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from pictures import encode

from ssl_kd.data import sources
from ssl_kd.data.bags import mates
from ssl_kd.data.loader import Loader, epoch_order
from ssl_kd.data.quarantine import MIN_BAD, keep_lists, read_list
from ssl_kd.data.sources import Source, arrays, open_source
from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.probes import judge
from ssl_kd.probes.evaluate import evaluate

N, B = 40, 8
BAD = {3: "junk", 4: "empty", 5: "cut", 12: "huge", 20: "vanished", 30: "shrunk", 39: "bomb"}
"""Row → what is wrong with it; three in a row, and the last one, in whose place the first stands."""
SMALL = 17
"""An image of 1 × 1 pixels: fine."""


def picture(i: int) -> bytes:
    size = (1, 1) if i == SMALL else (8, 6)
    return encode(np.full((*size, 3), i, np.uint8))


def announced(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says so."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def spoil(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    contents = {
        "junk": b"<html>not found</html>",
        "empty": b"",
        "cut": whole[:40],
        "huge": announced(20_000, 20_000),
        "shrunk": whole[:-30],
        "bomb": announced(50_000, 50_000, zlib.compress(bytes(10**7))),  # 10 kB here, 7.5 GB decoded
    }
    if kind == "vanished":
        path.unlink()
    else:
        path.write_bytes(contents[kind])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images 0.png … of which i is all i, in two classes, i % 2; seven of them are bad, two since they were listed."""
    for i in range(N):
        path = tmp_path / "photos" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(i))
        if BAD.get(i) not in (None, "vanished", "shrunk"):
            spoil(path, BAD[i])
    return tmp_path / "photos"


def opened(folder: Path, **options) -> Source:
    """Then two images go bad."""
    source = open_source(f"folder:{folder}", "all", canvas=8, **options)
    for i in (i for i, kind in BAD.items() if kind in ("vanished", "shrunk")):
        if (folder / f"{i:02}.png").exists():
            spoil(folder / f"{i:02}.png", BAD[i])
    return source


def again(source: Source) -> Source:
    """As another session or process has it."""
    return pickle.loads(pickle.dumps(source))


def stand_in(i: int) -> int:
    while i in BAD:
        i = (i + 1) % N
    return i


STAND_INS = [stand_in(i) for i in range(N)]


def listed(workdir: Path) -> list[dict]:
    files = sorted(workdir.glob("quarantine*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_every_kind_of_bad_image_gives_its_place_to_the_next_and_is_named(folder, tmp_path, capsys):
    source = opened(folder)
    keep_lists([source.quarantine], tmp_path, begun=False)
    images, _ = arrays(source)
    np.testing.assert_array_equal(images.pixels[:, 0, 0, 0], STAND_INS)
    np.testing.assert_array_equal(source.stand_ins(), STAND_INS)
    sizes = [(1, 1) if i == SMALL else (8, 6) for i in STAND_INS]
    np.testing.assert_array_equal(images.size, sizes)
    lines = listed(tmp_path)
    assert [line["row"] for line in lines] == sorted(BAD)
    assert {line["set"] for line in lines} == {f"folder:{folder} all"}
    reasons = {
        "junk": "is not a readable image (not a JPEG",
        "empty": "is not a readable image (it is empty)",
        "cut": "is not a readable image (",
        "huge": "is 20000x20000 pixels; at most",
        "vanished": "cannot be read (No such file or directory)",
        "shrunk": "is not a readable image (",
        "bomb": "is 50000x50000 pixels; at most",
    }
    said = capsys.readouterr().out.splitlines()
    for line, console in zip(lines, said, strict=True):
        path = str(folder / f"{line['row']:02}.png")
        assert line["where"] == path and line["reason"].startswith(f"{path} {reasons[BAD[line['row']]]}")
        assert console == f"The next image stands in for this one: {line['reason']}."
    arrays(source)
    assert listed(tmp_path) == lines and capsys.readouterr().out == ""  # once


@pytest.mark.parametrize(("resident", "workers"), [("replicated", 0), ("sharded", 0), ("streamed", 0), ("streamed", 2)])
def test_batches_are_the_same_however_they_are_read(folder, tmp_path, resident, workers):
    source = opened(folder)
    keep_lists([source.quarantine], tmp_path, begun=False)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    bags = np.stack([np.arange(1, N + 1) % N, np.arange(2, N + 2) % N], axis=1).astype(np.int32)
    loader = Loader(source, batch_size=B, seed=3, mesh=mesh, resident=resident, workers=workers, bags=bags)
    take, steps = jax.jit(lambda data, index: data.take(index)), N // B
    for step, batch in enumerate(loader.batches(0, 2 * steps)):
        if loader.data is not None:
            index = batch["index"]
            mate = jax.device_put(mates(loader.data.bag, index, 3, step), index.sharding)
            batch |= {"image": take(loader.data, index), "label": loader.data.label[index]}
            batch["mate"] = take(loader.data, mate)
        assert batch.keys() == {"image", "label", "index", "mate"}
        order = epoch_order(3, step // steps, N)
        index = np.array([stand_in(order[step % steps * B + k]) for k in range(B)], np.int32)
        mate = [stand_in(i) for i in mates(bags, index, 3, step)]
        np.testing.assert_array_equal(batch["index"], index)
        np.testing.assert_array_equal(batch["label"], source.labels()[index])
        np.testing.assert_array_equal(batch["image"].pixels[:, 0, 0, 0], index)
        np.testing.assert_array_equal(batch["mate"].pixels[:, 0, 0, 0], mate)
    assert {line["row"] for line in listed(tmp_path)} == BAD.keys() and len(listed(tmp_path)) == len(BAD)


def test_a_set_chosen_out_of_another_has_its_own_stand_ins_and_the_same_list(folder):
    source = opened(folder)
    chosen = source.take(np.array([2, 3, 4, 30, 31, 20]))
    images, _ = arrays(chosen)
    np.testing.assert_array_equal(images.pixels[:, 0, 0, 0], [2, 31, 31, 31, 31, 2])
    assert source.quarantine.met.keys() == {3, 4, 30, 20}


def direction(images: Images) -> jax.Array:
    """The brightness of B images as an angle: (B, 2)."""
    x = images.pixels[:, 0, 0, :1] / 255
    return jnp.hstack([jnp.cos(x), jnp.sin(x)])


def test_probes_of_a_set_too_large_to_keep_take_the_labels_of_what_they_saw(tmp_path, monkeypatch):
    for i in range(N):
        path = tmp_path / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"junk" if i in (0, 1) else encode(np.full((6, 6, 3), 5 * i, np.uint8)))
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    results = []
    for most in (0, judge.PROBE_BYTES):
        monkeypatch.setattr(judge, "PROBE_BYTES", most)
        sets = [judge.labelled(open_source(f"folder:{tmp_path}", "all", canvas=6)) for _ in range(2)]
        assert sets[0].num_classes == 2 and isinstance(sets[0].images, Source) == (most == 0)

        results.append(evaluate(direction, *sets, ks=(1,), linear=False, batch_size=16, mesh=mesh))
        labels = sets[0].labels_read
        assert labels.tolist() == sorted(labels.tolist()) and labels.sum() == N // 2
    assert results[0] == results[1] and results[0]["knn1"] == 1


def test_a_resumed_run_goes_on_with_the_list_and_a_new_one_begins_anew(folder, tmp_path, capsys):
    first = opened(folder)
    keep_lists([first.quarantine], tmp_path, begun=False)
    first[np.array([3, 20])]
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"set": "cut sh\n')
    capsys.readouterr()
    resumed = again(first)
    keep_lists([resumed.quarantine], tmp_path, begun=True)
    resumed[np.array([3, 20, 12])]
    assert "12.png" in capsys.readouterr().out.splitlines()[0]
    assert sorted(read_list(tmp_path)) == [(f"folder:{folder} all", row) for row in (3, 4, 5, 12, 20)]
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 6  # and the one cut short
    anew = again(first)
    keep_lists([anew.quarantine], tmp_path, begun=False)
    assert read_list(tmp_path) == set() and not anew.quarantine.listed


def test_every_process_has_its_file_and_knows_the_stand_ins_of_all(folder, tmp_path, monkeypatch):
    first = opened(folder)
    second = again(first)
    (tmp_path / "quarantine.7.jsonl").write_text("of an attempt with more processes")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    keep_lists([first.quarantine], tmp_path, begun=False)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    keep_lists([second.quarantine], tmp_path, begun=False)
    first[np.array([3])]
    second[np.array([12, 39])]
    lines = (tmp_path / "quarantine.1.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [12, 39]
    assert {row for _, row in read_list(tmp_path)} == {3, 4, 5, 12, 39}
    alone = [np.isin(np.arange(N), list(source.quarantine.met)) for source in (first, second)]
    assert not (tmp_path / "quarantine.7.jsonl").exists()
    monkeypatch.setattr(sources.multihost_utils, "process_allgather", lambda mine: np.stack(alone))
    known = [stand_in(i) if i in (3, 4, 5, 12, 39) else i for i in range(N)]
    assert first.stand_ins().tolist() == second.stand_ins().tolist() == known


def garbage(folder: Path, good: int, bad: int) -> str:
    """Bad images among good ones."""
    folder.mkdir()
    for i in range(good + bad):
        (folder / f"{i:04}.png").write_bytes(
            b"junk" if i % 2 and i < 2 * bad else encode(np.zeros((2, 2, 3), np.uint8))
        )
    return f"folder:{folder}"


@pytest.mark.parametrize(("resident", "workers"), [("replicated", 0), ("streamed", 0), ("streamed", 2)])
def test_too_many_stop_the_run_with_their_number_file_and_key(tmp_path, resident, workers):
    source = open_source(garbage(tmp_path / "photos", good=20, bad=20), "all")
    keep_lists([source.quarantine], tmp_path, begun=False)
    with pytest.raises(UserError) as error:
        loader = Loader(source, batch_size=8, seed=0, mesh=None, resident=resident, workers=workers)
        list(loader.batches(0, 10))
    number = 20 if resident == "replicated" else len(read_list(tmp_path))
    assert MIN_BAD <= number <= 20
    assert str(error.value).startswith(
        f"{number} of the 40 images of folder:{tmp_path}/photos all cannot be read, more"
    )
    assert f"data.max_bad=0.01 allows ({tmp_path}/quarantine.jsonl names them" in str(error.value)


def test_fewer_than_ten_never_stop_it_and_the_share_decides_beyond(tmp_path):
    arrays(open_source(garbage(tmp_path / "few", good=11, bad=9), "all", max_bad=0))
    spec = garbage(tmp_path / "many", good=60, bad=12)
    arrays(open_source(spec, "all", max_bad=12 / 72))
    with pytest.raises(UserError, match=r"^12 of the 72 images of .* more than data.max_bad=0.16 allows"):
        arrays(open_source(spec, "all", max_bad=0.16))
    for share in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"data.max_bad={share} must be a share"):
            open_source(spec, "all", max_bad=share)


def test_after_ten_the_console_names_the_list(tmp_path, capsys):
    source = open_source(garbage(tmp_path / "photos", good=12, bad=12), "all", max_bad=1)
    keep_lists([source.quarantine], tmp_path, begun=False)
    arrays(source)
    *ten, last = capsys.readouterr().out.splitlines()
    assert len(ten) == 10 and last == f"More images cannot be read; {tmp_path}/quarantine.jsonl names them."
    assert len(listed(tmp_path)) == 12
    arrays(again(source))  # not of a run
    assert capsys.readouterr().out.splitlines() == [*ten, "More images cannot be read."]


def test_garbage_alone_is_refused_when_it_is_opened(tmp_path):
    with pytest.raises(UserError, match=r"none of 5 images of .* can be read, the first: .*0001.png is not a readable"):
        folder = tmp_path / "photos"
        garbage(folder, good=5, bad=5)
        for path in sorted(folder.iterdir())[::2]:
            path.unlink()
        open_source(f"folder:{folder}", "all")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hundred_in_a_row_are_not_single_images(tmp_path, workers):
    spec = garbage(tmp_path / "photos", good=112, bad=0)
    source = open_source(spec, "all", max_bad=1)
    for path in sorted((tmp_path / "photos").iterdir())[10:110]:
        path.unlink()
    source[np.array([11])]  # 99, and then one that can be read
    with pytest.raises(UserError, match=r"^100 images in a row of .* the first: .*0010\.png cannot be read \(No such"):
        source[np.array([10])]
    with pytest.raises(UserError, match=r"^100 images in a row of .* cannot be read, the first: "):
        list(Loader(source, batch_size=8, seed=0, mesh=None, resident="streamed", workers=workers).batches(0, 14))


def test_a_list_that_cannot_be_written_is_one_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("")
    source = opened(folder)
    source.quarantine.keep(tmp_path / "file" / "quarantine.jsonl", ())
    with pytest.raises(UserError, match=r"^cannot write .*file/quarantine\.jsonl \(Not a directory\): free space"):
        arrays(source)


def test_a_source_travels_without_its_list(folder, tmp_path):
    source = opened(folder)
    keep_lists([source.quarantine], tmp_path, begun=False)
    copy = again(source)
    np.testing.assert_array_equal(copy[np.arange(N)].pixels, source[np.arange(N)].pixels)
    assert copy.quarantine.max_bad == source.quarantine.max_bad and len(listed(tmp_path)) == len(BAD)
