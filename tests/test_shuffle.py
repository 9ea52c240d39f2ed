"""Shuffled keys: a permutation that mixes all groups alike, in which every image moves once."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from ssl_kd.collectives import exchanges
from ssl_kd.mesh import SHARDED
from ssl_kd.shuffle import deal, draw_hands, order_of

drawn = jax.jit(lambda seed, *sizes: draw_hands(jax.random.key(seed), *sizes), static_argnums=(1, 2))
ordered = jax.jit(order_of)

SIZES = [(16, 2), (16, 8), (24, 8), (56, 8), (64, 16), (80, 16), (64, 8)]  # images, groups


@pytest.mark.parametrize(("count", "groups"), SIZES)
def test_a_group_of_keys_has_as_few_images_as_can_be_of_any_group_of_queries(count, groups):
    size = count // groups
    for seed in range(5):
        order = np.asarray(ordered(drawn(seed, count, groups)))
        assert sorted(order) == list(range(count))
        together = np.zeros((groups, groups), int)
        np.add.at(together, (np.arange(count) // size, order // size), 1)
        assert together.max() == -(-size // min(size, groups))


def test_every_image_of_a_group_may_be_dealt_to_every_group():
    orders = jax.vmap(lambda key: order_of(draw_hands(key, 24, 4)))(jax.random.split(jax.random.key(0), 4000))
    group = np.argsort(np.asarray(orders), axis=1) // 6
    share = np.stack([(group == g).mean(axis=0) for g in range(4)])
    expected = np.stack([[2 / 6 if (g - i // 6) % 4 in (1, 3) else 1 / 6 for i in range(24)] for g in range(4)])
    np.testing.assert_allclose(share, expected, atol=0.03)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize(("count", "groups"), SIZES)
def test_images_lie_where_the_order_says_on_any_number_of_devices(count, groups, devices):
    """Whether or not the devices divide the groups."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 2, 3), np.uint8)
    hands = drawn(1, count, groups)
    placed = jax.device_put(pixels, NamedSharding(mesh, SHARDED))
    found = jax.jit(lambda x, hands: deal(x, hands, mesh))(placed, hands)
    np.testing.assert_array_equal(found, pixels[ordered(hands)])


@pytest.mark.parametrize(("count", "groups", "sent"), [(64, 8, 7), (80, 16, 7), (80, 8, 9)])
def test_a_device_sends_only_what_another_wants(count, groups, sent):
    """Of its images those that it does not keep, each to one other device."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    pixels = jax.ShapeDtypeStruct((count, 3, 2, 3), np.uint8, sharding=NamedSharding(mesh, SHARDED))
    hands = drawn(1, count, groups)
    text = jax.jit(lambda x, hands: deal(x, hands, mesh)).lower(pixels, hands).compile().as_text()
    images = [e for e in exchanges(text) if e.dtype == "u8"]
    assert {e.kind for e in images} == {"collective-permute"}
    assert sum(e.bytes for e in images) == sent * 3 * 2 * 3
