"""Any store packed once into ArrayRecord shards, from which training reads without reducing an image again.

    OUT/train-00000-of-00010.arrayrecord …   the images, in the order of their rows
    OUT/packing.jsonl                        what is packed, then a line for every shard that is whole
    OUT/bad.txt                              images that could not be read, a line each
    OUT/dataset.json                         what readers go by; written last

A shard is written beside its place, synced and renamed, then noted in packing.jsonl. What a killed command leaves is
therefore whole shards, and at most one that does not count; the same command makes the same bytes and goes on there.

Images keep their order: training reads at random anyway, and so labels, subsets and bags mean the same rows as at the
source, unless images were left out because they could not be read.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import simplejpeg

from ssl_kd.data.decode import decode, reduced, upright_jpeg
from ssl_kd.data.quarantine import MIN_BAD
from ssl_kd.data.readers import Reader, open_reader
from ssl_kd.data.readers.arrayrecord import (
    INDEX,
    JOURNAL,
    SUFFIX,
    Index,
    Shard,
    open_writer,
    pack,
    read_index,
    unpack,
    write_index,
)
from ssl_kd.data.sources import longest
from ssl_kd.data.splits import parse_split, rows_of
from ssl_kd.errors import UserError, reason
from ssl_kd.log import Meter, console

BAD = "bad.txt"

LOOKED_AT = 64
"""Images of a split that tell how large all will be, and whether the source is still the one that was begun."""

AHEAD = 8
"""Images in work or waiting to be written, for every thread: what bounds memory."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """What decides the bytes of a packed set.

    Attributes:
      source: as `ssl_kd.data.readers.open_reader` has it.
      splits: as `ssl_kd.data.splits.rows_of` has them, each of another name.
      short: pixels that shorter sides are reduced to, and longer ones to 3/2 of it: what a run with data.canvas=short
        has room for.
      format: 'jpeg', or 'raw' pixels: many times as large, exact, and nothing to decode.
      quality: of the JPEGs, 1 to 100.
      shard_mib: about the size of a shard.
    """

    source: str
    splits: Sequence[str]
    short: int = 256
    format: str = "jpeg"
    quality: int = 90
    shard_mib: int = 256

    def record(self, reader: Reader, row: int) -> bytes:
        """A row's image and label. An upright JPEG that is small enough keeps its bytes.

        Other JPEGs halve their chroma (4:2:0), as cameras do: of 340×256 at quality 95, 45 kB instead of 69, decoded in
        0.53 ms instead of 0.78.

        Raises: UserError when the image cannot be read.
        """
        data = reader.read(row)
        image = decode(data, lambda: reader.where(row), short=self.short)
        image = np.ascontiguousarray(reduced(image, self.short, longest(self.short)))
        label = reader.label_of(row)
        if self.format == "raw":
            return pack(label, image)
        if not isinstance(data, np.ndarray) and upright_jpeg(data) == image.shape[:2]:
            return pack(label, bytes(memoryview(data)))
        return pack(label, simplejpeg.encode_jpeg(image, quality=self.quality, colorsubsampling="420"))


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a split that become one shard."""

    name: str
    split: str
    reader: Reader
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Split:
    """A split to be packed, and what a sample of it tells: bytes and seconds an image, and a digest of its records."""

    name: str
    reader: Reader
    rows: np.ndarray
    image_bytes: float
    image_seconds: float
    digest: str

    def parts(self, shard_bytes: int) -> list[Part]:
        count = min(len(self.rows), max(1, math.ceil(len(self.rows) * self.image_bytes / shard_bytes)))
        ends = np.arange(1, count) * len(self.rows) // count
        return [
            Part(f"{self.name}-{k:05}-of-{count:05}{SUFFIX}", self.name, self.reader, rows)
            for k, rows in enumerate(np.split(self.rows, ends))
        ]


