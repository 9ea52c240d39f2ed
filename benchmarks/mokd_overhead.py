"""MOKD's compiled step beside its networks alone: what losses, optimizers, averages and augmentation cost on top.

    python benchmarks/mokd_overhead.py --config=configs/mokd_resnet50_vit_small.py [--seconds=120] [--json=FILE]

The networks alone are the same crops, made beforehand, through the same networks, heads and search queries, forward and
backward. Both are timed in turn, so that a drifting machine hits both.
"""

import dataclasses
import statistics
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy.stats import quantile_test  # scipy comes with jax

from ssl_kd import command
from ssl_kd.bench import flops_of, seconds_a_call, stepper
from ssl_kd.data.sources import arrays
from ssl_kd.errors import UserError
from ssl_kd.log import console
from ssl_kd.methods import Aux
from ssl_kd.methods.mokd import GLOBALS, MOKD, look
from ssl_kd.run import prepare
from ssl_kd.step import TrainStep

CONFIG = command.define_config()
SECONDS = flags.DEFINE_float("seconds", 120.0, "For all timings together; compilation comes on top.")
ROUNDS = flags.DEFINE_integer("rounds", 25, "Times that both are timed, in turn.", lower_bound=6)
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


class NetworksAlone(MOKD):
    """MOKD whose loss is the sum of all that its networks put out, and nothing that is computed from it."""

    def loss(self, nets, views, memory, ctx):
        two = jnp.stack([views["global1"], views["global2"]], axis=1)
        learner = {i: look(getattr(nets, i), two, views["local"], dropout=True) for i in self.trained}
        average = {i: look(getattr(nets, f"{i}_momentum"), two) for i in self.trained}
        searched = []
        for i, j in zip(self.trained, self.trained[::-1], strict=True) if self.teacher == "online" else ():
            z = jax.lax.stop_gradient(getattr(nets, i).query(learner[i].features[1]))
            first_global = jax.tree.map(lambda rows: rows[::GLOBALS], average[j].features[0])
            searched.append(getattr(nets, f"{j}_momentum").search(first_global, z))
        total = sum(jnp.sum(output) for seen in learner.values() for output in seen.outputs.values())
        kept = [output for seen in average.values() for output in seen.outputs.values()]
        return total, Aux(push={}, metrics={f"kept{k}": jnp.sum(x) for k, x in enumerate((*kept, *searched))})


def main() -> None:
    run = prepare(CONFIG.value, Path("unused"))
    if not isinstance(run.recipe.method, MOKD) or run.recipe.accum > 1 or run.recipe.shuffled_groups > 1:
        raise UserError("this is for method.name='mokd': choose such a recipe, with optim.accum=1 and bn_groups=1.")
    command.write_figures(JSON.value, {})
    c = run.config
    method = NetworksAlone(**{f.name: getattr(run.recipe.method, f.name) for f in dataclasses.fields(MOKD)})
    step = TrainStep(dataclasses.replace(run.recipe, method=method), run.mesh)
    rows = jnp.arange(c.batch_size, dtype=jnp.int32)
    batch = step.shard({"index": rows, "label": jnp.zeros_like(rows)})
    images, _ = arrays(run.train.take(np.arange(c.batch_size)))
    views = jax.jit(lambda images: step.views(jnp.int32(0), {"image": images}, rows))(step.shard(images))
    state = run.create_now()

    def networks_alone(state, views):
        context = step.context(state, batch, 0)
        return jax.value_and_grad(step.loss, has_aux=True)(state.trained, state, {}, views, context)

    networks = jax.jit(networks_alone).lower(state, views).compile()
    whole = stepper(run)
    call, _ = whole.compile(run.mesh)
    budget = SECONDS.value / ROUNDS.value / 2
    seconds: dict[str, list[float]] = {"whole": [], "networks alone": []}
    for _ in range(ROUNDS.value):
        seconds["whole"].append(seconds_a_call(call, budget))
        seconds["networks alone"].append(seconds_a_call(partial(networks, state, views), budget))
    overheads = [a / b - 1 for a, b in zip(*seconds.values(), strict=True)]
    interval = quantile_test(overheads).confidence_interval(0.95)  # of the median, by the order of the rounds' values
    flops = whole.flops(), flops_of(jax.jit(networks_alone).trace(state, views).jaxpr)
    figures = {
        "recipe": f"{c.name}:{c.preset}".rstrip(":"),
        "device": f"{run.mesh.size} × {jax.devices()[0].device_kind}",
        "batch_size": c.batch_size,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "overhead": statistics.median(overheads),
        "overhead_interval_95": [float(interval.low), float(interval.high)],
        "rounds": len(overheads),
        "flops": {"whole": flops[0], "networks alone": flops[1]},
    }
    console.print(
        f"whole {figures['seconds']['whole']:.3f} s, networks alone {figures['seconds']['networks alone']:.3f} s: "
        f"overhead {100 * figures['overhead']:.1f} % (95 % interval of the median {100 * interval.low:.1f} to "
        f"{100 * interval.high:.1f})"
    )
    command.write_figures(JSON.value, figures)


if __name__ == "__main__":
    command.run(main)
