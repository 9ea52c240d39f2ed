"""ssl_kd's step beside the same step in plain PyTorch: timed in turn in one run, so that a drifting machine hits both.

    pip install -r benchmarks/requirements-peer.txt
    python benchmarks/peer.py --config=configs/rekd_alexnet.py [--config.KEY=VALUE …] [--seconds=60] [--json=FILE]
    python benchmarks/peer.py --config=configs/disco_resnet18.py

Online ReKD with the prototype miner and DisCo, on AlexNet and ResNets; the ratio is images/s of ssl_kd over PyTorch's.
Both sides must have the same parameters, forwards and, within a percent, FLOPs; what else differs is said in
torch_step.py. A frozen teacher may be left unnamed: a step takes as long with any weights.
"""

import json
import statistics
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ssl_kd import command
from ssl_kd.bench import flops_of, seconds_a_call, stepper
from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.models import backbone_calls
from ssl_kd.models.convolution import plain_convolutions
from ssl_kd.recipe import flatten
from ssl_kd.run import Run, prepare
from ssl_kd.step import TrainStep

CONFIG = command.define_config()
SECONDS = flags.DEFINE_float("seconds", 60.0, "For all timings together.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that both are timed, in turn.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")

NETWORKS = ("alexnet", "resnet18", "resnet34", "resnet50")
WRITTEN_FOR: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        "method.name": ("rekd", "disco"),
        "optim.name": ("sgd",),
        "optim.momentum": (0.9,),
        "optim.decay": ("all",),
        "optim.accum": (1,),
        "optim.clip": (0.0,),
        "augment.solarize": (0.0,),
        "student.name": NETWORKS,
        "teacher.name": NETWORKS,
        "student.head": ("mlp",),
        "teacher.head": ("mlp",),
        "remat": (False,),
    },
    "rekd": {
        "method.teacher": ("online",),
        "method.miner": ("prototype",),
        "method.knowledge": ("relation",),
        "method.balanced": (False,),
        "method.teacher_weight": (1.0,),
        "method.prototype_momentum": (0.99,),
    },
    "disco": {
        "method.distance": (0.0,),
        "method.angle": (0.0,),
        "method.teacher_norm": ("running",),
    },
}
"""Method, or '' for all → keys and the values that torch_step.py knows."""

FLOPS_APART = 0.01
"""Share by which the sides' FLOPs after augmentation may differ: small products may be written as sums."""


class Peer:
    """The PyTorch program in a process of its own, idle while it is not asked."""

    def __init__(self, run: Run):
        c, method = run.config, run.recipe.method
        roles = {"trained": method.trained, "frozen": method.frozen}
        networks = {role: c[role].to_dict() | {"stem": run.recipe.specs[role].stem} for role in sum(roles.values(), ())}
        sizes = roles | {"networks": networks, "method": c.method.to_dict(), "augment": c.augment.to_dict()}
        sizes |= {"image_size": c.image_size, "canvas": run.train.canvas[0], "images": min(len(run.train), 10_000)}
        sizes |= {"batch_size": c.batch_size, "lr": c.optim.lr, "weight_decay": c.optim.weight_decay}
        sizes |= {"bfloat16": c.compute_dtype == "bfloat16"}
        script = Path(__file__).with_name("torch_step.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.about = self.ask(json.dumps(sizes))

    def ask(self, line: str):
        self.stdin.write(line + "\n")
        self.stdin.flush()
        answer = self.stdout.readline()
        if not answer:
            raise UserError("the PyTorch step failed, as said above: pip install -r benchmarks/requirements-peer.txt.")
        return json.loads(answer)

    def seconds(self, budget: float) -> float:
        return self.ask(str(budget))

    def close(self) -> None:
        self.stdin.close()
        self.process.wait()


def work(run: Run) -> dict[str, Any]:
    """Of our step, what torch_step.py counts of its own; FLOPs as they are without the CPU's cheaper convolutions."""
    step, rows = TrainStep(run.recipe, run.mesh), np.arange(run.config.batch_size, dtype=np.int32)
    state, frozen = jax.eval_shape(run.create), run.frozen()
    images = Images.whole(np.zeros((len(rows), *run.train.canvas, 3), np.uint8))
    views = jax.eval_shape(lambda images: step.views(jnp.int32(0), {"image": images}, jnp.asarray(rows)), images)

    def learn(state, frozen, views):
        context = step.context(state, {"index": rows, "label": rows}, 0)
        return jax.value_and_grad(step.loss, has_aux=True)(state.trained, state, frozen, views, context)

    with plain_convolutions(), backbone_calls() as calls:
        flops = flops_of(jax.make_jaxpr(learn)(state, frozen, views))
    params = step.variables(state.trained, state, frozen)["params"]
    parameters = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    return {"parameters": parameters, "forwards": dict(Counter(call.network for call in calls)), "flops": flops}


def require_same_work(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for kind in ("parameters", "forwards"):
        if ours[kind] != theirs[kind]:
            raise UserError(f"{kind} are {ours[kind]} here and {theirs[kind]} in torch_step.py: make them alike.")
    if abs(theirs["flops"] / ours["flops"] - 1) > FLOPS_APART:
        raise UserError(f"a step is {ours['flops']:.4g} FLOPs here and {theirs['flops']:.4g} in torch_step.py.")


def main() -> None:
    run = prepare(CONFIG.value, Path("unused"), untrained=True)
    values = flatten(run.config)
    for key, known in (WRITTEN_FOR[""] | WRITTEN_FOR.get(run.config.method.name, {})).items():
        if values.get(key) not in known:
            raise UserError(f"{key}={values.get(key)!r}, but the PyTorch step is written for {known}: set it so.")

    command.write_figures(JSON.value, {})
    with closing(Peer(run)) as peer:
        ours, theirs = work(run), peer.about.pop("work")
        require_same_work(ours, theirs)
        step, _ = stepper(run).compile(run.mesh)
        share = SECONDS.value / ROUNDS.value / 2
        rounds = [(seconds_a_call(step, share), peer.seconds(share)) for _ in range(ROUNDS.value)]
    rates = [run.config.batch_size / statistics.median(side) for side in zip(*rounds, strict=True)]
    ratios = sorted(other / own for own, other in rounds)
    low, ratio, high = ratios[0], statistics.median(ratios), ratios[-1]
    print("ssl_kd {:,.0f} images/s · PyTorch {:,.0f} images/s".format(*rates))
    print(f"ratio {ratio:.2f} (from {low:.2f} to {high:.2f} over {len(rounds)} rounds)")
    print(f"{ours['flops'] / 1e9:,.1f} and {theirs['flops'] / 1e9:,.1f} GFLOP a step")
    pairs = [dict(zip(("ssl_kd_seconds", "torch_seconds"), pair, strict=True)) for pair in rounds]
    sides = {"ssl_kd_work": ours, "torch_work": theirs, "torch": peer.about}
    figures = {"ratio": ratio, "rounds": pairs, "batch_size": run.config.batch_size, **sides}
    command.write_figures(JSON.value, figures)


if __name__ == "__main__":
    command.run(main)
