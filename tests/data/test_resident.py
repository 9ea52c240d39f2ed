"""Where a set lies in device memory, and taking images out of one that is split."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssl_kd.data.resident import Resident, decide_resident
from ssl_kd.errors import UserError
from ssl_kd.images import Images

GIB = 1 << 30


@pytest.mark.parametrize(
    ("setting", "nbytes", "devices", "place"),
    [
        ("auto", 2 * GIB, 8, "replicated"),  # a CPU does not say what is free, and gives 2 GiB
        ("auto", 2 * GIB + 1, 8, "sharded"),
        ("auto", 16 * GIB, 8, "sharded"),
        ("auto", 16 * GIB + 1, 8, "streamed"),
        ("auto", 2 * GIB + 1, 1, "streamed"),
        ("on", 1, 8, "replicated"),
        ("on", 16 * GIB + 1, 8, "sharded"),
        ("on", 2 * GIB + 1, 1, "replicated"),
        ("off", 1, 8, "streamed"),
    ],
)
def test_a_set_lies_where_it_fits_and_that_is_said(setting, nbytes, devices, place):
    found, why = decide_resident(setting, nbytes, devices)
    assert found == place
    words = {
        "replicated": "whole on every device",
        "sharded": f"split over {devices} devices",
        "streamed": "streamed by the host",
    }
    assert words[place] in why and f"{nbytes / 2**20:,.0f} MiB" in why and "\n" not in why


def test_a_quarter_of_what_a_device_has_free_may_be_taken(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 200}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert [decide_resident("auto", nbytes, 2)[0] for nbytes in (200, 201, 400, 401)] == [
        "replicated",
        "sharded",
        "sharded",
        "streamed",
    ]


def test_another_setting_is_a_user_error():
    with pytest.raises(UserError, match=r"data.resident='yes'"):
        decide_resident("yes", 0, 1)


def test_rows_are_taken_from_every_device_without_moving_the_set():
    """Also the same row twice, and filler never; what the devices exchange is no larger than the batch."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (400, 6, 5, 3), np.uint8)
    images = Images(pixels, rng.integers(1, 6, (400, 2)).astype(np.int32))
    split = NamedSharding(mesh, PartitionSpec("data"))
    held = Resident(jax.device_put(images, split), label=np.zeros(397, np.int32), split_over=mesh)
    index = rng.integers(0, 397, 16).astype(np.int32)
    index[3] = index[12]
    take = jax.jit(lambda held, index: held.take(index)).lower(held, jax.device_put(index, split)).compile()
    found = take(held, jax.device_put(index, split))
    assert found.pixels.sharding == split and found.pixels.dtype == np.uint8
    np.testing.assert_array_equal(found.pixels, pixels[index])
    np.testing.assert_array_equal(found.size, images.size[index])
    exchanged = re.findall(
        r"= \(?(\w+)\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|reduce-scatter)", take.as_text()
    )
    assert exchanged  # else the pattern is out of date
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n], dtype=int)) for _, shape in exchanged]
    assert max(sizes) <= 16 * 6 * 5 * 3
