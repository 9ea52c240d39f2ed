"""The one compiled graph: views, every network's forward, relation matrix, losses, optimizer, averages, memory."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ssl_kd.augment import Augmentation, augment
from ssl_kd.methods import Context, Method
from ssl_kd.models import Networks, NetworkSpec
from ssl_kd.optim import moving_average
from ssl_kd.state import State, stream

Batch = Mapping[str, jax.Array]
"""'index' (B,) int32; and 'image' (B, H, W, 3) uint8, 'label' (B,) int32 unless the data set is resident."""


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The constants of a step that belong to no method, network or optimizer.

    Attributes:
      seed: of all random streams.
      image_size: side of every view, pixels.
      steps_per_epoch, total_steps: lengths of an epoch and of the run.
      accum: micro-batches an optimizer step is split into.
      shuffle_keys: whether views that ask for it are made from a shuffled batch (pointless with one batch-norm group).
      max_nonfinite: refused steps tolerated before the state halts; see `train_step`.
    """

    seed: int
    image_size: int
    steps_per_epoch: int
    total_steps: int
    accum: int = 1
    shuffle_keys: bool = False
    max_nonfinite: int = 0


def all_finite(tree: Any) -> jax.Array:
    """Whether no leaf holds NaN or infinity."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def make_train_step(
    method: Method,
    specs: Mapping[str, NetworkSpec],
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    augmentations: Mapping[str, Augmentation],
    config: StepConfig,
    mesh: jax.sharding.Mesh,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """Builds train_step(state, frozen, batch, data) -> (state, metrics), to be traced once and run with state donated.

    `frozen` holds the variables of `method.frozen`; `data` the resident arrays, or None. Metrics are float32 scalars.

    A step whose loss, gradients or pushed embeddings are not finite keeps the old state and is counted. Once more than
    `max_nonfinite` were refused, the state halts altogether: reading metrics lags behind the device, and so the state
    stays exactly the one from before the step that failed, to be saved and replayed.
    """
    networks = Networks(specs)
    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def forward(trained, state: State, frozen, views, ctx: Context):
        variables = {
            "params": {**trained, **state.averaged, **{n: v["params"] for n, v in frozen.items()}},
            "batch_stats": {**state.batch_stats, **{n: v["batch_stats"] for n, v in frozen.items()}},
        }
        run = nn.apply(method.loss, networks, mutable=["batch_stats"])
        (loss, aux), updates = run(variables, views, state.memory, ctx)
        # A frozen network's running statistics stay what they were, whatever its mode.
        batch_stats = {name: updates["batch_stats"].get(name, old) for name, old in state.batch_stats.items()}
        return loss, (aux.push, aux.metrics, batch_stats)

    def context(state: State, batch: Batch, number, inverse=None) -> Context:
        return Context(
            step=state.step,
            epoch=state.step / config.steps_per_epoch,
            progress=state.step / config.total_steps,
            key=jax.random.fold_in(stream(config.seed, "method", state.step), number),
            index=batch["index"],
            label=batch["label"],
            inverse=inverse,
        )

    def micro_step(state: State, frozen, batch: Batch, number):
        """Loss, gradients and by-products of one micro-batch; reads the memory and statistics from before the step."""
        count = batch["index"].shape[0]
        row = number * count + jnp.arange(count)
        order = inverse = None
        if config.shuffle_keys:
            key = jax.random.fold_in(stream(config.seed, "shuffle", state.step), number)
            order = jax.random.permutation(key, count)
            inverse = jnp.argsort(order)
        ctx = context(state, batch, number, inverse)
        views = {}
        for name, view in method.views.items():
            images, source = batch["image"], row
            if view.shuffled and order is not None:
                # uint8 images and row numbers are permuted before augmentation: an image keeps its own key. Unless
                # told, the compiler leaves the permuted rows, and so this view's networks, whole on every device.
                images, source = jax.lax.with_sharding_constraint((images[order], row[order]), rows)
            key = stream(config.seed, f"augment/{name}", state.step)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, source)
            spec = augmentations[view.preset]
            order_key = stream(config.seed, f"jitter order/{name}", state.step)
            views[name] = augment(images, keys, order_key, spec, config.image_size)
        return jax.value_and_grad(forward, has_aux=True)(state.trained, state, frozen, views, ctx)

    def accumulate(state: State, frozen, batch: Batch):
        """As `micro_step` on the whole batch: means over the micro-batches, pushes concatenated in order."""
        split = jax.tree.map(lambda x: x.reshape(config.accum, -1, *x.shape[1:]), dict(batch))
        split = jax.lax.with_sharding_constraint(split, NamedSharding(mesh, PartitionSpec(None, "data")))

        def body(total, item):
            number, micro = item
            (loss, (push, metrics, stats)), grads = micro_step(state, frozen, micro, number)
            return jax.tree.map(jnp.add, total, (loss, stats, grads)), (push, metrics)

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.batch_stats, state.trained))
        total, (push, metrics) = jax.lax.scan(body, zero, (jnp.arange(config.accum), split))
        loss, stats, grads = jax.tree.map(lambda x: x / config.accum, total)
        push = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), push)
        # A metric is NaN where a micro-batch has nothing to measure.
        metrics = jax.tree.map(jnp.nanmean, metrics)
        return (loss, (push, metrics, stats)), grads

    def train_step(state: State, frozen, batch: Batch, data) -> tuple[State, dict[str, jax.Array]]:
        if data is not None:
            index = batch["index"]
            batch = {"image": data["image"][index], "label": data["label"][index], "index": index}
            batch = jax.lax.with_sharding_constraint(batch, rows)
        whole = accumulate(state, frozen, batch) if config.accum > 1 else micro_step(state, frozen, batch, 0)
        (loss, (push, metrics, batch_stats)), grads = whole
        updates, opt = optimizer.update(grads, state.opt, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        averaged = {}
        for name, (source, schedule) in method.averaged.items():
            m = schedule(state.step / config.total_steps)
            averaged[name] = moving_average(state.averaged[name], trained[source], m)
        new = State(
            step=state.step + 1,
            nonfinite=state.nonfinite,
            trained=trained,
            averaged=averaged,
            batch_stats=batch_stats,
            opt=opt,
            memory=method.update(state.memory, push, context(state, batch, config.accum)),
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & all_finite(push)
        halted = state.nonfinite > config.max_nonfinite
        nonfinite = state.nonfinite + (~finite & ~halted)
        refused = state.replace(step=state.step + (nonfinite <= config.max_nonfinite), nonfinite=nonfinite)
        new = jax.tree.map(lambda a, b: jnp.where(finite & ~halted, a, b), new, refused)
        metrics = {
            "loss": loss,
            "lr": rate(state.step),
            "grad_norm": grad_norm,
            "nonfinite": nonfinite,
            **metrics,
        }
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return jax.jit(train_step, donate_argnums=0, out_shardings=(replicated, replicated))
