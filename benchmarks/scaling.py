"""Predicts weak scaling on accelerators from what the compiled step of a recipe exchanges and computes.

    python benchmarks/scaling.py --count rekd_alexnet     a recipe's step on 8 devices; 2 min (MOKD's 15) on 2 cores
    python benchmarks/scaling.py                          the table in docs/scaling.md and its picture, from the counts

Nothing is run on an accelerator, and nothing is allocated: the step of the `imagenet` preset is compiled for 8 fake CPU
devices, with convolutions as on an accelerator. Counts and predictions go to benchmarks/scaling.json; the assumptions
between them are `MACHINES`, `IMAGES` and `predict`. The picture needs `pip install matplotlib`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import argparse
import dataclasses
import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FIGURES, PAGE, PICTURE = ROOT / "benchmarks/scaling.json", ROOT / "docs/scaling.md", ROOT / "docs/scaling.svg"

RECIPES = {
    "rekd_alexnet": "ReKD, AlexNet + ResNet-50",
    "disco_resnet18": "DisCo, ResNet-18 of a frozen ResNet-50",
    "mokd_resnet50_vit_small": "MOKD, ResNet-50 + ViT-S",
}
COUNTED_ON = 8
IMAGES = 32
"""Images of a device in a step, as of the papers' 256 on 8 GPUs. Groups of batch norm keep their size as well."""
TRAINING_IMAGES = 1_281_167
CANVAS = 384
"""Side of the square that a photograph is sent on, pixels: 3/2 of the 256 that are enough for views of 224."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is assumed of a cluster. Rates are published peaks; `utilisation` and `latency` are guesses.

    Attributes:
      devices: how many are compared.
      flops: peak of a device, bfloat16, FLOP/s.
      utilisation: share of it that forward and backward passes reach; convolutional networks have 0.2 to 0.4.
      near, far: bytes/s that a device sends to those of its node, and to other nodes; equal where there are no nodes.
      node: devices of a node.
      latency: devices → seconds that the smallest collective takes.
      source: of the peaks.
    """

    devices: tuple[int, ...]
    flops: float
    utilisation: float
    near: float
    far: float
    node: int
    latency: dict[int, float]
    source: str


MACHINES = {
    "TPU v5e": Machine(
        devices=(8, 64, 256),
        flops=197e12,
        utilisation=0.3,
        near=200e9,  # 1600 Gbit/s a chip; a torus only with 256, but smaller slices are taken to have as much
        far=200e9,
        node=256,
        latency={8: 10e-6, 64: 30e-6, 256: 35e-6},  # 1 µs a hop, there and back along both axes
        source="https://cloud.google.com/tpu/docs/v5e",
    ),
    "H100 SXM, 8 a node": Machine(
        devices=(8, 64),
        flops=989e12,
        utilisation=0.2,
        near=450e9,  # NVLink 4: 900 GB/s in both directions
        far=50e9,  # one 400 Gbit/s InfiniBand adapter a GPU
        node=8,
        latency={8: 15e-6, 64: 40e-6},
        source="https://www.nvidia.com/en-us/data-center/h100/ and https://docs.nvidia.com/dgx/dgxh100-user-guide/",
    ),
}


