"""Checkpoints (orbax) and the record of a run: what it was configured as, and with what it was run."""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from ssl_kd.errors import UserError, reason
from ssl_kd.state import State

logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every save at INFO


class Checkpoints:
    """The newest states of a work directory, written in the background and renamed into place when whole.

    Args:
      keep: how many to keep when writing; None only reads, and touches nothing.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        self.directory = workdir.absolute() / "checkpoints"
        if keep is None and not self.directory.is_dir():
            raise UserError(f"there is no checkpoint in {self.directory}: train first, or check the path.")
        policies = ocp.training.preservation_policies
        try:
            self._orbax = ocp.training.Checkpointer(
                self.directory,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.LatestN(keep) if keep else None,
                cleanup_tmp_directories=keep is not None,
            )
        except OSError as error:
            raise UserError(f"cannot write to {self.directory} ({error}): choose another --workdir.") from error

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def restore(self, abstract: State, step: int | None = None) -> State:
        """Loads the newest or a given checkpoint into the shapes and shardings of `abstract`.

        Raises:
          UserError: if there is none, or it cannot be read as this state.
        """
        step = self.latest if step is None else step
        if step is None:
            raise UserError(f"there is no checkpoint in {self.directory}: train first, or check the path.")
        steps = [checkpoint.step for checkpoint in self._orbax.checkpoints]
        if step not in steps:
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}: there are {steps}.")
        try:
            return self._orbax.load(step, abstract)
        except Exception as error:  # orbax, tensorstore and json raise many kinds for a damaged file
            raise UserError(
                f"checkpoint {self.directory / str(step)} cannot be read ({reason(error)[:200]}): "
                "if it is damaged, delete that folder to go on from the one before it; if it was written by another "
                "version, use that one."
            ) from error

    def save(self, step: int, state: State) -> None:
        """Starts writing a checkpoint, unless there is one of this step: a state is a function of its step.

        Raises:
          UserError: if this or the last write met a full or unwritable disk.
        """
        if self.latest == step:
            return
        self._wait(lambda: self._orbax.save_async(step, state, force=True, overwrite=False))

    def wait(self) -> None:
        """Returns when everything saved is on disk. Raises UserError as `save`."""
        self._wait(self._orbax.wait)

    def close(self) -> None:
        self._wait(self._orbax.close)

    def _wait(self, action) -> None:
        try:
            action()
        except Exception as error:
            # tensorstore reports a full disk as a ValueError whose text holds the system's.
            text = str(error)
            if isinstance(error, OSError) or "No space left" in text or "ENOSPC" in text or "Permission denied" in text:
                raise UserError(
                    f"cannot write a checkpoint to {self.directory} ({text.strip().splitlines()[-1][:200]}): "
                    "free space or choose another --workdir; the checkpoints before it are whole."
                ) from error
            raise


def write_json(path: Path, value: Any, remedy: str = "choose another --workdir or free space") -> None:
    """Writes a file whole or not at all. Raises UserError, with the remedy, where that fails."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): {remedy}.") from error


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote; None if there is no such file. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): restore the file or choose another --workdir.") from error


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
