"""What a recipe's step costs on this machine: whole, in parts, and beside what the machine can do.

Parts are made of the same functions as the step, compiled one by one, and timed in turn with the whole step, so that a
machine whose speed drifts slows all alike.
"""

import dataclasses
import math
import resource
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
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from ssl_kd.data.loader import Loader
from ssl_kd.models import backbone_calls
from ssl_kd.state import State, abstract
from ssl_kd.step import TrainStep
from ssl_kd.train import Run

ROUNDS = 5
"""Times each part is measured, all in turn; medians count."""

HOST_SECONDS = 3.0
"""How long the host's input rate is measured."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A compiled piece of the step.

    Attributes:
      call: runs it once and returns what must be waited for.
      flops: of one call, all devices, as written (before the compiler's optimisations).
      moved: bytes read and written by one call on one device, by the compiler; an upper bound, for what caches hold.
      times: calls a step.
      counted: whether it is one of those that make up the step; a forward that is also in a forward + backward is not.
    """

    call: Callable[[], Any]
    flops: float
    moved: float
    times: int = 1
    counted: bool = True


def compile_part(function: Callable[..., Any], *arguments: Any, **kind: Any) -> Part:
    lowered = jax.jit(function).lower(*arguments)
    compiled = lowered.compile()
    flops = (lowered.cost_analysis() or {}).get("flops", math.nan)
    moved = (compiled.cost_analysis() or {}).get("bytes accessed", math.nan)
    return Part(partial(compiled, *arguments), flops, moved, **kind)


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


def matmul_rate(dtype: Any, side: int = 2048, budget: float = 0.5) -> float:
    """Measured FLOP/s of square matrix products on one device."""
    a = jnp.ones((side, side), dtype)
    return 2 * side**3 / seconds_a_call(partial(jax.jit(lambda a: a @ a), a), budget)


def copy_rate(megabytes: int = 256, budget: float = 0.5) -> float:
    """Measured bytes/s, read plus written, of adding 1 to an array that no cache holds, on one device."""
    a = jnp.zeros((megabytes << 18,), jnp.float32)
    return 2 * a.nbytes / seconds_a_call(partial(jax.jit(lambda a: a + 1), a), budget)


def step_parts(step: TrainStep, state: State, frozen: Any, images: jax.Array) -> dict[str, Part]:
    """Name → piece of a step whose micro-batches are these images, uint8 (B / accum, H, W, 3)."""
    r, count = step.recipe, images.shape[0]
    rows = jnp.arange(count, dtype=jnp.int32)
    batch = step.shard({"index": rows, "label": jnp.zeros_like(rows)})
    order = rows[::-1] if r.shuffle_keys else None

    def make_views(number, images):
        return {name: step.shard(view) for name, view in step.views(number, images, rows, order).items()}

    pieces = {"augmentation": compile_part(make_views, state.step, images, times=r.accum)}
    views = pieces["augmentation"].call()
    variables = step.variables(state.trained, state, frozen)
    calls = listed_calls(step, state, frozen, views, batch, order)
    for (network, norm, x, _), times in Counter(calls).items():
        name = network if [c[0] for c in set(calls)].count(network) == 1 else f"{network} {x.shape[1]} px {norm}"
        trained = network in r.method.trained
        x = step.shard(jax.random.normal(jax.random.key(0), x.shape, x.dtype))
        backbone, kind = r.specs[network].backbone(), {"times": times * r.accum}

        def forward(params, batch_stats, x, backbone=backbone, norm=norm):
            variables = {"params": params, "batch_stats": batch_stats}
            features, updates = backbone.apply(variables, x, norm=norm, mutable=["batch_stats"])
            return jnp.sum(features.pooled**2), updates

        both = jax.grad(forward, has_aux=True)
        arguments = (variables["params"][network]["backbone"], variables["batch_stats"][network]["backbone"], x)
        pieces[f"{name} forward"] = compile_part(forward, *arguments, counted=not trained, **kind)
        if trained:
            pieces[f"{name} forward + backward"] = compile_part(both, *arguments, **kind)

    features = [jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype), c[3]) for c in calls]
    learned = [c[0] in r.method.trained for c in calls]

    def relate(trained, own, other, state, frozen, views):
        context = step.context(state, batch, 0, order)

        def loss(trained, own):
            mine, theirs = iter(own), iter(other)
            with backbone_calls([next(mine if known else theirs) for known in learned]):
                value, (push, metrics, _) = step.loss(trained, state, frozen, views, context)
            return value, (push, metrics)

        (_, (push, metrics)), (heads, own) = jax.value_and_grad(loss, (0, 1), has_aux=True)(trained, own)
        heads = {name: {k: g for k, g in tree.items() if k != "backbone"} for name, tree in heads.items()}
        return heads, own, metrics, r.method.update(state.memory, push, context)

    own, other = ([f for f, known in zip(features, learned, strict=True) if known is kind] for kind in (True, False))
    pieces["heads, relations, losses, memory"] = compile_part(
        relate, state.trained, own, other, state, frozen, views, times=r.accum
    )
    pieces["optimizer and averages"] = compile_part(step.advance, state, state.trained)
    return pieces


