"""MoCo-v2 (He et al. 2020; Chen et al., arXiv 2003.04297): instance-wise contrast, the baseline of every method."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax

from ssl_kd.losses import contrast_logits, info_nce, normalize
from ssl_kd.memory import Queue, random_unit_rows
from ssl_kd.methods.protocol import Aux, Context, Schedule, View, constant, require_ranges
from ssl_kd.models import NetworkSpec


@dataclasses.dataclass(frozen=True)
class MoCo:
    """A query, a momentum key, a queue of other images' keys.

    The momentum network moves after the optimizer step; with equal initial weights that gives the forwards of the
    reference, which moves it before (its weights after step n are one average behind ours).
    """

    temperature: float = 0.2
    """Softmax temperature τ."""
    queue: int = 65536
    """Rows K of the queue, images."""
    momentum: float = 0.999
    """Of the key network, a step."""

    def __post_init__(self):
        require_ranges(self, above_zero=("temperature", "queue"), unit=("momentum",))

    trained = ("student",)
    frozen: ClassVar[tuple[str, ...]] = ()
    evaluated = ("student",)

    @property
    def averaged(self) -> Mapping[str, tuple[str, Schedule]]:
        return {"student_momentum": ("student", constant(self.momentum))}

    @property
    def views(self) -> Mapping[str, View]:
        return {"query": View(), "key": View(shuffled=True)}

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> Queue:
        return Queue.create(key=random_unit_rows(key, "key", self.queue, specs["student"].dim))

    def loss(self, nets, views, memory: Queue, ctx: Context) -> tuple[jax.Array, Aux]:
        q = normalize(nets.student.embed(views["query"], norm="batch"))
        k = ctx.unshuffle(normalize(nets.student_momentum.embed(views["key"], norm="batch")))
        loss = info_nce(contrast_logits(q, k, memory.rows["key"], self.temperature))
        return loss, Aux(push={"key": k}, metrics={})

    def update(self, memory: Queue, push: dict[str, jax.Array], ctx: Context) -> Queue:
        return memory.push(push)
