"""ReSSL (Zheng et al., NeurIPS 2021; arXiv 2107.09282): relations between images agree across views; no teacher."""

import dataclasses
from collections.abc import Mapping

import jax

from ssl_kd.losses import normalize, similarity, soft_cross_entropy
from ssl_kd.memory import Queue, random_unit_rows
from ssl_kd.methods.protocol import Aux, Context, Schedule, View, constant, require_ranges
from ssl_kd.models import NetworkSpec


@dataclasses.dataclass(frozen=True)
class ReSSL:
    """CE(softmax(k·Q / τ_k), softmax(q·Q / τ)): k the momentum network's embedding of a weak view, Q past ones."""

    temperature: float = 0.1
    """τ of the strongly augmented query."""
    key_temperature: float = 0.04
    """τ_k of the weakly augmented key; sharper than τ."""
    queue: int = 131072
    """Rows K of the queue, images."""
    momentum: float = 0.999
    """Of the key network, a step."""

    trained = ("student",)
    frozen = ()
    evaluated = ("student",)

    def __post_init__(self):
        require_ranges(self, above_zero=("temperature", "key_temperature", "queue"), unit=("momentum",))

    @property
    def averaged(self) -> Mapping[str, tuple[str, Schedule]]:
        return {"student_momentum": ("student", constant(self.momentum))}

    @property
    def views(self) -> Mapping[str, View]:
        return {"query": View(), "key": View(preset="weak", shuffled=True)}

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> Queue:
        return Queue.create(key=random_unit_rows(key, "key", self.queue, specs["student"].dim))

    def loss(self, nets, views, memory: Queue, ctx: Context) -> tuple[jax.Array, Aux]:
        q = normalize(nets.student.embed(views["query"], norm="batch"))
        k = ctx.unshuffle(normalize(nets.student_momentum.embed(views["key"], norm="batch")))
        rows = memory.rows["key"]
        targets = jax.nn.softmax(similarity(k, rows) / self.key_temperature)
        loss = soft_cross_entropy(similarity(q, rows) / self.temperature, targets)
        return loss, Aux(push={"key": k}, metrics={})

    def update(self, memory: Queue, push: dict[str, jax.Array], ctx: Context) -> Queue:
        return memory.push(push)
