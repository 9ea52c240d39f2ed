"""Runs a step of a run again, and says what in it is not finite, where first, and of which images.

python launch/replay.py --workdir=DIR [--step=N]

A run that stops at a loss or gradient that is not finite keeps that step in DIR/replay/N: the state from before it and
what it was given. A step before which there is a checkpoint can be run again too. The report goes beside the capture.
"""

from absl import flags

from ssl_kd import command, processes
from ssl_kd.replay.capture import find, reopen, replay
from ssl_kd.replay.report import tell, write
from ssl_kd.workdir import work_directory

processes.define_flags()
WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Which step, from 1; default the last one captured.", lower_bound=1)


def main() -> None:
    found = find(work_directory(WORKDIR.value), STEP.value)
    run = reopen(found)
    report = replay(run, found)
    write(run, found, report)
    tell(found, report)


if __name__ == "__main__":
    command.run(main)