def count(name: str) -> dict[str, Any]:
    """What the step of a recipe's `imagenet` preset computes and exchanges on 8 devices."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from ssl_kd.bench import flops_of
    from ssl_kd.collectives import exchanges, totals
    from ssl_kd.images import Images
    from ssl_kd.mesh import REPLICATED, SHARDED, make_mesh
    from ssl_kd.models.convolution import plain_convolutions
    from ssl_kd.recipe import make_recipe
    from ssl_kd.state import create_state
    from ssl_kd.step import TrainStep

    config = importlib.import_module(f"configs.{name}").get_config("imagenet")
    batch_size = config.batch_size = IMAGES * COUNTED_ON
    recipe, mesh = make_recipe(config, TRAINING_IMAGES), make_mesh()

    def whole(tree: Any) -> Any:
        where = NamedSharding(mesh, REPLICATED)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=NamedSharding(mesh, SHARDED))

    state = whole(jax.eval_shape(partial(create_state, recipe)))
    frozen = {role: whole(jax.eval_shape(partial(recipe.initial, role))) for role in recipe.method.frozen}
    images = Images(rows(np.uint8, CANVAS, CANVAS, 3), rows(np.int32, 2))
    batch = {"index": rows(np.int32), "label": rows(np.int32), "image": images}
    with plain_convolutions():
        traced = TrainStep(recipe, mesh).jit().trace(state, frozen, batch, None)
    found = exchanges(traced.lower().compile().as_text())

    def purpose(e: Any) -> str:
        if e.network:
            return "gradients" if e.backward else "statistics"
        if e.dtype == "u8":
            return "images"
        return "rows" if batch_size in e.shape else "memory and scalars"

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    exchanged: dict[str, dict[str, int]] = {}
    for e in found:
        by_kind = exchanged.setdefault(purpose(e), {})
        by_kind[e.kind] = by_kind.get(e.kind, 0) + e.bytes
    return {
        "flops": flops_of(traced.jaxpr),
        "collectives": sum(times for times, _ in totals(found).values()),
        "exchanged": exchanged,
        "trained": size(state.trained),
        "averaged": size(state.averaged),
        "frozen": size(frozen),
        "epochs": config.epochs,
    }


def seconds(machine: Machine, devices: int, kind: str, size: float) -> float:
    """Of a collective by rings, within nodes and then between them, or from device to device; its latency apart."""
    if kind == "collective-permute":
        return size / (machine.near if devices <= machine.node else machine.far)
    near, nodes = min(devices, machine.node), max(1, devices // machine.node)
    passes = 2 if kind == "all-reduce" else 1  # reduced and scattered, then gathered
    between = size / near * (nodes - 1) / nodes / machine.far
    return passes * (size * (near - 1) / near / machine.near + between)


def predict(counted: dict[str, Any], machine: Machine, devices: int) -> dict[str, float]:
    """Milliseconds of a step and what follows from them. Rows grow with the batch. Of its images a device keeps
    its part, one in n or a single one, and sends the others: hardly more on more devices. The rest stays.

    A parameter's gradient is exchanged once, in float32: XLA's CPU compiler does it at every call of a network, that
    for GPUs adds first (its pass all-reduce-reassociate).
    """
    compute = counted["flops"] / COUNTED_ON / (machine.flops * machine.utilisation)
    collectives, dealt = counted["collectives"], min(devices, IMAGES)
    if "images" in counted["exchanged"]:  # to each of the others an exchange of its own
        collectives += dealt - COUNTED_ON
    parts = {"latency": collectives * machine.latency[devices]}
    for purpose, kinds in counted["exchanged"].items():
        grown = devices / COUNTED_ON if purpose == "rows" else 1
        if purpose == "images":
            grown = (1 - 1 / dealt) / (1 - 1 / COUNTED_ON)
        if purpose == "gradients":
            kinds = {"all-reduce": counted["trained"]}
        parts[purpose] = sum(seconds(machine, devices, kind, grown * size) for kind, size in kinds.items())
    exchange, batch_size = sum(parts.values()), devices * IMAGES
    slowest, fastest = compute + exchange, max(compute, exchange)
    steps = counted["epochs"] * TRAINING_IMAGES / batch_size
    return {
        "batch_size": batch_size,
        "compute_ms": 1e3 * compute,
        "exchange_ms": 1e3 * exchange,
        **{f"{name.replace(' ', '_')}_ms": 1e3 * value for name, value in parts.items()},
        "efficiency_without_overlap": compute / slowest,
        "efficiency_with_full_overlap": compute / fastest,
        "hours_without_overlap": steps * slowest / 3600,
        "hours_with_full_overlap": steps * fastest / 3600,
    }


def tables(figures: dict[str, Any]) -> str:
    """What is counted and what is predicted, as Markdown."""
    lines = [
        "Counted, of a step of 256 images on 8 devices; MB of an array as every device has it in the end, images as "
        "it sends them:",
        "",
        "| recipe | TFLOP | collectives | parameters | gradients | batch norm | rows | images | rest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = ("gradients", "statistics", "rows", "images", "memory and scalars")
    for name, counted in figures["counted"].items():
        sizes = [sum(counted["exchanged"].get(purpose, {}).values()) / 1e6 for purpose in order]
        shown = " | ".join(f"{size:.1f}" if size else "0" for size in (counted["trained"] / 1e6, *sizes))
        lines.append(f"| {RECIPES[name]} | {counted['flops'] / 1e12:.1f} | {counted['collectives']} | {shown} |")
    lines += [
        "",
        "Predicted, 32 images a device; from nothing overlapped to all that can be:",
        "",
        "| recipe | devices | batch | compute, ms | exchange, ms | of it images | efficiency | hours of the recipe |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, machines in figures["predicted"].items():
        for machine, sizes in machines.items():
            for devices, p in sizes.items():
                low, high = (100 * p[f"efficiency_{key}"] for key in ("without_overlap", "with_full_overlap"))
                least, most = (p[f"hours_{key}"] for key in ("with_full_overlap", "without_overlap"))
                lines.append(
                    f"| {RECIPES[name].partition(',')[0]} | {devices} {machine.partition(',')[0]} "
                    f"| {p['batch_size']:,} | {p['compute_ms']:.1f} | {p['exchange_ms']:.1f} "
                    f"| {p.get('images_ms', 0):.1f} | {low:.0f}–{high:.0f} % | {least:.1f}–{most:.1f} |"
                )
    return "\n".join(lines)


def draw(figures: dict[str, Any]) -> None:
    """Efficiency over devices, one panel a machine: solid if nothing overlaps, dotted if all does that can."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same picture, byte for byte
    figure, panels = pyplot.subplots(1, len(MACHINES), figsize=(9, 3.2), sharey=True, layout="constrained")
    for panel, (machine, assumed) in zip(panels, MACHINES.items(), strict=True):
        for name, predicted in figures["predicted"].items():
            sizes = predicted[machine]
            low, high = (
                [100 * sizes[str(n)][f"efficiency_{key}"] for n in assumed.devices]
                for key in ("without_overlap", "with_full_overlap")
            )
            (line,) = panel.plot(assumed.devices, low, marker="o", label=RECIPES[name])
            panel.plot(assumed.devices, high, linestyle=":", color=line.get_color())
        panel.set_xscale("log", base=2)
        panel.set_xticks(assumed.devices, [str(n) for n in assumed.devices])
        panel.set(title=machine, xlabel="devices, 32 images each", ylim=(0, 103))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("predicted efficiency, %")
    panels[0].legend(fontsize="small", loc="lower left")
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", nargs="+", choices=RECIPES, default=[], metavar="RECIPE", help="compile these again")
    names = parser.parse_args().count
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"counted": {}}
    for name in names:
        figures["counted"][name] = count(name)
    figures["counted"] = {name: figures["counted"][name] for name in RECIPES if name in figures["counted"]}
    figures["assumed"] = {name: dataclasses.asdict(machine) for name, machine in MACHINES.items()}
    figures["predicted"] = {
        name: {
            machine: {str(n): predict(counted, assumed, n) for n in assumed.devices}
            for machine, assumed in MACHINES.items()
        }
        for name, counted in figures["counted"].items()
    }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    before, begin, rest = PAGE.read_text().partition("<!-- by benchmarks/scaling.py -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    PAGE.write_text(f"{before}{begin}\n{tables(figures)}\n\n{end}{after}")
    draw(figures)


if __name__ == "__main__":
    main()
