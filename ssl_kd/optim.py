"""Schedules, and one optax transform made of optimizers for groups of parameters, named by path."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Ramp = Literal["from_zero", "through_peak", "from_base"]


def cosine(start: float, end: float, progress: jax.Array | float) -> jax.Array:
    """`end` + (start − end) · (1 + cos πp) / 2, p the progress clipped to [0, 1]."""
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def warmup_cosine(
    peak: float,
    total_steps: int,
    warmup_steps: int,
    final: float = 0.0,
    ramp: Ramp = "from_zero",
    base: float = 0.0,
) -> optax.Schedule:
    """A linear warm-up, then a cosine from `peak` to `final`.

    Evaluated every step; the MoCo line of references holds the rate constant within an epoch, and agrees at the first
    step of each.

    Args:
      ramp: the references' three warm-ups over w steps. 'from_zero' (ReSSL): peak · i / w. 'through_peak' (MOKD):
        peak · i / (w − 1), so that the peak is used twice. 'from_base' (SEED): base + (peak − base) · i / w, and the
        cosine counts from step 0 instead of w.
    """
    start = base if ramp == "from_base" else 0.0
    ramp_steps = max(1, warmup_steps - (ramp == "through_peak"))
    origin = 0 if ramp == "from_base" else warmup_steps

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, float)  # an int32 divided is a float32, where float64 is enabled too
        decayed = cosine(peak, final, (step - origin) / max(1, total_steps - origin))
        return jnp.where(step < warmup_steps, start + (peak - start) * step / ramp_steps, decayed)

    return rate


def warmup_stairs(
    peak: float, total_steps: int, warmup_steps: int, milestones: Sequence[float], factor: float
) -> optax.Schedule:
    """Linear from 0 over the warm-up, then `peak`, times `factor` at each milestone, a share of the run."""

    def rate(step: jax.Array) -> jax.Array:
        passed = sum(step >= round(milestone * total_steps) for milestone in milestones)
        return jnp.where(step < warmup_steps, peak * step / max(1, warmup_steps), peak * factor**passed)

    return rate


@dataclasses.dataclass(frozen=True)
class Group:
    """How one group of parameters is optimized.

    Attributes:
      paths: of the parameters it takes, as 'teacher' or 'student/thead'; the longest matching path decides.
      name: 'sgd', as in PyTorch (decay joins the gradient before the momentum buffer), or 'adamw' (decoupled decay).
      rate: learning rate of a step.
      weight_decay: of a step.
      decay: which parameters decay: 'all' (the MoCo line), or 'weights', which spares vectors: biases, norms.
      momentum: of SGD.
      clip: largest L2 norm of each gradient tensor; 0 = any.
      last_layer_steps: first steps in which the heads' last layers are skipped: no decay, no momentum, no Adam counter.
    """

    paths: tuple[str, ...]
    name: Literal["sgd", "adamw"]
    rate: optax.Schedule
    weight_decay: optax.Schedule
    decay: Literal["all", "weights"] = "all"
    momentum: float = 0.9
    clip: float = 0.0
    last_layer_steps: int = 0

    def transform(self, skips: Callable[[jax.Array], jax.Array] | None = None) -> optax.GradientTransformation:
        """The optimizer of the group; in a step that it `skips`, its parameters and its moments stay as they are."""

        def decay_rate(step: jax.Array) -> jax.Array | float:
            decay = self.weight_decay(step)
            return decay if skips is None else jnp.where(skips(step), 0.0, decay)

        decayed = optax.add_decayed_weights(decay_rate, mask=lambda params: decay_mask(params, self.decay))
        moments = optax.trace(self.momentum) if self.name == "sgd" else optax.scale_by_adam()
        if skips is not None:
            # Outside stand the schedules, which go on counting.
            moments = optax.conditionally_mask(moments, lambda step: ~skips(step))
        parts = (decayed, moments) if self.name == "sgd" else (moments, decayed)
        clipping = (clip_each(self.clip),) if self.clip else ()
        return optax.chain(*clipping, *parts, optax.scale_by_learning_rate(self.rate))


def make_optimizer(groups: Sequence[Group]) -> optax.GradientTransformation:
    """One transform over a tree of parameters; those under no group's path belong to the first.

    Raises (when it meets the parameters):
      ValueError: for a path that holds none of them, or that two groups claim.
    """
    if len(groups) == 1 and not groups[0].paths and not groups[0].last_layer_steps:
        return groups[0].transform()
    paths = [path for group in groups for path in group.paths]
    owner = {path: number for number, group in enumerate(groups) for path in group.paths}

    def label(path: tuple, _) -> str:
        """Number of the group, and whether the parameter is of a head's last layer."""
        names = [key.key for key in path]
        found = [prefix for prefix in itertools.accumulate(names, "{}/{}".format) if prefix in owner]
        return f"{owner[found[-1]] if found else 0}{' last' if 'last' in names else ''}"

    def labels(params: Any) -> Any:
        known = {
            prefix
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
            for prefix in itertools.accumulate((key.key for key in path), "{}/{}".format)
        }
        if missing := sorted(set(owner) - known):
            raise ValueError(f"no parameter lies under {missing[0]!r}")
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"the path {twice[0]!r} is given twice")
        return jax.tree_util.tree_map_with_path(label, params)

    def last_layers(group: Group) -> optax.GradientTransformation:
        return group.transform((lambda step: step < group.last_layer_steps) if group.last_layer_steps else None)

    transforms = {str(number): group.transform() for number, group in enumerate(groups)}
    transforms |= {f"{number} last": last_layers(group) for number, group in enumerate(groups)}
    return optax.partition(transforms, labels)


def decay_mask(params: Any, decay: Literal["all", "weights"]) -> Any:
    """Which parameters decay: 'all', or 'weights' = everything but vectors (biases, norms)."""
    return jax.tree.map(lambda p: decay == "all" or p.ndim > 1, params)


def clip_each(most: float) -> optax.GradientTransformation:
    """Scales every tensor g by min(1, most / (‖g‖ + 1e-6)), each by its own norm (MOKD's code)."""

    def clip(g: jax.Array) -> jax.Array:
        return g * jnp.minimum(1.0, most / (jnp.sqrt(jnp.sum(jnp.square(g))) + 1e-6))

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))


def moving_average(average: Any, params: Any, momentum: jax.Array | float) -> Any:
    """m · average + (1 − m) · params, leaf by leaf (parameters only; buffers follow their own network's forwards)."""
    return jax.tree.map(lambda a, p: momentum * a + (1 - momentum) * p, average, params)
