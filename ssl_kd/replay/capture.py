"""A step whose loss or gradients were not finite: kept whole, and run again to see what was not, where first, of whom.

A capture is replay/STEP/ in the work directory of its run: capture.json, which says what failed, on what, seeing which
images; and, as in a work directory, run.json and checkpoints/, which hold the state from before the step. It is a copy
of its own, some hundred MB, because the run may go on and keeps its newest checkpoints only. Replays are put beside it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from ssl_kd.checkpoint import Checkpoints, array_digest, check_same_run, session
from ssl_kd.data.bags import mates
from ssl_kd.data.loader import Loader
from ssl_kd.errors import UserError
from ssl_kd.mesh import once
from ssl_kd.replay.witness import Extent, Witness
from ssl_kd.run import Run, prepare
from ssl_kd.state import State
from ssl_kd.workdir import read_json, write_json

LARGEST = 12
"""Images that a report names for the length of their embeddings."""

NOT_OF_THE_STEP = ("step", "seconds", "epoch", "images_per_second")
"""What a line of metrics.jsonl has beside a step's own metrics."""


def capture(run: Run, state: State, loader: Loader, metrics: Mapping[str, float]) -> Path:
    """Keeps all that a step is a function of, and returns where. All processes call this together.

    Args:
      state: from before the step. If its capture is there already, it stays: a state is a function of its step.
      metrics: of the step.

    Raises:
      UserError: if the disk is full.
    """
    step = int(state.step) + 1
    directory = run.workdir / "replay" / str(step)
    with closing(Checkpoints(directory, keep=1)) as checkpoints:
        checkpoints.save(step - 1, state)
        checkpoints.wait()
    _, index = batch_of(loader, step)
    if jax.process_index() == 0:
        now = session()
        write_json(directory / "run.json", {**run.record, "sessions": [now]})
        found = {
            "step": step,
            "metrics": written(metrics),
            "seed": run.config.seed,
            "compute_dtype": run.config.compute_dtype,
            "processes": jax.process_count(),
            "session": now,
            "pixels": pixels(run, index),
            "images": [named(run, place, number) for place, number in enumerate(index)],
        }
        write_json(directory / "capture.json", found)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("captured")  # what ends one process ends all
    return directory


