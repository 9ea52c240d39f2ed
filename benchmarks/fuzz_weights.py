"""Mutates weight files and reads them: everything must load or be refused in one sentence.

    python benchmarks/fuzz_weights.py [--seconds=300] [--seed=0]

Findings are: any exception but UserError, a refusal over several lines or for want of memory, a warning, an import or
call that Python audits, more than twice the file's size + 4 MiB of memory, and more than 5 s for one file. After 20 it
stops. It writes fuzz_weights.json beside it, and each finding's file into fuzz_weights.findings/, where also a crash
leaves its file.
"""

import argparse
import encodings.cp437  # noqa: F401 (zipfile's, which it imports only when a file's names want it)
import io
import os
import random
import resource
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ssl_kd.checkpoint import session
from ssl_kd.errors import UserError
from ssl_kd.weights.torchfile import read_weights
from ssl_kd.workdir import write_json

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "golden" / "torch"
AUDITED = ("exec", "compile", "import", "os.", "subprocess.", "pickle.", "socket.", "ctypes.", "shutil.")
NUMBERS = [0, 1, 2, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
FRAGMENTS = [
    *(
        b"cposix\nsystem\n",
        b"\x8c\x05posix\x8c\x06system\x93",
        b"X\x04\0\0\0true\x85R",
        b"ctorch\nSize\n",
        b"](",
        b"}(",
    ),
    *(b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"h\0", b"h\1a", b"Q", b"R", b"b", b"\x94", b"0", b"2", b"(" * 50),
    *(b"ccollections\nOrderedDict\n)R", b"}" * 300, b"\x85" * 300, b"]a" * 300, b"\x8b\xff\xff\xff\x7f", b"."),
    *(
        b"PK\1\2",
        b"PK\3\4",
        b"PK\5\6",
        b"PK\6\6",
        b"PK\6\7",
        b'"shape":[-1]',
        b'"data_offsets":[0,99999999999]',
        b"[[[[",
    ),
]


def seeds() -> dict[str, bytes]:
    """Name -> a valid file."""
    arrays = {name: np.arange(4).astype(name).reshape(2, 2) for name in ("float32", "float16", "int64", "bool")}
    files = {path.stem: path.read_bytes() for path in sorted(GOLDEN.glob("*.pth"))}
    return {**files, "safetensors": save(arrays, metadata={"made": "here"})}


def mutated(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Flips bits, overwrites bytes and numbers, cuts, splices, adds fragments, changes the length of a header."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0 | 1 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 2 if data:
                data[at % len(data)] = rng.randrange(256)
            case 3:
                width = rng.choice([2, 4, 8])
                number = (rng.choice(NUMBERS) + rng.choice([-1, 0, 0, 1])) % (1 << 8 * width)
                data[at : at + width] = number.to_bytes(width, rng.choice(["little", "little", "big"]))
            case 4:
                del data[at : at + rng.choice([1, 1, 4, 50, len(data)])]
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                data[at:at] = other[start : start + rng.choice([1, 8, 100, 1000])]
            case 6:
                data[at:at] = rng.choice(FRAGMENTS)
            case 7:  # safetensors' length of the header
                length = rng.choice([*NUMBERS, len(data), len(data) - 8, len(data) - 7])
                data[0:8] = (length % (1 << 64)).to_bytes(8, "little")
    return bytes(data)


def mutated_entry(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Mutates one entry of an archive, and writes it anew, so that its checksums hold and the pickle is reached."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as archive:
        names = source.namelist()
        chosen = rng.choice([*names, *[name for name in names if name.endswith("data.pkl")] * 20])
        for name in names:
            archive.writestr(name, mutated(source.read(name), others, rng) if name == chosen else source.read(name))
    return target.getvalue()


class Watch:
    """Counts audited events while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: Any) -> None:
        if self.on and event.startswith(AUDITED):
            self.events.append(f"{event} {arguments!r}"[:200])


def verdict(read: Callable[[Path], Any], path: Path, watch: Watch) -> str:
    """'loaded', 'refused', or what is wrong."""
    started, size, watch.events = time.process_time(), path.stat().st_size, []
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    watch.on = True
    try:
        read(path)
        result = "loaded"
    except UserError as error:
        text = str(error)
        whole = str(path) in text and text.endswith(".") and text.isprintable()
        memory = isinstance(error.__cause__, MemoryError)
        result = "refused" if whole and not memory else f"refused oddly: {text}"
    except BaseException as error:  # a panic of safetensors' Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        result = f"{type(error).__name__}: {error}"
    finally:
        watch.on = False
    if watch.events:
        return f"did {watch.events[0]}"
    if (peak := tracemalloc.get_traced_memory()[1] - before) > 2 * size + (4 << 20):
        return f"took {peak} bytes for {size}"
    if (seconds := time.process_time() - started) > 5:
        return f"took {seconds:.1f} s"
    return result


def fuzz(seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """Reads mutated files for some seconds of this process.

    Returns:
      counts of 'files', 'loaded' and 'refused', 'by_seed' file, and the 'findings'.
    """
    folder.mkdir(exist_ok=True)
    rng, files, watch = random.Random(seed), seeds(), Watch()
    others = list(files.values())
    path = folder / "current"
    for content in others:  # everything that is imported late is imported now
        path.write_bytes(content)
        read_weights(path)
    counts: Counter[tuple[str, str]] = Counter()
    findings: list[str] = []
    traced = tracemalloc.is_tracing()
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started = time.process_time()
        while time.process_time() - started < seconds and len(findings) < 20:
            name, content = rng.choice(list(files.items()))
            archive = content.startswith(b"PK")
            mutate = mutated_entry if archive and rng.random() < 0.7 else mutated
            path.write_bytes(mutate(content, others, rng))
            result = verdict(read_weights, path, watch)
            if result not in ("loaded", "refused"):
                path.rename(folder / f"finding-{len(findings)}")
                findings.append(f"{name}: {result}")
                result = "finding"
            counts[name, result] += 1
    if not traced:
        tracemalloc.stop()
    path.unlink(missing_ok=True)

    def total(result: str) -> int:
        return sum(count for (_, found), count in counts.items() if found == result)

    by_seed = {
        name: {r: counts[name, r] for r in ("loaded", "refused", "finding") if counts[name, r]} for name in files
    }
    return {
        "files": counts.total(),
        "loaded": total("loaded"),
        "refused": total("refused"),
        "by_seed": by_seed,
        "findings": findings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="CPU seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pages = int(Path("/proc/self/statm").read_text().split()[0])  # what jax reserves is much, and not ours
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (1 << 30), resource.RLIM_INFINITY))
    folder = HERE / "fuzz_weights.findings"
    report = fuzz(args.seconds, args.seed, folder)
    if not report["findings"]:
        folder.rmdir()
    header = {**session(), "seconds": args.seconds, "seed": args.seed}
    write_json(HERE / "fuzz_weights.json", {**header, **report}, "choose another folder")
    print({key: report[key] for key in ("files", "loaded", "refused", "findings")})
    sys.exit(bool(report["findings"]))


if __name__ == "__main__":
    main()
