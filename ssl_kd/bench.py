"""What a recipe's step costs on this machine: whole, in parts, and beside what the machine can do.

Parts are the functions the step is made of, compiled one by one and timed in turn with the whole step, so that a
machine whose speed drifts slows all alike. They leave out what is small: gathering a resident batch, the order of a
shuffle, the additions of an accumulated gradient.
"""

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import NamedSharding

from ssl_kd.images import Images
from ssl_kd.mesh import REPLICATED, SHARDED, place
from ssl_kd.models import backbone_calls, backbone_forward
from ssl_kd.models.layers import Features
from ssl_kd.run import Run
from ssl_kd.shuffle import draw_hands, order_of
from ssl_kd.state import State
from ssl_kd.step import TrainStep

ROUNDS = 5
"""Times each part is measured, all in turn; medians count."""

HOST_SECONDS = 3.0
"""How long the host's input rate is measured."""


def flops_of(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, loops counted in full: two for every product summed."""
    total = 0.0
    for equation in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        p, name = equation.params, equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            taps = kernel.size / kernel.shape[p["dimension_numbers"].rhs_spec[0]]
            # The gradient of a strided convolution meets mostly the zeros that were put between its inputs.
            total += 2.0 * out.size * taps / math.prod(p["lhs_dilation"])
        repeats = p["length"] if name == "scan" else 1
        for value in p.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    total += repeats * flops_of(inner)
    return total


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of the step.

    Attributes:
      function, arguments: the piece and what it is timed on.
      times: calls a step.
      counted: whether it is one of those that make up the step; a forward that is also in a forward + backward is not.
      carried: argument 0 is donated, and the first output takes its place in the next call.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    times: int = 1
    counted: bool = True
    carried: bool = False

    def flops(self) -> float:
        """Of all its calls in a step, on all devices, as written."""
        return self.times * flops_of(jax.jit(self.function).trace(*self.arguments).jaxpr)

    def compile(self, mesh: jax.sharding.Mesh) -> tuple[Callable[[], Any], float]:
        """A call, which returns what must be waited for; and bytes that a step's calls read and write, by the compiler.

        The bytes are an upper bound: caches hold some of them.
        """
        first, *others = self.arguments
        carry: dict[str, Any] = {}
        if self.carried:
            out = jax.tree.map(lambda x: x.sharding, first), NamedSharding(mesh, REPLICATED)
            carry = {"donate_argnums": 0, "out_shardings": out}
        compiled = jax.jit(self.function, **carry).lower(*self.arguments).compile()
        moved = self.times * mesh.size * (compiled.cost_analysis() or {}).get("bytes accessed", math.nan)

        def call():
            nonlocal first
            if not self.carried:
                return compiled(first, *others)
            first, out = compiled(first, *others)
            return out

        return call, moved


def seconds_a_call(call: Callable[[], Any], budget: float) -> float:
    """Mean seconds of a call repeated for about `budget` seconds; one call is dispatched while another runs."""
    jax.block_until_ready(call())
    began, count, running = time.perf_counter(), 0, None
    while count == 0 or time.perf_counter() - began < budget:
        following = call()
        jax.block_until_ready(running)
        running, count = following, count + 1
    jax.block_until_ready(running)
    return (time.perf_counter() - began) / count


_multiply = jax.jit(jnp.matmul)
_increment = jax.jit(lambda a: a + 1)


def matmul_rate(dtype: Any, budget: float = 0.5) -> float:
    """Measured FLOP/s of square matrix products on one device, large enough to fill it."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    return 2 * side**3 / seconds_a_call(partial(_multiply, a, a), budget)


def copy_rate(megabytes: int = 256, budget: float = 0.5) -> float:
    """Measured bytes/s, read plus written, of adding 1 to an array that no cache holds, on one device."""
    a = jnp.zeros((megabytes << 18,), jnp.float32)
    return 2 * a.nbytes / seconds_a_call(partial(_increment, a), budget)


def step_parts(step: TrainStep, state: State, frozen: Any, images: Images) -> dict[str, Part]:
    """Name → piece of a step whose micro-batches are these B / accum images."""
    r, count = step.recipe, len(images)
    rows = jnp.arange(count, dtype=jnp.int32)
    batch = step.shard({"index": rows, "label": jnp.zeros_like(rows)})
    hands = draw_hands(jax.random.key(0), count, r.shuffled_groups) if r.shuffled_groups > 1 else None
    inverse = None if hands is None else jnp.argsort(order_of(hands))

    def random(shapes):
        return step.shard(jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype), shapes))

    def make_views(number, images):
        sources = {"image": images, "mate": images}
        return {name: step.shard(view) for name, view in step.views(number, sources, rows, hands).items()}

    pieces = {"augmentation": Part(make_views, (state.step, images), r.accum)}
    views = random(jax.eval_shape(make_views, state.step, images))
    variables = step.variables(state.trained, state, frozen)
    calls = listed_calls(step, state, frozen, views, batch, inverse)
    for (network, norm, x, _), times in Counter(calls).items():
        name = network if [c[0] for c in set(calls)].count(network) == 1 else f"{network} {x.shape[1]} px {norm}"
        trained = network in r.method.trained

        def forward(params, batch_stats, x, spec=r.specs[network], norm=norm):
            variables = {"params": params, "batch_stats": batch_stats}
            features, updates = backbone_forward(spec, variables, x, norm=norm)
            used = (features.pooled, features.map) if spec.thead else (features.pooled,)
            return optax.tree.norm(used, squared=True), updates

        weights = (variables[kind][network].get("backbone", {}) for kind in ("params", "batch_stats"))
        arguments = (*weights, random(x))
        pieces[f"{name} forward"] = Part(forward, arguments, times * r.accum, counted=not trained)
        if trained:
            both = jax.grad(forward, has_aux=True)
            pieces[f"{name} forward + backward"] = Part(both, arguments, times * r.accum)

    features = [random(c[3]) for c in calls]
    learned = [c[0] in r.method.trained for c in calls]

    def relate(trained, outputs, features, state, frozen, views):
        context = step.context(state, batch, 0, inverse)

        def loss(trained, outputs):
            mine = iter(outputs)
            given = [with_outputs(f, *next(mine)) if own else f for f, own in zip(features, learned, strict=True)]
            with backbone_calls(given):
                return step.loss(trained, state, frozen, views, context)

        (value, (push, metrics, _)), (heads, of_outputs) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            trained, outputs
        )
        heads = {name: {k: g for k, g in tree.items() if k != "backbone"} for name, tree in heads.items()}
        return heads, of_outputs, value, push, metrics

    outputs = [(f.pooled, f.map) for f, own in zip(features, learned, strict=True) if own]
    arguments = (state.trained, outputs, features, state, frozen, views)
    pieces["heads, relations, losses"] = Part(relate, arguments, r.accum)

    # What `finish` is handed: a micro-batch's shapes, the batch's for what is pushed.
    value, push, metrics = jax.eval_shape(relate, *arguments)[2:]
    whole = {name: jax.ShapeDtypeStruct((r.accum * count, *x.shape[1:]), x.dtype) for name, x in push.items()}
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    outcome = (zeros(value), (step.shard(zeros(whole)), zeros(metrics), state.batch_stats))
    several = step.shard({name: jnp.tile(x, r.accum) for name, x in batch.items()})
    copied = jax.tree.map(jnp.copy, state)
    pieces["optimizer, averages, memory"] = Part(
        step.finish, (copied, several, outcome, zeros(state.trained)), carried=True
    )
    return pieces


