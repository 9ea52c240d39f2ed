"""What the launchers share: command line to config, a user's mistake to one sentence, and jax set up for a run."""

import contextlib
import ctypes
import inspect
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from ssl_kd import processes
from ssl_kd.checkpoint import session
from ssl_kd.errors import UserError, reason
from ssl_kd.recipe import WEIGHT_SOURCES, digest, flatten, identity
from ssl_kd.trained import FROM_WORKDIR
from ssl_kd.workdir import write_json

CUDA_INSTALL = 'pip install -U "jax[cuda12]>=0.10,<0.11"'


def run(main: Callable[..., None], *, words: bool = False) -> None:
    """Parses the command line and runs a launcher; a UserError becomes its sentence on stderr and exit status 2.

    With `words`, `main` is given what is no flag.
    """
    try:
        rest = parse(words=words)
        set_up_process()
        if "coordinator_address" in flags.FLAGS:
            met: list[Any] = [flags.FLAGS[name].value for name in inspect.signature(processes.join).parameters]
            processes.join(*met)
        warn_of_idle_gpu()
        main(*[rest] if words else [])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        processes.leave(2)
    except KeyboardInterrupt:
        processes.leave(130)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(
                f"error: {reason(error)}: a device has failed, or another process of the run has gone, whose output "
                "says why; the same command, for every process, goes on from the newest checkpoint.",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        processes.leave(1)


def define_config() -> flags.FlagHolder:
    """--config=FILE[:PRESET] and --config.KEY=VALUE."""
    return config_flags.DEFINE_config_file(
        "config", None, "Recipe, as configs/rekd_alexnet.py or …py:cifar10; keys: configs/base.py."
    )


def network_source(workdir: str | None, weights: str | None) -> str:
    """The source, as `load_source` takes it, of what --workdir or --weights names; UserError unless it is one."""
    if bool(workdir) == bool(weights):
        raise UserError("give either --workdir=DIR, a run, or --weights=file:PATH, weights of others.")
    return weights or f"{FROM_WORKDIR}{workdir}"


def write_figures(path: str | None, figures: Mapping[str, Any]) -> None:
    """Writes what was measured, and by what, to the file of a --json flag, if there is one.

    Call it once with nothing before long work: minutes of it must not end at a file that cannot be written.
    """
    if path:
        write_json(Path(path), {**figures, "session": session()}, "choose another --json")


def default_workdir(config: ConfigDict) -> Path:
    """runs/<config>[-<preset>][-<digest of the overrides>]; overrides that change no number do not count."""
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    counted = {*identity(config), *WEIGHT_SOURCES}
    overrides = {key: str(value) for key, value in overrides.items() if key in counted}
    parts = [config.name, config.preset, digest(overrides) if overrides else ""]
    return Path("runs") / "-".join(part for part in parts if part)


def parse(*, words: bool = False) -> list[str]:
    """Reads sys.argv into the flags and returns the `words` that are none; UserError for whatever is wrong with it."""
    app.define_help_flags()
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if "config" in flags.FLAGS and flags.FLAGS.config is None:
            raise UserError("--config is missing: name a recipe, as --config=configs/rekd_alexnet.py.")
        if "config" in flags.FLAGS:
            flatten(flags.FLAGS.config)  # a recipe that failed to load says so when it is first read
    except AttributeError as error:
        key = str(error).strip("\"'\\").split("\\n")[0].strip("\"'\\")
        given = [arg for arg in sys.argv if f".{key}=" in arg or arg.endswith(f".{key}")]
        if not given:  # raised by the recipe itself
            raise
        raise UserError(f"{given[0]} sets an unknown key: configs/base.py lists them all.") from error
    except (flags.Error, KeyError, TypeError, ValueError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A recipe's own error comes as a traceback in text, a missing file as a list of attempts: the cause is last.
        raise UserError(lines[-1 if len(lines) > 1 else 0].split("Error: ", 1)[-1]) from error
    if rest and not words:
        raise UserError(f"{rest[0]!r} is not a flag: write overrides as --config.key=value.")
    return rest


def keep_freed_memory() -> None:
    """Lets glibc reuse what is freed; by default large blocks go back to the system and return page by page.

    XLA's CPU backend allocates a step's temporaries anew in every step. The README's first command on 2 cores: 75 000
    page faults a step become none, and 0.61 s a step 0.40 s. Threads share one arena, or each would keep its own.
    """
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # names of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
            mallopt(parameter, value)


def set_up_process() -> None:
    """Keeps freed memory and, between runs, compiled programs; touches no device."""
    if not shutil.which("nvidia-smi") and not list(Path("/dev").glob("accel*")):
        keep_freed_memory()
    kept = {
        "jax_compilation_cache_dir": str(Path.home() / ".cache" / "ssl_kd" / "xla"),
        # Small programs too: compiling them was a fifth of a run of four steps and its probes, started again.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for option, value in kept.items():
        if option.upper() not in os.environ:
            jax.config.update(option, value)


def warn_of_idle_gpu() -> None:
    """Says so if there is a GPU that jax does not use."""
    if shutil.which("nvidia-smi") and jax.default_backend() == "cpu":
        print(f"warning: an NVIDIA GPU is visible but jax runs on the CPU: {CUDA_INSTALL}", file=sys.stderr)
