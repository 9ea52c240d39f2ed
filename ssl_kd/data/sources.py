"""What a run sees of its images: a `Source`, random access to decoded images on one canvas, with labels.

`readers` knows the storage formats, `splits` which rows of them are meant, `decode` makes pixels of what they hold.
An image that cannot be read gives its place to the next one of the set that can; `quarantine` counts and names it.
So what stands where is a function of the set alone, and nothing beyond this file has to know of bad images.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_kd.data.decode import decode
from ssl_kd.data.quarantine import Quarantine
from ssl_kd.data.readers import Reader, open_reader
from ssl_kd.data.splits import parse_split, rows_of
from ssl_kd.errors import UserError, reason
from ssl_kd.images import Images

SHORT_OVER_VIEW = 8 / 7
"""Shorter side of an image on the host over a view's: 256 for 224, as evaluation has always had it."""

LONG_OVER_SHORT = 3 / 2
"""Side of the square canvas of a set whose images differ, over the shorter side that they need.

Room to spare is bytes on the way to the device, 442 kB an image for 350, but saves a resize on the host: a JPEG shrinks
by eighths while it is decoded, and what comes out need not be an exact size. 500×375 comes out as 375×282, which fits
384 × 384 but not the 341 × 341 of 4/3: 1.5 ms an image instead of 2.7 (one core, 62 kB each).
"""

LOOKED_AT = 64
"""Images that show whether all of a set are of one size."""

TRIES = 100
"""Images in a row that may be bad; more, and it is not single images that are."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Some rows of a reader, each an image that fits one canvas; indexed as `Images` are, by arrays of their numbers.

    Picklable: grain's worker processes get a copy.

    Attributes:
      rows: int64 (N,), of the reader.
      short: pixels that are enough for an image's shorter side.
      canvas: height and width. An image that does not fit is reduced, its shorter side to `short` or further.
      quarantine: counts and names those that cannot be read.
    """

    reader: Reader
    rows: np.ndarray
    short: int
    canvas: tuple[int, int]
    quarantine: Quarantine

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: np.ndarray) -> Images:
        return arrays(self, chosen)[0]

    @property
    def num_classes(self) -> int | None:
        """None when there are no labels."""
        return self.reader.num_classes

    @property
    def nbytes(self) -> int:
        """Of all images decoded, each on its canvas."""
        return len(self) * self.canvas[0] * self.canvas[1] * 3

    def labels(self) -> np.ndarray:
        """int32 (N,), −1 where unknown; no image is decoded for them, and no other row is asked for its own."""
        return np.fromiter((self.label(i) for i in range(len(self))), np.int32, len(self))

    def label(self, i: int) -> int:
        return self.reader.label_of(int(self.rows[i]))

    def take(self, chosen: np.ndarray | range) -> "Source":
        """The images of these numbers as a set of their own, in that order; of [0, N), perhaps several times."""
        return dataclasses.replace(self, rows=self.rows[chosen])

    def image(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3), h and w at most the canvas's. Raises UserError for one that cannot be read."""
        row = int(self.rows[i])
        try:
            data = self.reader.read(row)
        except OSError as error:
            where = self.reader.where(row)
            raise UserError(f"{where} cannot be read ({reason(error)}); restore or remove it") from error
        image = decode(data, lambda: self.reader.where(row), short=self.short, long=max(self.canvas))
        if image.shape[0] > self.canvas[0] or image.shape[1] > self.canvas[1]:  # upright, on a canvas that lies
            image = decode(data, lambda: self.reader.where(row), long=min(self.canvas))
        return image

    def first_readable(self, i: int, bad: dict[int, str]) -> tuple[int, np.ndarray]:
        """Of image i and those after it, the first one after the last, the first that can be read: number and pixels.

        Args:
          bad: takes the rows of the reader that could not be, and why.

        Raises: UserError when there is none among TRIES.
        """
        tries = [i, *((i + k) % len(self) for k in range(1, min(TRIES, len(self))))]
        for number in tries:
            try:
                return number, self.image(number)
            except UserError as error:
                bad[int(self.rows[number])] = str(error)
        first = bad[int(self.rows[i])]
        raise UserError(f"{len(tries)} images in a row of {self.quarantine.name} cannot be read, the first: {first}")

    def stand_ins(self) -> np.ndarray:
        """The image that stands in the place of each, itself but for those known to be bad by now: int32 (N,).

        All processes call this together, because each knows only what it has read.
        """
        bad = np.isin(self.rows, list(self.quarantine.met))
        if jax.process_count() > 1:
            bad = np.any(multihost_utils.process_allgather(bad), axis=0)
        good = np.flatnonzero(~bad)
        return good[np.searchsorted(good, np.arange(len(bad))) % len(good)].astype(np.int32)


