"""Probes any network of any checkpoint on any labelled set: kNN, linear probe, health; or every layer linearly.

python launch/evaluate.py --workdir=DIR [--network=student] [--step=N] [--source=hf:PATH --train=train --test=test]
                          [--layers [--epochs=36]] [--json=FILE]
"""

from absl import flags

from ssl_kd import command
from ssl_kd.log import console
from ssl_kd.probes import layerwise
from ssl_kd.probes.judge import probe_layers, probe_network
from ssl_kd.report import accuracy_table, layer_table

WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
NETWORK = flags.DEFINE_string("network", "", "Which network; default the method's evaluated one.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; default the newest.")
SOURCE = flags.DEFINE_string("source", "", "Data source; default the run's.")
TRAIN = flags.DEFINE_string("train", "", "Training split of the probe; default the run's.")
TEST = flags.DEFINE_string("test", "", "Test split; default the run's.")
LAYERS = flags.DEFINE_bool("layers", False, "The layer-wise linear probe, as published for AlexNet, and nothing else.")
EPOCHS = flags.DEFINE_float("epochs", layerwise.EPOCHS, "Passes of --layers over the training images.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def main() -> None:
    command.write_figures(JSON.value, {})
    network, title = (WORKDIR.value, NETWORK.value, STEP.value), f"{WORKDIR.value}: accuracy in %"
    data = {"source": SOURCE.value, "train": TRAIN.value, "test": TEST.value}
    if LAYERS.value:
        results = probe_layers(*network, **data, epochs=EPOCHS.value)
        console.print(layer_table(results, title))
    else:
        results = probe_network(*network, **data)
        console.print(accuracy_table(results, title))
    command.write_figures(JSON.value, results)


if __name__ == "__main__":
    command.run(main)
