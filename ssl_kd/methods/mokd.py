"""MOKD (Song et al., CVPR 2023; arXiv 2304.06461): two different models, both learners, teach each other.

Names: 1 the student, 2 the teacher (the release pairs a CNN with a ViT); ′ an exponential average; m and t the outputs
of MLP-Head and T-Head; g the two global crops, v all crops; B batch, M outputs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ssl_kd.losses import dino_loss, promote, soft_cross_entropy
from ssl_kd.methods.protocol import Aux, Context, Schedule, View, cosine, require_equal_widths, require_ranges
from ssl_kd.models import NetworkSpec
from ssl_kd.optim import moving_average

GLOBALS = 2


@dataclasses.dataclass(frozen=True)
class MOKD:
    """L_1 = H(m′_1, m_1) + H(t′_1, t_1) + λ_1 [H(m′_2, m_1) + CE(t̂′_2, t_1)], and L_2 with 1 and 2 exchanged.

    H is DINO's centred cross-entropy over crops. t̂′_2 = T-Head′_2([z_1; Z′_2]) is the cross-attention feature search:
    model 1's own local crop, detached, asks the tokens of model 2's first global crop; its term sees local crops only.
    Evaluate the averages. With teacher='none' the student learns alone: DINO (Caron et al., arXiv 2104.14294).
    """

    teacher: Literal["online", "none"] = "online"
    """Whether there is a second model."""
    temperature: float = 0.1
    """τ_s of what learns."""
    first_teacher_temperature: float = 0.04
    """τ_t of what teaches, in epoch 0."""
    teacher_temperature: float = 0.07
    """τ_t at the end of its linear warm-up."""
    self_temperature_epochs: int = 50
    """Epochs of the warm-up in the student's self-distillation (50 for a CNN)."""
    temperature_epochs: int = 30
    """Epochs of the warm-up in every other term (30)."""
    centre_momentum: float = 0.9
    """Of the centres of the averages' outputs, a step."""
    momentum: float = 0.996
    """Of the averages in the first step; it rises to 1 along half a cosine."""
    student_cross: float = 1.0
    """λ_1, weight of what the student learns from the teacher."""
    teacher_cross: float = 1.0
    """λ_2, weight of what the teacher learns from the student (the release's command has .1 for its ViT)."""
    local_crops: int = 8
    """Local crops of an image."""
    local_size: int = 96
    """Their side, pixels."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Area of a global crop over that of the image, from and to."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Area of a local crop over that of the image, from and to."""
    augmentation: Literal["dino", "default"] = "dino"
    """DINO's three augmentations, or the recipe's `augment` for every crop."""

    queue = 0
    frozen = ()

    def __post_init__(self):
        temperatures = ("temperature", "first_teacher_temperature", "teacher_temperature")
        require_ranges(self, above_zero=(*temperatures, "local_crops", "local_size"))
        require_ranges(self, unit=("centre_momentum", "momentum"), not_negative=("student_cross", "teacher_cross"))
        require_ranges(self, above_zero=("self_temperature_epochs", "temperature_epochs"))
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"method.{name}={(low, high)} must be low <= high within (0, 1]")

    # Roles.

    @property
    def trained(self) -> tuple[str, ...]:
        return ("student", "teacher") if self.teacher == "online" else ("student",)

    @property
    def averaged(self) -> Mapping[str, tuple[str, Schedule]]:
        return {f"{name}_momentum": (name, cosine(self.momentum, 1.0)) for name in self.trained}

    @property
    def evaluated(self) -> tuple[str, ...]:
        return (*self.averaged, *self.trained)

    @property
    def views(self) -> Mapping[str, View]:
        def crop(name: str, **options) -> View:
            return View(preset=f"dino_{name}" if self.augmentation == "dino" else "default", **options)

        return {
            "global1": crop("global1", scale=self.global_scale),
            "global2": crop("global2", scale=self.global_scale),
            "local": crop("local", scale=self.local_scale, size=self.local_size, count=self.local_crops),
        }

    # Memory: the centre (M,) of every output of the averages.

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> dict[str, jax.Array]:
        for name in self.trained:
            if specs[name].head != "dino":
                raise ValueError(f"method.name='mokd' needs {name}.head='dino', not {specs[name].head!r}")
        if self.teacher == "online":
            require_equal_widths("mokd", specs)
            widths = [specs[name].thead for name in self.trained]
            if len(set(widths)) > 1 or not widths[0]:
                raise ValueError(
                    "method.name='mokd' lets each network ask the other's T-Head, so student.thead="
                    f"{widths[0]} and teacher.thead={widths[1]} must be equal and above 0"
                )
        return {
            f"{name}/{head}": jnp.zeros((specs[name].dim,), jnp.float32)
            for name in self.trained
            for head in (("mlp", "thead") if specs[name].thead else ("mlp",))
        }

    # Loss and update.

    def teacher_temperature_at(self, epoch: jax.Array, warmup_epochs: int) -> jax.Array:
        """τ_t of an epoch: linear over `warmup_epochs`, both ends included, then constant."""
        share = jnp.minimum(jnp.floor(epoch) / max(1, warmup_epochs - 1), 1.0)
        return self.first_teacher_temperature + (self.teacher_temperature - self.first_teacher_temperature) * share

    def loss(self, nets, views, memory: dict[str, jax.Array], ctx: Context) -> tuple[jax.Array, Aux]:
        two = jnp.stack([views["global1"], views["global2"]], axis=1)
        learner = {i: look(getattr(nets, i), two, views["local"], dropout=True) for i in self.trained}
        average = {i: look(getattr(nets, f"{i}_momentum"), two) for i in self.trained}
        tau = self.teacher_temperature_at(ctx.epoch, self.temperature_epochs)
        tau_self = self.teacher_temperature_at(ctx.epoch, self.self_temperature_epochs)

        def distil(j: str, i: str, head: str, tau: jax.Array) -> jax.Array:
            """H from the average of j to i."""
            teaches, centre = average[j].outputs[head], memory[f"{j}/{head}"]
            return dino_loss(learner[i].outputs[head], teaches, centre, self.temperature, tau)

        def search(j: str, i: str) -> jax.Array:
            """CE(t̂′_j, t_i) over the local crops of i."""
            z = jax.lax.stop_gradient(getattr(nets, i).query(learner[i].features[1]))
            first_global = jax.tree.map(lambda rows: rows[::GLOBALS], average[j].features[0])
            found = getattr(nets, f"{j}_momentum").search(first_global, z)
            # Image by image, as they lie on the devices: crops first, the rows would be gathered whole on each.
            asked = jnp.moveaxis(learner[i].outputs["thead"][GLOBALS:], 0, 1).reshape(found.shape)
            return soft_cross_entropy(asked / self.temperature, jax.nn.softmax(promote(found) / tau))

        total, metrics = jnp.zeros(()), {}
        for i, j, weight in (("student", "teacher", self.student_cross), ("teacher", "student", self.teacher_cross)):
            if i in self.trained:
                own = tau_self if i == "student" else tau
                metrics[f"{i}_self"] = jnp.sum(jnp.stack([distil(i, i, head, own) for head in learner[i].outputs]))
                total += metrics[f"{i}_self"]
            if self.teacher == "online":
                metrics[f"{i}_cross"], metrics[f"{i}_search"] = distil(j, i, "mlp", tau), search(j, i)
                total += weight * (metrics[f"{i}_cross"] + metrics[f"{i}_search"])

        means = {
            f"{i}/{head}": jnp.mean(output, (0, 1))[None]
            for i in self.trained
            for head, output in average[i].outputs.items()
        }
        return total, Aux(push=means, metrics=metrics)

    def update(self, memory: dict[str, jax.Array], push: dict[str, jax.Array], ctx: Context) -> dict[str, jax.Array]:
        return moving_average(memory, {name: jnp.mean(push[name], 0) for name in memory}, self.centre_momentum)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a network makes of crops: outputs (V, B, M) by head, and the features of each size, rows image by image."""

    outputs: dict[str, jax.Array]
    features: list[Any]


def look(network: Any, *sizes: jax.Array, dropout: bool = False) -> Seen:
    """Every crop through a network and its heads; crops (B, n, S, S, 3) of one size are one batch to its batch norm."""
    batch = sizes[0].shape[0]
    features = [network.features(x.reshape(-1, *x.shape[2:]), norm="batch", dropout=dropout) for x in sizes]
    heads = {"mlp": lambda f: network.project(f, norm="batch")}
    if network.spec.thead:
        heads["thead"] = network.search
    outputs = {name: jnp.concatenate([crops_first(head(f), batch) for f in features]) for name, head in heads.items()}
    return Seen(outputs, features)


def crops_first(rows: jax.Array, batch: int) -> jax.Array:
    """(B · n, M) image by image → (n, B, M)."""
    return jnp.moveaxis(rows.reshape(batch, -1, *rows.shape[1:]), 1, 0)
