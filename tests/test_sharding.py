"""The compiled step is the same for every number of devices and micro-batches."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest
from conftest import GROUPS, Rig, rig_of, tiny_config, worst
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import mokd_resnet50_vit_small
from ssl_kd.mesh import LEAST_SPLIT, layout
from ssl_kd.recipe import make_recipe
from ssl_kd.report import tree_bytes
from ssl_kd.state import create_state


def assert_as_on_one_device(variant, **changes):
    """Two steps of eight devices are those of one; returns the rig of eight and its state after them."""
    a, metrics_a = rig_of(variant).run(2)
    rig = rig_of(variant, 8, **changes)
    b, metrics_b = rig.run(2)
    assert rig.step._cache_size() == 1
    for x, y in zip(metrics_a, metrics_b, strict=True):
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=2e-4, atol=1e-5, err_msg=name)
    assert worst(a.trained, b.trained) < 2e-4
    assert worst(a.memory, b.memory) < 2e-4
    return rig, b


@pytest.mark.parametrize("variant", [*GROUPS, "moco_v2", "mokd"])
def test_one_device_equals_eight(variant):
    """With groups the keys are shuffled across devices."""
    assert_as_on_one_device(variant)


@pytest.mark.parametrize("variant", ["rekd-balanced", "disco"])
def test_one_device_equals_eight_that_split_the_state(variant):
    """No method knows of it: with a teacher that is trained, and one that is frozen."""
    rig, state = assert_as_on_one_device(variant, sharding="fsdp")
    split = state.trained, state.averaged, state.opt, rig.frozen
    kernels = [x for x in jax.tree.leaves(split) if x.size >= LEAST_SPLIT]
    assert kernels and all(8 * x.addressable_shards[0].data.size == x.size for x in kernels)


def test_accumulation_equals_one_batch_with_as_many_times_the_groups(monkeypatch):
    """Unrolled, as on a CPU, and in a loop, as elsewhere."""

    def run(accum, bn_groups):
        c = tiny_config("moco_v2")
        c.optim.accum, c.bn_groups = accum, bn_groups
        rig = Rig(c)
        # Shuffled keys mix the micro-batches, so the two differ by design.
        object.__setattr__(rig.recipe, "shuffled_groups", 1)
        return rig.run(2)

    a, metrics_a = run(1, 4)
    for backend in ("cpu", "gpu"):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda backend=backend: backend)
            b, metrics_b = run(2, 2)
        np.testing.assert_allclose([m["loss"] for m in metrics_a], [m["loss"] for m in metrics_b], rtol=1e-5)
        assert worst(a.trained, b.trained) < 2e-4
        assert worst(a.batch_stats, b.batch_stats) < 2e-4
        assert worst(a.memory, b.memory) < 2e-4


def test_shuffled_keys_come_back_in_order():
    """With one group of batch norm a shuffle must change nothing at all."""
    plain, shuffled = Rig(tiny_config("moco_v2")), Rig(tiny_config("moco_v2"))
    object.__setattr__(shuffled.recipe, "shuffled_groups", 4)
    (a, metrics_a), (b, metrics_b) = plain.run(2), shuffled.run(2)
    np.testing.assert_allclose([m["loss"] for m in metrics_a], [m["loss"] for m in metrics_b], rtol=1e-5)
    assert worst(a.memory, b.memory) < 1e-4


def test_groups_and_shuffle_each_change_the_statistics():
    config = tiny_config("moco_v2")
    config.bn_groups = 4
    shuffled, grouped = Rig(config), Rig(config)
    object.__setattr__(grouped.recipe, "shuffled_groups", 1)
    losses = [rig.run(1)[1][0]["loss"] for rig in (shuffled, grouped, rig_of("moco_v2"))]
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-4


def test_shuffled_keys_are_split_over_the_devices():
    """Each device embeds its share of the key view, not the whole batch."""
    rig = rig_of("moco_v2", 8, bn_groups=8)
    side = rig.config.image_size
    shapes = set(re.findall(rf"f32\[(\d+),(?:3,{side},{side}|{side},{side},3)\]", rig.text()))
    assert shapes == {str(rig.config.batch_size // 8)}


def test_a_set_split_over_the_devices_trains_exactly_as_one_that_lies_whole_on_each():
    """And stays split: no more images than a batch of them are exchanged."""
    expected, metrics = rig_of("moco_v2", 8).run(2)
    rig = Rig(tiny_config("moco_v2"), 8)
    rows = NamedSharding(rig.mesh, PartitionSpec("data"))
    rig.data = dataclasses.replace(rig.data, image=jax.device_put(rig.data.image, rows), split_over=rig.mesh)
    found, again = rig.run(2)
    assert again == metrics
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(found), jax.device_get(expected)))
    exchanged = re.findall(r"= u8\[(\d+),[\d,]*\]\S* (?:all-gather|all-reduce|all-to-all|reduce-scatter)", rig.text())
    assert exchanged and max(int(count) for count in exchanged) <= rig.config.batch_size


def test_split_state_of_resnet50_and_vit_base_takes_an_eighth_of_each_device():
    """Within a fifth, of what cannot be split; nothing is allocated."""
    config = mokd_resnet50_vit_small.get_config("imagenet")
    config.teacher.name = "vit_base"
    recipe = make_recipe(config, 1_281_167)
    shapes = jax.eval_shape(functools.partial(create_state, recipe))
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))

    def bytes_on_each_device(sharding):
        place = layout(shapes, mesh, sharding)
        return tree_bytes(jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, place))

    whole = bytes_on_each_device("replicated")
    assert whole > 1 << 30
    assert bytes_on_each_device("fsdp") <= 1.2 * whole / 8