def pack_set(packing: Packing, out: Path, *, workers: int = 0, max_bad: float = 0.01) -> None:
    """Packs a set into a directory, or goes on where a command of the same arguments was stopped.

    Args:
      workers: threads that read, decode and encode (0: one per core), most of it without the interpreter's lock.
      max_bad: share of unreadable images at which to stop, once there are 10. Fewer are left out, and named in bad.txt.

    Raises:
      UserError: from the source; a directory of other things, in use or of another packing; no room; too many images
        that cannot be read.
    """
    names = [parse_split(split)[0] for split in packing.splits]
    if len(set(names)) < len(names):
        raise UserError(f"--splits={','.join(packing.splits)} names a split twice; name each once")
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        splits = [_look(packing, split, pool) for split in packing.splits]
        num_classes, class_names = _classes(splits)
        parts = [part for split in splits for part in split.parts(packing.shard_mib << 20)]
        plan = {
            **dataclasses.asdict(packing),
            "images": {split.name: len(split.rows) for split in splits},
            "sample": {split.name: split.digest for split in splits},
        }
        with open_journal(out, plan) as journal:
            missing = [part for part in parts if part.name not in journal.whole]
            _announce(splits, parts, missing, out)
            if missing:
                _pack(packing, missing, journal, pool, AHEAD * workers, Tally(journal, parts, max_bad))
            index = Index(
                num_classes,
                class_names,
                plan["images"],
                {name: [journal.whole[part.name][0] for part in parts if part.split == name] for name in names},
            )
            with _writing(out / INDEX):
                write_index(out, index)
            left_out = f" ({len(journal.bad)} left out, see {out / BAD}: the rows after them have moved up)"
            console.print(
                f"{sum(shard.records for shard, _ in journal.whole.values()):,} images in {out}"
                f"{left_out if journal.bad else ''}; train with --config.data.source=arrayrecord:{out}"
            )


def verify(out: Path) -> None:
    """Compares every shard with its checksum in dataset.json. Raises UserError naming those that differ."""
    shards = [shard for found in read_index(out).splits.values() for shard in found]
    damaged = []
    with Meter(len(shards), 0, "shard", "reading …") as meter:
        for done, shard in enumerate(shards, 1):
            try:
                if _sha256(out / shard.name) != shard.sha256:
                    damaged.append(f"{shard.name} (its bytes have changed)")
            except OSError as error:
                damaged.append(f"{shard.name} ({reason(error)})")
            meter.show(done, f"{len(damaged)} damaged", math.nan)
    if damaged:
        raise UserError(
            f"{out}: {len(damaged)} of {len(shards)} shards are damaged: {', '.join(damaged)}; delete them and give "
            "the packing command again, which makes only what is missing"
        )
    console.print(f"{out}: {sum(shard.records for shard in shards):,} images in {len(shards)} shards, all as written")


@contextlib.contextmanager
def open_journal(out: Path, plan: dict[str, Any]) -> Iterator["Journal"]:
    """Makes OUT, and locks it lest two commands write there."""
    with _writing(out / JOURNAL):
        out.mkdir(parents=True, exist_ok=True)
        if not (out / JOURNAL).exists() and any(out.iterdir()):
            raise UserError(f"{out} holds other things; choose an empty directory or a new one")
        file = (out / JOURNAL).open("a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another command is packing into {out}; wait for it, or choose another OUT") from error
        yield Journal(out, file, json.loads(json.dumps(plan)))