def open_source(spec: str, split: str, canvas: int = 256, max_bad: float = 0.01) -> Source:
    """The images of one split.

    The canvas: 64 images spread evenly over the set are looked at. If they are of one size, reduced as all will be, the
    canvas has that size and nothing of it is wasted; else it is a square of 3/2 `canvas`.

    Args:
      spec: where they are stored, as `ssl_kd.data.readers.open_reader` has it.
      split: which of them, as `ssl_kd.data.splits.rows_of` has it.
      canvas: pixels that are enough for an image's shorter side. What has more keeps them where that is cheaper and a
        side of 3/2 of it has room for the longer one; else it is reduced, keeping its ratio. Nothing is enlarged.
      max_bad: share of unreadable images at which reading stops, as `ssl_kd.data.quarantine.Quarantine` has it.

    Raises:
      UserError: unknown spec or split; missing, empty, corrupt or truncated files; none of the 64 can be read.
    """
    if canvas < 1:
        raise UserError(f"data.canvas={canvas} must be 0 (8/7 of the largest view) or a side in pixels")
    reader = open_reader(spec, parse_split(split)[0])
    rows = rows_of(split, reader)
    quarantine = Quarantine(f"{spec} {split}", len(rows), max_bad)
    source = Source(reader, rows, canvas, (longest(canvas),) * 2, quarantine)
    some = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist()

    def size_or_error(i: int) -> tuple[int, int] | UserError:
        try:
            height, width, _ = source.image(i).shape
            return height, width
        except UserError as error:  # counted when it is read for what it holds
            return error

    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(size_or_error, some))
    sizes = {look for look in looks if not isinstance(look, UserError)}
    if not sizes:
        raise UserError(f"none of {len(some)} images of {quarantine.name} can be read, the first: {looks[0]}")
    return dataclasses.replace(source, canvas=sizes.pop()) if len(sizes) == 1 else source


def longest(short: int) -> int:
    """Pixels of the longest side that has room on the canvas of a set whose images differ."""
    return round(LONG_OVER_SHORT * short)


class Gathered(NamedTuple):
    """Images of a source, as they were read.

    Attributes:
      images: B of them.
      labels: int32 (B,), −1 where unknown.
      numbers: int32 (B,), of the images: not the wanted ones where others stand in.
      bad: rows of the reader that could not be read, and why.
    """

    images: Images
    labels: np.ndarray
    numbers: np.ndarray
    bad: dict[int, str]


def gather(source: Source, chosen: np.ndarray, threads: int = 0) -> Gathered:
    """The images of these numbers, in that order, or what stands in for them; nothing is said of those.

    A pool of threads reads them (0: one per core), because decoding releases the interpreter's lock.

    Raises: UserError as `Source.first_readable`.
    """
    threads = threads or os.cpu_count() or 1
    images = Images(np.zeros((len(chosen), *source.canvas, 3), np.uint8), np.empty((len(chosen), 2), np.int32))
    labels, numbers = np.empty((2, len(chosen)), np.int32)
    bad: dict[int, str] = {}

    def fill(first: int) -> None:  # threads interleave, so that sequential rows share a file's row group
        for i in range(first, len(chosen), threads):
            numbers[i], image = source.first_readable(int(chosen[i]), bad)
            height, width, _ = image.shape
            images.pixels[i, :height, :width] = image
            images.size[i] = height, width
            labels[i] = source.label(numbers[i])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(threads)))
    return Gathered(images, labels, numbers, bad)


def arrays(source: Source, chosen: np.ndarray | None = None, threads: int = 0) -> tuple[Images, np.ndarray]:
    """The images of these numbers (None: all), decoded, and their labels, int32 (N,); bad ones are reported.

    Raises: UserError as `gather`, and when there are too many bad ones.
    """
    found = gather(source, np.arange(len(source)) if chosen is None else chosen, threads)
    source.quarantine.report(found.bad, source.reader.where)
    return found.images, found.labels
