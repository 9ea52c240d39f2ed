"""Writes a trained network as safetensors under the names of timm, torchvision, detectron2 or ssl_kd.

python launch/export.py --workdir=DIR --out=FILE.safetensors [--names=timm] [--network=student] [--step=N]
python launch/export.py --weights=file:PATH --out=FILE.safetensors [--names=timm] [--model=NAME]

timm's names load with timm.create_model(NAME, num_classes=0).load_state_dict(safetensors.torch.load_file(FILE)).
"""

from pathlib import Path

from absl import flags

from ssl_kd import command
from ssl_kd.weights.commands import export

WORKDIR = flags.DEFINE_string("workdir", None, "The run.")
NETWORK = flags.DEFINE_string("network", "", "Which network of the run; default the method's evaluated one.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; default the newest.")
WEIGHTS = flags.DEFINE_string("weights", None, "Weights to rename instead of a run: file:PATH or hf:….")
MODEL = flags.DEFINE_string("model", "", "Key of MODELS, where the weights fit several.")
OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
FORMAT = flags.DEFINE_enum("format", "safetensors", ["safetensors"], "Kind of file.")
NAMES = flags.DEFINE_enum("names", "timm", ["timm", "torchvision", "detectron2", "ssl_kd"], "Whose names of weights.")


def main() -> None:
    source = command.network_source(WORKDIR.value, WEIGHTS.value)
    export(source, Path(OUT.value), NAMES.value, MODEL.value, NETWORK.value, STEP.value)


if __name__ == "__main__":
    command.run(main)
