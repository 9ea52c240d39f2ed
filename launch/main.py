"""Trains a recipe, or goes on where it stopped.

python launch/main.py --config=configs/rekd_alexnet.py[:PRESET] [--config.KEY=VALUE …] [--workdir=DIR] [--dry_run]
"""

from absl import flags

from ssl_kd import command, processes
from ssl_kd.report import estimate, summarise
from ssl_kd.run import prepare
from ssl_kd.train import fit
from ssl_kd.workdir import work_directory

CONFIG = command.define_config()
processes.define_flags()
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default runs/<config>-<preset>[-<overrides>].")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print parameters, memory and time, and stop.")


def main() -> None:
    workdir = work_directory(WORKDIR.value) if WORKDIR.value else command.default_workdir(CONFIG.value)
    run = prepare(CONFIG.value, workdir)
    if DRY_RUN.value:
        estimate(run)
    else:
        summarise(run, fit(run))


if __name__ == "__main__":
    command.run(main)
