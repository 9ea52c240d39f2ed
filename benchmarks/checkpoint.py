"""Checkpoints of a ResNet-50 run while it trains: how long saving halts the steps, and how long restoring takes.

    python benchmarks/checkpoint.py [--saves=3] [--interval=60] [--json=FILE]

The state is that of configs/moco_v2_resnet50.py:imagenet, momentum network and queue of 65 536 included. Its images are
few and small, which the state does not depend on: short steps show more of what a save does to them.
"""

import os
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import jax
from absl import flags

from configs import moco_v2_resnet50
from ssl_kd import command
from ssl_kd.checkpoint import Checkpoints
from ssl_kd.digests import DIGESTS, inspect
from ssl_kd.log import console
from ssl_kd.run import prepare

SAVES = flags.DEFINE_integer("saves", 3, "Checkpoints to write while training.", lower_bound=1)
INTERVAL = flags.DEFINE_float("interval", 60.0, "Seconds from one to the next.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def forget(folder: Path) -> None:
    """Has the system drop its copies of these files in memory, so that they are read from the disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    command.write_figures(JSON.value, {})
    config = moco_v2_resnet50.get_config("imagenet")
    config.data.update(source="embedded", train="train[:1024]", test="test[:64]", workers=0)
    config.image_size, config.batch_size, config.bn_groups, config.compute_dtype = 32, 8, 1, "float32"
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(config, Path(folder))
        state, frozen, loader, train_step = run.create_now(), run.frozen(), run.loader(run.bags()), run.train_step()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        asked: list[float] = []
        halted: list[float] = []
        behind: list[float] = []
        steps: dict[str, list[float]] = {"while saving": [], "else": []}
        console.print(f"A state of {size / 1e6:.0f} MB; compiling the step …")
        with closing(Checkpoints(run.workdir, keep=2)) as checkpoints, closing(loader.batches(0, 10**9)) as batches:
            saved, due = 0, float("inf")
            for step, batch in enumerate(batches, 1):
                whole = not saved or (checkpoints.directory / str(saved) / DIGESTS).exists()
                if whole and len(behind) < len(halted):
                    behind.append(time.perf_counter() - asked[-1])
                began = time.perf_counter()
                state, values = train_step(state, frozen, batch, loader.data)
                jax.block_until_ready(values)
                now = time.perf_counter()
                if step <= 2:
                    due = now + INTERVAL.value / 2
                    continue
                steps["else" if whole else "while saving"].append(now - began)
                if now >= due and len(halted) == SAVES.value:
                    break
                if now >= due:
                    asked.append(now)
                    saved, due = step, due + INTERVAL.value
                    checkpoints.save(step, state)
                    halted.append(time.perf_counter() - now)
                    console.print(f"step {step}: saving halted the steps for {halted[-1]:.2f} s")
        newest = run.workdir / "checkpoints" / str(saved)
        sizes = {str(path.relative_to(newest)): path.stat().st_size for path in newest.rglob("*") if path.is_file()}
        restores = {}
        for name in ("from disk", "from memory"):
            if name == "from disk":
                forget(newest)
            began = time.perf_counter()
            with closing(Checkpoints(run.workdir, keep=2)) as checkpoints:
                jax.block_until_ready(checkpoints.restore(shapes))
            restores[name] = time.perf_counter() - began
        began = time.perf_counter()
        assert inspect(newest) == ("", "")
        checked = time.perf_counter() - began
    figures = {
        "recipe": "moco_v2_resnet50:imagenet, 8 images of 32 px",
        "device": f"{run.mesh.size} × {jax.devices()[0].device_kind}",
        "state_bytes": size,
        "checkpoint_bytes": sum(sizes.values()),
        "checkpoint_files": len(sizes),
        "load_average": os.getloadavg()[0],  # others at work on the same cores: times are upper bounds
        "interval_seconds": INTERVAL.value,
        "save_halts_steps_seconds": halted,
        "save_halts_steps_share": max(halted) / INTERVAL.value,
        "save_to_digest_seconds": behind,
        "step_seconds": {name: statistics.median(values) for name, values in steps.items() if values},
        "steps": {name: len(values) for name, values in steps.items()},
        "restore_seconds": restores,
        "of_which_check_seconds": checked,
    }
    console.print(figures)
    command.write_figures(JSON.value, figures)


if __name__ == "__main__":
    command.run(main)
