"""Probes any network of any run or file on any set: kNN and linear probe where it has labels, and what needs none
(neighbours shared by two views, signs of collapse); or every layer linearly.

python launch/evaluate.py --workdir=DIR [--network=student] [--step=N] [--source=hf:PATH --train=train --test=test]
                          [--layers [--epochs=36]] [--json=FILE]
python launch/evaluate.py --weights=file:PATH|hf:OWNER/REPOSITORY/FILE [--model=NAME] [--source=… as above]

Weights of others see images as they were trained to: cropped, resized and normalised as their file or layout says.
"""

from absl import flags
from ml_collections import ConfigDict

from configs import base
from ssl_kd import command, processes
from ssl_kd.log import console
from ssl_kd.probes import layerwise
from ssl_kd.probes.judge import probe_layers, probe_network
from ssl_kd.report import layer_table, probe_table
from ssl_kd.trained import RunNetwork, TrainedNetwork, load_source

processes.define_flags()
WORKDIR = flags.DEFINE_string("workdir", None, "The run.")
NETWORK = flags.DEFINE_string("network", "", "Which network of the run; default the method's evaluated one.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; default the newest.")
WEIGHTS = flags.DEFINE_string("weights", None, "Weights of others instead of a run: file:PATH or hf:….")
MODEL = flags.DEFINE_string("model", "", "Key of MODELS, where the weights fit several.")
SOURCE = flags.DEFINE_string("source", "", "Data source; default the run's, for weights of others 'embedded'.")
TRAIN = flags.DEFINE_string("train", "", "Training split of the probe; default the run's, else 'train'.")
TEST = flags.DEFINE_string("test", "", "Test split; default the run's, else 'test'.")
LAYERS = flags.DEFINE_bool("layers", False, "The layer-wise linear probe, as published for AlexNet, and nothing else.")
EPOCHS = flags.DEFINE_float("epochs", layerwise.EPOCHS, "Passes of --layers over the training images.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def main() -> None:
    network = command.network_source(WORKDIR.value, WEIGHTS.value)
    command.write_figures(JSON.value, {})
    found = load_source(network, MODEL.value, NETWORK.value, STEP.value)
    config, title = config_of(found), network.removeprefix("workdir:")
    data = {"source": SOURCE.value, "train": TRAIN.value, "test": TEST.value}
    if LAYERS.value:
        results = probe_layers(found, config, **data, epochs=EPOCHS.value)
        console.print(layer_table(results, title))
    else:
        results = probe_network(found, config, **data)
        console.print(probe_table(results, title))
    command.write_figures(JSON.value, results)


def config_of(found: TrainedNetwork) -> ConfigDict:
    """Data and settings of the probes: the run's, or the defaults for images as large as weights of others take."""
    if isinstance(found, RunNetwork):
        return found.config
    config = base.get_config()
    config.image_size = found.image_size
    return config


if __name__ == "__main__":
    command.run(main)