@dataclasses.dataclass(frozen=True)
class Replayable:
    """A step that can be run again.

    Attributes:
      workdir: of its run.
      step: its number, from 1.
      source: the directory with run.json and the checkpoint from before the step: of the capture, or the run.
      metrics: what was recorded of it, as `written` or as metrics.jsonl has it; {} if nothing was.
      pixels: digest of its images, as `pixels` has it; '' if nobody knows.
      session: in which it was recorded; {} if nobody knows.
    """

    workdir: Path
    step: int
    source: Path
    metrics: Mapping[str, float | str | None]
    pixels: str = ""
    session: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Of the report."""
        return self.workdir / "replay" / str(self.step)


def find(workdir: Path, step: int | None = None) -> Replayable:
    """A step of a run that was captured, or before which there is a checkpoint; None: the last one captured.

    Raises:
      UserError: if there is no such step.
    """
    captured = numbers(workdir / "replay", "capture.json")
    possible = sorted({number + 1 for number in numbers(workdir / "checkpoints")} | set(captured))
    if not possible:
        raise UserError(f"{workdir} holds no captured step and no checkpoint: check the path of the run.")
    if step is None and not captured:
        raise UserError(f"no step of {workdir} was captured: name one to run again, --step=N with N of {possible}.")
    step = captured[-1] if step is None else step
    if step in captured:
        source = workdir / "replay" / str(step)
        record = read_json(source / "capture.json")
        try:
            return Replayable(workdir, step, source, record["metrics"], record["pixels"], record["session"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{source / 'capture.json'} is damaged: have the step captured anew.") from error
    if step in possible:
        return Replayable(workdir, step, workdir, logged(workdir, step))
    raise UserError(
        f"step {step} of {workdir} cannot be run again, for the state from before it is not kept: choose one of "
        f"{possible}."
    )


def reopen(found: Replayable) -> Run:
    """The run of a step, as it was recorded, with its data and given weights on the devices that are here now.

    Raises:
      UserError: if any of that is missing, or is not what it was.
    """
    record = read_json(found.source / "run.json")
    if record is None:
        raise UserError(f"{found.source} holds no run (no run.json): check the path.")
    try:
        run = prepare(ConfigDict(record["config"], convert_dict=True), found.workdir)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{found.source / 'run.json'} is not of this version of ssl_kd ({error}): use the version its 'git' names."
        ) from error
    check_same_run(record, run.record, found.source)
    return run


def replay(run: Run, found: Replayable) -> dict[str, Any]:
    """Runs the step again. All processes call this together.

    Nothing of the run is written, but for bags and a teacher's features that the step needs and that are gone.

    Returns:
      step, source, session, recorded_session: what was run again, from where, and on what, then and now.
      metrics, recorded: of the step, now and then; witnessed: of the step as it is compiled to be looked at, by which
        all that follows goes.
      differing: what is not as it was recorded, bit for bit: names of metrics, and 'pixels' for those of the images.
      float32: the metrics with every network computing in float32; None where they do so anyway.
      networks: network → parameters, statistics, gradients, updates → largest absolute value, how many are not finite.
      outputs: of every module, in order of execution, the same two numbers.
      gradients_not_finite: paths of arrays, in the order in which the backward pass meets them.
      pushed_not_finite: names of what was to go into the memory.
      embeddings_not_finite: how many of the images have one of no finite length, of `images`.
      views_not_finite: images of which a view is not; longest: those that are embedded furthest from zero.
    """
    with closing(Checkpoints(found.source)) as checkpoints:
        state = checkpoints.restore(run.abstract, found.step - 1)
    bags = run.bags()
    batch, index = batch_of(loader := run.loader(bags, run.cache()), found.step)
    inputs = state, run.frozen(), batch, loader.data

    def look(dtype: Any = None) -> dict[str, Any]:
        specs = {n: dataclasses.replace(spec, dtype=dtype or spec.dtype) for n, spec in run.recipe.specs.items()}
        witness = Witness(dataclasses.replace(run.recipe, specs=specs), run.mesh)
        compiled = jax.jit(witness.look, out_shardings=run.replicated, compiler_options=once())
        return jax.device_get(compiled(*inputs))

    seen = look()
    in_float32 = None if run.config.compute_dtype == "float32" else look(jnp.float32)["metrics"]
    _, metrics = run.train_step()(*inputs)  # the last, for it consumes the state
    now = written(jax.device_get(metrics))
    images = [named(run, place, number) for place, number in enumerate(index)]
    if run.bag_size:
        for image, number in zip(images, mates(bags, index, run.config.seed, found.step - 1), strict=True):
            image["mate"] = int(number)
    for image in images:
        place = image["place"]
        image["views_not_finite"] = [name for name, finite in seen["views"].items() if not finite[place]]
        image["lengths"] = written({role: lengths[place] for role, lengths in seen["lengths"].items()})
    differing = [name for name, value in found.metrics.items() if not same(value, now.get(name))]
    if found.pixels and found.pixels != pixels(run, index):
        differing.append("pixels")
    return {
        "step": found.step,
        "source": str(found.source),
        "session": session(),
        "recorded_session": dict(found.session),
        "metrics": now,
        "witnessed": written(seen["metrics"]),
        "recorded": dict(found.metrics),
        "differing": differing,
        "float32": in_float32 and written(in_float32),
        "networks": networks(seen),
        "outputs": [{"name": e.name, **reach([e])} for e in seen["outputs"]],
        "gradients_not_finite": met_by_the_backward_pass(seen),
        "pushed_not_finite": [e.name for e in seen["pushed"] if e.nonfinite.any()],
        "images": len(images),
        "embeddings_not_finite": sum(longest(image) == math.inf for image in images),
        "views_not_finite": [image for image in images if image["views_not_finite"]],
        "longest": sorted(images, key=longest, reverse=True)[:LARGEST],
    }


def batch_of(loader: Loader, step: int) -> tuple[dict[str, Any], np.ndarray]:
    """The batch of a step, and the numbers of all its images in the set, stand-ins included: int32 (B,)."""
    with closing(loader.batches(step - 1, step)) as batches:
        batch = next(batches)
    index = batch["index"]
    if jax.process_count() > 1:
        index = multihost_utils.process_allgather(index, tiled=True)
    return batch, np.asarray(index)


def named(run: Run, place: int, number: int) -> dict[str, Any]:
    """An image of a batch: its place there, its number in the set, and the file or row that it is."""
    return {"place": place, "index": int(number), "where": run.train.reader.where(int(run.train.rows[number]))}


def pixels(run: Run, index: np.ndarray) -> str:
    """The digest of these images as they are read."""
    images = run.train[index]
    return array_digest((images.pixels, images.size))


def written(values: Mapping[str, Any]) -> dict[str, float | str]:
    """Scalars as JSON can hold them, exactly: what is not finite is a word, 'nan', 'inf' or '-inf'."""
    floats = {name: float(value) for name, value in values.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in floats.items()}


def same(recorded: float | str | None, now: float | str | None) -> bool:
    """Whether a metric is what was recorded; metrics.jsonl has null for all that is not finite."""
    return isinstance(now, str) if recorded is None else recorded == now


def longest(image: Mapping[str, Any]) -> float:
    """The length of an image's longest embedding; infinite if it is not finite."""
    return max(math.inf if isinstance(length, str) else length for length in image["lengths"].values())


def reach(extents: list[Extent]) -> dict[str, float | int]:
    """Of several arrays together."""
    largest = max((float(e.largest.max()) for e in extents), default=0.0)
    return {"largest": largest, "nonfinite": sum(int(e.nonfinite.sum()) for e in extents)}


def networks(seen: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | int]]]:
    """Network → kind of array → reach, of what `Witness.look` saw."""
    table: dict[str, dict[str, list[Extent]]] = {}
    for kind in ("parameters", "statistics", "gradients", "updates"):
        for e in seen[kind]:
            table.setdefault(e.name.split("/")[0], {}).setdefault(kind, []).append(e)
    return {role: {kind: reach(arrays) for kind, arrays in kinds.items()} for role, kinds in table.items()}


def met_by_the_backward_pass(seen: Mapping[str, Any]) -> list[str]:
    """Paths of the gradients that are not finite, those of the modules executed last first."""
    executed = {e.name.split(" ")[0]: number for number, e in enumerate(seen["outputs"])}

    def when(path: str) -> int:
        """Of the innermost module that is known: one within a recomputed block is not."""
        while path and path not in executed:
            path = path.rpartition("/")[0]
        return executed.get(path, -1)

    return sorted((e.name for e in seen["gradients"] if e.nonfinite.any()), key=when, reverse=True)


def numbers(directory: Path, holding: str = "") -> list[int]:
    """The subdirectories that are named by a number, and hold that file."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / holding).exists())


def logged(workdir: Path, step: int) -> dict[str, float | None]:
    """What metrics.jsonl has of a step itself; {} if nothing."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed([json.loads(line) for line in lines if line.endswith("}")]):  # the last one may be half
        if line["step"] == step and "loss" in line:
            return {name: value for name, value in line.items() if name not in NOT_OF_THE_STEP}
    return {}
