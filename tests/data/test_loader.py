"""The order law, and that nothing but the step number decides a batch."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from ssl_kd.data.loader import Loader, epoch_order
from ssl_kd.data.sources import open_source
from ssl_kd.errors import UserError
from ssl_kd.mesh import own_rows

N, B = 43, 8
S = N // B


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((3 + value % 2, 4, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A parquet set whose image i is all i, 4 wide and 3 + i % 2 high, labelled i % 7."""
    path = tmp_path_factory.mktemp("images")
    table = pa.table({"image": pa.array([png(i) for i in range(N)], pa.binary()), "label": np.arange(N) % 7})
    pq.write_table(table, path / "train.parquet", row_group_size=10)
    return path


@pytest.fixture(scope="module")
def source(directory):
    return open_source(f"hf:{directory}", "train", canvas=4)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


def host(batches) -> list[dict[str, Any]]:
    return [jax.device_get(batch) for batch in batches]


def assert_same(got: list[dict], want: list[dict]) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_epoch_order_is_a_fixed_permutation():
    """Golden: these orders must never change, or resumed runs would see other images."""
    assert epoch_order(0, 0, 8).tolist() == [6, 0, 3, 1, 2, 4, 7, 5]
    assert epoch_order(0, 1, 8).tolist() == [7, 3, 2, 1, 5, 6, 0, 4]
    assert epoch_order(1, 0, 8).tolist() == [5, 4, 7, 2, 3, 0, 6, 1]
    order = epoch_order(3, 2, 1000)
    assert order.dtype == np.int32 and not order.flags.writeable
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))


def test_epoch_orders_are_unrelated():
    """Means over 200 epochs of where each of 50 rows stands: uniform, standard error 14.4 / sqrt(200) = 1.02."""
    orders = np.stack([epoch_order(5, epoch, 50) for epoch in range(200)])
    assert np.abs(np.argsort(orders, axis=1).mean(0) - 24.5).max() < 4 * 1.02
    assert len(np.unique(orders, axis=0)) == 200


