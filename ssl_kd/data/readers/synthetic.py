"""Noise, for timing without a data set."""

import re
import zlib

import numpy as np

from ssl_kd.errors import UserError


class SyntheticReader:
    """Noise, for timing without a data set: 'synthetic:64x10000' is 10 000 images of 64 px; row r has label r % 10."""

    num_classes: int | None = 10
    class_names: tuple[str, ...] | None = None

    def __init__(self, name: str, split: str) -> None:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if not match:
            raise UserError(f"data source 'synthetic:{name}' is not SIDExCOUNT, as synthetic:64x10000")
        self.side, self.count, self.split = int(match[1]), int(match[2]), split

    def __len__(self) -> int:
        return self.count

    def read(self, row: int) -> np.ndarray:
        rng = np.random.default_rng([zlib.crc32(self.split.encode()), row])
        return rng.integers(0, 256, (self.side, self.side, 3), np.uint8)

    def labels(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int32) % 10

    def label_of(self, row: int) -> int:
        return row % 10

    def where(self, row: int) -> str:
        return f"row {row} of the synthetic {self.split} split"
