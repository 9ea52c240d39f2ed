"""SEED (Fang et al., ICLR 2021; arXiv 2101.04731): the student repeats the teacher's similarities to a queue."""

import dataclasses
from collections.abc import Mapping

import jax

from ssl_kd.losses import contrast_logits, normalize, soft_cross_entropy
from ssl_kd.memory import Queue, random_unit_rows
from ssl_kd.methods.protocol import Aux, Context, Schedule, View, require_equal_widths, require_ranges
from ssl_kd.models import NetworkSpec


@dataclasses.dataclass(frozen=True)
class SEED:
    """CE(softmax([t·t, t·Q] / τ_t), softmax([s·t, s·Q] / τ)); Q holds the frozen teacher's embeddings."""

    temperature: float = 0.2
    """τ of the student's distribution."""
    teacher_temperature: float = 0.01
    """τ_t of the teacher's. The authors' code defaults to 1e-4, where the target is one-hot on the own image."""
    queue: int = 65536
    """Rows K of the queue, images."""

    trained = ("student",)
    frozen = ("teacher",)
    evaluated = ("student",)

    def __post_init__(self):
        require_ranges(self, above_zero=("temperature", "teacher_temperature", "queue"))

    @property
    def averaged(self) -> Mapping[str, tuple[str, Schedule]]:
        return {}

    @property
    def views(self) -> Mapping[str, View]:
        return {"image": View()}

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> Queue:
        require_equal_widths("seed", specs)
        return Queue.create(teacher=random_unit_rows(key, "teacher", self.queue, specs["teacher"].dim))

    def loss(self, nets, views, memory: Queue, ctx: Context) -> tuple[jax.Array, Aux]:
        s = normalize(nets.student.embed(views["image"], norm="batch"))
        t = normalize(nets.teacher.embed(views["image"], norm="running"))
        rows = memory.rows["teacher"]
        targets = jax.nn.softmax(contrast_logits(t, t, rows, self.teacher_temperature))
        loss = soft_cross_entropy(contrast_logits(s, t, rows, self.temperature), targets)
        return loss, Aux(push={"teacher": t}, metrics={})

    def update(self, memory: Queue, push: dict[str, jax.Array], ctx: Context) -> Queue:
        return memory.push(push)