def test_streaming_follows_the_order_law(source):
    loader = Loader(source, batch_size=B, seed=3, mesh=None, resident="streamed")
    assert loader.steps_per_epoch == S == 5 and loader.data is None
    batches = host(loader.batches(0, 3 * S))
    for t, batch in enumerate(batches):  # the law, written out
        order = epoch_order(3, t // S, N)
        want = np.array([order[(t % S) * B + k] for k in range(B)])
        np.testing.assert_array_equal(batch["index"], want)
        np.testing.assert_array_equal(batch["label"], want % 7)
        np.testing.assert_array_equal(batch["image"].size, [(3 + i % 2, 4) for i in want])
        for i, pixels in zip(want, batch["image"].pixels, strict=True):
            assert pixels.shape == (6, 6, 3)  # a square of 3/2 of 4
            np.testing.assert_array_equal(pixels[: 3 + i % 2, :4], i)
            assert pixels.sum() == i * (3 + i % 2) * 4 * 3  # and nothing beyond
        types = [x.dtype for x in jax.tree.leaves((batch["image"], batch["label"], batch["index"]))]
        assert types == [np.uint8, np.int32, np.int32, np.int32]
    for epoch in range(3):  # an image at most once an epoch
        seen = np.concatenate([batch["index"] for batch in batches[epoch * S : (epoch + 1) * S]])
        assert len(np.unique(seen)) == S * B


@pytest.mark.parametrize("start", [1, S - 1, S, 2 * S + 3])
def test_starting_anywhere_continues_the_same_sequence(source, start):
    make = lambda: Loader(source, batch_size=B, seed=3, mesh=None, resident="streamed")  # noqa: E731
    assert_same(host(make().batches(start, start + 4)), host(make().batches(0, start + 4))[start:])


@pytest.mark.parametrize(("resident", "rows"), [("replicated", N), ("sharded", N + 1)])
def test_resident_equals_streaming(source, resident, rows):
    mesh = mesh_of(4)
    held = Loader(source, batch_size=B, seed=9, mesh=mesh, resident=resident)
    streaming = Loader(source, batch_size=B, seed=9, mesh=mesh, resident="streamed")
    spec = PartitionSpec("data") if resident == "sharded" else PartitionSpec()
    assert all(x.sharding == NamedSharding(mesh, spec) for x in jax.tree.leaves(held.data.image))
    assert held.data.image.pixels.shape == (rows, 6, 6, 3) and held.data.label.shape == (N,)
    indices = list(held.batches(2, 9))
    assert all(batch.keys() == {"index"} for batch in indices)
    take = jax.jit(lambda data, index: {"image": data.take(index), "label": data.label[index], "index": index})
    assert_same(host(take(held.data, batch["index"]) for batch in indices), host(streaming.batches(2, 9)))


@pytest.mark.parametrize("resident", ["replicated", "sharded", "streamed"])
def test_eight_devices_equal_one(source, resident):
    one, eight = (Loader(source, batch_size=B, seed=1, mesh=mesh_of(n), resident=resident) for n in (1, 8))
    batches = list(eight.batches(3, 7))
    for batch in batches:
        for value in jax.tree.leaves(batch):
            assert value.sharding == NamedSharding(mesh_of(8), PartitionSpec("data"))
            assert [shard.data.shape[0] for shard in value.addressable_shards] == [1] * 8
    assert_same(host(batches), host(one.batches(3, 7)))


def test_the_number_of_worker_processes_changes_nothing(source):
    threads, one, two = (
        Loader(source, batch_size=B, seed=3, mesh=mesh_of(2), resident="streamed", workers=workers)
        for workers in (0, 1, 2)
    )
    expected = host(threads.batches(3, 10))
    assert_same(host(one.batches(3, 10)), expected)
    assert_same(host(two.batches(3, 10)), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_every_batch(source, processes, monkeypatch):
    """Each with an equal share of 8 devices; together they read an epoch's images once, in the order of one process."""
    whole = Loader(source, batch_size=B, seed=3, mesh=mesh_of(8), resident="streamed")
    expected = np.stack([whole._host.indices(step) for step in range(S)])
    shares = []
    for process in range(processes):

        class Sharding(NamedSharding):
            def addressable_devices_indices_map(self, shape, process=process):
                every = self.devices_indices_map(shape)
                return {d: index for d, index in every.items() if d.id * processes // 8 == process}

        monkeypatch.setattr("ssl_kd.mesh.NamedSharding", Sharding)
        share = Loader(source, batch_size=B, seed=3, mesh=mesh_of(8), resident="streamed")._host
        batches = [share(step) for step in range(S)]
        shares.append(np.stack([batch["index"] for batch in batches]))
        assert shares[-1].shape == (S, B // processes)
        assert all(len(batch["image"]) == B // processes for batch in batches)
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), expected)
    assert len(np.unique(expected)) == S * B
    assert own_rows(B, mesh_of(8)).shape == (B // processes,)  # as the last of them


def test_a_loop_left_early_leaves_no_threads(source):
    loader = Loader(source, batch_size=B, seed=3, mesh=None, resident="streamed")
    for _ in loader.batches(0, 1000):
        break
    with pytest.raises(ZeroDivisionError):
        for _ in loader.batches(0, 1000):
            1 / 0  # noqa: B018
    ours = [thread for thread in threading.enumerate() if "grain" in thread.name]
    for thread in ours:
        thread.join(timeout=60)  # told to stop, perhaps amid a batch
    assert not [thread.name for thread in ours if thread.is_alive()]
    assert list(loader.batches(4, 4)) == []


SCRIPT = """
import sys
from ssl_kd.data.loader import Loader
from ssl_kd.data.sources import open_source

if __name__ == "__main__":
    source = open_source(f"hf:{sys.argv[1]}", "train")
    loader = Loader(source, batch_size=8, seed=3, mesh=None, resident="streamed", workers=int(sys.argv[2]))
    batches = loader.batches(0, 1000)
    print(next(batches)["index"].tolist())
    if sys.argv[3] == "raise":
        raise SystemExit(7)
"""


@pytest.mark.parametrize(("workers", "end"), [(2, "raise"), (0, "fall off")])
def test_a_script_that_ends_mid_epoch_ends_quietly(tmp_path, directory, workers, end):
    """Also with worker processes: flags never parsed, the iterator never closed by hand."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(directory), str(workers), end]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == (7 if end == "raise" else 0), run.stderr
    assert run.stdout.strip() == str(epoch_order(3, 0, N)[:8].tolist())
    assert run.stderr == ""


@pytest.mark.parametrize("batch_size", [0, N + 1])
def test_batch_size_beyond_the_set(source, batch_size):
    with pytest.raises(UserError, match=f"batch_size={batch_size} must be between 1 and the {N} images"):
        Loader(source, batch_size=batch_size, seed=0, mesh=None, resident="streamed")


def test_batch_size_that_does_not_divide(source):
    with pytest.raises(UserError, match="batch_size=12 must be a multiple of the mesh's 8 devices"):
        Loader(source, batch_size=12, seed=0, mesh=mesh_of(8), resident="replicated")
