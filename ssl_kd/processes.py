"""Many processes as one: how they meet, agree on when to stop, and end together."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Generator

import jax
from absl import flags
from jax.experimental import multihost_utils

from ssl_kd.errors import UserError, reason
from ssl_kd.log import console

LAST_WORDS = 10
"""Seconds that jax is given beyond the time to meet in: its own end is an abort with a stack trace."""


def define_flags() -> None:
    """The arguments of `join` as flags of a launcher."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where no cluster is detected.")
    flags.DEFINE_integer("num_processes", None, "How many processes run this command; 1 = alone, even in a cluster.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer("initialization_timeout", 300, "Seconds to wait for the others to arrive.")
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead.")


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Meets the other processes, before any device is touched.

    Nothing needs to be said on TPU slices, under SLURM and Open MPI; elsewhere a process of which nothing is said is
    alone. One that the others do not reach in time ends with a sentence.

    Args:
      coordinator_address: 'HOST:PORT' of process 0.
      num_processes: how many run this command; 1 = alone, also where there is a cluster.
      process_id: which of them this is.
      initialization_timeout, heartbeat_timeout: seconds to wait for the others, and of silence that counts as death.

    Raises:
      UserError: for arguments that do not go together, or a cluster that does not say what it is.
    """
    if num_processes == 1:
        return
    said = [value is not None for value in (coordinator_address, num_processes, process_id)]
    if any(said) and not all(said):
        raise UserError("--coordinator_address, --num_processes and --process_id go together: give all three or none.")
    if coordinator_address is not None and not coordinator_address.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator_address={coordinator_address} must be HOST:PORT, as 10.0.0.1:1234.")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} must be at least 0 and below --num_processes={num_processes}.")
    with deadline(initialization_timeout):
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                cluster_detection_method="deactivate" if any(said) else None,
                initialization_timeout=initialization_timeout + LAST_WORDS,
                heartbeat_timeout_seconds=heartbeat_timeout,
            )
        except Exception as error:  # a cluster's metadata may be behind a network
            if isinstance(error, ValueError) and not any(said):  # there is no cluster here
                return
            raise UserError(
                f"the other processes cannot be met ({reason(error)}): give --num_processes=1 to train alone, or "
                "--coordinator_address, --num_processes and --process_id."
            ) from error
    console.quiet = jax.process_index() != 0


@contextlib.contextmanager
def deadline(seconds: float) -> Generator[None]:
    """Ends the process with one sentence if the block takes longer."""

    def give_up() -> None:
        print(
            f"error: not all processes of this run have met within {seconds:g} s: start the same command once for "
            "every process, see that all can reach the coordinator (process 0), or wait longer with "
            "--initialization_timeout=SECONDS.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def leave(status: int) -> None:
    """Exits with this status. Of several processes one that fails goes at once, without the farewell of an orderly end,
    in which the others, who wait for it in the middle of a step, will not join."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Interruption:
    """Turns SIGTERM and Ctrl-C into a wish the loop grants between steps; a second Ctrl-C stops at once.

    Of several processes one may be told; all learn of it and stop after the same step, by jax's preemption service.
    """

    def __init__(self):
        self.signal = 0
        self._together, self._asked = jax.process_count() > 1, 0

    def __enter__(self) -> "Interruption":
        # With several processes SIGTERM is the service's own: it took the signal over when they met.
        taken = (signal.SIGINT,) if self._together else (signal.SIGTERM, signal.SIGINT)
        self._previous = {s: signal.signal(s, self._receive) for s in taken}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._together:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no step will come to grant the wish

    def wanted(self) -> int:
        """The signal that asks to stop after this step, or 0. Every process asks once for every step."""
        if self._together:
            # Counted from 1: jax has processes that have not asked yet, as they compile, stop at 1. With the number of
            # the step a run that is resumed would never come by, and go on.
            self._asked += 1
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(self._asked) else 0
        return self.signal  # read once: what arrives later is granted after the next step

    def _receive(self, number: int, _frame) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        os.write(2, b"\nsaving before stopping ...\n")
