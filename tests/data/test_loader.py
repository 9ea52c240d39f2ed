"""The order law, and that nothing but the step number decides a batch."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from ssl_kd.data.loader import Loader, decide_resident, epoch_order
from ssl_kd.data.sources import open_source
from ssl_kd.errors import UserError

N, B = 43, 8
S = N // B


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((3, 4, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A parquet set whose image i is all i, labelled i % 7; its split 'broken' cannot read row 5."""
    path = tmp_path_factory.mktemp("images")
    images = [png(i) for i in range(N)]
    for split, cells in (("train", images), ("broken", [*images[:5], b"junk", *images[6:]])):
        table = pa.table({"image": pa.array(cells, pa.binary()), "label": np.arange(N) % 7})
        pq.write_table(table, path / f"{split}.parquet", row_group_size=10)
    return path


@pytest.fixture(scope="module")
def source(directory):
    return open_source(f"hf:{directory}", "train")


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


def host(batches) -> list[dict[str, np.ndarray]]:
    return [{name: np.asarray(value) for name, value in batch.items()} for batch in batches]


def assert_same(got: list[dict], want: list[dict]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


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
    loader = Loader(source, batch_size=B, seed=3, mesh=None, resident=False)
    assert loader.steps_per_epoch == S == 5 and loader.data is None
    batches = host(loader.batches(0, 3 * S))
    for t, batch in enumerate(batches):  # the law, written out
        order = epoch_order(3, t // S, N)
        want = np.array([order[(t % S) * B + k] for k in range(B)])
        np.testing.assert_array_equal(batch["index"], want)
        np.testing.assert_array_equal(batch["label"], want % 7)
        np.testing.assert_array_equal(batch["image"], np.broadcast_to(want[:, None, None, None], (B, 3, 4, 3)))
        assert [batch[name].dtype for name in ("image", "label", "index")] == [np.uint8, np.int32, np.int32]
    for epoch in range(3):  # an image at most once an epoch
        seen = np.concatenate([batch["index"] for batch in batches[epoch * S : (epoch + 1) * S]])
        assert len(np.unique(seen)) == S * B


@pytest.mark.parametrize("start", [1, S - 1, S, 2 * S + 3])
def test_starting_anywhere_continues_the_same_sequence(source, start):
    make = lambda: Loader(source, batch_size=B, seed=3, mesh=None, resident=False)  # noqa: E731
    assert_same(host(make().batches(start, start + 4)), host(make().batches(0, start + 4))[start:])


def test_resident_equals_streaming(source):
    mesh = mesh_of(4)
    resident = Loader(source, batch_size=B, seed=9, mesh=mesh, resident=True)
    streaming = Loader(source, batch_size=B, seed=9, mesh=mesh, resident=False)
    assert resident.data["image"].sharding == NamedSharding(mesh, PartitionSpec())
    data = jax.device_get(resident.data)
    assert data["image"].shape == (N, 3, 4, 3) and data["image"].dtype == np.uint8
    indices = host(resident.batches(2, 9))
    gathered = [{name: data[name][b["index"]] for name in data} | b for b in indices]
    assert_same(gathered, host(streaming.batches(2, 9)))
    assert all(batch.keys() == {"index"} for batch in indices)


@pytest.mark.parametrize("resident", [True, False])
def test_eight_devices_equal_one(source, resident):
    one, eight = (Loader(source, batch_size=B, seed=1, mesh=mesh_of(n), resident=resident) for n in (1, 8))
    batches = list(eight.batches(3, 7))
    for batch in batches:
        for value in batch.values():
            assert value.sharding == NamedSharding(mesh_of(8), PartitionSpec("data"))
            assert [shard.data.shape[0] for shard in value.addressable_shards] == [1] * 8
    assert_same(host(batches), host(one.batches(3, 7)))


def test_worker_processes_change_nothing(source):
    loader = Loader(source, batch_size=B, seed=3, mesh=mesh_of(2), resident=False, workers=2)
    threads = Loader(source, batch_size=B, seed=3, mesh=mesh_of(2), resident=False)
    assert_same(host(loader.batches(3, 10)), host(threads.batches(3, 10)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_a_user_error(directory, workers):
    loader = Loader(
        open_source(f"hf:{directory}", "broken"), batch_size=B, seed=3, mesh=None, resident=False, workers=workers
    )
    with pytest.raises(UserError) as error:
        list(loader.batches(0, S + 1))
    sentence = f"row 5 of {directory}/broken.parquet is not a readable image (cannot identify image file)"
    assert str(error.value) == f"{sentence}; restore or remove it"


def test_a_loop_left_early_leaves_no_threads(source):
    loader = Loader(source, batch_size=B, seed=3, mesh=None, resident=False)
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
    loader = Loader(source, batch_size=8, seed=3, mesh=None, resident=False, workers=int(sys.argv[2]))
    batches = loader.batches(0, 1000)
    print(next(batches)["index"].tolist())
    if sys.argv[3] == "raise":
        raise SystemExit(7)
"""


@pytest.mark.parametrize(("workers", "end"), [(0, "raise"), (2, "raise"), (0, "fall off")])
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
        Loader(source, batch_size=batch_size, seed=0, mesh=None, resident=False)


def test_batch_size_that_does_not_divide(source):
    with pytest.raises(UserError, match="batch_size=12 must be a multiple of the mesh's 8 devices"):
        Loader(source, batch_size=12, seed=0, mesh=mesh_of(8), resident=True)


def test_decide_resident(monkeypatch):
    assert decide_resident("on", 1 << 50) and not decide_resident("off", 0)
    assert decide_resident("auto", 2 << 30) and not decide_resident("auto", (2 << 30) + 1)  # CPU reports no memory

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 200}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert decide_resident("auto", 200) and not decide_resident("auto", 201)
    with pytest.raises(UserError, match=r"data.resident='yes'"):
        decide_resident("yes", 0)
