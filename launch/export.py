"""Writes a trained network as safetensors under the names of timm, torchvision, detectron2 or ssl_kd.

python launch/export.py --workdir=DIR --out=FILE.safetensors [--names=timm] [--network=student] [--step=N]

timm's names load with timm.create_model(NAME, num_classes=0).load_state_dict(safetensors.torch.load_file(FILE)).
"""

from pathlib import Path

from absl import flags

from ssl_kd import command
from ssl_kd.weights.commands import export

WORKDIR = flags.DEFINE_string("workdir", None, "The run, or file:PATH of weights to rename.", required=True)
OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
FORMAT = flags.DEFINE_enum("format", "safetensors", ["safetensors"], "Kind of file.")
NAMES = flags.DEFINE_enum("names", "timm", ["timm", "torchvision", "detectron2", "ssl_kd"], "Whose names of weights.")
NETWORK = flags.DEFINE_string("network", "", "Which network; default the method's evaluated one.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; default the newest.")


def main() -> None:
    export(WORKDIR.value, Path(OUT.value), NAMES.value, NETWORK.value, STEP.value)


if __name__ == "__main__":
    command.run(main)
