"""Directories, globs and lists; splits and classes from their names; and whatever else may lie in a folder."""

import os
import pickle
import socket

import numpy as np
import pytest
from pictures import encode, noise

from ssl_kd.data.decode import decode
from ssl_kd.data.readers import open_reader
from ssl_kd.data.splits import held_out
from ssl_kd.errors import UserError

PNG = encode(noise(1, 4, 5)[0])


def put(root, *paths, data=PNG):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def opened(path, split="all"):
    return open_reader(f"folder:{path}", split)


def paths(reader, root):
    return [os.path.relpath(reader.where(row), root) for row in range(len(reader))]


# --- what counts


def test_images_of_every_suffix_at_any_depth_sorted(tmp_path):
    kept = ["B.PNG", "a.jpg", "b/c.JPEG", "b/d/e.webp", "b/f.bmp", "z.gif"]
    put(tmp_path, *kept, "notes.txt", "b/label.json", ".hidden.jpg", ".thumbs/x.jpg", "jpg", "a.jpg.part")
    reader = opened(tmp_path)
    assert paths(reader, tmp_path) == kept
    assert reader.skipped == 6  # a hidden directory counts once
    assert [reader.read(row) for row in range(6)] == [PNG] * 6
    assert reader.num_classes is None and reader.labels().tolist() == [-1] * 6 and reader.label_of(3) == -1