def with_outputs(features: Features, pooled: jax.Array, last: jax.Array) -> Features:
    """The features with another pooled feature and last map."""
    return features.replace(pooled=pooled, stages=(*features.stages[:-1], last))


def listed_calls(
    step: TrainStep, state: State, frozen: Any, views: Any, batch: Any, inverse: jax.Array | None
) -> list[tuple[Any, ...]]:
    """(network, norm, images, features) of every backbone call of the loss, arrays as hashable shapes."""
    found: list[tuple[Any, ...]] = []

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    def trace(state, frozen, views):
        with backbone_calls() as calls:
            step.loss(state.trained, state, frozen, views, step.context(state, batch, 0, inverse))
        found.extend((c.network, c.norm, shape(c.images), jax.tree.map(shape, c.features)) for c in calls)

    jax.eval_shape(trace, state, frozen, views)
    return found


def any_bags(run: Run) -> np.ndarray:
    """Bags that no teacher had to mine: mining is not part of a step."""
    return np.zeros((len(run.train), run.bag_size), np.int32)


def stepper(run: Run) -> Part:
    """The whole step on the run's first batch."""
    loader = run.loader(any_bags(run))
    with closing(loader.batches(0, 1)) as batches:
        batch = next(batches)
    return Part(TrainStep(run.recipe, run.mesh), (run.create_now(), run.frozen(), batch, loader.data), carried=True)


def compile_seconds(run: Run) -> tuple[float, float]:
    """Seconds to trace and compile the step: anew, and again from a persistent cache."""
    state, (batch, data), frozen = run.abstract, run.abstract_inputs(), run.frozen()
    changed = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in changed}
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        try:
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            for _ in range(2):
                compilation_cache.reset_cache()
                jax.clear_caches()
                began = time.perf_counter()
                run.train_step().lower(state, frozen, batch, data).compile()
                seconds.append(time.perf_counter() - began)
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
    cold, cached = seconds
    return cold, cached


