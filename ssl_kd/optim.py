"""Learning-rate schedules, weight-decay masks, optimizers and moving averages of parameters."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int, final: float = 0.0) -> optax.Schedule:
    """Linear from 0 to `peak` over the warm-up, then `final` + (peak − final) · (1 + cos π p) / 2.

    Evaluated every step; the MoCo line of references holds the rate constant within an epoch, and agrees at the first
    step of each.
    """

    def rate(step: jax.Array) -> jax.Array:
        p = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
        cosine = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * p))
        return jnp.where(step < warmup_steps, peak * step / max(1, warmup_steps), cosine)

    return rate


def decay_mask(params: Any, decay: Literal["all", "weights"]) -> Any:
    """Which parameters decay: 'all' (the MoCo line), or 'weights' = everything but biases and batch-norm."""
    return jax.tree.map(lambda p: decay == "all" or p.ndim > 1, params)


def make_optimizer(
    name: Literal["sgd", "adamw"],
    rate: optax.Schedule,
    *,
    weight_decay: float,
    decay: Literal["all", "weights"],
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """SGD as in PyTorch (decay joins the gradient before the momentum buffer) or AdamW (decoupled decay)."""
    decayed = optax.add_decayed_weights(weight_decay, mask=lambda params: decay_mask(params, decay))
    if name == "sgd":
        return optax.chain(decayed, optax.trace(momentum), optax.scale_by_learning_rate(rate))
    return optax.chain(optax.scale_by_adam(), decayed, optax.scale_by_learning_rate(rate))


def moving_average(average: Any, params: Any, momentum: jax.Array | float) -> Any:
    """m · average + (1 − m) · params, leaf by leaf (parameters only; buffers follow their own network's forwards)."""
    return jax.tree.map(lambda a, p: momentum * a + (1 - momentum) * p, average, params)