def test_only_regular_files_are_ever_opened(tmp_path, monkeypatch):
    put(tmp_path, "a.jpg", "other/b.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "directory.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "to_fifo.jpg").symlink_to("fifo.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the names of sockets are short
        listener.bind("socket.jpg")
        reader = opened(tmp_path)
    assert paths(reader, tmp_path) == ["a.jpg", "other/b.jpg"] and reader.skipped == 5


def test_links_are_followed_but_no_directory_is_entered_twice(tmp_path):
    put(tmp_path / "set", "z/x.jpg", "m/y.jpg")
    put(tmp_path, "elsewhere/far.jpg", "elsewhere/deep/q.jpg")
    (tmp_path / "set/a").symlink_to("z")  # under its own name
    (tmp_path / "set/z/up").symlink_to("..")  # a cycle
    (tmp_path / "set/m/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set")
    (tmp_path / "set/one.jpg").symlink_to(tmp_path / "elsewhere/far.jpg")
    assert paths(opened(tmp_path / "set"), tmp_path / "set") == [
        "m/out/deep/q.jpg",
        "m/out/far.jpg",
        "m/y.jpg",
        "one.jpg",
        "z/x.jpg",
    ]


def test_names_of_any_bytes(tmp_path):
    name = b"caf\xe9 \n\xf0\x9f\x90\xb1.png"  # neither UTF-8 nor printable
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(PNG)
    reader = opened(tmp_path)
    assert reader.read(0) == PNG
    assert reader.where(0).encode() and reader.where(0).endswith("caf\\xe9 \n🐱.png")


def test_readers_travel_to_other_processes(tmp_path):
    put(tmp_path, *(f"{k % 3}/{k:03}.jpg" for k in range(200)))
    reader = opened(tmp_path, "train")
    sent = pickle.dumps(reader)
    assert len(sent) < 200 * 30 + 3000
    copy = pickle.loads(sent)
    assert paths(copy, tmp_path) == paths(reader, tmp_path) and copy.labels().tolist() == reader.labels().tolist()
    assert copy.num_classes == 3 and copy.read(7) == PNG


# --- splits


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_directories_called_so_are_splits(tmp_path, name):
    put(tmp_path, "train/1.jpg", "train/2.jpg", f"{name}/3.jpg", "loose.jpg")
    assert paths(opened(tmp_path, "train"), tmp_path) == ["train/1.jpg", "train/2.jpg"]
    for split in ("validation", "test"):
        assert paths(opened(tmp_path, split), tmp_path) == [f"{name}/3.jpg"]
    put(tmp_path, "test/4.jpg")
    assert paths(opened(tmp_path, "test"), tmp_path) == ["test/4.jpg"]
    with pytest.raises(UserError, match=rf"folder:.*has no split 'all'; the splits there are test, train, {name}"):
        opened(tmp_path, "all")


def test_a_folder_without_splits_holds_out_a_tenth_by_path(tmp_path):
    names = [f"{k:03}.jpg" for k in range(100)]
    put(tmp_path, *names)
    test = [names[row] for row in held_out([name.encode() for name in names], "test")]
    assert 3 < len(test) < 20
    assert paths(opened(tmp_path, "test"), tmp_path) == test
    assert paths(opened(tmp_path, "train"), tmp_path) == [name for name in names if name not in test]
    assert paths(opened(f"{tmp_path}/*.jpg", "test"), tmp_path) == test
    with pytest.raises(UserError, match="split 'validation' does not exist"):
        opened(tmp_path, "validation")


def test_one_split_beside_other_directories_may_be_a_class(tmp_path):
    put(tmp_path, "train/1.jpg", "bus/2.jpg", "car/3.jpg")
    with pytest.raises(UserError, match=r"directory 'train' beside others \(bus, car\); give 'folder:.*/train', or"):
        opened(tmp_path, "train")
    assert opened(f"{tmp_path}/**").labels().tolist() == [0, 1, 2]
    assert paths(opened(f"{tmp_path}/train"), tmp_path) == ["train/1.jpg"]


# --- classes


def test_classes_are_the_directories_in_order(tmp_path):
    put(tmp_path, "cat/1.jpg", "cat/deep/2.jpg", "ant/3.jpg", "bee/4.jpg")
    (tmp_path / "zebra").mkdir()  # no images
    reader = opened(tmp_path)
    assert paths(reader, tmp_path) == ["ant/3.jpg", "bee/4.jpg", "cat/1.jpg", "cat/deep/2.jpg"]
    assert reader.labels().tolist() == [0, 1, 2, 2] and reader.labels().dtype == np.int32
    assert reader.num_classes == 3 and reader.label_of(2) == 2
    assert reader.class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize("stored", [["a/1.jpg", "b/2.jpg", "3.jpg"], ["a/1.jpg", "a/b/2.jpg"], ["1.jpg"]])
def test_no_classes_unless_every_image_lies_in_one_of_two(tmp_path, stored):
    put(tmp_path, *stored)
    reader = opened(tmp_path)
    assert reader.num_classes is None and reader.class_names is None and set(reader.labels()) == {-1}


def test_classes_are_numbered_over_all_splits(tmp_path):
    put(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/d/3.jpg", "val/b/4.jpg", "val/c/5.jpg", "test/6.jpg")
    (tmp_path / "train/c").mkdir()
    assert opened(tmp_path, "train").labels().tolist() == [0, 1, 3]
    assert opened(tmp_path, "validation").labels().tolist() == [1, 2]
    assert opened(tmp_path, "train").class_names == opened(tmp_path, "validation").class_names == tuple("abcd")
    assert opened(tmp_path, "test").num_classes is None


def test_a_split_of_one_directory_has_no_classes(tmp_path):
    put(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/images/3.jpg")
    train, val = opened(tmp_path, "train"), opened(tmp_path, "val")
    assert train.labels().tolist() == [0, 1] and train.num_classes == 2
    assert val.labels().tolist() == [-1] and val.num_classes is None


def test_the_held_out_part_keeps_the_classes(tmp_path):
    put(tmp_path, *(f"{'abc'[k % 3]}/{k:03}.jpg" for k in range(90)))
    for split in ("train", "test"):
        reader = opened(tmp_path, split)
        assert reader.num_classes == 3
        assert ["abc"[k] for k in reader.labels()] == [path[0] for path in paths(reader, tmp_path)]


# --- globs


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jpg", ["1.jpg"]),
        ("*/*.jpg", ["a/2.jpg", "b/3.jpg"]),
        ("**/*.jpg", ["1.jpg", "a/2.jpg", "a/x/4.jpg", "b/3.jpg"]),
        ("**", ["1.jpg", "a/2.jpg", "a/5.png", "a/x/4.jpg", "b/3.jpg"]),
        ("**/x/**", ["a/x/4.jpg"]),
        ("a/**/*.jpg", ["a/2.jpg", "a/x/4.jpg"]),
        ("[ac]/?.*", ["a/2.jpg", "a/5.png"]),
        ("**/[!a]/*.jpg", ["a/x/4.jpg", "b/3.jpg"]),
    ],
)
def test_globs(tmp_path, pattern, found):
    put(tmp_path, "1.jpg", "a/2.jpg", "b/3.jpg", "a/x/4.jpg", "a/5.png", "notes.txt", ".git/6.jpg")
    assert paths(opened(f"{tmp_path}/{pattern}"), tmp_path) == found


def test_globs_relative_to_here(tmp_path, monkeypatch):
    put(tmp_path, "1.jpg", "a/2.jpg", "b/3.jpg")
    monkeypatch.chdir(tmp_path)
    assert paths(opened("*.jpg"), ".") == ["1.jpg"]
    assert paths(opened("*/*.jpg"), ".") == ["a/2.jpg", "b/3.jpg"] and opened("*/*.jpg").num_classes == 2
    assert paths(opened("a"), ".") == ["a/2.jpg"]


def test_a_directory_whose_name_looks_like_a_glob(tmp_path):
    put(tmp_path, "photos [2020]/1.jpg", "photos 2/2.jpg")
    assert paths(opened(f"{tmp_path}/photos [2020]"), tmp_path) == ["photos [2020]/1.jpg"]


def test_globs_enter_no_directory_in_vain(tmp_path, monkeypatch):
    put(tmp_path, "a/1.jpg", "b/2.jpg", "a/x/y.jpg")
    entered, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(os.fsdecode(path)) or scandir(path))
    opened(f"{tmp_path}/a*/*.jpg")
    assert [os.path.relpath(path, tmp_path) for path in entered] == [".", "a"]


