"""Sets in device memory: where one may lie, and how a step takes its images out of it."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from ssl_kd.errors import UserError
from ssl_kd.images import Images

Residence = Literal["replicated", "sharded", "streamed"]
"""Whole on every device; its rows split over the devices; or sent by the host, batch by batch."""

RESIDENT_FRACTION = 0.25  # of free device memory
RESIDENT_BYTES = 2 << 30  # where the device does not say how much is free


@functools.partial(jax.tree_util.register_dataclass, data_fields=("image", "label", "bag"), meta_fields=("split_over",))
@dataclasses.dataclass(frozen=True, eq=False)
class Resident:
    """A decoded set on the devices. A pytree.

    Attributes:
      image: all images; where they are split, rows that are never asked for fill the last device's share.
      label: int32 (N,).
      bag: int32 (N, k), every image's nearest others; None without mates.
      split_over: the mesh over whose axis 'data' the rows of `image` are split; None where every device has them all.
        Labels and bags, a few bytes an image, are never split.
    """

    image: Images
    label: Any
    bag: Any = None
    split_over: jax.sharding.Mesh | None = None

    def take(self, index: jax.Array) -> Images:
        """The images of these rows, (B,) of a multiple of the devices. Traceable.

        Split rows go where they are wanted, and the set stays where it is: every device looks up those of the batch
        that it has, and of their sum over the devices, zeros but for one, each keeps its share of the batch.
        """
        if self.split_over is None:
            return self.image[index]

        def own_share(held: jax.Array, index: jax.Array) -> jax.Array:
            place = index - jax.lax.axis_index("data") * len(held)
            mine = (place >= 0) & (place < len(held))
            rows = held[jnp.clip(place, 0, len(held) - 1)]
            rows = jnp.where(mine.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)
            return jax.lax.psum_scatter(rows, "data", tiled=True)

        split = PartitionSpec("data")
        share = jax.shard_map(own_share, mesh=self.split_over, in_specs=(split, PartitionSpec()), out_specs=split)
        return jax.tree.map(lambda held: share(held, index), self.image)


def decide_resident(setting: str, nbytes: int, devices: int) -> tuple[Residence, str]:
    """Where a decoded set of nbytes is to lie, and one sentence that says so and why.

    It is replicated where a device has the memory for all of it, else sharded where the devices have it together, else
    streamed. A device's budget is a quarter of its free memory, 2 GiB where it does not report that (CPU). All
    processes decide alike.

    Args:
      setting: 'auto'; 'on', which never streams, whatever fits; or 'off', which always does.

    Raises:
      UserError: for any other setting.
    """
    if setting not in ("auto", "on", "off"):
        raise UserError(f"data.resident={setting!r} is unknown; use 'auto', 'on' or 'off'")
    budget = _budget()
    images, spare = f"Data: {nbytes / 2**20:,.0f} MiB of decoded images", f"{budget / 2**20:,.0f} MiB each to spare"
    if setting == "off":
        return "streamed", f"{images}, streamed by the host, as data.resident='off' asks."
    if nbytes <= budget or (setting == "on" and devices == 1):
        return "replicated", f"{images}, whole on every device ({spare})."
    if nbytes <= budget * devices or setting == "on":
        return "sharded", f"{images}, split over {devices} devices ({spare})."
    return "streamed", f"{images}, streamed by the host: too many for the devices ({devices}, {spare})."


def _budget() -> int:
    """Bytes of a device that a set may take, alike in all processes."""
    stats = jax.local_devices()[0].memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats and "bytes_limit" in stats else None
    budget = RESIDENT_BYTES if free is None else int(RESIDENT_FRACTION * free)
    if jax.process_count() > 1:  # free memory may differ by a little
        budget = int(multihost_utils.broadcast_one_to_all(np.float32(budget)))
    return budget