def host_rate(run: Run) -> float | None:
    """Images/s that the host reads, decodes and hands to the devices; None where it sends only row numbers."""
    if run.resident != "streamed":
        return None
    ready = 3 * (run.config.data.workers + 1)  # batches that were prefetched before the clock starts
    with closing(run.loader(any_bags(run)).batches(0, sys.maxsize >> 1)) as batches:
        for _ in range(ready):
            jax.block_until_ready(next(batches))
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < HOST_SECONDS:
            jax.block_until_ready(next(batches))
            count += 1
        return count * run.config.batch_size / (time.perf_counter() - began)


def host_parts(run: Run) -> dict[str, float] | None:
    """Seconds an image that one thread takes for what the host does with it; None where it sends only row numbers."""
    if run.resident != "streamed":
        return None
    source = run.train.take(np.linspace(0, len(run.train) - 1, min(len(run.train), 256)).astype(int))
    images = Images.whole(np.zeros((run.config.batch_size, *source.canvas, 3), np.uint8))

    def seconds(work: Callable[[], Any], count: int) -> float:
        work()
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) / count

    reading = seconds(lambda: [source.reader.read(row) for row in source.rows.tolist()], len(source))
    decoded = seconds(lambda: [source.image(i) for i in range(len(source))], len(source))
    sending = seconds(lambda: jax.block_until_ready(place(images, run.mesh, SHARDED)), len(images))
    return {"reading": reading, "decoding": max(0.0, decoded - reading), "sending": sending}


def peak_bytes() -> int:
    """Largest memory used so far: of one device where it reports it, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bench(run: Run, budget: float) -> dict[str, Any]:
    """Measures a prepared run. Nothing is written.

    Args:
      budget: seconds for the timings of the step and its parts together; compilation and the host's input on top.

    Returns:
      What `launch/bench.py` writes as JSON; seconds, FLOPs and rates are of one optimizer step on all devices.
    """
    c, r = run.config, run.recipe
    cold, cached = compile_seconds(run)
    step = TrainStep(r, run.mesh)
    whole, _ = stepper(run).compile(run.mesh)
    jax.block_until_ready(whole())
    peak = peak_bytes()
    pixels = np.zeros((c.batch_size // c.optim.accum, *run.train.canvas, 3), np.uint8)
    images = jax.device_put(Images.whole(pixels), NamedSharding(run.mesh, SHARDED))
    parts = step_parts(step, run.create_now(), run.frozen(), images)
    compiled = {name: part.compile(run.mesh) for name, part in parts.items()}
    share = budget / ROUNDS / (len(parts) + 3)
    timed: dict[str, list[float]] = {name: [] for name in ("whole", *parts)}
    peaks: dict[str, list[float]] = {"matmul": [], "copy": []}
    for _ in range(ROUNDS):
        timed["whole"].append(seconds_a_call(whole, share))
        for name, (call, _) in compiled.items():
            timed[name].append(parts[name].times * seconds_a_call(call, share))
        peaks["matmul"].append(run.mesh.size * matmul_rate(jnp.dtype(c.compute_dtype), budget=share))
        peaks["copy"].append(run.mesh.size * copy_rate(budget=share))
    matmul, copy = (statistics.median(peaks[name]) for name in ("matmul", "copy"))

    def row(seconds: float, flops: float, moved: float) -> dict[str, float]:
        rates = {"of_matmul_rate": flops / seconds / matmul, "of_copy_rate": moved / seconds / copy}
        return {"seconds": seconds, "flops": flops, "bytes": moved, **rates}

    rows: dict[str, dict[str, Any]] = {
        name: row(statistics.median(timed[name]), part.flops(), compiled[name][1]) | {"counted": part.counted}
        for name, part in parts.items()
    }
    counted = {name: figures for name, figures in rows.items() if figures["counted"]}
    sums = [sum(values) for values in zip(*(timed[name] for name in counted), strict=True)]
    seconds = statistics.median(timed["whole"])
    flops, moved = (sum(figures[kind] for figures in counted.values()) for kind in ("flops", "bytes"))
    host = host_rate(run)
    waiting = host is not None and host < c.batch_size / seconds
    return {
        "recipe": c.name + (f":{c.preset}" if c.preset else ""),
        "device": f"{run.mesh.size} × {jax.devices()[0].device_kind}",
        "batch_size": c.batch_size,
        "compute_dtype": c.compute_dtype,
        "images_per_second": c.batch_size / seconds,
        "host_images_per_second": host,
        "host_seconds_per_image": host_parts(run),
        "whole": row(seconds, flops, moved),  # operations and bytes are the parts'
        "parts": rows,
        "sum_of_parts_over_whole": statistics.median(total / s for total, s in zip(sums, timed["whole"], strict=True)),
        "limit": "the host's input" if waiting else max(counted, key=lambda name: counted[name]["seconds"]),
        "steps": r.total_steps,
        "hours": r.total_steps * (c.batch_size / host if waiting else seconds) / 3600,
        "matmul_flops_per_second": matmul,
        "copy_bytes_per_second": copy,
        "compile_seconds": cold,
        "compile_cached_seconds": cached,
        "peak_bytes": peak,
    }
