"""The one compiled graph: views, every network's forward, relation matrix, losses, optimizer, averages, memory."""

import contextlib
import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_kd.augment import augment
from ssl_kd.data.bags import mates
from ssl_kd.data.resident import Resident
from ssl_kd.images import Images
from ssl_kd.losses import promote
from ssl_kd.mesh import REPLICATED, gathered, layout
from ssl_kd.methods import Context
from ssl_kd.models import Networks, features_of_views
from ssl_kd.optim import moving_average
from ssl_kd.recipe import Recipe
from ssl_kd.shuffle import deal, draw_hands, order_of
from ssl_kd.state import State, create_state, stream

Batch = Mapping[str, Any]
"""'index' (B,) int32; and unless the data set is resident, 'image', B `Images`, 'label' (B,) int32, and for a method
with mates 'mate', B `Images`. With `teacher.cache_views` 'cached', view → the teacher's features (B, D); without it the
teacher looks itself.

Within the step, where every device has the whole set, images are the numbers of their rows, (B,) int32, until they are
looked at: then none is ever exchanged."""


def crop_keys(keys: jax.Array, count: int) -> jax.Array:
    """(B,) keys of images → (B, count) keys of their crops."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(count))


def all_finite(tree: Any) -> jax.Array:
    """Whether no leaf holds NaN or infinity."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """train_step(state, frozen, batch, data) -> (state, metrics): pure, traced once, run with the state donated.

    `frozen` holds the variables of `method.frozen`; `data` the resident set, or None. Metrics are float32 scalars.

    A step whose loss, gradients or pushed embeddings are not finite keeps the old state and is counted. Once more than
    `max_nonfinite` were refused, the state halts altogether: reading metrics lags behind the device, and so the state
    stays exactly the one from before the step that failed, to be saved and replayed.
    """

    recipe: Recipe
    mesh: Mesh

    def jit(self) -> jax.stages.Wrapped:
        """The step as one executable; its outputs lie as its inputs do, or the second step would be traced anew."""
        state = replicated = NamedSharding(self.mesh, REPLICATED)
        if self.recipe.sharding != "replicated":
            state = layout(jax.eval_shape(partial(create_state, self.recipe)), self.mesh, self.recipe.sharding)
        return jax.jit(self.__call__, donate_argnums=0, out_shardings=(state, replicated))

    def __call__(self, state: State, frozen, batch: Batch, data: Resident | None) -> tuple[State, dict[str, jax.Array]]:
        if data is not None:
            rows = {"image": batch["index"]}
            if data.bag is not None:
                rows["mate"] = mates(data.bag, batch["index"], self.recipe.seed, state.step)
            images = rows if data.split_over is None else {name: data.take(index) for name, index in rows.items()}
            batch = self.shard({**batch, **images, "label": data.label[batch["index"]]})
        if self.recipe.accum > 1:
            outcome, grads = self.accumulate(state, frozen, batch, data)
        else:
            outcome, grads = self.micro(state, frozen, batch, data, 0)
        return self.finish(state, batch, outcome, grads)

    def finish(self, state: State, batch: Batch, outcome, grads) -> tuple[State, dict[str, jax.Array]]:
        """All that follows the gradient: optimizer, averages, memory, and the refusal of what is not finite."""
        r, (loss, (push, metrics, batch_stats)) = self.recipe, outcome
        updates, opt = r.optimizer.update(grads, state.opt, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        averaged = {}
        for name, (source, schedule) in r.method.averaged.items():
            m = schedule(state.step / r.total_steps)
            averaged[name] = moving_average(state.averaged[name], trained[source], m)
        new = State(
            step=state.step + 1,
            nonfinite=state.nonfinite,
            trained=trained,
            averaged=averaged,
            batch_stats=batch_stats,
            opt=opt,
            memory=r.method.update(state.memory, push, self.context(state, batch, r.accum)),
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & all_finite(push)
        new = self.refuse_unless(finite, new, state)
        metrics = {
            "loss": loss,
            "lr": r.rate(state.step - state.nonfinite),  # optax counts the updates made
            "grad_norm": grad_norm,
            "nonfinite": new.nonfinite,
            **metrics,
        }
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    def micro(self, state: State, frozen, batch: Batch, data: Resident | None, number):
        """((loss, (push, metrics, batch_stats)), grads) of micro-batch `number`, by the memory from before the step."""
        count = batch["index"].shape[0]
        hands = order = inverse = None
        if self.recipe.shuffled_groups > 1:
            key = jax.random.fold_in(stream(self.recipe.seed, "shuffle", state.step), number)
            hands = draw_hands(key, count, self.recipe.shuffled_groups)
            order = order_of(hands)
            inverse = jnp.argsort(order)
        views = self.views(state.step, batch, number * count + jnp.arange(count), hands, data)
        ctx = self.context(state, batch, number, inverse)
        with contextlib.ExitStack() as stack:
            if "cached" in batch:
                shuffled = {name for name, view in self.recipe.method.views.items() if view.shuffled}
                cached = {
                    name: promote(rows if order is None or name not in shuffled else rows[order])
                    for name, rows in batch["cached"].items()
                }
                stack.enter_context(features_of_views("teacher", views, cached))
            return jax.value_and_grad(self.loss, has_aux=True)(state.trained, state, frozen, views, ctx)

    def accumulate(self, state: State, frozen, batch: Batch, data: Resident | None):
        """As `micro` on the whole batch: means over the micro-batches, pushes concatenated in order."""
        split = jax.tree.map(lambda x: x.reshape(self.recipe.accum, -1, *x.shape[1:]), dict(batch))
        split = self.shard(split, None, "data")

        def body(total, item):
            number, micro_batch = item
            (loss, (push, metrics, stats)), grads = self.micro(state, frozen, micro_batch, data, number)
            return jax.tree.map(jnp.add, total, (loss, stats, grads)), (push, metrics)

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.batch_stats, state.trained))
        # In a loop, XLA's CPU backend takes kernel gradients of convolutions some thirty times slower.
        unroll = jax.default_backend() == "cpu"
        total, (push, metrics) = jax.lax.scan(body, zero, (jnp.arange(self.recipe.accum), split), unroll=unroll)
        loss, stats, grads = jax.tree.map(lambda x: x / self.recipe.accum, total)
        push = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), push)
        # A metric is NaN where a micro-batch has nothing to measure.
        metrics = jax.tree.map(jnp.nanmean, metrics)
        return (loss, (push, metrics, stats)), grads

    def views(
        self,
        step: jax.Array,
        batch: Batch,
        row: jax.Array,
        hands: jax.Array | None = None,
        data: Resident | None = None,
    ) -> dict[str, jax.Array]:
        """Name → float32 view of the images, as `View` has it; what is shuffled lies as `hands` deal it, if given.

        A view is a function of a step and of `row`, the image's place within the whole batch; with
        `teacher.cache_views` of the number of the epoch's views, and of the image's index in the set.
        """
        views = {}
        if self.recipe.cache_views:
            step, row = step // self.recipe.steps_per_epoch % self.recipe.cache_views, batch["index"]
        for name, view in self.recipe.method.views.items():
            source, number = batch[view.source], row
            if view.shuffled and hands is not None:
                # Before augmentation, an image and its row's number: it keeps its own key.
                source, number = self.shuffled(source, hands), self.shuffled(row, hands)
            if data is not None and not isinstance(source, Images):
                source = self.shard(data.image[source])
            keys = jax.vmap(jax.random.fold_in, (None, 0))(stream(self.recipe.seed, f"augment/{name}", step), number)
            make = partial(
                augment,
                source,
                order_key=stream(self.recipe.seed, f"jitter order/{name}", step),
                spec=self.recipe.augmentation(view),
                size=view.size or self.recipe.image_size,
            )
            # Crops lie on the second axis, so that an image's crops stay on its device.
            views[name] = jax.vmap(make, 1, 1)(crop_keys(keys, view.count)) if view.count else make(keys)
        return views

    def shuffled(self, rows: Images | jax.Array, hands: jax.Array) -> Any:
        """Images or numbers of the batch, as the hands deal them. Numbers are few bytes, and gathered."""
        order = order_of(hands)
        if isinstance(rows, Images):
            return Images(self.shard(deal(rows.pixels, hands, self.mesh)), self.shard(rows.size[order]))
        # Unless told, the compiler leaves permuted rows, and so a view's networks, whole on every device.
        return self.shard(rows[order])

    def loss(self, trained, state: State, frozen, views, ctx: Context):
        """The method's loss as a function of the trained parameters; the other networks are constants."""
        variables, memory = self.gathered((self.variables(trained, state, frozen), state.memory))
        run = nn.apply(self.recipe.method.loss, Networks(self.recipe.specs), mutable=["batch_stats"])
        rngs = {"dropout": jax.random.fold_in(ctx.key, 0)}
        (loss, aux), updates = run(variables, views, memory, ctx, rngs=rngs)
        # A frozen network's running statistics stay what they were, whatever its mode.
        moved = updates.get("batch_stats", {})
        batch_stats = {name: moved.get(name, old) for name, old in state.batch_stats.items()}
        return loss, (aux.push, aux.metrics, batch_stats)

    def variables(self, trained, state: State, frozen) -> dict[str, Any]:
        """The variables of all networks: 'params' and 'batch_stats', each network → tree."""
        return {
            "params": {**trained, **state.averaged, **{n: v["params"] for n, v in frozen.items()}},
            "batch_stats": {**state.batch_stats, **{n: v["batch_stats"] for n, v in frozen.items()}},
        }

    def context(self, state: State, batch: Batch, number, inverse: jax.Array | None = None) -> Context:
        epochs, steps = jnp.divmod(state.step, self.recipe.steps_per_epoch)
        return Context(
            step=state.step,
            # Compiled, a quotient may miss a whole number by its last bit, and an epoch's first step its epoch.
            epoch=epochs + steps / self.recipe.steps_per_epoch,
            progress=state.step / self.recipe.total_steps,
            key=jax.random.fold_in(stream(self.recipe.seed, "method", state.step), number),
            index=batch["index"],
            label=batch["label"],
            inverse=inverse,
        )

    def refuse_unless(self, finite: jax.Array, new: State, old: State) -> State:
        """The new state if it is finite and the run has not halted; else the old one, with the refusal counted."""
        halted = old.nonfinite > self.recipe.max_nonfinite
        nonfinite = old.nonfinite + (~finite & ~halted)
        refused = old.replace(step=old.step + (nonfinite <= self.recipe.max_nonfinite), nonfinite=nonfinite)
        return jax.tree.map(lambda a, b: jnp.where(finite & ~halted, a, b), new, refused)

    def gathered(self, tree: Any) -> Any:
        """What the state's layout splits, whole on every device."""
        return gathered(tree, self.mesh, self.recipe.sharding)

    def shard(self, tree: Any, *axes: str | None) -> Any:
        """Splits rows over the devices, or the axes as given."""
        spec = PartitionSpec(*(axes or ("data",)))
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))
