"""Mining against a naive loop, the file of bags and everything that may be wrong with it, and the draw of mates."""

import functools
import os
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssl_kd.data import bags
from ssl_kd.data.bags import load_or_mine, mates, mine
from ssl_kd.errors import UserError

N, K, DIM = 53, 4, 6


def features(count=N, seed=0):
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def naive(rows, neighbours):
    """Sorted by falling cosine, then by index."""
    rows = rows.astype(np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        found.append(sorted(others, key=lambda j, i=i: (-(rows[i] @ rows[j]), j))[:neighbours])
    return np.array(found)


# --- mining


@pytest.mark.parametrize("block", [8192, 53, 52, 20, 7, 3, 1])
@pytest.mark.parametrize("neighbours", [1, K, N - 1])
def test_neighbours_equal_a_naive_loop(block, neighbours):
    """Whatever the blocks, also those narrower than k."""
    found = mine(features(), neighbours, block=block)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, naive(features(), neighbours))


@pytest.mark.parametrize("block", [64, 10, 3])
def test_ties_go_to_the_lower_index_and_copies_are_neighbours(block):
    """Rows of one coordinate, so that no cosine is rounded: seven directions in turn, and two rows of zeros."""
    axis = np.arange(40) % 7
    rows = np.eye(7, dtype=np.float32)[axis] * np.float32(2) ** (axis[:, None] % 3)
    rows[30] = rows[31] = 0
    np.testing.assert_array_equal(mine(rows, 9, block=block), naive(rows, 9))
    same = mine(np.ones((6, 3), np.float32), 3, block=block)
    np.testing.assert_array_equal(same, [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]])


def test_features_may_lie_on_the_device_and_need_not_be_float32():
    expected = mine(features(), K)
    np.testing.assert_array_equal(mine(jnp.asarray(features()), K, block=20), expected)
    np.testing.assert_array_equal(mine(features().astype(np.float64) * 1000, K), expected)


@pytest.mark.parametrize("neighbours", [0, 5, 6])
def test_more_neighbours_than_other_images_are_refused(neighbours):
    with pytest.raises(UserError, match=rf"method\.neighbours={neighbours} must be between 1 and 4"):
        mine(features(5), neighbours)


def test_progress_counts_the_images():
    seen = []
    mine(features(), K, block=20, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(18, N), (36, N), (N, N)]  # three equal blocks


# --- the file