def listed_calls(
    step: TrainStep, state: State, frozen: Any, views: Any, batch: Any, order: jax.Array | None
) -> list[tuple[Any, ...]]:
    """(network, norm, images, features) of every backbone call of the loss, arrays as hashable shapes."""
    found: list[tuple[Any, ...]] = []

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    def trace(state, frozen, views):
        with backbone_calls() as calls:
            step.loss(state.trained, state, frozen, views, step.context(state, batch, 0, order))
        found.extend((c.network, c.norm, shape(c.images), jax.tree.map(shape, c.features)) for c in calls)

    jax.eval_shape(trace, state, frozen, views)
    return found


def compile_seconds(run: Run) -> tuple[Any, float, float]:
    """The compiled step, and seconds to trace and compile it: anew, and again from a persistent cache."""
    state, (batch, data) = abstract(run.create, run.replicated), run.abstract_inputs()
    before = jax.config.values["jax_compilation_cache_dir"]
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        compilation_cache.reset_cache()
        for _ in range(2):
            jax.clear_caches()
            began = time.perf_counter()
            compiled = run.train_step().lower(state, run.frozen(), batch, data).compile()
            seconds.append(time.perf_counter() - began)
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    return compiled, *seconds


def host_rate(run: Run) -> float:
    """Images/s that the host reads, decodes and hands to the devices when the set is not resident."""
    c = run.config
    loader = Loader(
        run.train, batch_size=c.batch_size, seed=c.seed, mesh=run.mesh, resident=False, workers=c.data.workers
    )
    with closing(loader.batches(0, sys.maxsize >> 1)) as batches:
        jax.block_until_ready(next(batches))
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < HOST_SECONDS:
            jax.block_until_ready(next(batches))
            count += 1
        return count * c.batch_size / (time.perf_counter() - began)


def peak_bytes() -> int:
    """Largest memory used so far: of one device where it reports it, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench(run: Run, budget: float) -> dict[str, Any]:
    """Measures a prepared run. Nothing is written.

    Args:
      budget: seconds for the timings of the step and its parts together; compilation comes on top.

    Returns:
      What `launch/bench.py` writes as JSON; seconds and FLOPs are of one optimizer step on all devices.
    """
    c, r = run.config, run.recipe
    compiled, cold, cached = compile_seconds(run)
    loader, frozen = run.loader(), run.frozen()
    with closing(loader.batches(0, 1)) as batches:
        batch = next(batches)
    state = run.create_now()

    def whole():
        nonlocal state
        state, metrics = compiled(state, frozen, batch, loader.data)
        return metrics

    images = np.zeros((c.batch_size // c.optim.accum, *run.train.image_shape), np.uint8)
    images = jax.device_put(images, NamedSharding(run.mesh, PartitionSpec("data")))
    parts = step_parts(TrainStep(r, run.mesh), run.create_now(), frozen, images)
    share = budget / ROUNDS / (len(parts) + 3)
    timed: dict[str, list[float]] = {name: [] for name in ("whole", *parts)}
    peaks: dict[str, list[float]] = {"matmul": [], "copy": []}
    for _ in range(ROUNDS):
        timed["whole"].append(seconds_a_call(whole, share))
        for name, part in parts.items():
            timed[name].append(part.times * seconds_a_call(part.call, share))
        peaks["matmul"].append(run.mesh.size * matmul_rate(jnp.dtype(c.compute_dtype), budget=share))
        peaks["copy"].append(run.mesh.size * copy_rate(budget=share))
    matmul, copy = (statistics.median(peaks[name]) for name in ("matmul", "copy"))

    def row(seconds: float, flops: float, moved: float) -> dict[str, float]:
        return {
            "seconds": seconds,
            "flops": flops,
            "of_matmul_rate": flops / seconds / matmul,
            "of_copy_rate": moved / seconds / copy,
        }

    rows = {
        name: row(statistics.median(timed[name]), part.times * part.flops, part.times * part.moved * run.mesh.size)
        | {"counted": part.counted}
        for name, part in parts.items()
    }
    counted = {name: part for name, part in parts.items() if part.counted}
    whole_flops, whole_moved = (sum(p.times * getattr(p, f) for p in counted.values()) for f in ("flops", "moved"))
    sums = [sum(values) for values in zip(*(timed[name] for name in counted), strict=True)]
    ratios = [total / one for total, one in zip(sums, timed["whole"], strict=True)]
    seconds = statistics.median(timed["whole"])
    host = host_rate(run)
    speed = c.batch_size / seconds
    limit = max(counted, key=lambda name: rows[name]["seconds"])
    return {
        "recipe": f"{c.name}:{c.preset}",
        "device": f"{run.mesh.size} × {jax.devices()[0].device_kind}",
        "batch_size": c.batch_size,
        "compute_dtype": c.compute_dtype,
        "images_per_second": speed,
        "whole": row(seconds, whole_flops, whole_moved * run.mesh.size),
        "parts": rows,
        "sum_of_parts_over_whole": statistics.median(ratios),
        "limit": "the host's input" if not run.resident and host < speed else limit,
        "hours": r.total_steps * seconds / 3600,
        "steps": r.total_steps,
        "matmul_flops_per_second": matmul,
        "copy_bytes_per_second": copy,
        "compile_seconds": cold,
        "compile_cached_seconds": cached,
        "peak_bytes": peak_bytes(),
        "resident": run.resident,
        "host_images_per_second": host,
    }
