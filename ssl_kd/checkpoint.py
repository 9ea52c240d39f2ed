"""Checkpoints (orbax) and the record of a run: what it was configured as, and with what it was run."""

import errno
import hashlib
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ssl_kd.digests import DIGESTS, file_digests, inspect
from ssl_kd.errors import UserError, reason
from ssl_kd.log import console
from ssl_kd.state import State
from ssl_kd.workdir import append, is_local, write_json

# Orbax reports every save at INFO, and prints pages of errors that it raises as well.
logging.getLogger("absl").setLevel(logging.WARNING)
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)

UNWRITABLE = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)))
"""What the system says of a place that takes no more; tensorstore raises it as a ValueError with a long text."""


class Checkpoints:
    """The newest states of a work directory, written in the background and renamed into place when whole.

    All processes call the methods together, on a directory they share.

    Args:
      keep: how many to keep when writing; None only reads, and touches nothing.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        self.directory = (workdir.absolute() if is_local(workdir) else workdir) / "checkpoints"
        if keep is None and not self.directory.is_dir():
            raise UserError(f"there is no checkpoint in {self.directory}: train first, or check the path.")
        policies, context = ocp.training.preservation_policies, ocp.Context()
        context.array.saving.use_compression = False  # of 8 % of the bytes, for 7 times the work
        try:
            self._orbax = ocp.training.Checkpointer(
                self.directory,
                context=context,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.LatestN(keep) if keep else None,
                cleanup_tmp_directories=keep is not None,
            )
        except OSError as error:
            raise UserError(f"cannot write to {self.directory} ({error}): choose another --workdir.") from error
        # Orbax asks jax for a preemption from a thread of process 0, with the step of the save: to jax that process is
        # then back at that step, and the processes may not stop together.
        self._orbax._manager.reached_preemption = lambda step: False
        self._writes = keep is not None
        self._background = ThreadPoolExecutor(1)
        self._sealing: Future[None] | None = None

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint that was written whole; what became of it since is for `restore` to find."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def restore(self, abstract: State, step: int | None = None) -> State:
        """Loads the newest undamaged or a given checkpoint into the shapes and shardings of `abstract`.

        Damaged ones are named on the console, and moved out of the way of a run that is going to save those steps
        again, into checkpoints-damaged.

        Raises:
          UserError: if there is none, or it cannot be read as this state.
        """
        steps = [checkpoint.step for checkpoint in self._orbax.checkpoints]
        if step is None and not steps:
            raise UserError(f"there is no checkpoint in {self.directory}: train first, or check the path.")
        if step is not None and step not in steps:
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}: there are {steps}.")
        damaged: dict[int, str] = {}
        for candidate in reversed(steps) if step is None else [step]:
            found = ("", "") if jax.process_index() else inspect(self.directory / str(candidate))
            damage, doubt = map(agreed, found)
            if doubt:
                console.print(f"Checkpoint {candidate} cannot be checked for damage: {doubt}.")
            if not damage:
                state, failure = self._load(candidate, abstract)
                if state is not None:
                    self._put_aside(damaged, candidate)
                    return state
                if not doubt:
                    raise UserError(
                        f"checkpoint {self.directory / str(candidate)} is undamaged, but cannot be read as this run's "
                        f"state ({failure}): use the version of ssl_kd that wrote it, which run.json names."
                    )
                damage = failure
            damaged[candidate] = damage
        newest, why = next(iter(damaged.items()))
        others = f", nor can those before it ({', '.join(map(str, steps[-2::-1]))})" if len(damaged) > 1 else ""
        raise UserError(
            f"checkpoint {self.directory / str(newest)} cannot be read ({why}){others}: bring back a copy, use the "
            "version of ssl_kd that wrote it, or choose another --workdir."
        )

    def _load(self, step: int, abstract: State) -> tuple[State | None, str]:
        """The state, or why some process could not load it."""
        state, failure = None, ""
        try:
            state = self._orbax.load(step, abstract)
        except Exception as error:  # orbax, tensorstore and json raise many kinds for a damaged file
            while isinstance(deeper := error.__cause__ or error.__context__, Exception):
                error = deeper  # the first of them says most
            failure = reason(error)[:200]
        failure = agreed(failure)
        return (None if failure else state), failure

    def _put_aside(self, damaged: dict[int, str], loaded: int) -> None:
        """Says which checkpoints were passed over for that of step `loaded`, and moves them if this run writes."""
        shelf = self.directory.with_name("checkpoints-damaged")
        for step, why in damaged.items():
            kept = f"; it is kept in {shelf}" if self._writes else ""
            said = f"Checkpoint {step} is damaged ({why}): that of step {loaded} is used instead{kept}."
            console.print(said)
            if self._writes and jax.process_index() == 0:
                target = shelf / str(step)
                while target.exists():  # it was damaged before
                    target = target.with_name(f"{target.name}-again")
                shelf.mkdir(exist_ok=True)
                append(shelf / "why.txt", f"{said}\n")  # and an object store has no empty folder to move to
                (self.directory / str(step)).rename(target)
        if damaged and self._writes:
            agreed("")  # the others wait until they are moved
            self._orbax.reload()

    def save(self, step: int, state: State) -> None:
        """Starts writing a checkpoint, unless there is one of this step: a state is a function of its step.

        Raises:
          UserError: if this or the last write met a full or unwritable disk.
        """
        if self.latest != step:
            self._wait(lambda: self._start(step, state))

    def _start(self, step: int, state: State) -> None:
        self._finish()
        response = self._orbax.save_async(step, state, force=True, overwrite=False)
        if response is not None:
            self._sealing = self._background.submit(self._seal, step, response)

    def _seal(self, step: int, response: ocp.AsyncResponse[bool]) -> None:
        """In the background: when a checkpoint is whole, puts down what its files are."""
        response.result()
        if jax.process_index() == 0:
            folder = self.directory / str(step)
            write_json(folder / DIGESTS, file_digests(folder))

    def _finish(self) -> None:
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()
        self._orbax.wait()

    def wait(self) -> None:
        """Returns when everything saved is on disk. Raises UserError as `save`."""
        self._wait(self._finish)

    def close(self) -> None:
        try:
            self._wait(self._finish)
        finally:
            self._background.shutdown()
            self._wait(self._orbax.close)

    def _wait(self, action: Callable[[], None]) -> None:
        try:
            action()
        except UserError:
            raise
        except Exception as error:
            said = next((text for text in UNWRITABLE if text in str(error)), "")
            if not said and not isinstance(error, OSError):
                raise
            raise UserError(
                f"cannot write a checkpoint to {self.directory} ({said or reason(error)}): free space or choose "
                "another --workdir; the checkpoints before it are whole."
            ) from error


def agreed(text: str) -> str:
    """What the first process with anything to say says, on all of them; 200 bytes of it. They wait for each other."""
    if jax.process_count() == 1:
        return text
    mine = np.frombuffer(text.encode()[:200].ljust(200), np.uint8)
    said = (bytes(row).decode(errors="ignore").strip() for row in multihost_utils.process_allgather(mine))
    return next(filter(None, said), "")


def array_digest(tree: Any) -> str:
    """SHA-256 over paths, shapes and bytes of a pytree of arrays: which weights these are."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def session() -> dict[str, Any]:
    """Who runs: time, command, versions, device and git revision."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        git = ""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(sys.argv),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "devices": [str(d.device_kind) for d in jax.devices()],
        "git": git or "unknown",
    }


def check_same_run(record: dict[str, Any] | None, run: dict[str, Any], workdir: Path) -> None:
    """Refuses to continue a run whose mathematics or frozen teacher differ, naming the keys."""
    try:
        old, new = record["identity"], run["identity"]  # type: ignore[index]
        old.keys()
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{workdir} holds a run without a readable run.json: choose another --workdir.") from error
    differing = [
        f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with other settings: {'; '.join(differing)}. "
            "Use the same settings to continue it, or another --workdir."
        )
