"""ReKD (Zheng, Wang, Yuan; AAAI 2022; arXiv 2112.04174): relation knowledge distillation.

A teacher of another architecture, trained online, mines semantic relations; the student contrasts each image with
many positives. The paper gives the parts by name (relation miner, dynamic semantic prototype bank, relation
contrastive loss) but neither code nor equations: everything below is a RECONSTRUCTION.

Names: q, k student and momentum-student embeddings of the two views; u momentum-teacher embedding of the second view;
B batch, K queue rows, M prototypes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from ssl_kd.losses import (
    contrast_logits,
    info_nce,
    normalize,
    relation_targets,
    similarity,
    sinkhorn,
    soft_cross_entropy,
)
from ssl_kd.memory import PrototypeBank, Queue, random_unit_rows
from ssl_kd.methods.protocol import Aux, Context, Schedule, View, constant, require_ranges
from ssl_kd.models import NetworkSpec


class ReKDMemory(struct.PyTreeNode):
    """Aligned queue of keys k, and where the method needs them teacher embeddings u, assignments y and labels."""

    queue: Queue
    bank: PrototypeBank | None


@dataclasses.dataclass(frozen=True)
class ReKD:
    """Relation miner, relation contrastive loss, and the paper's ablations as switches."""

    temperature: float = 0.2
    """τ of the student's and the teacher's contrast."""
    queue: int = 65536
    """Rows K of the aligned queue, images."""
    momentum: float = 0.999
    """Of both momentum networks, a step."""
    miner: Literal["prototype", "neighbour", "soft", "none"] = "prototype"
    """How relations are found: same prototype; teacher-nearest rows; a soft teacher distribution; none (= MoCo-v2)."""
    teacher: Literal["online", "frozen", "self"] = "online"
    """Who mines: a heterogeneous teacher trained at the same time; one loaded from a run; the momentum student."""
    knowledge: Literal["relation", "response"] = "relation"
    """What is handed over: relations, or the teacher's responses (SEED's loss with this teacher; equal widths)."""
    prototypes: int = 3000
    """M, about 3 × the number of semantic classes."""
    prototype_momentum: float = 0.99
    """a of the bank's moving mean."""
    balanced: bool = False
    """Assign by Sinkhorn-balanced codes (ε .05, 3 iterations; over a micro-batch) instead of the nearest prototype."""
    neighbours: int = 10
    """Positives an image takes from the queue under the neighbour miner."""
    threshold: float = 0.0
    """Neighbour miner: if above 0, positives are the rows of cosine above it, whatever their number."""
    alpha: float = 0.5
    """Soft miner: share of the target on the image's own key; 1 is MoCo-v2."""
    teacher_temperature: float = 0.04
    """τ_t of the soft miner and of response knowledge."""
    teacher_weight: float = 1.0
    """λ of the online teacher's own InfoNCE."""
    warmup: float = 0.05
    """Share of the run during which only the own key is positive, because an online teacher is still noise."""

    evaluated = ("student",)

    def __post_init__(self):
        require_ranges(self, above_zero=("temperature", "queue", "prototypes", "teacher_temperature"))
        require_ranges(
            self,
            unit=("momentum", "prototype_momentum", "threshold", "alpha", "warmup"),
            not_negative=("teacher_weight",),
        )
        if self.knowledge == "response" and self.teacher == "self":
            raise ValueError("method.knowledge='response' needs a teacher: set method.teacher to 'online' or 'frozen'")
        if self.miner == "neighbour" and not self.threshold and not 0 < self.neighbours <= self.queue:
            raise ValueError(
                f"method.neighbours={self.neighbours} must lie between 1 and method.queue={self.queue} "
                "unless method.threshold is set"
            )

    # Roles.

    @property
    def trained(self) -> tuple[str, ...]:
        return ("student", "teacher") if self.teacher == "online" else ("student",)

    @property
    def averaged(self) -> Mapping[str, tuple[str, Schedule]]:
        return {f"{name}_momentum": (name, constant(self.momentum)) for name in self.trained}

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("teacher",) if self.teacher == "frozen" else ()

    @property
    def views(self) -> Mapping[str, View]:
        return {"query": View(), "key": View(shuffled=True)}

    # Memory.

    @property
    def _mines_prototypes(self) -> bool:
        return self.knowledge == "relation" and self.miner == "prototype"

    @property
    def _stores_teacher(self) -> bool:
        """Whether the queue keeps u: for the teacher's own negatives, or to compare with rows of the past."""
        if self.teacher == "self":  # u is k
            return False
        return self.teacher == "online" or self.miner in ("neighbour", "soft") or self.knowledge == "response"

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> ReKDMemory:
        if self.knowledge == "response" and specs["student"].dim != specs["teacher"].dim:
            raise ValueError(
                "method.knowledge='response' compares embeddings of equal width, but "
                f"student.dim={specs['student'].dim} and teacher.dim={specs['teacher'].dim}: set them alike"
            )
        unknown = jnp.full((self.queue,), -1, jnp.int32)
        rows = {
            "key": random_unit_rows(key, "key", self.queue, specs["student"].dim),
            "filled": unknown,
            "label": unknown,
        }
        teacher_dim = specs["student" if self.teacher == "self" else "teacher"].dim
        if self._stores_teacher:
            rows["teacher"] = random_unit_rows(key, "teacher", self.queue, teacher_dim)
        bank = None
        if self._mines_prototypes:
            rows["prototype"] = unknown
            bank = PrototypeBank.create(key, self.prototypes, teacher_dim)
        return ReKDMemory(queue=Queue.create(**rows), bank=bank)

    # The relation miner.

    def assign(self, u: jax.Array, bank: PrototypeBank) -> jax.Array:
        """Prototype of each image: (B, d) → (B,) int32, by the bank before its update."""
        scores = similarity(u, bank.centres)
        return jnp.argmax(sinkhorn(scores) if self.balanced else scores, axis=1).astype(jnp.int32)

    def relate(self, u: jax.Array, y: jax.Array | None, rows: dict[str, jax.Array]) -> jax.Array:
        """The relation matrix R (B, K) bool of the prototype and neighbour forms; unwritten rows are never related."""
        if y is not None:
            return y[:, None] == rows["prototype"][None]
        filled = rows["filled"] >= 0
        if self.miner == "none":
            return jnp.zeros((u.shape[0], filled.shape[0]), bool)
        s = jnp.where(filled, similarity(u, rows["key" if self.teacher == "self" else "teacher"]), -jnp.inf)
        if self.threshold:
            return s > self.threshold
        least = jax.lax.top_k(s, self.neighbours)[0][:, -1:]
        return (s >= least) & filled

    def targets(self, u: jax.Array, y: jax.Array | None, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Target distribution over [own key, queue] (B, 1 + K), and the relation R (B, K), bool or soft, behind it."""
        if self.miner != "soft":
            relation = self.relate(u, y, rows)
            return relation_targets(relation), relation
        filled = rows["filled"] >= 0
        s = similarity(u, rows["key" if self.teacher == "self" else "teacher"]) / self.teacher_temperature
        # Until a row is written there is nothing to relate to: all weight stays on the own key.
        soft = jnp.where(filled, jax.nn.softmax(jnp.where(filled, s, jnp.finfo(s.dtype).min)), 0)
        alpha = jnp.where(jnp.any(filled), self.alpha, 1.0)
        targets = jnp.concatenate([jnp.full((u.shape[0], 1), alpha), (1 - alpha) * soft], axis=1)
        return targets, soft

    # Loss and update.

    def loss(self, nets, views, memory: ReKDMemory, ctx: Context) -> tuple[jax.Array, Aux]:
        rows = memory.queue.rows
        q = normalize(nets.student.embed(views["query"], norm="batch"))
        k = ctx.unshuffle(normalize(nets.student_momentum.embed(views["key"], norm="batch")))
        logits = contrast_logits(q, k, rows["key"], self.temperature)

        teacher_loss = jnp.zeros((), logits.dtype)
        if self.teacher == "online":
            t = normalize(nets.teacher.embed(views["query"], norm="batch"))
            u = ctx.unshuffle(normalize(nets.teacher_momentum.embed(views["key"], norm="batch")))
            teacher_loss = info_nce(contrast_logits(t, u, rows["teacher"], self.temperature))
        elif self.teacher == "frozen":
            u = ctx.unshuffle(normalize(nets.teacher.embed(views["key"], norm="running")))
        else:
            u = k
        u = jax.lax.stop_gradient(u)

        warm = ctx.progress < self.warmup
        y = self.assign(u, memory.bank) if memory.bank is not None else None
        if self.knowledge == "response":
            own = jnp.ones((u.shape[0], 1), u.dtype)
            teacher_logits = jnp.concatenate([own, similarity(u, rows["teacher"])], axis=1) / self.teacher_temperature
            response = soft_cross_entropy(
                contrast_logits(q, u, rows["teacher"], self.temperature), jax.nn.softmax(teacher_logits)
            )
            student_loss = jnp.where(warm, info_nce(logits), response)
            relation = jnp.zeros_like(rows["filled"], bool)[None]
        else:
            targets, relation = self.targets(u, y, rows)
            student_loss = soft_cross_entropy(logits, jnp.where(warm, jax.nn.one_hot(0, targets.shape[1]), targets))

        push = {"key": k, "filled": jnp.ones_like(ctx.index), "label": ctx.label}
        if self._stores_teacher or memory.bank is not None:
            push["teacher"] = u
        if y is not None:
            push["prototype"] = y
        metrics = {
            "student_loss": student_loss,
            "teacher_loss": teacher_loss,
            **relation_health(relation, ctx.label, rows["label"]),
        }
        if memory.bank is not None:
            metrics["prototype_entropy"] = usage_entropy(rows["prototype"], self.prototypes)
        return student_loss + self.teacher_weight * teacher_loss, Aux(push=push, metrics=metrics)

    def update(self, memory: ReKDMemory, push: dict[str, jax.Array], ctx: Context) -> ReKDMemory:
        queue, bank = memory.queue, memory.bank
        if bank is not None:
            patience = max(1, 2 * self.queue // push["key"].shape[0])
            bank, reseeded = bank.update(push["teacher"], push["prototype"], self.prototype_momentum, patience)
            ids = queue.rows["prototype"]
            queue = queue.replace(rows={**queue.rows, "prototype": jnp.where(reseeded[ids] & (ids >= 0), -1, ids)})
        return ReKDMemory(queue=queue.push({name: push[name] for name in queue.rows}), bank=bank)


def relation_health(relation: jax.Array, label: jax.Array, queue_label: jax.Array) -> dict[str, jax.Array]:
    """What a relation is worth: positives per anchor, and the share of them that has the anchor's label.

    Args:
      relation: (B, K) bool, or weights ≥ 0 of a soft relation.
      label: (B,) int32 and queue_label: (K,) int32, −1 unknown.

    Returns:
      positives: effective number of positives an anchor (perplexity of its weights; the count when they are equal).
      relation_precision: NaN where there are no positives with known labels.
    """
    weight = relation.astype(jnp.float32)
    total = jnp.sum(weight, axis=1)
    p = weight / jnp.maximum(total, 1e-30)[:, None]
    perplexity = jnp.exp(-jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=1))
    known = jnp.sum(weight * (label >= 0)[:, None] * (queue_label >= 0)[None])
    agree = jnp.sum(weight * (label[:, None] == queue_label[None]) * (label >= 0)[:, None])
    return {
        "positives": jnp.mean(jnp.where(total > 0, perplexity, 0)),
        "relation_precision": jnp.where(known > 0, agree / known, jnp.nan),
    }


def usage_entropy(ids: jax.Array, prototypes: int) -> jax.Array:
    """Entropy of how the queue's rows spread over the prototypes, as a share of log M: 1 uniform, 0 collapsed.

    Args:
      ids: (K,) int32, −1 where a row has no prototype.
    """
    used = jnp.zeros((prototypes,), jnp.float32).at[ids].add(ids >= 0)
    p = used / jnp.maximum(jnp.sum(used), 1)
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30))) / jnp.log(max(prototypes, 2))
