"""ReSSL (Zheng et al., NeurIPS 2021; arXiv 2107.09282): relations between images agree across views; no teacher."""

import dataclasses
from collections.abc import Mapping

import jax

from ssl_kd.losses import normalize, similarity, soft_cross_entropy
from ssl_kd.memory import Queue
from ssl_kd.methods.moco import MoCo
from ssl_kd.methods.protocol import Aux, Context, View, require_ranges


@dataclasses.dataclass(frozen=True)
class ReSSL(MoCo):
    """CE(softmax(k·Q / τ_k), softmax(q·Q / τ)): k the momentum network's embedding of a weak view, Q past ones."""

    temperature: float = 0.1
    """τ of the strongly augmented query."""
    key_temperature: float = 0.04
    """τ_k of the weakly augmented key; sharper than τ."""
    queue: int = 131072
    """Rows K of the queue, images."""

    def __post_init__(self):
        super().__post_init__()
        require_ranges(self, above_zero=("key_temperature",))

    @property
    def views(self) -> Mapping[str, View]:
        return {"query": View(), "key": View(preset="weak", shuffled=True)}

    def loss(self, nets, views, memory: Queue, ctx: Context) -> tuple[jax.Array, Aux]:
        q = normalize(nets.student.embed(views["query"], norm="batch"))
        k = ctx.unshuffle(normalize(nets.student_momentum.embed(views["key"], norm="batch")))
        rows = memory.rows["key"]
        targets = jax.nn.softmax(similarity(k, rows) / self.key_temperature)
        loss = soft_cross_entropy(similarity(q, rows) / self.temperature, targets)
        return loss, Aux(push={"key": k}, metrics={})
