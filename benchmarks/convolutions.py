"""The CPU's convolutions, forward and backward: XLA's own, ssl_kd's and, where it is installed, PyTorch's.

    python benchmarks/convolutions.py [--rounds=7] [--only=TEXT] [--out=benchmarks/convolutions]

Writes OUT.json and OUT.md: GFLOP/s of single convolutions, ms an image of whole networks (in PyTorch timm's, and an
AlexNet of its own). What `convolve` in ssl_kd/models/convolution.py does with which shape rests on them. One thread,
float32; CPU seconds, not the clock's, so that other work on the machine counts little; the sides take turns, and the
fastest of their rounds counts.
"""

import argparse
import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np

from ssl_kd.checkpoint import session
from ssl_kd.command import keep_freed_memory
from ssl_kd.models import MODELS, convolution
from ssl_kd.weights.layouts import TIMM_MODELS
from ssl_kd.workdir import write_json

try:
    import torch
    import torch_models
    import torch_step
except ImportError:
    torch = None
else:
    torch.set_num_threads(1)

# Batch, size, in, out, kernel, stride, padding; by where they come from. Depthwise where in == out == groups.
SHAPES = {
    "rekd_alexnet's student": [
        (128, 28, 3, 48, 5, 2, 2),
        (128, 7, 48, 128, 5, 1, 2),
        (128, 3, 128, 192, 3, 1, 1),
        (128, 3, 192, 192, 3, 1, 1),
    ],
    "rekd_alexnet's teacher": [
        (128, 28, 3, 32, 3, 2, 1),
        (128, 14, 32, 32, 3, 1, 1),
        (128, 14, 32, 64, 3, 2, 1),
        (128, 14, 32, 64, 1, 2, 0),
        (128, 7, 64, 64, 3, 1, 1),
        (128, 7, 64, 128, 3, 2, 1),
        (128, 4, 128, 128, 3, 1, 1),
        (128, 4, 128, 256, 3, 2, 1),
        (128, 2, 256, 256, 3, 1, 1),
    ],
    "ResNet-18, 64 px": [
        (64, 64, 3, 64, 7, 2, 3),
        (64, 16, 64, 64, 3, 1, 1),
        (64, 8, 128, 128, 3, 1, 1),
        (64, 4, 256, 256, 3, 1, 1),
        (64, 2, 512, 512, 3, 1, 1),
    ],
    "ResNet-18, 224 px": [
        (16, 224, 3, 64, 7, 2, 3),
        (16, 56, 64, 64, 3, 1, 1),
        (16, 56, 64, 128, 3, 2, 1),
        (16, 28, 128, 128, 3, 1, 1),
        (16, 14, 256, 256, 3, 1, 1),
        (16, 7, 512, 512, 3, 1, 1),
    ],
    "AlexNet, 224 px": [(16, 224, 3, 96, 11, 4, 2), (16, 27, 96, 256, 5, 1, 2), (16, 13, 384, 384, 3, 1, 1)],
}
DEPTHWISE = {
    "MobileNet-V3-L, 64 px": [
        (32, 32, 64, 64, 3, 2, 1),
        (32, 16, 72, 72, 3, 1, 1),
        (32, 16, 72, 72, 5, 2, 2),
        (32, 8, 120, 120, 5, 1, 2),
        (32, 4, 480, 480, 3, 1, 1),
        (32, 4, 672, 672, 5, 2, 2),
    ],
    "MobileNet-V3-L, 224 px": [(8, 56, 72, 72, 3, 1, 1), (8, 28, 120, 120, 5, 1, 2)],
}
NETWORKS = ("resnet18", "alexnet", "mobilenet_v3_large", "efficientnet_b0")
SIZES = ((64, 32), (224, 8))
"""Pixels and images a batch."""


def torch_network(name: str, size: int):
    if name == "alexnet":
        return torch_step.AlexNet(1.0, "imagenet", size)
    return torch_models.timm.create_model(TIMM_MODELS[name], num_classes=0)


def convolution_sides(shape: tuple[int, ...], groups: int) -> dict[str, Callable]:
    """What each side does: the value, the kernel's gradient and, but for images, that of x."""
    batch, size, channels, features, k, stride, padding = shape
    rng, out = np.random.default_rng(0), (size + 2 * padding - k) // stride + 1
    x, kernel, gradient = (
        rng.normal(size=s).astype(np.float32)
        for s in ((batch, size, size, channels), (k, k, channels // groups, features), (batch, out, out, features))
    )

    def side(convolve):
        def run(x, kernel, gradient):
            out, pull = jax.vjp(convolve, x, kernel)
            of_x, of_kernel = pull(gradient)
            return (out, of_kernel) if channels == 3 else (out, of_kernel, of_x)  # XLA drops what is not returned

        arguments = [jnp.asarray(a) for a in (x, kernel, gradient)]
        compiled = jax.jit(run).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    how = {"stride": stride, "padding": padding, "groups": groups}
    sides = {
        "xla": side(lambda x, kernel: convolution._convolve(x, kernel, stride, padding, groups)),
        "ssl_kd": side(lambda x, kernel: convolution.convolve(x, kernel, **how)),
    }
    if torch:
        there = [torch.tensor(a.transpose(order)) for a, order in zip((x, kernel, gradient), ORDERS, strict=True)]
        tx, tkernel, tgradient = (a.contiguous(memory_format=torch.channels_last) for a in there)
        geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)

        def run():
            torch.conv2d(tx, tkernel, None, stride, padding, 1, groups)
            mask = [channels != 3, True, False]
            torch.ops.aten.convolution_backward(tgradient, tx, tkernel, None, *geometry, mask)

        sides["torch"] = run
    return sides


ORDERS = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""From NHWC, HWIO and NHWC to torch's."""


def network_sides(name: str, size: int, batch: int) -> dict[str, Callable]:
    """Value and gradients of the parameters of a network's mean squared feature, its batch norms in training mode."""
    images = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)
    network = MODELS[name]()
    variables = network.init(jax.random.key(0), images, norm="batch")

    def loss(params):
        out, moved = network.apply({**variables, "params": params}, images, norm="batch", mutable=["batch_stats"])
        return jnp.square(out.pooled).mean(), moved

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(variables["params"]).compile()
    sides: dict[str, Callable] = {"ssl_kd": lambda: jax.block_until_ready(compiled(variables["params"]))}
    if torch:
        for layout in (torch.contiguous_format, torch.channels_last):
            there = torch_network(name, size).to(memory_format=layout)
            x = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout)

            def run(there=there, x=x):
                there.zero_grad()
                there(x).square().mean().backward()

            sides[f"torch, {str(layout).removeprefix('torch.')}"] = run
    return sides


