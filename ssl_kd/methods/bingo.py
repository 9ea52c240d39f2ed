"""BINGO (Xu et al., ICLR 2022; arXiv 2107.01691): the student gathers the bags of instances that the teacher sees.

A bag is an image with its nearest others in the frozen teacher's feature space, mined once (`ssl_kd.data.bags`). Each
image of a batch, the anchor, meets one of these others, its mate; the teacher's embeddings of both are positives.

Names: s a student embedding, of the anchor, of the mate, or of their CutMix; t, t2 the teacher's embeddings of anchor
and mate, from other views of them; B batch, K queue rows, d embedding width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from ssl_kd.augment import cutmix
from ssl_kd.losses import normalize, similarity
from ssl_kd.memory import Queue, random_unit_rows
from ssl_kd.methods.protocol import Aux, Context, Schedule, View, require_equal_widths, require_ranges
from ssl_kd.models import NetworkSpec


@dataclasses.dataclass(frozen=True)
class BINGO:
    """L = 1/3 Σ_s w_s · InfoNCE(s, t) + (1 − w_s) · InfoNCE(s, t2), over the anchor, its mate and their CutMix.

    w is 1 for the anchor and 0 for the mate at first, later nearer to each other; for the CutMix it is the anchor's
    share of the area. The negatives are a queue of the teacher's embeddings of earlier anchors.
    """

    temperature: float = 0.2
    """Softmax temperature τ."""
    queue: int = 65536
    """Rows K of the queue of teacher embeddings, images."""
    neighbours: int = 5
    """Nearest others in an image's bag: a step draws one of them, uniformly, for its mate."""
    bag_path: str = ""
    """File of the mined bags, which runs with the same teacher and images can share; '' = one in the work directory."""
    single_epochs: float = 11.0
    """Epochs at the start in which the anchor and the mate have only their own embedding for a positive."""
    late_weight: float = 0.5
    """What the anchor's term and the mate's then give to the teacher's embedding of the other; .5 is one half each."""
    cutmix_alpha: float = 2.0
    """α of the Beta(α, α) from which the anchor's share of a CutMix is drawn; 2 is the authors' code's."""
    teacher_norm: Literal["running", "batch"] = "running"
    """The frozen teacher's batch-norm statistics. The authors' code uses the batch's; the running ones are a teacher's
    own and do not depend on the batch, so they are the default here."""

    trained = ("student",)
    frozen = ("teacher",)
    evaluated = ("student",)

    def __post_init__(self):
        require_ranges(
            self,
            above_zero=("temperature", "queue", "neighbours", "cutmix_alpha"),
            unit=("late_weight",),
            not_negative=("single_epochs",),
        )

    @property
    def averaged(self) -> Mapping[str, tuple[str, Schedule]]:
        return {}

    @property
    def views(self) -> Mapping[str, View]:
        return {
            "anchor": View(),
            "mate": View(source="mate"),
            "anchor_key": View(shuffled=True),
            "mate_key": View(source="mate", shuffled=True),
        }

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> Queue:
        require_equal_widths("bingo", specs)
        return Queue.create(teacher=random_unit_rows(key, "teacher", self.queue, specs["teacher"].dim))

    def loss(self, nets, views, memory: Queue, ctx: Context) -> tuple[jax.Array, Aux]:
        def student(view):
            return normalize(nets.student.embed(view, norm="batch"))

        def teacher(name):
            return ctx.unshuffle(normalize(nets.teacher.embed(views[name], norm=self.teacher_norm)))

        t, t2 = teacher("anchor_key"), teacher("mate_key")

        def term(s, w):
            own, other = contrasts(s, jnp.stack([t, t2]), memory.rows["teacher"], self.temperature)
            return w * own + (1 - w) * other

        shared = jnp.where(ctx.epoch >= self.single_epochs, self.late_weight, 0.0)
        mixed, share = random_cutmix(ctx.key, views["anchor"], views["mate"], self.cutmix_alpha)
        anchor = term(student(views["anchor"]), 1 - shared)
        mate = term(student(views["mate"]), shared)
        mix = term(student(mixed), share)
        loss = (anchor + mate + mix) / 3
        return loss, Aux(push={"teacher": t}, metrics={"anchor": anchor, "mate": mate, "mix": mix})

    def update(self, memory: Queue, push: dict[str, jax.Array], ctx: Context) -> Queue:
        return memory.push(push)


def contrasts(s: jax.Array, positives: jax.Array, queue: jax.Array, temperature: float) -> jax.Array:
    """InfoNCE of one embedding against each of several positives, all with the same negatives.

    `info_nce(contrast_logits(s, t, queue, temperature))` for every t, with one pass over the queue:
    −log softmax([s·t, s·Q] / τ)_0 = log(1 + Σ_j exp((s·Q_j − s·t) / τ)).

    Args:
      s: (B, d); with gradient.
      positives: (P, B, d).
      queue: (K, d).

    Returns:
      (P,) means over the batch.
    """
    negatives = jax.nn.logsumexp(similarity(s, queue) / temperature, axis=1)
    own = jnp.sum(s * positives, axis=2) / temperature
    return jnp.mean(jax.nn.softplus(negatives - own), axis=1)


def random_cutmix(key: jax.Array, a: jax.Array, b: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """`cutmix` of (B, H, W, 3) views, share from Beta(α, α) and centre anywhere: one box for the micro-batch."""
    share_key, centre_key = jax.random.split(key)
    centre = jax.random.randint(centre_key, (2,), 0, jnp.array(a.shape[1:3]))
    return cutmix(a, b, jax.random.beta(share_key, alpha, alpha), centre)
