"""Everything that changes during a run, and how it begins."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ssl_kd.memory import Memory
from ssl_kd.recipe import Recipe, stream


class State(struct.PyTreeNode):
    """The run at one step. What is not in here does not change.

    Attributes:
      step: int32 scalar, optimizer steps done.
      nonfinite: int32 scalar, steps refused because the loss or a gradient was not finite.
      trained: network → params.
      averaged: network → params, exponential averages of trained ones.
      batch_stats: network → running batch-norm statistics, of trained and averaged networks.
      opt: optax state over `trained`.
      memory: the method's queues, prototypes, centres.
    """

    step: jax.Array
    nonfinite: jax.Array
    trained: dict[str, Any]
    averaged: dict[str, Any]
    batch_stats: dict[str, Any]
    opt: optax.OptState
    memory: Memory


def abstract(create: Callable[[], State], sharding: jax.sharding.Sharding) -> State:
    """Shapes, dtypes and one sharding for every leaf of the state that `create` would make; nothing is computed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(create))


def create_state(recipe: Recipe, pretrained: Mapping[str, Any] | None = None) -> State:
    """The state of step 0; every network starts from its own initialisers, averages as a copy of their source.

    Args:
      pretrained: variables {'params', 'batch_stats'} of trained networks that start from a file instead.
    """
    method = recipe.method
    variables = dict(pretrained or {})
    for name in method.trained:
        if name not in variables:
            variables[name] = recipe.initial(name)
    for name, (source, _) in method.averaged.items():
        variables[name] = jax.tree.map(jnp.copy, variables[source])  # donated buffers must not alias
    trained = {name: variables[name]["params"] for name in method.trained}
    return State(
        step=jnp.zeros((), jnp.int32),
        nonfinite=jnp.zeros((), jnp.int32),
        trained=trained,
        averaged={name: variables[name]["params"] for name in method.averaged},
        batch_stats={name: variables[name].get("batch_stats", {}) for name in (*method.trained, *method.averaged)},
        opt=recipe.optimizer.init(trained),
        memory=method.init(stream(recipe.seed, "memory"), recipe.specs),
    )
