"""A tiny run with files: used by tests, and as a script that kills itself at a chosen point, or is one of several.

And the launchers, as a user runs them.

python tests/runs.py --workdir=DIR [--kill=POINT] [--method=NAME] [--teacher=SOURCE] [--sharding=…] [flags of
ssl_kd.processes]
"""

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
from absl import flags
from conftest import VARIANTS, tiny_config
from jax.sharding import AxisType

from ssl_kd import command, processes, train
from ssl_kd.checkpoint import Checkpoints
from ssl_kd.log import Metrics
from ssl_kd.run import Run, prepare
from ssl_kd.train import fit
from ssl_kd.workdir import write_json

ROOT = Path(__file__).parents[1]
ONE_DEVICE = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}


def launch(name: str, *arguments, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/NAME.py on one device."""
    env = {**os.environ, **ONE_DEVICE, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def config(variant: str = "rekd", **changes):
    """12 steps of 16 embedded images, a checkpoint every 3 steps."""
    method, fields = VARIANTS[variant]
    c = tiny_config(method, **fields)
    c.data.update(train="train[:96]", test="test[:40]")
    c.image_size, c.epochs, c.log_every = 28, 2.0, 1
    c.checkpoint.every_epochs, c.probe.every_epochs = 0.5, 1.0
    c.probe.update(linear=False, knn=(5,), batch_size=40)
    c.bn_groups = 2
    c.update_from_flattened_dict(changes)
    return c


def prepared(config, workdir: Path, **options) -> Run:
    """A run on one device: the loop does not care, and it compiles in half the time."""
    run = prepare(config, workdir, **options)
    run.mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    return run


def begun(run: Run) -> str:
    """Where a teacher comes from: a run that has saved its random weights."""
    write_json(run.workdir / "run.json", run.record)
    with closing(Checkpoints(run.workdir, keep=1)) as checkpoints:
        checkpoints.save(0, run.create_now())
        checkpoints.wait()
    return f"workdir:{run.workdir}"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(owner, name: str, call: int) -> None:
    """Kill the process at the call-th call of a method, before it does anything."""
    original, calls = getattr(owner, name), 0

    def replacement(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            die()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def die_after_save_began() -> None:
    original = Checkpoints.save

    def save(self, step, state):
        original(self, step, state)
        if step == 9:
            die()

    Checkpoints.save = save


KILLS = {
    "metrics of step 2": lambda: die_before(Metrics, "write", 2),
    "while step 9 is being written": die_after_save_began,
    "final probe": lambda: die_before(train.Judge, "final", 1),
}


def main() -> None:
    if KILL.value:
        KILLS[KILL.value]()
    workdir, together = Path(WORKDIR.value), jax.distributed.is_initialized()
    changes = {"sharding": SHARDING.value, "teacher.source": TEACHER.value}
    if together:  # every process reads its own rows
        changes["data.resident"] = "off"
    c = config(METHOD.value, **changes)
    fit(prepare(c, workdir) if together else prepared(c, workdir))


if __name__ == "__main__":
    KILL = flags.DEFINE_enum("kill", None, list(KILLS), "Where to die.")
    WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.")
    METHOD = flags.DEFINE_string("method", "rekd", "Of the tiny recipe.")
    TEACHER = flags.DEFINE_string("teacher", "init", "Where its weights come from.")
    SHARDING = flags.DEFINE_string("sharding", "replicated", "Of its state.")
    processes.define_flags()
    command.run(main)
