"""fit(): the loop, in a stated order."""

import ctypes
import math
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any, NoReturn

import jax

from ssl_kd.checkpoint import Checkpoints, check_same_run, session
from ssl_kd.data.loader import Loader
from ssl_kd.data.quarantine import keep_lists, read_list
from ssl_kd.errors import UserError
from ssl_kd.log import Bar, Metrics, console
from ssl_kd.probes.judge import Judge, headline
from ssl_kd.processes import Interruption
from ssl_kd.replay.capture import capture
from ssl_kd.run import Run
from ssl_kd.state import State
from ssl_kd.workdir import read_json, write_json

IN_FLIGHT = 3
"""Steps the host may be ahead of the device: enough to hide dispatch, few enough to stop soon."""


def fit(run: Run) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint if there is one, and returns the final results.

    In this order: the run's record is compared or written; state restored or created; bags mined and the teacher's
    features computed, where the run needs them; then for every step: batch, compiled step, and, when due, metrics,
    quick probe, checkpoint. The order is part of what makes a resumed run equal an uninterrupted one, bit for bit: a
    probe reads the state, and only the step changes it.

    Raises:
      UserError: for a work directory of another run, a damaged checkpoint, a full disk, or a diverged run.
      SystemExit: with 128 + the signal's number after SIGTERM or Ctrl-C; the state is saved first.
    """
    config, total = run.config, run.recipe.total_steps
    record_path, results_path = run.workdir / "run.json", run.workdir / "results.json"
    record, finished = read_json(record_path), read_json(results_path)
    with closing(Checkpoints(run.workdir, config.checkpoint.keep)) as checkpoints:
        if checkpoints.latest is not None or finished is not None:
            check_same_run(record, run.record, run.workdir)
        if finished is not None:
            console.print(f"This run is done; nothing to do. Delete {run.workdir} to train it anew.")
            return finished
        write_json(record_path, {**run.record, "sessions": [*(record or {}).get("sessions", []), session()]})
        begun = checkpoints.latest is not None
        keep_lists((run.train.quarantine, run.test.quarantine), run.workdir, begun=begun)
        if checkpoints.latest is None:
            state = run.create_now()
        else:
            state = checkpoints.restore(run.abstract)
            console.print(f"Resuming at step {int(state.step)} of {total}.")
            if (skipped := int(state.nonfinite)) > config.max_nonfinite:
                raise UserError(f"this run has skipped {skipped} steps: allow that, --config.max_nonfinite={skipped}.")
        start, judge = int(state.step), Judge(run)
        with closing(Metrics(run.workdir, start)) as metrics:
            if start < total:
                loader = run.loader(run.bags(), run.cache())
                with Interruption() as interruption:
                    state = loop(run, loader, state, start, checkpoints, metrics, judge, interruption)
            checkpoints.wait()
            console.print(f"Trained in {metrics.seconds / 60:.1f} min.")
            results = judge.final(state) | {"step": total, "seconds": metrics.seconds}
            results["quarantined"] = len(read_list(run.workdir))
            write_json(results_path, results)
            metrics.write(total, {f"final/{k}": v for k, v in results[judge.role].items()})
    return results


def loop(
    run: Run,
    loader: Loader,
    state: State,
    start: int,
    checkpoints: Checkpoints,
    metrics: Metrics,
    judge: Judge,
    interruption: Interruption,
) -> State:
    """The steps from `start` to the end; the host only sends row numbers and reads metrics that are already there."""
    c, total, per_epoch = run.config, run.recipe.total_steps, run.recipe.steps_per_epoch
    save_every = max(1, round(c.checkpoint.every_epochs * per_epoch))
    probe_every = max(1, round(c.probe.every_epochs * per_epoch)) if c.probe.every_epochs else 0
    train_step, frozen = run.train_step(), run.frozen()
    probed, paused, began = "", 0.0, math.nan
    flying: deque = deque()

    def land(bar: Bar) -> None:
        """Reads the oldest metrics in flight, which the device has finished or is about to."""
        nonlocal began
        step, values = flying.popleft()
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        if values["nonfinite"] > c.max_nonfinite:
            diverged(run, loader, state, values, checkpoints)
        if math.isnan(began):
            return_memory()
        now = time.monotonic() - paused
        began = now if math.isnan(began) else began  # the first step's compilation is no speed
        speed = (step - start - 1) * c.batch_size / (now - began) if now > began else math.nan
        left = (total - step) * c.batch_size / speed
        bar.update(step, images_per_second=speed, seconds_left=left, loss=values["loss"], probed=probed)
        if step % c.log_every == 0 or step == total:
            metrics.write(step, {"epoch": step / per_epoch, **values, "images_per_second": speed})

    with Bar(total, start) as bar, closing(loader.batches(start, total)) as batches:
        for step, batch in enumerate(batches, start + 1):
            state, values = train_step(state, frozen, batch, loader.data)
            flying.append((step, values))
            stop = interruption.wanted()
            save_due = stop or step == total or step % save_every == 0
            probe_due = probe_every and step % probe_every == 0 and step < total
            while flying and (len(flying) > IN_FLIGHT or save_due or probe_due):
                land(bar)
            if save_due:
                metrics.flush()
                checkpoints.save(step, state)
            if stop:
                checkpoints.wait()
                name = signal.Signals(stop).name
                console.print(f"Stopped by {name}; saved at step {step}. The same command goes on from there.")
                raise SystemExit(128 + stop)
            if probe_due:
                pause = time.monotonic()
                found = judge.quick(state)
                metrics.write(step, {f"probe/{name}": value for name, value in found.items()})
                probed = headline(found)
                paused += time.monotonic() - pause
    return state


def return_memory() -> None:
    """Gives the system what was freed. glibc keeps it, and compiling a step takes more memory than training needs."""
    with suppress(AttributeError, TypeError):  # other systems' libraries cannot
        ctypes.CDLL(None).malloc_trim(0)


def diverged(
    run: Run, loader: Loader, state: State, metrics: Mapping[str, float], checkpoints: Checkpoints
) -> NoReturn:
    """Saves the state from before the first refused step, captures that step, and stops.

    The refusal that halted the state is forgotten, so that the same command tries the step again.
    """
    state = state.replace(nonfinite=state.nonfinite - 1)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    directory = capture(run, state, loader, metrics)
    raise UserError(
        f"the loss or a gradient of step {int(state.step) + 1} is not finite: {directory} keeps that step, and "
        f"`python launch/replay.py --workdir={run.workdir}` says what in it was not; skip such steps with "
        "--config.max_nonfinite=N, or lower optim.lr in another --workdir."
    )
