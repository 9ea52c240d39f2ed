"""A tiny run with files: used by tests, and as a script that kills itself at a chosen point.

python tests/runs.py WORKDIR POINT, where POINT is a key of KILLS or 'none'.
"""

import os
import signal
import sys
from pathlib import Path

import jax
from conftest import tiny_config
from jax.sharding import AxisType

from ssl_kd import train
from ssl_kd.checkpoint import Checkpoints
from ssl_kd.log import Metrics
from ssl_kd.run import Run, prepare
from ssl_kd.train import fit


def config(**changes):
    """12 steps of 16 embedded images, a checkpoint every 3 steps."""
    c = tiny_config("rekd")
    c.data.update(train="train[:96]", test="test[:40]")
    c.image_size, c.epochs, c.log_every = 28, 2.0, 1
    c.checkpoint.every_epochs, c.probe.every_epochs = 0.5, 1.0
    c.probe.update(linear=False, knn=(5,), batch_size=40)
    c.bn_groups = 2
    c.update_from_flattened_dict(changes)
    return c


def prepared(config, workdir: Path) -> Run:
    """A run on one device: the loop does not care, and it compiles in half the time."""
    run = prepare(config, workdir)
    run.mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    return run


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
    "before the save of step 6": lambda: die_before(Checkpoints, "save", 2),
    "while step 9 is being written": die_after_save_began,
    "final probe": lambda: die_before(train.Judge, "final", 1),
}

if __name__ == "__main__":
    workdir, point = sys.argv[1:]
    if point in KILLS:
        KILLS[point]()
    fit(prepared(config(), Path(workdir)))
