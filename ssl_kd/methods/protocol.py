"""What a method is to the rest of the program: roles, views and three pure functions."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax

from ssl_kd.memory import Memory
from ssl_kd.models import NetworkSpec
from ssl_kd.optim import cosine as cosine_between

Schedule = Callable[[jax.Array], jax.Array | float]
"""Progress of the run in [0, 1] (float32 scalar) → value."""


@dataclasses.dataclass(frozen=True)
class View:
    """How one augmented view is made: (B, S, S, 3), or (B, count, S, S, 3) of several crops.

    Attributes:
      preset: a name of `augment.PRESETS`, or 'default' for the recipe's `config.augment`.
      shuffled: made from the batch with its rows dealt to other batch-norm groups than the query's (MoCo's shuffled
        BN, as in `shuffle.py`); restore embeddings with `Context.unshuffle`.
      source: the image itself, or its mate: one of the `neighbours` (a field of the method) nearest to it in the frozen
        teacher's features, another one in every step.
      size: side S, pixels; 0 = the recipe's image_size.
      scale: area of the crop over area of the image, from and to; None = the preset's.
      count: crops of each image; 0 = one, without an axis for it.
    """

    preset: str = "default"
    shuffled: bool = False
    source: Literal["image", "mate"] = "image"
    size: int = 0
    scale: tuple[float, float] | None = None
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Context:
    """What a loss may know beside networks, views and memory.

    Attributes:
      step: int32 scalar, optimizer steps done.
      epoch: float32 scalar, step / steps per epoch, exact where it is whole.
      progress: float32 scalar, step / total steps.
      key: PRNG key of this micro-batch.
      index: (B,) int32, position of each image in the data set.
      label: (B,) int32, −1 where unknown; for diagnostics only.
      inverse: (B,) int32 row order that undoes the shuffle, or None when nothing was shuffled.
    """

    step: jax.Array
    epoch: jax.Array
    progress: jax.Array
    key: jax.Array
    index: jax.Array
    label: jax.Array
    inverse: jax.Array | None = None

    def unshuffle(self, rows: jax.Array) -> jax.Array:
        """Puts the embeddings of a `shuffled` view back into the batch's order."""
        return rows if self.inverse is None else rows[self.inverse]


@dataclasses.dataclass(frozen=True)
class Aux:
    """What a loss returns beside its value.

    Attributes:
      push: dict of arrays handed to `update`: rows of images, in batch order, or one row of the micro-batch; under
        accumulation they are concatenated.
      metrics: dict of scalars to log.
    """

    push: dict[str, jax.Array]
    metrics: dict[str, jax.Array]


class Method(Protocol):
    """The roles of the networks, the views, and three pure functions. Roles may be properties of the fields."""

    queue: int
    """Rows of the longest queue, or 0: the recipe checks that it holds a batch."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Networks that get gradients."""
        ...

    @property
    def averaged(self) -> Mapping[str, tuple[str, Schedule]]:
        """Exponential-average network → (the trained one it follows, momentum(progress)). Parameters only."""
        ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """Loaded once, never written, never checkpointed (only their digest)."""
        ...

    @property
    def evaluated(self) -> tuple[str, ...]:
        """What probes and `ssl_kd.load` may use; the first is the default."""
        ...

    @property
    def views(self) -> Mapping[str, View]: ...

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> Memory:
        """The memory of step 0. Raises ValueError if the networks do not fit the method or each other."""
        ...

    def loss(self, nets: Any, views: Mapping[str, jax.Array], memory: Memory, ctx: Context) -> tuple[jax.Array, Aux]:
        """Scalar loss. `nets.<name>` are bound networks. Reads memory, never writes it."""
        ...

    def update(self, memory: Memory, push: dict[str, jax.Array], ctx: Context) -> Memory:
        """The memory after an optimizer step."""
        ...


def constant(value: float) -> Schedule:
    """The schedule that stays at `value`."""
    return lambda progress: value


def cosine(start: float, end: float) -> Schedule:
    """The schedule that goes from `start` to `end` along half a cosine."""
    return lambda progress: cosine_between(start, end, progress)


def require_ranges(
    method: Any, above_zero: Sequence[str] = (), unit: Sequence[str] = (), not_negative: Sequence[str] = ()
) -> None:
    """Raises ValueError for the first field outside its range: finite and above 0, within [0, 1], or not negative."""
    checks = (
        (above_zero, lambda v: 0 < v < math.inf, "above 0"),
        (unit, lambda v: 0 <= v <= 1, "within [0, 1]"),
        (not_negative, lambda v: 0 <= v < math.inf, "0 or more"),
    )
    for names, holds, rule in checks:
        for name in names:
            if not holds(getattr(method, name)):
                raise ValueError(f"method.{name}={getattr(method, name)} must be {rule}")


def require_equal_widths(method: str, specs: Mapping[str, NetworkSpec]) -> None:
    """Raises ValueError unless student and teacher embed into the same width."""
    student, teacher = specs["student"].dim, specs["teacher"].dim
    if student != teacher:
        raise ValueError(
            f"method.name={method!r} compares embeddings of equal width, but student.dim={student} and "
            f"teacher.dim={teacher}: set them alike"
        )
