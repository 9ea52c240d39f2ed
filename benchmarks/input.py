"""What the host's input costs: photographs delivered beside PyTorch's, packed beside plain files, steps, many files.

    pip install -r benchmarks/requirements-peer.txt
    python benchmarks/input.py [--rounds=7] [--seconds=3] [--json=benchmarks/input.json]

Rates of images are per second that a core works, over all threads, whatever else the machine does. Every part makes its
own images in a temporary directory and runs in a process of its own; the sides of a comparison are timed in turn, so
that a drifting machine hits all alike. Files are in the system's cache: disks are not what is compared.
"""

import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from configs import moco_v2_alexnet
from ssl_kd import command
from ssl_kd.bench import any_bags, seconds_a_call, stepper
from ssl_kd.data.loader import Loader
from ssl_kd.data.prepare import Packing, pack_set
from ssl_kd.data.sources import open_source
from ssl_kd.errors import UserError
from ssl_kd.run import prepare

ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that all sides are timed, in turn.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 3.0, "Of each timing.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
PART = flags.DEFINE_string("part", "", "The one part that a process of its own measures.")

PHOTOS, BATCH, CANVAS = 512, 128, 256
PEER_BATCH = 32  # what it does for a batch is little beside what it does for an image
FILES, STREAMED, WORKERS = 100_000, 200, 2


def main() -> None:
    if PART.value:
        with tempfile.TemporaryDirectory() as folder:
            figures = PARTS[PART.value](Path(folder))
        print(json.dumps(figures))
        return
    command.write_figures(JSON.value, {})
    figures = {name: measured(name) for name in PARTS}
    delivered, resident, files = (figures[name] for name in PARTS)
    for side, rate in delivered["images_per_core_second"].items():
        print(f"{rate:8,.0f} images per core second · {side}")
    for name, ratio in delivered["ratios"].items():
        print("{:8.2f} × · {} ({:.2f} to {:.2f})".format(ratio["median"], name, ratio["least"], ratio["most"]))
    print(f"{resident['share']:8.2%} of a step is the host's work for a set on the device ({resident['recipe']})")
    print(f"{files['listing_seconds']:8.1f} s to list {FILES:,} files; {files['peak_bytes'] / 2**30:.2f} GiB at most")
    command.write_figures(JSON.value, figures)


