"""The devices: batches lie split over the mesh's one axis, 'data', the rest whole on each, or split as well."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SHARDED, REPLICATED = PartitionSpec("data"), PartitionSpec()

Sharding = Literal["replicated", "fsdp"]
"""Of parameters, optimizer state, averages, frozen networks and memory: whole on every device, or split over them."""

LEAST_SPLIT = 1024
"""Numbers in an array from which 'fsdp' splits it: what is smaller costs more messages than memory."""


def make_mesh() -> Mesh:
    """All devices of all processes along 'data'."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def once() -> dict[str, Any] | None:
    """Compiler options of what runs once: on a CPU, to compile it well costs more than that saves."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def layout(tree: Any, mesh: Mesh, sharding: Sharding) -> Any:
    """The `NamedSharding` of every leaf of a state or of a network's variables: a function of its shape alone.

    With 'fsdp' an array is split along its longest axis that the devices divide, of several the last; queues and
    prototypes are so split over their rows. Arrays without one, and small ones, are whole on every device.
    """

    def of(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0]
        if sharding == "replicated" or leaf.size < LEAST_SPLIT or not axes:
            return NamedSharding(mesh, REPLICATED)
        longest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(of, tree)


def gathered(tree: Any, mesh: Mesh, sharding: Sharding) -> Any:
    """A tree laid out by `layout`, whole on every device; its gradient is laid out as the tree. Traceable."""
    if sharding == "replicated":
        return tree
    constrain = jax.lax.with_sharding_constraint

    @jax.custom_vjp
    def whole(x: jax.Array) -> jax.Array:
        return constrain(x, NamedSharding(mesh, REPLICATED))

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        return (constrain(gradient, layout(gradient, mesh, sharding)),)

    whole.defvjp(lambda x: (whole(x), None), backward)
    return jax.tree.map(whole, tree)


def own_rows(count: int, mesh: Mesh | None) -> np.ndarray:
    """Which of `count` rows sharded over 'data' live on this process's devices, in order."""
    if mesh is None:
        return np.arange(count)
    shards = NamedSharding(mesh, SHARDED).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in shards]))


def place(local: Any, mesh: Mesh | None, spec: PartitionSpec) -> Any:
    """A tree of this process's rows -> the same of global arrays."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, local)
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), local)


def spread(tree: Any, shardings: Any) -> Any:
    """A tree that every process has whole, or that lies on the mesh already, laid out by shardings of it or of all."""

    def put(x: Any, where: NamedSharding) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, where)
        return jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__)

    return jax.tree.map(lambda where, part: jax.tree.map(lambda x: put(x, where), part), shardings, tree)
