"""The step under a magnifying glass: how large everything in it gets, and what is not finite."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ssl_kd.models import Network
from ssl_kd.models.outputs import module_outputs
from ssl_kd.step import TrainStep


@functools.partial(jax.tree_util.register_dataclass, data_fields=("nonfinite", "largest"), meta_fields=("name",))
@dataclasses.dataclass(frozen=True, eq=False)
class Extent:
    """How far an array, or the arrays of an output, reach.

    Attributes:
      name: of what it is.
      nonfinite: int32 (accum,), how many of its numbers are NaN or infinite; (1,) of what a step has once.
      largest: float32, alike: the greatest absolute value of the others.
    """

    name: str
    nonfinite: jax.Array
    largest: jax.Array


def extent(name: str, tree: Any) -> Extent:
    """Of all arrays of a tree together. Traceable."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.size(leaf)]
    nonfinite = sum((jnp.sum(~jnp.isfinite(x)) for x in leaves), start=jnp.zeros((), jnp.int32))
    largest = [jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0)).astype(jnp.float32) for x in leaves]
    return Extent(name, nonfinite[None], jnp.max(jnp.stack([*largest, jnp.zeros(())]))[None])


def extents(tree: Any) -> list[Extent]:
    """Of every array of a tree, named by its path. Traceable."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [extent(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


class Witness(TrainStep):
    """witness.look(state, frozen, batch, data) -> what was seen during the step, as `look` has it.

    It is the step itself, micro-batches and shuffles included, that is looked at; but compiled with all these sums, its
    numbers may differ from the run's in their last bits.
    """

    def look(self, state, frozen, batch, data) -> dict[str, Any]:
        """The step, none of whose results is kept.

        Returns:
          metrics: of the step, float32 scalars.
          parameters, statistics, gradients, updates, pushed: extents of every array.
          outputs: of every module called in the loss, in order of execution.
          views: name → bool (B,), whether an image's view is finite.
          lengths: trained network → float32 (B,), length of what it embeds each image's first view as, by its running
            statistics: with those of the batch, one image that is not finite would spoil all.
        """
        variables = self.variables(state.trained, state, frozen)
        metrics, seen = self(state, frozen, batch, data)
        found = {"parameters": extents(variables["params"]), "statistics": extents(variables["batch_stats"])}
        return {"metrics": metrics, **found, **seen}

    def loss(self, trained, state, frozen, views, ctx):
        """As it is, with what was seen beside the pushes: they alone come through accumulation row by row."""
        with module_outputs() as outputs:
            loss, (push, metrics, batch_stats) = super().loss(trained, state, frozen, views, ctx)
        method, variables = self.recipe.method, jax.lax.stop_gradient(self.variables(trained, state, frozen))

        def in_order(name: str, rows: jax.Array) -> jax.Array:
            return ctx.unshuffle(rows) if method.views[name].shuffled else rows

        def length(role: str) -> jax.Array:
            own = {kind: networks.get(role, {}) for kind, networks in variables.items()}
            rows = Network(self.recipe.specs[role]).apply(own, views[first], norm="running", method="embed")
            return in_order(first, jnp.linalg.norm(rows, axis=1))

        first = next(name for name, view in method.views.items() if not view.count and not view.size)
        seen = {
            "outputs": [extent(name, out) for name, out in outputs],
            "views": {n: in_order(n, jnp.isfinite(v).all(range(1, v.ndim))) for n, v in views.items()},
            "lengths": {role: length(role) for role in method.trained},
        }
        return loss, ((push, seen), metrics, batch_stats)

    def finish(self, state, batch, outcome, grads) -> tuple[Any, Any]:
        """The metrics, and what was seen."""
        loss, ((push, seen), metrics, batch_stats) = outcome
        _, metrics = super().finish(state, batch, (loss, (push, metrics, batch_stats)), grads)
        updates, _ = self.recipe.optimizer.update(grads, state.opt, state.trained)
        of_arrays = {"gradients": extents(grads), "updates": extents(updates), "pushed": extents(push)}
        return metrics, {**seen, **of_arrays}
