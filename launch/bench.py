"""Times a recipe's step here, whole and in parts, names what limits it, and predicts the hours of the full run.

python launch/bench.py --config=configs/rekd_alexnet.py[:PRESET] [--config.KEY=VALUE …] [--seconds=30] [--json=FILE]

Images come from the recipe's source; --config.data.source=synthetic:64x10000 needs none (10 000 images of 64 px). A
frozen teacher may be left unnamed: a step takes as long with any weights.
"""

from pathlib import Path

from absl import flags

from ssl_kd import command
from ssl_kd.bench import bench
from ssl_kd.log import console
from ssl_kd.report import bench_table
from ssl_kd.run import prepare

CONFIG = command.define_config()
SECONDS = flags.DEFINE_float("seconds", 30.0, "For all timings together; compilation comes on top.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def main() -> None:
    run = prepare(CONFIG.value, Path("unused"), untrained=True)
    command.write_figures(JSON.value, {})
    figures = bench(run, SECONDS.value)
    console.print(bench_table(figures))
    command.write_figures(JSON.value, figures)


if __name__ == "__main__":
    command.run(main)
