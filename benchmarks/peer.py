"""ssl_kd's step beside the same step in plain PyTorch: timed in turn in one run, so that a drifting machine hits both.

    pip install -r benchmarks/requirements-peer.txt
    python benchmarks/peer.py --config=configs/rekd_alexnet.py [--config.KEY=VALUE …] [--seconds=60] [--json=FILE]

Online ReKD with the prototype miner on AlexNet and ResNets; the ratio is images/s of ssl_kd over PyTorch's.
"""

import json
import statistics
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from absl import flags

from ssl_kd import command
from ssl_kd.bench import seconds_a_call
from ssl_kd.checkpoint import session, write_json
from ssl_kd.errors import UserError
from ssl_kd.train import Run, prepare

CONFIG = command.define_config()
SECONDS = flags.DEFINE_float("seconds", 60.0, "For all timings together.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that both are timed, in turn.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


class Peer:
    """The PyTorch program in a process of its own, idle while it is not asked."""

    def __init__(self, run: Run):
        c = run.config
        if (c.method.name, c.method.teacher, c.method.miner) != ("rekd", "online", "prototype"):
            raise UserError("the PyTorch step is online ReKD with the prototype miner: choose a recipe of that.")
        sizes = {key: c.method[key] for key in ("queue", "prototypes", "temperature", "momentum")}
        specs = {role: run.recipe.specs[role] for role in ("student", "teacher")}
        sizes |= {role: {"name": s.name, "width": s.width, "stem": s.stem, "dim": s.dim} for role, s in specs.items()}
        sizes |= {"image_size": c.image_size, "canvas": run.train.image_shape[0], "images": min(len(run.train), 10_000)}
        sizes |= {"batch_size": c.batch_size, "lr": c.optim.lr, "weight_decay": c.optim.weight_decay}
        sizes |= {"augment": c.augment.to_dict()}
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
    with closing(Peer(run)) as peer:
        loader, frozen, state, train_step = run.loader(), run.frozen(), run.create_now(), run.train_step()
        with closing(loader.batches(0, 1)) as batches:
            batch = next(batches)

        def step():
            nonlocal state
            state, metrics = train_step(state, frozen, batch, loader.data)
            return metrics

        share = SECONDS.value / ROUNDS.value / 2
        rounds = [(seconds_a_call(step, share), peer.seconds(share)) for _ in range(ROUNDS.value)]
        ours, theirs = (run.config.batch_size / statistics.median(side) for side in zip(*rounds, strict=True))
        ratios = sorted(other / own for own, other in rounds)
        print(f"ssl_kd {ours:,.0f} images/s · PyTorch {theirs:,.0f} images/s")
        low, ratio, high = ratios[0], statistics.median(ratios), ratios[-1]
        print(f"ratio {ratio:.2f} (from {low:.2f} to {high:.2f} over {len(rounds)} rounds)")
        if JSON.value:
            figures = {"seconds": rounds, "ratio": ratio, "torch": peer.versions}
            write_json(Path(JSON.value), figures | {"session": session()})


if __name__ == "__main__":
    command.run(main)
