"""The Fashion-MNIST subset in this package."""

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_kd import data
from ssl_kd.errors import UserError


@functools.cache
def _tiles(split: str) -> np.ndarray:
    """uint8 (n, 28, 28) of the split's mosaic: ten tiles a row, column = class (see embedded/build.py)."""
    with Image.open(Path(data.__file__).parent / "embedded" / f"{split}.png") as mosaic:
        pixels = np.asarray(mosaic)
    return pixels.reshape(-1, 28, 10, 28).transpose(0, 2, 1, 3).reshape(-1, 28, 28)


class EmbeddedReader:
    """The Fashion-MNIST subset in this package; row r has label r % 10."""

    num_classes: int | None = 10
    class_names: tuple[str, ...] | None = None

    def __init__(self, name: str, split: str) -> None:
        if split not in ("train", "test"):
            raise UserError(f"data source 'embedded' has no split {split!r}; it has 'train' and 'test'")
        self.split = split

    def __len__(self) -> int:
        return len(_tiles(self.split))

    def read(self, row: int) -> np.ndarray:
        return np.repeat(_tiles(self.split)[row, :, :, None], 3, axis=-1)

    def labels(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int32) % 10

    def label_of(self, row: int) -> int:
        return row % 10

    def where(self, row: int) -> str:
        return f"row {row} of the embedded {self.split} split"