class Journal:
    """What OUT holds, by its packing.jsonl.

    Attributes:
      whole: name → the shard, and the sentences on what was left out of it.
    """

    def __init__(self, out: Path, file: IO[bytes], plan: dict[str, Any]) -> None:
        self.out, self._file, self.whole = out, file, dict[str, tuple[Shard, list[str]]]()
        lines = self._lines()
        if len(lines) > 1:
            _check_same(lines[0], plan, out)
        else:  # nothing to mix it with
            self._file.truncate(0)
            self._append(plan)
        for line in lines[1:]:
            shard, size = Shard(**line["shard"]), line["bytes"]
            if (path := out / shard.name).is_file() and path.stat().st_size == size:
                self.whole[shard.name] = shard, line["bad"]
        with _writing(out / BAD):
            for leftover in (out / BAD, *out.glob("*.partial")):
                leftover.unlink(missing_ok=True)
        for sentence in self.bad:
            self.note(sentence)

    @property
    def bad(self) -> list[str]:
        return [sentence for _, sentences in self.whole.values() for sentence in sentences]

    def note(self, sentence: str) -> None:
        """Names an image in bad.txt."""
        with _writing(self.out / BAD), (self.out / BAD).open("a") as file:
            file.write(sentence + "\n")

    def add(self, shard: Shard, bad: list[str]) -> None:
        """A shard that stands in its place."""
        size = (self.out / shard.name).stat().st_size
        self._append({"shard": dataclasses.asdict(shard), "bytes": size, "bad": bad})
        self.whole[shard.name] = shard, bad

    def _append(self, line: dict[str, Any]) -> None:
        with _writing(self.out / JOURNAL):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        """Without the half line of a killed command, which is cut off."""
        self._file.seek(0)
        whole = self._file.read().rpartition(b"\n")
        self._file.truncate(len(whole[0]) + len(whole[1]))
        try:
            return [json.loads(line) for line in whole[0].splitlines()]
        except ValueError as error:
            raise UserError(f"{self.out / JOURNAL} is damaged ({reason(error)}); delete {self.out}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes what the system or array_record says of a write one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {path} ({reason(error)}); make room or choose another OUT; the same command goes on "
            "with the shards that are whole"
        ) from error


@dataclasses.dataclass
class Tally:
    """Counts images, shows them, and stops the work when too many cannot be read."""

    journal: Journal
    parts: Sequence[Part]
    max_bad: float

    def __post_init__(self) -> None:
        self.total = sum(len(part.rows) for part in self.parts)
        self.start = self.seen = sum(len(part.rows) for part in self.parts if part.name in self.journal.whole)
        self.bad = len(self.journal.bad)
        self.began = time.monotonic()
        self.meter = Meter(self.total, self.start, "image", "packing …")

    def count(self) -> None:
        self.seen += 1
        rate = (self.seen - self.start) / (time.monotonic() - self.began)
        said = f"{rate:,.0f} images/s" + f" · {self.bad} left out" * bool(self.bad)
        self.meter.show(self.seen, said, (self.total - self.seen) / rate)

    def refuse(self, error: UserError) -> None:
        self.bad += 1
        self.journal.note(str(error))
        if self.bad >= MIN_BAD and self.bad > self.max_bad * (self.seen + 1):
            raise UserError(
                f"{self.bad} of {self.seen + 1:,} images cannot be read, each named in {self.journal.out / BAD}; "
                f"mend the source, or leave more of them out with --max_bad above {self.max_bad}"
            )


def _look(packing: Packing, split: str, pool: ThreadPoolExecutor) -> Split:
    """Opens a split and packs images spread evenly over it, without keeping them."""
    name = parse_split(split)[0]
    reader = open_reader(packing.source, name)
    rows = rows_of(split, reader)
    some = rows[np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(int))].tolist()
    began = time.monotonic()
    records = list(pool.map(lambda row: _attempt(packing, reader, row), some))
    seconds = (time.monotonic() - began) / len(some)
    good = [record for record in records if not isinstance(record, UserError)]
    if not good:
        raise UserError(f"none of {len(some)} images of {packing.source} {split} can be read: {records[0]!s}")
    digest = hashlib.sha256(b"".join(good)).hexdigest()
    return Split(name, reader, rows, sum(map(len, good)) / len(good), seconds, digest)


def _attempt(packing: Packing, reader: Reader, row: int) -> bytes | UserError:
    try:
        return packing.record(reader, row)
    except UserError as error:
        return error


