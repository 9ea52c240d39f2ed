"""ssl_kd's step beside the same step in plain PyTorch: timed in turn in one run, so that a drifting machine hits both.

    pip install -r benchmarks/requirements-peer.txt
    python benchmarks/peer.py --config=configs/rekd_alexnet.py [--config.KEY=VALUE …] [--seconds=60] [--json=FILE]

Online ReKD with the prototype miner on AlexNet and ResNets; the ratio is images/s of ssl_kd over PyTorch's. What
differs between the two is said in torch_step.py.
"""

import json
import statistics
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from absl import flags

from ssl_kd import command
from ssl_kd.bench import seconds_a_call, stepper
from ssl_kd.checkpoint import session, write_json
from ssl_kd.errors import UserError
from ssl_kd.recipe import flatten
from ssl_kd.train import Run, prepare

CONFIG = command.define_config()
SECONDS = flags.DEFINE_float("seconds", 60.0, "For all timings together.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that both are timed, in turn.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")

WRITTEN_FOR = {
    "method.name": ("rekd",),
    "method.teacher": ("online",),
    "method.miner": ("prototype",),
    "method.knowledge": ("relation",),
    "method.balanced": (False,),
    "method.teacher_weight": (1.0,),
    "method.prototype_momentum": (0.99,),
    "optim.name": ("sgd",),
    "optim.momentum": (0.9,),
    "optim.decay": ("all",),
    "optim.accum": (1,),
    "augment.solarize": (0.0,),
    "student.head_hidden": (0,),
    "teacher.head_hidden": (0,),
    "student.name": ("alexnet", "resnet18", "resnet34", "resnet50"),
    "teacher.name": ("alexnet", "resnet18", "resnet34", "resnet50"),
    "remat": (False,),
}
"""Keys and the values that torch_step.py knows."""


class Peer:
    """The PyTorch program in a process of its own, idle while it is not asked."""

    def __init__(self, run: Run):
        c = run.config
        sizes = {key: c.method[key] for key in ("queue", "prototypes", "temperature", "momentum")}
        specs = {role: run.recipe.specs[role] for role in ("student", "teacher")}
        sizes |= {role: {"name": s.name, "width": s.width, "stem": s.stem, "dim": s.dim} for role, s in specs.items()}
        sizes |= {"image_size": c.image_size, "canvas": run.train.image_shape[0], "images": min(len(run.train), 10_000)}
        sizes |= {"batch_size": c.batch_size, "lr": c.optim.lr, "weight_decay": c.optim.weight_decay}
        sizes |= {"augment": c.augment.to_dict(), "bfloat16": c.compute_dtype == "bfloat16"}
        script = Path(__file__).with_name("torch_step.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self.ask(json.dumps(sizes))

    def ask(self, line: str):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError("the PyTorch step failed, as said above: pip install -r benchmarks/requirements-peer.txt.")
        return json.loads(answer)

    def seconds(self, budget: float) -> float:
        return self.ask(str(budget))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    run = prepare(CONFIG.value, Path("unused"))
    values = flatten(run.config)
    for key, known in WRITTEN_FOR.items():
        if values.get(key) not in known:
            raise UserError(f"{key}={values.get(key)!r}, but the PyTorch step is written for {known}: set it so.")

    def write(figures):
        if JSON.value:
            write_json(Path(JSON.value), figures | {"session": session()}, "choose another --json")

    write({})
    with closing(Peer(run)) as peer:
        step, _ = stepper(run).compile(run.mesh)
        share = SECONDS.value / ROUNDS.value / 2
        rounds = [(seconds_a_call(step, share), peer.seconds(share)) for _ in range(ROUNDS.value)]
        ours, theirs = (run.config.batch_size / statistics.median(side) for side in zip(*rounds, strict=True))
        ratios = sorted(other / own for own, other in rounds)
        low, ratio, high = ratios[0], statistics.median(ratios), ratios[-1]
        print(f"ssl_kd {ours:,.0f} images/s · PyTorch {theirs:,.0f} images/s")
        print(f"ratio {ratio:.2f} (from {low:.2f} to {high:.2f} over {len(rounds)} rounds)")
        names = ("ssl_kd_seconds", "torch_seconds")
        pairs = [dict(zip(names, pair, strict=True)) for pair in rounds]
        write({"ratio": ratio, "rounds": pairs, "batch_size": run.config.batch_size, "torch": peer.versions})


if __name__ == "__main__":
    command.run(main)
