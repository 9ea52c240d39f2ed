"""Trains rows of methods × seeds under one protocol and writes the table: kNN, linear, relation precision, wall time.

    python benchmarks/compare.py embedded                          3 seeds, MoCo-v2 and ReKD
    python benchmarks/compare.py cifar10 --source=hf:DIRECTORY     2 seeds, every miner and teacher mode; 2 cores
    python benchmarks/compare.py methods --source=hf:DIRECTORY --teacher=file:efficientnet-lite0-57934424.pth
                                                                   1 seed, every method, ResNet-18 student; 2 cores
    python benchmarks/compare.py cifar10-full --source=hf:DIRECTORY    3 seeds, the full set; for an accelerator

Every run is the README's own command with a seed, in a process of its own, one after the other; finished runs are not
repeated and stopped ones resume. Results, with device, versions and commands, go to <protocol>.json and .md beside the
runs, after every one of them; at last to benchmarks/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

STUDENT = "--config.student.name=resnet18"
RESNET18 = [STUDENT, "--config.student.stem=small_s2"]
ONLINE_RESNET50 = ["--config.teacher.name=resnet50", "--config.teacher.stem=small_s2"]
LITE0 = ["--config.teacher.source={file}", "--config.teacher.name=tf_efficientnet_lite0", "--config.teacher.resize=64"]
AS_WIDE = "--config.student.dim=0"  # the student's embedding has the teacher's width
ALONE = ["--config.method.teacher=none", "--config.optim.groups.thead.paths=('student/thead','student/reduce')"]

PROTOCOLS: dict[str, dict[str, Any]] = {
    "embedded": {
        "preset": "",
        "seeds": 3,
        "rows": {"MoCo-v2": ("moco_v2_alexnet", []), "ReKD": ("rekd_alexnet", [])},
    },
    "cifar10": {
        "preset": ":cifar10",
        "seeds": 2,
        "rows": {
            "MoCo-v2": ("moco_v2_alexnet", []),
            "ReKD": ("rekd_alexnet", []),
            "ReKD, neighbour miner": ("rekd_alexnet", ["--config.method.miner=neighbour"]),
            "ReKD, soft miner": ("rekd_alexnet", ["--config.method.miner=soft"]),
            "ReKD, self as teacher": ("rekd_alexnet", ["--config.method.teacher=self"]),
            "teacher alone (MoCo-v2)": ("moco_v2_resnet18", ["--config.epochs=40"]),
            "ReKD, frozen teacher": ("rekd_alexnet", ["--config.teacher.source=workdir:{teacher}"]),
            "ReKD, frozen teacher, soft miner": (
                "rekd_alexnet",
                ["--config.teacher.source=workdir:{teacher}", "--config.method.miner=soft"],
            ),
        },
    },
    "methods": {
        "preset": ":cifar10",
        "seeds": 1,
        "set": ["epochs=8.0"],
        "rows": {
            "MoCo-v2": ("moco_v2_resnet18", []),
            "ReSSL": ("ressl_resnet50", [STUDENT]),
            "ReKD": ("rekd_alexnet", [*RESNET18, *ONLINE_RESNET50]),
            "ReKD, frozen teacher": ("rekd_alexnet", [*RESNET18, *LITE0]),
            "SEED": ("seed_resnet18", [*LITE0, AS_WIDE]),
            "DisCo": ("disco_resnet18", [*LITE0, AS_WIDE]),
            "CompRess": ("compress_alexnet", [*RESNET18, *LITE0]),
            "SimReg": ("simreg_resnet18", LITE0),
            "BINGO": ("bingo_resnet18", [*LITE0, AS_WIDE]),
            "ResNet-18 alone (MOKD)": ("mokd_resnet18_resnet50", ALONE),
            "ResNet-50 alone (MOKD)": ("mokd_resnet18_resnet50", [*ALONE, "--config.student.name=resnet50"]),
            "MOKD": ("mokd_resnet18_resnet50", []),
            "ViT-Ti alone (MOKD)": ("mokd_vit_tiny_vit_small", ["--config.method.teacher=none"]),
            "MOKD, ResNet-18 with ViT-Ti": ("mokd_resnet50_vit_small", []),
        },
        "others": dict.fromkeys(("MOKD", "MOKD, ResNet-18 with ViT-Ti"), "teacher_momentum"),
    },
    "cifar10-full": {
        "preset": ":cifar10",
        "seeds": 3,
        "set": [
            "data.train=train",
            "epochs=100.0",
            "batch_size=256",
            "compute_dtype=bfloat16",
            "method.queue=16384",
            "student.width=1.0",
        ],
        "rows": {
            "MoCo-v2": ("moco_v2_alexnet", []),
            "ReKD": ("rekd_alexnet", ["--config.teacher.width=1.0"]),
        },
    },
}


def workdir(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"


def train(protocol: dict, out: Path, name: str, seed: int, extra: list[str], file: str) -> dict:
    """Runs one cell and returns its results and what the last tenth of training showed."""
    recipe, options = protocol["rows"][name]
    where = workdir(out, name, seed)
    teacher = workdir(out, "teacher alone (MoCo-v2)", seed)
    command = [
        "launch/main.py",
        f"--config=configs/{recipe}.py{protocol['preset']}",
        f"--config.seed={seed}",
        f"--workdir={where}",
        *extra,
        *[option.format(teacher=teacher, file=file) for option in options],
    ]
    print("python", *command, flush=True)
    measure_memory([sys.executable, *command], where / "memory.json")
    results = json.loads((where / "results.json").read_text())
    results["peak_gib"] = json.loads((where / "memory.json").read_text())["peak_gib"]
    if other := protocol.get("others", {}).get(name):
        figures = where / f"{other}.json"
        evaluate = ["launch/evaluate.py", f"--workdir={where}", f"--network={other}", f"--json={figures}"]
        subprocess.run([sys.executable, *evaluate], cwd=ROOT, check=True)
        results["other"] = evaluated(json.loads(figures.read_text()))
    lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    precision = [m["relation_precision"] for m in lines if m.get("relation_precision", -1) >= 0]
    results["relation_precision"] = statistics.mean(precision[-max(1, len(precision) // 10) :]) if precision else None
    results["command"] = " ".join(["python", *command])
    results["session"] = json.loads((where / "run.json").read_text())["sessions"][-1]
    return results


def measure_memory(command: list[str], path: Path) -> None:
    """Runs a command to its end, and writes down the most host memory that it, or a run before it, held at once."""
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    peak = usage.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    before = json.loads(path.read_text())["peak_gib"] if path.exists() else 0.0
    path.write_text(json.dumps({"peak_gib": max(peak, before)}))


def evaluated(run: dict) -> dict:
    """The row of the trained network, which comes first."""
    return next(row for row in run.values() if isinstance(row, dict))


def spread(values: list[float], scale: float = 100) -> str:
    """mean ± standard deviation over the seeds."""
    mean = scale * statistics.mean(values)
    return f"{mean:.1f} ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def markdown(runs: dict[str, list[dict]]) -> str:
    lines = ["| features | 20-NN | linear | relation precision | minutes | GiB |", "|---|---|---|---|---|---|"]

    def add(name: str, rows: list[dict], *rest: str) -> None:
        accuracies = (spread([row[key] for row in rows]) for key in ("knn20", "linear"))
        lines.append(f"| {' | '.join([name, *accuracies, *rest])} |")

    first = next(iter(runs.values()))
    for baseline in ("raw pixels", "random weights"):
        add(baseline, [run[baseline] for run in first], "", "", "")
    for name, cell in runs.items():
        precision = [run["relation_precision"] for run in cell if run["relation_precision"] is not None]
        minutes, memory = ([run[key] / unit for run in cell] for key, unit in (("seconds", 60), ("peak_gib", 1)))
        costs = spread(minutes, 1), spread(memory, 1)
        add(name, [evaluated(run) for run in cell], spread(precision) if precision else "", *costs)
        if "other" in cell[0]:
            add(f"{name}, the other network", [run["other"] for run in cell], "", "", "")
    return "\n".join(lines) + "\n"


def write(runs: dict[str, list[dict]], target: Path) -> None:
    target.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--source", help="data.source, where the preset's is elsewhere")
    parser.add_argument("--teacher", default="", help="weights of the frozen teacher of methods, as file:PATH")
    parser.add_argument("--seeds", type=int, help="how many, from 0")
    parser.add_argument("--out", type=Path, help="where the runs live; default runs/compare-<protocol>")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="config override for every row")
    arguments = parser.parse_args()
    protocol = PROTOCOLS[arguments.protocol]
    out = (arguments.out or ROOT / "runs" / f"compare-{arguments.protocol}").absolute()
    extra = [f"--config.{item}" for item in (*protocol.get("set", ()), *arguments.set)]
    extra += [f"--config.data.source={arguments.source}"] if arguments.source else []
    runs: dict[str, list[dict]] = {name: [] for name in protocol["rows"]}
    for seed in range(arguments.seeds or protocol["seeds"]):
        for name in protocol["rows"]:
            runs[name].append(train(protocol, out, name, seed, extra, arguments.teacher))
            done = {name: cell for name, cell in runs.items() if cell}  # what is stopped leaves the rows that it made
            write(done, out / arguments.protocol)
    write(runs, ROOT / "benchmarks" / arguments.protocol)  # now: the later runs would call their tree changed
    print(markdown(runs))


if __name__ == "__main__":
    main()
