"""MoCo's shuffled batch norm: a key is normalised in other company than its query, which could betray it.

Images are dealt like cards. Every batch-norm group shuffles its m images and deals them in equal parts, the first to
itself, the next to the group after it, and so on around the G groups, or to m of them where there are more. So a group
of keys has m / G images, or one, of any group of queries, and an image moves at most once, from the device that has its
query. MoCo's code (He et al. 2020, arXiv 1911.05722) permutes the whole batch instead: that mixes as well on the
average, but every device then needs all images to find its own.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ssl_kd.mesh import REPLICATED, SHARDED


def draw_hands(key: jax.Array, count: int, groups: int) -> jax.Array:
    """int32 (G, m): the places within its group of the images that each deals, in the order in which it does."""
    places = jnp.broadcast_to(jnp.arange(count // groups, dtype=jnp.int32), (groups, count // groups))
    return jax.random.permutation(key, places, axis=1, independent=True)


def _parts(groups: int, size: int) -> list[range]:
    """The cards of a hand that go 0, 1, 2, … groups further."""
    parts = min(groups, size)
    bounds = [size * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def order_of(hands: jax.Array) -> jax.Array:
    """int32 (B,): which row of the batch lies in each place once these hands are dealt."""
    groups, size = hands.shape
    further = jnp.array([part for part, cards in enumerate(_parts(groups, size)) for _ in cards], jnp.int32)
    giver = (jnp.arange(groups, dtype=jnp.int32)[:, None] - further) % groups
    return (giver * size + hands[giver, jnp.arange(size)]).reshape(-1)


def deal(rows: jax.Array, hands: jax.Array, mesh: Mesh) -> jax.Array:
    """rows (B, …)[order_of(hands)], split over the mesh. Traceable.

    Where the devices divide the groups, a row is sent to the device that wants it and to no other; else XLA gathers all
    on each.
    """
    groups, size = hands.shape
    if mesh.size == 1 or groups % mesh.size:
        return rows[order_of(hands)]
    own = groups // mesh.size  # groups of a device

    def further(hand: jax.Array, part: int) -> jax.Array:
        """(own, …) of all devices, each group's moved to the one that many groups further."""
        devices, crossing = divmod(part, own)

        def send(x: jax.Array, distance: int) -> jax.Array:
            to = [(device, (device + distance) % mesh.size) for device in range(mesh.size)]
            return jax.lax.ppermute(x, "data", to) if len(x) and distance % mesh.size else x

        return jnp.concatenate([send(hand[own - crossing :], devices + 1), send(hand[: own - crossing], devices)])

    @partial(jax.shard_map, mesh=mesh, in_specs=(SHARDED, REPLICATED), out_specs=SHARDED)
    def exchange(rows: jax.Array, hands: jax.Array) -> jax.Array:
        mine = jax.lax.dynamic_slice_in_dim(hands, own * jax.lax.axis_index("data"), own)
        cards = jax.vmap(lambda x, hand: x[hand])(rows.reshape(own, size, *rows.shape[1:]), mine)
        dealt = [further(cards[:, c.start : c.stop], part) for part, c in enumerate(_parts(groups, size))]
        return jnp.concatenate(dealt, axis=1).reshape(rows.shape)

    return exchange(rows, hands)