class Teacher:
    """Features that may be asked for once at most."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return features()


def call(path, embed=None, **changes):
    arguments = {"images": N, "neighbours": K, "data": "synthetic train 53 images", "teacher": "ab12", **changes}
    return load_or_mine(path, embed or Teacher(), **arguments)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "bags.npz"


def test_bags_are_mined_once(path):
    teacher = Teacher()
    first = call(path, teacher)
    np.testing.assert_array_equal(first, naive(features(), K))
    again = call(path, teacher)
    np.testing.assert_array_equal(again, first)
    assert again.dtype == np.int32 and teacher.calls == 1
    assert os.listdir(path.parent) == ["bags.npz"]  # nothing half-written beside it


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": "cd34"}, "teacher 'ab12' there, 'cd34' now"),
        ({"data": "synthetic test"}, "data 'synthetic train 53 images' there, 'synthetic test' now"),
        ({"neighbours": K - 1}, "neighbours 4 there, 3 now"),
        ({"images": N + 1}, r"int32 \(53, 4\) and the set 54 images"),
    ],
    ids=["teacher", "data", "neighbours", "images"],
)
def test_bags_of_something_else_are_refused_and_left_alone(path, changes, named):
    call(path)
    before, teacher = path.read_bytes(), Teacher()
    with pytest.raises(UserError, match=rf"bags\.npz.*{named}.*delete it.*method\.bag_path"):
        call(path, teacher, **changes)
    assert teacher.calls == 0 and path.read_bytes() == before


def test_bags_of_another_format_are_refused(path, monkeypatch):
    call(path)
    monkeypatch.setattr(bags, "FORMAT", 2)
    with pytest.raises(UserError, match="format 1 there, 2 now"):
        call(path)


def damage(path, kind):
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("bags\n")
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros((N, K), np.int32))
    elif kind == "other arrays":
        np.savez(path, neighbours=np.zeros((N, K), np.int32))
    elif kind == "pickle":
        np.savez(path, identity=np.array({"format": 1}, object), indices=np.zeros((N, K), np.int32))
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "changed":
        place = content.index(naive(features(), K).astype(np.int32).tobytes()) + 5
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif kind == "directory":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "kind", ["empty", "text", "array", "other arrays", "pickle", "truncated", "changed", "directory"]
)
def test_a_damaged_file_is_refused(path, kind):
    call(path)
    damage(path, kind)
    with pytest.raises(UserError, match=r"bags\.npz cannot be read as a file of bags .*delete it.*method\.bag_path"):
        call(path)


def test_no_cut_or_flipped_bit_goes_unnoticed(path):
    """Or it lies where it changes nothing that is read."""
    expected = call(path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(content), 150):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        for broken in (bytes(flipped), content[:place]):
            path.write_bytes(broken)
            try:
                np.testing.assert_array_equal(call(path), expected)
            except UserError:
                refused += 1
    assert refused > 200


@pytest.mark.parametrize("index", [-1, N])
def test_indices_beyond_the_set_are_refused(path, index):
    found = call(path)
    with np.load(path) as arrays:
        identity = arrays["identity"]
    found[3, 1] = index
    np.savez(path, identity=identity, indices=found)
    with pytest.raises(UserError, match=rf"bags\.npz names images that are not among the {N}"):
        call(path)


def test_nothing_in_the_file_is_pickled(path):
    call(path)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            version = np.lib.format.read_magic(file := archive.open(name))
            assert version == (1, 0) and not np.lib.format.read_array_header_1_0(file)[2].hasobject


@pytest.mark.parametrize("process", [0, 1])
def test_a_place_that_cannot_be_written_is_known_to_every_process_before_mining(process, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    (tmp_path / "file").touch()
    teacher = Teacher()
    with pytest.raises(UserError, match=r"cannot write .*bags\.npz.*method\.bag_path"):
        call(tmp_path / "file" / "bags.npz", teacher)
    assert teacher.calls == 0


def test_a_full_disk_leaves_no_file_of_bags(path, monkeypatch):
    def full(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(UserError, match=r"cannot write .*bags\.npz \(No space left on device\)"):
            call(path)
    assert os.listdir(path.parent) == []
    np.testing.assert_array_equal(call(path), naive(features(), K))


def test_runs_that_mine_the_same_file_at_once_all_succeed(path):
    def overtaken():
        call(path)
        return features()

    np.testing.assert_array_equal(call(path, overtaken), call(path))
    assert os.listdir(path.parent) == ["bags.npz"]


def test_an_error_of_the_teachers_data_is_not_taken_for_the_files(path):
    def broken():
        raise FileNotFoundError(2, "an image is gone")

    with pytest.raises(FileNotFoundError, match="an image is gone"):
        call(path, broken)
    assert os.listdir(path.parent) == []


def test_too_many_neighbours_are_refused_before_anything_else(path):
    teacher = Teacher()
    with pytest.raises(UserError, match=r"method\.neighbours=53"):
        call(path, teacher, neighbours=N)
    assert teacher.calls == 0 and not path.parent.exists()


def test_only_the_first_process_writes(path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    np.testing.assert_array_equal(call(path), naive(features(), K))
    assert os.listdir(path.parent) == []


# --- mates


@functools.cache
def found():
    return mine(features(), K)


on_device = jax.jit(mates, static_argnames="seed")


def test_host_and_device_draw_the_same_mates():
    index = np.random.default_rng(1).permutation(N).astype(np.int32)
    for seed, step in ((0, 0), (0, 1), (3, 12345), (2**31 + 7, 2**31 - 1), (2**40 + 1, 10)):
        host = mates(found(), index, seed, step)
        device = on_device(jnp.asarray(found()), jnp.asarray(index), seed=seed, step=jnp.int32(step))
        assert host.dtype == device.dtype == np.int32 and host.shape == (N,)
        np.testing.assert_array_equal(host, device)
    assert on_device._cache_size() == 4  # the step is traced; the low words of two seeds are their own


def test_a_mate_depends_on_seed_step_and_image_alone():
    index = np.arange(N, dtype=np.int32)
    together = mates(found(), index, 7, 40)
    order = np.random.default_rng(2).permutation(N)
    np.testing.assert_array_equal(mates(found(), index[order], 7, 40), together[order])
    np.testing.assert_array_equal(mates(found(), index[10:13], 7, 40), together[10:13])
    for other in (mates(found(), index, 7, 41), mates(found(), index, 8, 40)):
        assert 0.5 < (other != together).mean() < 1  # three of four


def test_devices_draw_what_one_does():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=jax.devices()[:8])
    index = np.arange(48, dtype=np.int32)
    rows = jax.device_put(index, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(found(), NamedSharding(mesh, PartitionSpec()))
    drawn = on_device(whole, rows, seed=1, step=jnp.int32(5))
    np.testing.assert_array_equal(drawn, mates(found(), index, 1, 5))
    assert drawn.sharding.is_equivalent_to(rows.sharding, 1)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_mates_are_uniform_over_the_neighbours_and_independent_between_steps_and_images(k):
    """Image i has the neighbours i k, …, i k + k − 1, so that a mate tells its place. Chi-squares within 5 sigma."""
    images, steps = 97, 300
    table = np.arange(images * k, dtype=np.int32).reshape(images, k)
    index = np.arange(images, dtype=np.int32)
    drawn = np.stack([mates(table, index, 0, step) for step in range(steps)])
    assert (drawn // k == index).all()
    place = drawn % k

    def excess(counts):
        expected = counts.sum() / counts.size
        return (((counts - expected) ** 2 / expected).sum() - counts.size) / np.sqrt(2 * counts.size)

    def pairs(a, b):
        return np.bincount((a * k + b).ravel(), minlength=k * k)

    assert excess(np.bincount(place.ravel(), minlength=k)) < 5
    assert excess(pairs(place[1:], place[:-1])) < 5
    assert excess(pairs(place[:, 1:], place[:, :-1])) < 5
    assert excess(np.stack([np.bincount(row, minlength=k) for row in place.T])) < 5


def test_drawing_on_the_host_does_not_wake_jax():
    """A reader process that did would take hold of the accelerator."""
    code = (
        "import numpy as np; from jax._src import xla_bridge; from ssl_kd.data.bags import mates\n"
        "mates(np.zeros((9, 3), np.int32), np.arange(4, dtype=np.int32), 0, 1)\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
