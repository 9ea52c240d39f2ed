"""Storage formats, one a file, behind one protocol; and `open_reader`, which opens any of them by its name."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pyarrow as pa

from ssl_kd.data.readers.arrayrecord import ArrayRecordReader
from ssl_kd.data.readers.embedded import EmbeddedReader
from ssl_kd.data.readers.folder import FolderReader
from ssl_kd.data.readers.parquet import ParquetReader
from ssl_kd.data.readers.synthetic import SyntheticReader
from ssl_kd.data.readers.tar import TarReader
from ssl_kd.data.readers.tfds import TfdsReader
from ssl_kd.errors import UserError


class Reader(Protocol):
    """Random access to stored images: what lies in row r, still encoded, and its label. Picklable, thread-safe."""

    num_classes: int | None  # None when there are no labels
    class_names: tuple[str, ...] | None  # of all classes; None where the store does not tell

    def __len__(self) -> int: ...
    def read(self, row: int) -> bytes | memoryview | pa.Buffer | np.ndarray: ...  # a file, or uint8 (h, w, 3) RGB
    def labels(self) -> np.ndarray: ...  # int32 (N,), -1 unknown; without decoding
    def label_of(self, row: int) -> int: ...
    def where(self, row: int) -> str: ...  # for messages


READERS: dict[str, Callable[[str, str], Reader]] = {
    "embedded": EmbeddedReader,
    "folder": FolderReader,
    "tar": TarReader,
    "arrayrecord": ArrayRecordReader,
    "hf": ParquetReader,
    "tfds": TfdsReader,
    "synthetic": SyntheticReader,
}


def open_reader(spec: str, split: str) -> Reader:
    """The images of one split.

    Args:
      spec: 'embedded' (Fashion-MNIST subset: 10 000 train, 4 000 test) | 'folder:PATH' (a directory of image files, a
        glob, or a .txt list of paths) | 'tar:PATTERN' (WebDataset shards) | 'arrayrecord:PATTERN' (shards that
        launch/prepare.py wrote) | 'hf:PATH' (a directory of Hugging Face parquet files) | 'tfds:NAME' (a prepared
        TensorFlow Datasets set; reading it needs no TensorFlow) | 'synthetic:SIDExCOUNT' (noise, for timing). The
        readers' docstrings say more.
      split: a split's bare name, as `splits.parse_split` gives it.

    Raises:
      UserError: unknown spec or split; missing, empty, corrupt, truncated or unreadable files.
    """
    kind, _, name = spec.partition(":")
    if kind not in READERS or bool(name) != (kind != "embedded"):
        raise UserError(
            f"data.source={spec!r} is unknown; use 'embedded', 'folder:PATH', 'tar:PATTERN', 'arrayrecord:PATTERN', "
            "'hf:PATH', 'tfds:NAME' or 'synthetic:SIDExCOUNT'"
        )
    return READERS[kind](name, split)
