"""A run on one screen: what it will cost before it starts, and what it reached."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from ssl_kd.bench import flops_of, matmul_rate
from ssl_kd.data import quarantine
from ssl_kd.log import console
from ssl_kd.run import Run

ASSUMED_UTILISATION = 0.4
"""Share of the measured matrix-multiply rate a step is assumed to reach; only the estimate of time rests on it."""


def tree_bytes(tree: Any) -> int:
    """Bytes of an abstract tree on each of its devices."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def estimate(run: Run) -> None:
    """Prints parameters, memory and time of a run without training a step. Compiles the step, for its memory."""
    c, r = run.config, run.recipe
    state = run.abstract
    networks = Table(title="networks")
    for column in ("name", "architecture", "parameters", "role"):
        networks.add_column(column)
    method = run.recipe.method
    roles = {**dict.fromkeys(method.trained, "trained"), **dict.fromkeys(method.frozen, "frozen")}
    roles |= {name: f"average of {source}" for name, (source, _) in method.averaged.items()}
    params = {**state.trained, **state.averaged, **{n: run.pretrained[n].variables["params"] for n in method.frozen}}
    for name, role in roles.items():
        spec = run.recipe.specs[name]
        count = sum(x.size for x in jax.tree.leaves(params[name]))
        networks.add_row(name, f"{spec.name} × {spec.width:g}, {spec.stem} stem", f"{count:,}", role)
    console.print(networks)

    batch, data = run.abstract_inputs()
    traced = run.train_step().trace(state, run.frozen(), batch, data)
    memory = traced.lower().compile().memory_analysis()
    flops = flops_of(traced.jaxpr)
    rate = run.mesh.size * matmul_rate(jnp.dtype(c.compute_dtype))
    seconds = r.total_steps * flops / (rate * ASSUMED_UTILISATION)
    height, width = run.train.canvas
    rows = {
        "images": f"{len(run.train):,} on a canvas of {height} × {width} px, {r.steps_per_epoch} steps an epoch",
        "steps": f"{r.total_steps:,} of {c.batch_size} images",
        "state": f"{tree_bytes(state) / 2**20:,.0f} MiB on every device (parameters, averages, optimizer, memory)",
        "step": f"{memory.temp_size_in_bytes / 2**20:,.0f} MiB of temporaries, by the compiler",
        "data": f"{tree_bytes(data) / 2**20:,.0f} MiB on every device, {run.resident}" if data else "streamed",
        "compute": f"{flops / 1e9:,.1f} GFLOP a step in matrix products and convolutions",
        "time": f"about {seconds / 60:,.1f} min at {100 * ASSUMED_UTILISATION:.0f} % of the {rate / 1e9:,.0f} GFLOP/s "
        f"that {run.mesh.size} × {jax.devices()[0].device_kind} multiply matrices with; probes not counted",
        "workdir": str(run.workdir),
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def bench_table(figures: Mapping[str, Any]) -> Table:
    """What `ssl_kd.bench.bench` measured, for people."""
    f = figures
    total = sum(part["seconds"] for part in f["parts"].values() if part["counted"])
    table = Table(title=f"{f['recipe']} · batch {f['batch_size']} · {f['compute_dtype']} · {f['device']}")
    table.add_column("part of the step")
    for column in ("ms", "share", "GFLOP", "% of matmul rate", "% of copy rate"):
        table.add_column(column, justify="right")

    def add(name: str, row: Mapping[str, float], share: str) -> None:
        rates = (f"{100 * row[key]:.0f}" for key in ("of_matmul_rate", "of_copy_rate"))
        table.add_row(name, f"{1e3 * row['seconds']:.2f}", share, f"{row['flops'] / 1e9:.2f}", *rates)

    for name, row in f["parts"].items():
        add(name, row, f"{100 * row['seconds'] / total:.0f} %" if row["counted"] else "")
    table.add_section()
    add("whole step", f["whole"], f"{100 * f['whole']['seconds'] / total:.0f} %")
    host = f["host_images_per_second"]
    spent = [f"{what} {1e3 * seconds:.2f}" for what, seconds in (f["host_seconds_per_image"] or {}).items()]
    reads = f"the host: {host:,.0f} images/s; ms an image of one thread: {', '.join(spent)}\n" if host else ""
    table.caption = (
        f"{f['images_per_second']:,.0f} images/s · limit: {f['limit']}\n{reads}"
        f"{f['steps']:,} steps: {f['hours']:.2f} hours · peak memory {f['peak_bytes'] / 2**30:.2f} GiB\n"
        f"compiles in {f['compile_seconds']:.1f} s, from the cache in {f['compile_cached_seconds']:.1f} s\n"
        f"here: {f['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s matmul, "
        f"{f['copy_bytes_per_second'] / 1e9:,.1f} GB/s copy"
    )
    return table


def probe_table(results: Mapping[str, Any], title: str) -> Table:
    """What `ssl_kd.probes.evaluate` found of each row of features: accuracies, where there are labels, and what needs
    none."""
    rows = {name: row for name, row in results.items() if isinstance(row, dict)}
    first = next(iter(rows.values()))
    ks = {key: f"{key.removeprefix('knn')}-NN" for key in first if key.startswith("knn")}
    names = ks | {
        key: name for key, name in {"linear": "linear", "nn_consistency": "neighbours"}.items() if key in first
    }
    captions = [] if ks else ["no accuracies, for not all images have labels"]
    if "nn_chance" in first:
        captions.append(f"neighbours: shared by two views of an image, {100 * first['nn_chance']:.1f} by chance")
    table = Table(title=f"{title}, in %", caption="\n".join(captions))
    table.add_column("features", no_wrap=True)
    for column in (*names.values(), "effective rank"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{100 * row[key]:.1f}" for key in names), f"{row['effective_rank']:.0f}")
    return table


def layer_table(results: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """Accuracy of every layer of each network, in %, and which is the best."""
    table = Table(title=f"{title}, in %")
    table.add_column("network", no_wrap=True)
    for column in (*next(iter(results.values())), "best"):
        table.add_column(column, justify="right")
    for name, row in results.items():
        best = max(row, key=row.__getitem__)
        table.add_row(name, *(f"{100 * value:.1f}" for value in row.values()), best)
    return table


def summarise(run: Run, results: Mapping[str, Any]) -> None:
    """Prints what a finished run reached, where it lies, and what to try next."""
    c = run.config
    console.print(probe_table(results, f"{c.data.source} {c.data.test}"))
    console.print(f"{results['seconds'] / 60:.1f} min, probes included. Checkpoint: {run.workdir / 'checkpoints'}")
    if results["quarantined"]:
        console.print(
            f"Images that could not be read, in whose place others stood: {results['quarantined']:,}, each named in "
            f"{run.workdir / quarantine.FILE}"
        )
    method = run.recipe.method
    if "teacher" in method.trained:
        network = "teacher_momentum" if "teacher_momentum" in method.evaluated else "teacher"
        following = f"python launch/evaluate.py --workdir={run.workdir} --network={network}"
    elif not method.frozen and set(method.averaged) == {"student_momentum"} and c.method.name != "rekd":
        preset = f":{c.preset}" if c.preset else ""
        source = f"--config.teacher.source=workdir:{run.workdir}"
        following = f"python launch/main.py --config=configs/rekd_alexnet.py{preset} {source}"
    else:
        following = f'python -c "import ssl_kd; apply, params = ssl_kd.load({str(run.workdir)!r})"'
    console.print(f"Next: {following}")