def cpu_seconds(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Of one call of each side, the least of the rounds, in which they take turns of 50 ms or one call."""
    fastest: dict[str, float] = {}
    calls: dict[str, int] = {}
    for name, side in sides.items():
        side()
        began = time.process_time()
        side()
        calls[name] = 1 + int(0.05 / (time.process_time() - began + 1e-6))
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.process_time()
            for _ in range(calls[name]):
                side()
            seconds = (time.process_time() - began) / calls[name]
            fastest[name] = min(seconds, fastest.get(name, seconds))
    return fastest


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return line(*head) + line(*["---"] * 2, *["---:"] * (len(head) - 2)) + "".join(line(*row) for row in rows) + "\n"


def ratio(seconds: dict[str, float], other: str) -> str:
    return f"{seconds[other] / seconds['ssl_kd']:.2f}" if other in seconds else "–"


def report(results: dict, record: dict) -> str:
    """The Markdown of the results."""
    convolutions, networks = [], []
    sides = ("xla", "ssl_kd", "torch")
    for r in results["convolutions"]:
        seconds = r["seconds"]
        rates = [f"{r['gflop'] / seconds[side]:.0f}" if side in seconds else "–" for side in sides]
        convolutions.append((r["where"], r["shape"], *rates, ratio(seconds, "xla"), ratio(seconds, "torch")))
    for r in results["networks"]:
        each = {side: 1e3 * seconds / r["batch"] for side, seconds in r["seconds"].items()}
        best = min((side for side in each if side != "ssl_kd"), key=each.__getitem__, default="")
        theirs = f"{each[best]:.2f}, {best.removeprefix('torch, ')}" if best else "–"
        images = f"{r['size']} px × {r['batch']}"
        networks.append((r["network"], images, f"{each['ssl_kd']:.2f}", theirs, ratio(each, best)))
    versions = [f"{name} {record['versions'][name]}" for name in ("jax", "jaxlib", "numpy")]
    versions += [f"torch {record['torch']}"] if record["torch"] else []
    return (
        "# Convolutions on one core\n\n"
        "GFLOP/s of forward and backward, float32; every product of the plain convolution counts, also those with\n"
        "padding and those that Winograd's algorithm saves.\n\n"
        + table(("of", "batch × size, in → out, kernel / stride", *sides, "÷ xla", "÷ torch"), convolutions)
        + "Forward and backward of whole networks, full width, ms an image; torch in the faster of its layouts.\n\n"
        + table(("network", "images", "ssl_kd", "torch", "ratio of rates"), networks)
        + f"`python {record['command']}` on one core of {record['cpu']}; {', '.join(versions)}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="only what has this text in its name")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix("")), help="without .json and .md")
    args = parser.parse_args()
    keep_freed_memory()  # as every launcher does; PyTorch has the benefit too
    results: dict[str, list] = {"convolutions": [], "networks": []}
    for where, shapes in (SHAPES | DEPTHWISE).items():
        for shape in shapes if args.only in where else ():
            groups = shape[2] if where in DEPTHWISE else 1
            batch, size, channels, features, k, stride, padding = shape
            gflop = 2e-9 * batch * ((size + 2 * padding - k) // stride + 1) ** 2 * k * k * channels / groups * features
            name = f"{batch} × {size}², {channels} → {features}, {k}×{k} / {stride}" + " depthwise" * (groups > 1)
            seconds = cpu_seconds(convolution_sides(shape, groups), args.rounds)
            gflop *= 2 if channels == 3 else 3
            results["convolutions"].append({"where": where, "shape": name, "gflop": gflop, "seconds": seconds})
            print(where, name, {side: round(gflop / s) for side, s in seconds.items()}, flush=True)
    for network, (size, batch) in itertools.product(NETWORKS, SIZES):
        if args.only in f"{network}, {size} px":
            seconds = cpu_seconds(network_sides(network, size, batch), args.rounds)
            results["networks"].append({"network": network, "size": size, "batch": batch, "seconds": seconds})
            print(network, size, {side: f"{1e3 * s / batch:.2f} ms" for side, s in seconds.items()}, flush=True)
    record = session() | {"cpu": cpu_name(), "torch": torch.__version__ if torch else None}
    write_json(Path(f"{args.out}.json"), record | results, "choose another --out")
    Path(f"{args.out}.md").write_text(report(results, record))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
