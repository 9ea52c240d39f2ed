"""Ten thousand steps of a tiny run, with checkpoints and probes: neither memory nor the time of a step may grow.

python benchmarks/long_run.py --json=benchmarks/long_run.json [--steps=10000]
"""

import ctypes
import dataclasses
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from configs import rekd_alexnet
from ssl_kd import command
from ssl_kd.run import prepare
from ssl_kd.train import fit

BLOCK = 1000
"""Steps that are compared: the first so many against the last."""

LOGGED = 100
"""Steps between two lines of metrics.jsonl."""


MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


def allocated() -> int:
    """Bytes that malloc has handed out: resident memory without what is free between them."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


@dataclasses.dataclass
class Sampler:
    """This process's memory, resident and allocated, ten times a second."""

    seen: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __enter__(self) -> "Sampler":
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.stop.wait(0.1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen.append((time.monotonic(), pages * 4096, allocated()))

    def mebibytes(self, start: float, stop: float) -> dict[str, float]:
        """Medians between two times."""
        _, *sizes = zip(*(seen for seen in self.seen if start <= seen[0] <= stop), strict=True)
        names = ("mebibytes_resident", "mebibytes_allocated")
        return {name: round(statistics.median(size) / 2**20, 1) for name, size in zip(names, sizes, strict=True)}


def config(steps: int) -> Any:
    """ReKD on 8 images of 28 px: all that a step has, in some ten milliseconds."""
    c = rekd_alexnet.get_config("smoke")
    c.batch_size, c.bn_groups, c.log_every = 8, 1, LOGGED
    c.student.width = c.teacher.width = 1 / 32
    c.student.head_hidden = c.teacher.head_hidden = 32
    c.method.queue = 256
    c.epochs = steps / (1024 // c.batch_size)
    c.checkpoint.every_epochs = c.probe.every_epochs = BLOCK / 2 / (1024 // c.batch_size)
    c.probe.linear = False
    return c


def compared(lines: Sequence[dict[str, float]], sampler: Sampler, began: float) -> dict[str, Any]:
    """Milliseconds a step, and memory, of the first thousand steps, of the last, and of every thousand."""
    figures: dict[str, Any] = {}
    pairs, size = list(itertools.pairwise(lines)), BLOCK // LOGGED
    blocks = {f"thousand {k + 1}": pairs[k * size : (k + 1) * size - 1] for k in range(len(lines) // size)}
    for name, part in blocks.items():
        paces = [1e3 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in part]
        start, stop = began + part[0][0]["seconds"], began + part[-1][1]["seconds"]
        figures[name] = {
            "steps": [int(part[0][0]["step"]), int(part[-1][1]["step"])],
            "ms_a_step": round(statistics.median(paces), 3),
            **sampler.mebibytes(start, stop),
        }
    first, *_, last = figures.values()
    growth = {key: round(last[key] / first[key], 4) for key in first if key != "steps"}
    return {**figures, "last over first": growth}


def main() -> None:
    command.write_figures(JSON.value, {})
    with tempfile.TemporaryDirectory() as directory, Sampler() as sampler:
        run = prepare(config(STEPS.value), Path(directory))
        began = time.monotonic()
        fit(run)
        text = (Path(directory) / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    figures = compared(lines, sampler, began)
    print(json.dumps(figures, indent=1))
    command.write_figures(JSON.value, {"steps": int(lines[-1]["step"]), **figures})


if __name__ == "__main__":
    JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
    STEPS = flags.DEFINE_integer("steps", 10_000, "Of the run; two thousand or more.")
    command.run(main)
