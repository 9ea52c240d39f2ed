"""What a run sees of its images: a `Source`, random access to decoded images on one canvas, with labels.

`readers` knows the storage formats, `splits` which rows of them are meant, `decode` makes pixels of what they hold.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ssl_kd.data.decode import decode
from ssl_kd.data.readers import Reader, open_reader
from ssl_kd.data.splits import parse_split, rows_of
from ssl_kd.errors import UserError
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


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Some rows of a reader, each an image that fits one canvas. Picklable: grain's worker processes get a copy.

    Attributes:
      rows: int64 (N,), of the reader.
      short: pixels that are enough for an image's shorter side.
      canvas: height and width. An image that does not fit is reduced, its shorter side to `short` or further.
    """

    reader: Reader
    rows: np.ndarray
    short: int
    canvas: tuple[int, int]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_classes(self) -> int | None:
        """None when there are no labels."""
        return self.reader.num_classes

    @property
    def nbytes(self) -> int:
        """Of all images decoded, each on its canvas."""
        return len(self) * self.canvas[0] * self.canvas[1] * 3

    def labels(self) -> np.ndarray:
        """int32 (N,), −1 where unknown; no image is decoded for them."""
        return self.reader.labels()[self.rows]

    def label(self, i: int) -> int:
        return self.reader.label_of(int(self.rows[i]))

    def take(self, chosen: np.ndarray | range) -> "Source":
        """The images of these numbers, in that order; of [0, N), perhaps several times."""
        return dataclasses.replace(self, rows=self.rows[chosen])

    def image(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3), h and w at most the canvas's. Raises UserError for one that cannot be read."""
        row = int(self.rows[i])
        data = self.reader.read(row)
        image = decode(data, lambda: self.reader.where(row), short=self.short, long=max(self.canvas))
        if image.shape[0] > self.canvas[0] or image.shape[1] > self.canvas[1]:  # upright, on a canvas that lies
            image = decode(data, lambda: self.reader.where(row), long=min(self.canvas))
        return image


def open_source(spec: str, split: str, canvas: int = 256) -> Source:
    """The images of one split.

    The canvas: 64 images spread evenly over the set are looked at. If they are of one size, reduced as all will be, the
    canvas has that size and nothing of it is wasted; else it is a square of 3/2 `canvas`.

    Args:
      spec: where they are stored, as `ssl_kd.data.readers.open_reader` has it.
      split: which of them, as `ssl_kd.data.splits.rows_of` has it.
      canvas: pixels that are enough for an image's shorter side. What has more keeps them where that is cheaper and a
        side of 3/2 of it has room for the longer one; else it is reduced, keeping its ratio. Nothing is enlarged.

    Raises:
      UserError: unknown spec or split; missing, empty, corrupt or truncated files; unreadable images among the 64.
    """
    if canvas < 1:
        raise UserError(f"data.canvas={canvas} must be 0 (8/7 of the largest view) or a side in pixels")
    reader = open_reader(spec, parse_split(split)[0])
    rows = rows_of(split, reader)
    source = Source(reader, rows, canvas, (longest(canvas),) * 2)
    some = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int))
    with ThreadPoolExecutor() as pool:
        sizes = {image.shape[:2] for image in pool.map(source.image, some.tolist())}
    return dataclasses.replace(source, canvas=sizes.pop()) if len(sizes) == 1 else source


def longest(short: int) -> int:
    """Pixels of the longest side that has room on the canvas of a set whose images differ."""
    return round(LONG_OVER_SHORT * short)


def arrays(source: Source, threads: int = 0) -> tuple[Images, np.ndarray]:
    """All images, decoded, and their labels, int32 (N,).

    A pool of threads reads them (0: one per core), because decoding releases the interpreter's lock.
    """
    threads = threads or os.cpu_count() or 1
    images = Images(np.zeros((len(source), *source.canvas, 3), np.uint8), np.empty((len(source), 2), np.int32))
    labels = np.empty(len(source), np.int32)

    def fill(first: int) -> None:  # threads interleave, so that sequential rows share a file's row group
        for i in range(first, len(source), threads):
            image = source.image(i)
            height, width, _ = image.shape
            images.pixels[i, :height, :width] = image
            images.size[i] = height, width
            labels[i] = source.label(i)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(threads)))
    return images, labels
