"""Probes any network of any checkpoint on any labelled set: kNN, linear probe, health.

python launch/evaluate.py --workdir=DIR [--network=student] [--step=N] [--source=hf:PATH --train=train --test=test]
                          [--json=FILE]
"""

from absl import flags

from ssl_kd import command
from ssl_kd.log import console
from ssl_kd.probes.judge import probe_network
from ssl_kd.report import accuracy_table

WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
NETWORK = flags.DEFINE_string("network", "", "Which network; default the method's evaluated one.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; default the newest.")
SOURCE = flags.DEFINE_string("source", "", "Data source; default the run's.")
TRAIN = flags.DEFINE_string("train", "", "Training split of the probe; default the run's.")
TEST = flags.DEFINE_string("test", "", "Test split; default the run's.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def main() -> None:
    command.write_figures(JSON.value, {})
    results = probe_network(
        WORKDIR.value, NETWORK.value, STEP.value, source=SOURCE.value, train=TRAIN.value, test=TEST.value
    )
    console.print(accuracy_table(results, f"{WORKDIR.value}: accuracy in %"))
    command.write_figures(JSON.value, results)


if __name__ == "__main__":
    command.run(main)
