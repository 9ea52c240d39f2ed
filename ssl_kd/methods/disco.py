"""DisCo (Gao et al., ECCV 2022; arXiv 2104.09124): distilled contrastive learning.

The student learns by MoCo-v2 and, on both views, by reproducing the final embedding of a frozen self-supervised
teacher. The paper's remedy for the distilling bottleneck, a wide hidden layer in the student's head, is the key
`student.head_hidden`. The second view is made once, shuffled over the batch-norm groups for all three networks; the
authors shuffle it for the momentum network alone. Which images share statistics is chance either way.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax

from ssl_kd.losses import angle_relations, contrast_logits, distance_relations, info_nce, normalize, squared_distance
from ssl_kd.memory import Queue
from ssl_kd.methods.moco import MoCo
from ssl_kd.methods.protocol import Aux, Context, require_equal_widths, require_ranges
from ssl_kd.models import NetworkSpec


@dataclasses.dataclass(frozen=True)
class DisCo(MoCo):
    """L = c · InfoNCE(q, k) + w · (mean‖t − q‖² + mean‖t′ − q′‖²): primes mark the second view."""

    contrast: float = 1.0
    """Weight c of the student's own InfoNCE."""
    consistency: float = 32.0
    """Weight w a view. The authors sum over a GPU's 32 images where InfoNCE is a mean: that is 32 on the mean."""
    distance: float = 0.0
    """Weight a view of the optional distance term (relational knowledge distillation)."""
    angle: float = 0.0
    """Weight a view of the optional angle term; memory grows with the cube of the micro-batch."""
    teacher_norm: Literal["running", "batch"] = "running"
    """The frozen teacher's batch-norm statistics. The authors' code uses the batch's; the running ones are a teacher's
    own and do not depend on the batch, so they are the default here."""

    frozen = ("teacher",)

    def __post_init__(self):
        super().__post_init__()
        require_ranges(self, not_negative=("contrast", "consistency", "distance", "angle"))

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> Queue:
        require_equal_widths("disco", specs)
        return super().init(key, specs)

    def loss(self, nets, views, memory: Queue, ctx: Context) -> tuple[jax.Array, Aux]:
        def key_view(network, norm):
            return ctx.unshuffle(normalize(network.embed(views["key"], norm=norm)))

        q, q2 = normalize(nets.student.embed(views["query"], norm="batch")), key_view(nets.student, "batch")
        k = key_view(nets.student_momentum, "batch")
        t = normalize(nets.teacher.embed(views["query"], norm=self.teacher_norm))
        t2 = key_view(nets.teacher, self.teacher_norm)

        contrast = info_nce(contrast_logits(q, k, memory.rows["key"], self.temperature))
        consistency = squared_distance(t, q) + squared_distance(t2, q2)
        loss = self.contrast * contrast + self.consistency * consistency
        if self.distance:
            loss += self.distance * (distance_relations(q, t) + distance_relations(q2, t2))
        if self.angle:
            loss += self.angle * (angle_relations(q, t) + angle_relations(q2, t2))
        return loss, Aux(push={"key": k}, metrics={"contrast": contrast, "consistency": consistency})