# --- lists


def test_lists_keep_their_order_and_take_any_name(tmp_path):
    put(tmp_path, "b/2.jpg", "a/1", "c.jpg")
    put(tmp_path, "list.txt", data=f"\ufeffb/2.jpg\r\n\r\n{tmp_path}/a/1\n./a/../b/2.jpg\n".encode())
    reader = opened(tmp_path / "list.txt")
    assert paths(reader, tmp_path) == ["b/2.jpg", "a/1", "b/2.jpg"]
    assert reader.labels().tolist() == [1, 0, 1] and reader.num_classes == 2
    assert reader.read(1) == PNG


def test_lists_of_files_elsewhere_have_no_classes(tmp_path):
    put(tmp_path, "b/2.jpg", "a/1.jpg")
    for lines in ("../b/2.jpg\n../a/1.jpg", f"{tmp_path}/b/2.jpg\n{tmp_path}/a/1.jpg"):
        put(tmp_path, "lists/list.txt", data=lines.encode())
        reader = opened(tmp_path / "lists/list.txt")
        assert paths(reader, tmp_path) == ["b/2.jpg", "a/1.jpg"] and reader.num_classes is None
        assert reader.read(0) == PNG


@pytest.mark.parametrize("line", ["missing.jpg", "fifo.jpg", "directory", "nul\0.jpg", "list.txt/x.jpg", "x" * 300])
def test_what_a_list_names_wrongly_is_one_sentence(tmp_path, line):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "directory").mkdir()
    put(tmp_path, "list.txt", data=line.encode())
    reader = opened(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"(cannot be read \(.+\); restore|is no regular file; remove it)"):
        reader.read(0)


# --- bad places and files


def test_nothing_there(tmp_path):
    put(tmp_path, "file.jpg", "empty/notes.md", "list.txt", data=b"\n\n")
    for path in ("none", "file.jpg", "file.jpg/below", "none.txt", "nul\0"):
        with pytest.raises(
            UserError, match=r"folder:.* is not there; give a directory, a glob like .*, or a .txt list"
        ):
            opened(f"{tmp_path}/{path}")
    with pytest.raises(UserError, match=r"holds no images in .*empty \(1 other files\)"):
        opened(tmp_path / "empty")
    with pytest.raises(UserError, match=r"holds no images in .*empty"):
        opened(f"{tmp_path}/empty/*.jpg")
    with pytest.raises(UserError, match=r"holds no images"):
        opened(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"there is no directory .*/none; correct the path before the wildcard"):
        opened(f"{tmp_path}/none/**/*.jpg")


@pytest.mark.parametrize("pattern", ["", "/**/*.jpg"])
def test_an_unreadable_directory_is_named(tmp_path, monkeypatch, pattern):
    put(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def guarded(path):
        if os.fsencode(path).endswith(b"/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=r"^directory .*/b cannot be read \(Permission denied\); make it readable$"):
        opened(f"{tmp_path}{pattern}")


def test_files_that_went_bad_are_named(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    reader = opened(tmp_path)
    put(tmp_path, "a.jpg", data=b"")
    (tmp_path / "b.jpg").unlink()
    (tmp_path / "c.jpg").unlink()
    os.mkfifo(tmp_path / "c.jpg")
    with open(tmp_path / "d.jpg", "wb") as file:
        file.truncate(1 << 40)  # sparse
    for row, message in enumerate(
        ["not a readable image (it is empty)", "cannot be read", "no regular file", "takes 1099"]
    ):
        with pytest.raises(UserError) as error:
            decode(reader.read(row), lambda row=row: reader.where(row))
        assert str(error.value).startswith(f"{tmp_path}/{'abcd'[row]}.jpg ") and message in str(error.value)


def test_a_thousand_files_are_listed_at_once(tmp_path):
    """The small version of 100 000 files in ten seconds."""
    put(tmp_path, *(f"{k % 10}/{k}.jpg" for k in range(1000)), data=b"")
    calls = []
    stat = os.stat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", lambda *a, **k: calls.append(a) or stat(*a, **k))
        reader = opened(tmp_path)
    assert len(reader) == 1000
    assert len(calls) < 50  # of directories alone: the listing tells what a file is
