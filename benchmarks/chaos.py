"""Kills processes of a run at random times until it is done: it must end as one that nobody touched, bit for bit.

python benchmarks/chaos.py --json=benchmarks/chaos.json [--kills=20] [--seed=0] [-- launch/main.py --config=… …]
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from ssl_kd import command
from ssl_kd.checkpoint import Checkpoints, array_digest
from ssl_kd.errors import UserError
from ssl_kd.run import prepare
from ssl_kd.workdir import read_json

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
"""Death, a platform's warning, and a process that is there but no longer answers."""

HEARTBEAT = 10
"""Seconds of silence that the others take for death."""

ARRIVAL = 60
"""Seconds that they wait for one that was killed before it met them."""

PATIENCE = 300.0
"""Seconds within which a run must notice what was done to it."""

RUN = (
    "launch/main.py",
    "--config=configs/rekd_alexnet.py:smoke",
    "--config.data.train=train[:512]",
    "--config.batch_size=16",
    "--config.bn_groups=1",
    "--config.epochs=8",
    "--config.checkpoint.every_epochs=0.5",
    "--config.probe.every_epochs=0",
    "--config.probe.linear=False",
)
"""256 steps, a checkpoint every 16."""


@contextlib.contextmanager
def together(
    line: Sequence[str], processes: int, log: Path, env: Mapping[str, str]
) -> Generator[list[subprocess.Popen]]:
    """A command as several processes that meet each other; what they say goes to the log. None outlives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    meet += [f"--heartbeat_timeout={HEARTBEAT}", f"--initialization_timeout={ARRIVAL}"]
    with log.open("ab") as said:
        running = [
            subprocess.Popen(
                [sys.executable, *line, *meet, f"--process_id={i}"],
                env={**os.environ, **env},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            for i in range(processes)
        ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def over(running: Sequence[subprocess.Popen], within: float) -> bool:
    """Whether, within so many seconds, all processes end well or one does not: then the others are of no use."""
    end = time.monotonic() + within
    while True:
        ended = [process.poll() for process in running]
        if None not in ended or any(ended):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.02)


def survive(
    line: Sequence[str],
    *,
    kills: int,
    seed: int,
    longest: float,
    log: Path,
    processes: int = 2,
    env: Mapping[str, str] | None = None,
    sign: Path | None = None,
) -> list[dict[str, Any]]:
    """Runs a command again and again until it ends well, and hurts one process of each of its first `kills` attempts.

    Args:
      longest: an attempt is hurt at a random time before so many seconds.
      sign: a file; that time counts from when an attempt has written it, else from its start.

    Returns:
      What was done: 'seconds', 'signal', 'process', and the 'status' of all processes after it.

    Raises:
      RuntimeError: for an attempt that fails without having been hurt, or does not notice that it was.
    """
    draw, done = random.Random(seed), list[dict[str, Any]]()

    def written() -> int:
        return sign.stat().st_mtime_ns if sign is not None and sign.exists() else 0

    while True:
        before = written()
        hurt: dict[str, Any] | None = None
        with together(line, processes, log, env or {}) as running:
            if len(done) < kills:
                while sign is not None and written() == before and not over(running, 0.0):
                    time.sleep(0.02)
                what = SIGNALS[len(done) % len(SIGNALS)]
                seconds, who = draw.uniform(0, longest), draw.randrange(processes)
                if not over(running, seconds):
                    running[who].send_signal(what)
                    hurt = {"seconds": round(seconds, 2), "signal": what.name, "process": who}
                    done.append(hurt)
            while hurt is None and not over(running, 60.0):
                pass
            for process in running:
                stopped = hurt and hurt["signal"] == "SIGSTOP" and process is running[hurt["process"]]
                if not (stopped or over([process], PATIENCE)):
                    raise RuntimeError(f"one process does not notice {hurt or 'that another has failed'}: see {log}")
            status = [process.poll() for process in running]
        if status == [0] * processes:
            return done
        if hurt is None:
            raise RuntimeError(f"unhurt it ended with {status}: see {log}")
        hurt["status"] = status


def end_of(workdir: Path) -> str:
    """Digest of the whole state that the last step of a run left."""
    record = read_json(workdir / "run.json")
    run = prepare(ConfigDict(record["config"], convert_dict=True), workdir)
    return array_digest(jax.device_get(Checkpoints(workdir).restore(run.abstract)))


def main(line: list[str]) -> None:
    command.write_figures(JSON.value, {})
    line = line or list(RUN)
    with tempfile.TemporaryDirectory() as directory:
        found: dict[str, dict[str, Any]] = {}
        for name, kills in {"left alone": 0, "hurt": KILLS.value}.items():
            workdir, log = Path(directory) / name, Path(directory) / f"{name}.log"
            began = time.monotonic()
            try:
                done = survive(
                    [*line, f"--workdir={workdir}"],
                    kills=kills,
                    seed=SEED.value,
                    longest=LONGEST.value,
                    log=log,
                    processes=PROCESSES.value,
                )
            except RuntimeError as error:
                print(log.read_text()[-4000:], file=sys.stderr)
                raise UserError(str(error)) from error
            seconds = time.monotonic() - began
            found[name] = {"seconds": round(seconds, 1), "done": done, "end": end_of(workdir)}
            print(f"{name}: {len(done)} times, {seconds:.0f} s, ends as {found[name]['end'][:12]}", flush=True)
    same = found["left alone"]["end"] == found["hurt"]["end"]
    print("The same, bit for bit." if same else "NOT the same.")
    command.write_figures(JSON.value, {"run": line, "processes": PROCESSES.value, "same": same, **found})
    if not same:
        raise UserError("a run that was killed ended with other numbers than one that was left alone.")


if __name__ == "__main__":
    JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
    KILLS = flags.DEFINE_integer("kills", 20, "How often a process is hurt.")
    PROCESSES = flags.DEFINE_integer("processes", 2, "Processes of the run.")
    LONGEST = flags.DEFINE_float("longest", 30.0, "An attempt is hurt before so many seconds, drawn at random.")
    SEED = flags.DEFINE_integer("seed", 0, "Of to whom it is done, and when.")
    command.run(main, words=True)