def _classes(splits: Sequence[Split]) -> tuple[int | None, tuple[str, ...] | None]:
    """Number and names of the classes of all splits."""
    names = {split.reader.class_names for split in splits if split.reader.class_names}
    counts = [split.reader.num_classes for split in splits if split.reader.num_classes]
    if len(names) > 1:
        raise UserError(f"the splits {', '.join(split.name for split in splits)} name their classes differently")
    only = names.pop() if names else None
    return (len(only) if only else max(counts, default=None)), only


def _check_same(there: dict[str, Any], plan: dict[str, Any], out: Path) -> None:
    """Refuses to mix two packings, naming what differs: settings, or else what was counted or seen."""
    differing = [key for key in plan if there.get(key) != plan[key]]
    settings = [key for key in differing if key not in ("images", "sample")]
    if differing:
        which = [f"{key} ({there.get(key)!r} there, {plan[key]!r} now)" for key in settings or differing[:1]]
        raise UserError(
            f"{out} holds another packing: {'; '.join(which)}. Use the same to go on with it, or choose another OUT"
        )


def _announce(splits: Sequence[Split], parts: Sequence[Part], missing: Sequence[Part], out: Path) -> None:
    """Says how many images, bytes and minutes it will be. Raises UserError when they have no room."""
    of = {split.name: split for split in splits}
    size = sum(len(part.rows) * of[part.split].image_bytes for part in missing)
    minutes = sum(len(part.rows) * of[part.split].image_seconds for part in missing) / 60
    free = shutil.disk_usage(out).free
    counts = " and ".join(f"{len(split.rows):,} {split.name}" for split in splits)
    shards = f"{len(parts)} shard{'s' * (len(parts) > 1)}"
    whole = f", {len(parts) - len(missing)} of them whole" if len(missing) < len(parts) else ""
    console.print(
        f"{counts} images in {shards}{whole}: about {_bytes(size)} to write and {minutes:.1f} min; "
        f"{_bytes(free)} are free"
    )
    if size > free:
        raise UserError(
            f"{out} needs about {_bytes(size)} and has {_bytes(free)} free; make room, choose another OUT, or lower "
            "--short or --quality"
        )


def _pack(
    packing: Packing, missing: Sequence[Part], journal: Journal, pool: ThreadPoolExecutor, ahead: int, tally: Tally
) -> None:
    tasks = ((part.reader, row) for part in missing for row in part.rows.tolist())
    results = _records(packing, tasks, pool, ahead)
    with tally.meter:
        for part in missing:
            journal.add(*_write(journal, part, itertools.islice(results, len(part.rows)), tally))


def _records(
    packing: Packing, tasks: Iterable[tuple[Reader, int]], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[bytes | UserError]:
    """Records of rows in their order, of which at most `ahead` are begun before they are asked for."""
    waiting = deque[Future[bytes | UserError]]()
    for task in tasks:
        waiting.append(pool.submit(_attempt, packing, *task))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write(journal: Journal, part: Part, results: Iterator[bytes | UserError], tally: Tally) -> tuple[Shard, list[str]]:
    """A shard, written into its place, and sentences on the images that had to be left out."""
    path, partial = journal.out / part.name, journal.out / f"{part.name}.partial"
    labels, bad = [], []
    with _writing(path):
        writer = open_writer(partial)
    try:
        for result in results:
            if isinstance(result, UserError):
                bad.append(str(result))
                tally.refuse(result)
            else:
                labels.append(unpack(result)[0])
                with _writing(path):
                    writer.write(result)
            tally.count()
        with _writing(path):
            writer.close()
            _sync(partial)
            shard = Shard(part.name, len(labels), _sha256(partial), labels if part.reader.num_classes else None)
            os.replace(partial, path)
            _sync(journal.out)
    except BaseException:
        with contextlib.suppress(Exception):  # on a full disk closing fails again
            writer.close()
        partial.unlink(missing_ok=True)
        raise
    return shard, bad


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