def measured(part: str) -> dict[str, Any]:
    words = [f"--{flag.name}={flag.value}" for flag in (ROUNDS, SECONDS)]
    done = subprocess.run([sys.executable, __file__, f"--part={part}", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"part {part!r} failed, as said above: pip install -r benchmarks/requirements-peer.txt.")
    return json.loads(done.stdout.splitlines()[-1])


# --- photographs


def photograph(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Smooth fields of several scales and some grain: compresses to what cameras' pictures of this size take."""
    canvas = np.zeros((height, width, 3), np.float32)
    for scale, weight in ((125, 0.8), (25, 0.4), (6, 0.24), (2, 0.16)):
        coarse = rng.integers(-128, 128, (height // scale, width // scale, 3)) + 128
        field = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        canvas += weight * (np.asarray(field, np.float32) - 128)
    return Image.fromarray((canvas + 128).clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path) -> float:
    """A quarter stands, the others lie. Returns the mean bytes of a file."""
    rng = np.random.default_rng(0)
    for k in range(PHOTOS):
        file = folder / "train" / "ab"[k % 2] / f"{k:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(*((500, 375) if k % 4 else (375, 500)), rng).save(file, quality=90)
    return statistics.mean(file.stat().st_size for file in folder.rglob("*.jpg"))


@contextlib.contextmanager
def ours(source: str) -> Iterator[Callable[[float], float]]:
    """Budget in seconds → images that the Loader decodes and places on the device, per second of a core's work."""
    opened = open_source(source, "train", CANVAS)
    loader = Loader(opened, batch_size=BATCH, seed=0, mesh=None, resident="streamed")
    with contextlib.closing(loader.batches(0, sys.maxsize >> 1)) as batches:

        def rate(budget: float) -> float:
            for _ in range(4):  # made before
                next(batches)
            began, worked, count = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - began < budget:
                jax.block_until_ready(next(batches))
                count += BATCH
            images = count / (time.process_time() - worked)
            wait_until_idle()
            return images

        yield rate


def wait_until_idle() -> None:
    """Until batches have been made ahead, lest that work be counted as another's."""
    worked = -math.inf
    while time.process_time() - worked > 0.02:
        worked = time.process_time()
        time.sleep(0.2)


@contextlib.contextmanager
def theirs(folder: Path) -> Iterator[dict[str, Callable[[float], float]]]:
    """The same of torch_input.py's pipelines, in a process of its own that idles while it is not asked."""
    script = Path(__file__).with_name("torch_input.py")
    words = [sys.executable, str(script), str(folder / "train"), str(PEER_BATCH)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin and stdout

        def ask(pipeline: str, budget: float) -> float:
            stdin.write(json.dumps([pipeline, budget]) + "\n")
            stdin.flush()
            return float(stdout.readline() or sys.exit(1))

        yield {name: partial(ask, name) for name in ("two views", "one centre crop")}
        stdin.close()


def delivered(folder: Path) -> dict[str, Any]:
    """Images from storage to the device, of files, of packed sets, and of a DataLoader."""
    photos = folder / "photos"
    size = write_photographs(photos)
    spec = f"folder:{photos}"
    packed = {kind: folder / kind for kind in ("jpeg", "raw")}
    with contextlib.redirect_stdout(sys.stderr):
        for kind, out in packed.items():
            pack_set(Packing(spec, ["train"], CANVAS, kind), out)
    with contextlib.ExitStack() as stack:
        sides = {"files": stack.enter_context(ours(spec))}
        sides |= {f"packed, {kind}": stack.enter_context(ours(f"arrayrecord:{out}")) for kind, out in packed.items()}
        peers = stack.enter_context(theirs(photos))
        sides |= {f"DataLoader, {name}": rate for name, rate in peers.items()}
        rounds = [{name: rate(SECONDS.value) for name, rate in sides.items()} for _ in range(ROUNDS.value)]

    def ratio(one: str, other: str) -> dict[str, float]:
        ratios = sorted(rates[one] / rates[other] for rates in rounds)
        return {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}

    pairs = [("files", f"DataLoader, {name}") for name in peers] + [(f"packed, {kind}", "files") for kind in packed]
    return {
        "photographs": PHOTOS,
        "file_bytes": size,
        "packed_bytes": {kind: sum(f.stat().st_size for f in out.iterdir()) / PHOTOS for kind, out in packed.items()},
        "images_per_core_second": {name: statistics.median(rates[name] for rates in rounds) for name in sides},
        "ratios": {f"{one} over {other}": ratio(one, other) for one, other in pairs},
        "rounds": rounds,
    }


# --- a set on the device


def resident(folder: Path) -> dict[str, Any]:
    """The host's work for a batch, as a share of the step that takes it out of a set on the device."""
    config = moco_v2_alexnet.get_config("cifar10")  # the quickest step of those that train an AlexNet
    config.data.update(source="synthetic:32x10000", train="train", test="test[:100]")
    with contextlib.redirect_stdout(sys.stderr):
        run = prepare(config, folder, untrained=True)
        step, _ = stepper(run).compile(run.mesh)
        batches = run.loader(any_bags(run)).batches(0, sys.maxsize >> 1)
        rounds = []
        for _ in range(ROUNDS.value):
            whole = seconds_a_call(step, SECONDS.value)
            rounds.append((seconds_a_call(lambda: next(batches), SECONDS.value / 3), whole))
        batches.close()
    host, whole = (statistics.median(side) for side in zip(*rounds, strict=True))
    share = statistics.median(host / whole for host, whole in rounds)
    return {"recipe": config.name, "host_seconds": host, "step_seconds": whole, "share": share}


# --- many files


def files(folder: Path) -> dict[str, Any]:
    """Seconds to list 100 000 files, and memory of all processes while some are streamed."""
    rng = np.random.default_rng(0)
    originals = [folder / f"{k}.jpg" for k in range(100)]
    photos = folder / "photos"
    for original in originals:
        photograph(128, 128, rng).save(original, quality=90)
    for k in range(FILES):
        link = photos / "train" / f"{k % 100:03}" / f"{k:06}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(originals[k // 100 % 100], link)
    began = time.perf_counter()
    source = open_source(f"folder:{photos}", "train")
    listing = time.perf_counter() - began
    loader = Loader(source, batch_size=BATCH, seed=0, mesh=None, resident="streamed", workers=WORKERS)
    with contextlib.closing(loader.batches(0, 1_000_000)) as batches:
        began = time.perf_counter()
        for _ in range(STREAMED):
            jax.block_until_ready(next(batches))
        seconds = time.perf_counter() - began
        workers = [peak_bytes(int(child)) for child in children()]
    assert len(workers) >= WORKERS, workers
    main = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {
        "files": len(source),
        "listing_seconds": listing,
        "images_per_second": STREAMED * BATCH / seconds,
        "main_bytes": main,
        "worker_bytes": workers,
        "peak_bytes": main + sum(workers),  # what they share counts for each
    }


def children() -> list[str]:
    return [child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()]


def peak_bytes(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise ValueError(process)


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"delivered": delivered, "resident": resident, "files": files}


if __name__ == "__main__":
    command.run(main)
