"""What a run sees of its images: a `Source`, random access to decoded images of one shape with labels.

`readers.py` knows the storage formats; `Rows` turns a reader into a source: a slice of its rows, every image on one
fixed canvas. Sources are picklable (grain's worker processes get a copy).
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ssl_kd.data.readers import READERS, Reader
from ssl_kd.errors import UserError


class Source(Protocol):
    """Random access to labelled images of one shape.

    `source[i]` is dict(image=uint8 (H, W, 3) RGB, label=int32 (-1: unknown), index=int32 i).
    """

    num_classes: int | None  # None when there are no labels
    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    def label_of(self, i: int) -> int: ...  # without decoding the image
    def labels(self) -> np.ndarray: ...  # int32 (N,), without decoding images


def open_source(spec: str, split: str, canvas: int = 0) -> Source:
    """The images of one split.

    Args:
      spec: 'embedded' (Fashion-MNIST subset: 10 000 train, 4 000 test) | 'hf:PATH' (a directory of Hugging Face
        parquet files) | 'tfds:NAME' (a prepared TensorFlow Datasets set; reading it needs no TensorFlow) |
        'synthetic:SIDExCOUNT' (noise, for timing).
      split: a split's name, optionally sliced by rows or percent: 'train', 'train[:10000]', 'train[10%:20%]',
        'test[-500:]'. 'test' means the validation split of a parquet directory that has no test split.
      canvas: side of the square canvas in pixels: each image's shorter side is resized to it by antialiased bilinear
        (Pillow), and the centre kept; images of canvas size already are left alone. This is an interim choice: the
        random resized crop sees the square only. 0 keeps the images' own size, then the same for all.

    Raises:
      UserError: unknown spec, split or slice; missing, empty, corrupt or truncated files; unreadable images; images of
        several sizes with canvas=0 (when reached).
    """
    kind, _, name = spec.partition(":")
    if kind not in READERS or bool(name) != (kind != "embedded"):
        raise UserError(
            f"data.source={spec!r} is unknown; use 'embedded', 'hf:PATH', 'tfds:NAME' or 'synthetic:SIDExCOUNT'"
        )
    if canvas < 0:
        raise UserError(f"data.canvas={canvas} must be 0 (the images' own size) or a side in pixels")
    match = re.fullmatch(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UserError(f"split {split!r} is not understood; write it like 'train', 'train[:10000]' or 'test[10%:20%]'")
    reader = READERS[kind](name, match[1])
    start, stop = _slice(match[2] or "0", match[3] or "100%", len(reader), split)
    return Rows(reader, start, stop, canvas)


def gather(source: Source, rows: Sequence[int] | np.ndarray, threads: int = 0) -> dict[str, np.ndarray]:
    """Reads and stacks rows with a pool of threads (0: one per core; JPEG decoding releases the interpreter's lock).

    Returns: dict(image=uint8 (n, H, W, 3), label=int32 (n,), index=int32 (n,)).
    """
    threads = threads or os.cpu_count() or 1
    out: dict[str, np.ndarray] = {
        "image": np.empty((len(rows), *source.image_shape), np.uint8),
        "label": np.empty(len(rows), np.int32),
        "index": np.empty(len(rows), np.int32),
    }

    def fill(first: int) -> None:  # threads interleave, so that sequential rows share a file's row group
        for k in range(first, len(rows), threads):
            for name, value in source[int(rows[k])].items():
                out[name][k] = value

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(threads)))
    return out


def arrays(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """The whole set, decoded: images uint8 (N, H, W, 3) and labels int32 (N,)."""
    batch = gather(source, range(len(source)))
    return batch["image"], batch["label"]


def _slice(start: str, stop: str, n: int, split: str) -> tuple[int, int]:
    """Row numbers of a slice of n rows; percentages round to the nearest row, as in TFDS."""

    def row(text: str) -> int:
        value = round(int(text[:-1]) * n / 100) if text.endswith("%") else int(text)
        if not -n <= value <= n:
            raise UserError(f"split {split!r} reaches row {text}, but there are {n} rows; choose a slice within them")
        return value + n if value < 0 or (text.startswith("-") and value == 0) else value

    first, last = row(start), row(stop)
    if first >= last:
        raise UserError(f"split {split!r} is empty (rows {first} to {last} of {n}); choose a slice that holds images")
    return first, last


@dataclasses.dataclass
class Rows:
    """Rows [start, stop) of a reader, each image on the same canvas: a `Source`."""

    reader: Reader
    start: int
    stop: int
    canvas: int

    def __post_init__(self) -> None:
        self.num_classes = self.reader.num_classes
        side = self.canvas
        self.image_shape = (side, side, 3) if side else self.reader.read(self.start)[0].shape

    def __len__(self) -> int:
        return self.stop - self.start

    def label_of(self, i: int) -> int:
        return self.reader.label_of(self.start + i)

    def labels(self) -> np.ndarray:
        return np.array([self.label_of(i) for i in range(len(self))], np.int32)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        row = self.start + i
        image, label = self.reader.read(row)
        if image.shape != self.image_shape:
            if not self.canvas:
                raise UserError(
                    f"{self.reader.where(row)} is {image.shape[1]}x{image.shape[0]} pixels, others are "
                    f"{self.image_shape[1]}x{self.image_shape[0]}; set data.canvas to put all on one canvas"
                )
            image = center_square(image, self.canvas)
        return {"image": image, "label": np.int32(label), "index": np.int32(i)}


@dataclasses.dataclass
class Subset:
    """Some rows of a source, in the given order: itself a `Source`."""

    source: Source
    rows: np.ndarray

    def __post_init__(self) -> None:
        self.num_classes, self.image_shape = self.source.num_classes, self.source.image_shape

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self) -> np.ndarray:
        return np.array([self.label_of(i) for i in range(len(self))], np.int32)

    def label_of(self, i: int) -> int:
        return self.source.label_of(int(self.rows[i]))

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.source[int(self.rows[i])], "index": np.int32(i)}


def center_square(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (h, w, 3) -> (side, side, 3): shorter side resized to `side` (antialiased bilinear), then the centre."""
    h, w = image.shape[:2]
    s = min(h, w)
    left, top = (w - s) / 2, (h - s) / 2
    square = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, (left, top, left + s, top + s))
    return np.asarray(square)
