"""CompRess (Koohpayegani et al., NeurIPS 2020; arXiv 2010.14713): a student ranks anchors as its teacher does."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax

from ssl_kd.losses import kl_divergence, normalize, similarity
from ssl_kd.memory import Queue, random_unit_rows
from ssl_kd.methods.protocol import Aux, Context, Schedule, View, constant, require_ranges
from ssl_kd.models import NetworkSpec


@dataclasses.dataclass(frozen=True)
class CompRess:
    """KL(softmax(t·Q_t / τ) ‖ softmax(s·Q_s / τ)), on features of the backbones.

    The authors' queues start as uniform noise that is not normalised; ours as random unit rows.
    """

    temperature: float = 0.04
    """τ of both distributions."""
    queue: int = 128000
    """Rows K of the queues: the anchor images."""
    queues: Literal[1, 2] = 2
    """2: the student has a queue Q_s of its own; 1: the student is mapped to the teacher's width and Q_s is Q_t."""
    keys: Literal["momentum", "student"] = "momentum"
    """Who fills Q_s: the student's moving average, or the student itself."""
    momentum: float = 0.999
    """Of the moving average, a step."""

    trained = ("student",)
    frozen = ("teacher",)
    evaluated = ("student",)

    def __post_init__(self):
        require_ranges(self, above_zero=("temperature", "queue"), unit=("momentum",))

    @property
    def _averages(self) -> bool:
        return self.queues == 2 and self.keys == "momentum"

    @property
    def averaged(self) -> Mapping[str, tuple[str, Schedule]]:
        return {"student_momentum": ("student", constant(self.momentum))} if self._averages else {}

    @property
    def views(self) -> Mapping[str, View]:
        return {"image": View(preset="weak")}

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> Queue:
        width, wanted = specs["student"].dim, specs["teacher"].feature_dim
        rows = {"teacher": random_unit_rows(key, "teacher", self.queue, wanted)}
        if self.queues == 2:
            rows["student"] = random_unit_rows(key, "student", self.queue, width)
        elif width != wanted:
            raise ValueError(
                f"method.queues=1 compares the student's {width} outputs with the teacher's {wanted} features: set "
                "student.head='linear' and student.dim=0, which takes the teacher's width"
            )
        return Queue.create(**rows)

    def loss(self, nets, views, memory: Queue, ctx: Context) -> tuple[jax.Array, Aux]:
        rows = memory.rows
        s = normalize(nets.student.embed(views["image"], norm="batch"))
        t = normalize(nets.teacher.features(views["image"], norm="running").pooled)
        push = {"teacher": t}
        if self.queues == 2:
            averages = self._averages
            key = normalize(nets.student_momentum.embed(views["image"], norm="batch")) if averages else s
            push["student"] = jax.lax.stop_gradient(key)
        anchors = rows["student" if self.queues == 2 else "teacher"]
        loss = kl_divergence(
            similarity(t, rows["teacher"]) / self.temperature, similarity(s, anchors) / self.temperature
        )
        return loss, Aux(push=push, metrics={})

    def update(self, memory: Queue, push: dict[str, jax.Array], ctx: Context) -> Queue:
        return memory.push(push)
