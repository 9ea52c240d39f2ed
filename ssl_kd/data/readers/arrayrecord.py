"""Our own shards: images packed once into ArrayRecord files, beside a dataset.json that describes them.

A record is a header of eight bytes, then the image: kind 0 an image file's bytes, kind 1 height and width (uint16)
and uint8 (h, w, 3) RGB. Numbers are little-endian.

    magic 'KD' | version uint8 = 1 | kind uint8 | label int32, -1 unknown

dataset.json tells, without a look at the shards, what they hold:

    {"format": 1, "num_classes": 2, "class_names": ["cat", "dog"], "rows": {"train": 3}, "splits": {"train": [
        {"name": "train-00000-of-00001.arrayrecord", "records": 3, "sha256": "9f86…", "labels": [1, 0, 1]}]}}

num_classes, class_names and labels may be null. `rows` counts a split's images at its source: where there are fewer
records, images could not be read, and those after them have moved up.
"""

import dataclasses
import json
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader as _Shard
from array_record.python.array_record_module import ArrayRecordWriter

from ssl_kd.data import splits
from ssl_kd.data.readers.files import shards
from ssl_kd.errors import UserError, reason

FORMAT = 1
SUFFIX = ".arrayrecord"
INDEX = "dataset.json"
JOURNAL = "packing.jsonl"  # of a set that is being packed
_HEADER = struct.Struct("<2sBBi")
_SIZE = struct.Struct("<HH")
_FILE, _RAW = 0, 1


def pack(label: int, image: bytes | np.ndarray) -> bytes:
    """A record of an image file's bytes, or of uint8 (h, w, 3) RGB. Label: -1 unknown."""
    if isinstance(image, np.ndarray):
        return _HEADER.pack(b"KD", FORMAT, _RAW, label) + _SIZE.pack(*image.shape[:2]) + image.tobytes()
    return _HEADER.pack(b"KD", FORMAT, _FILE, label) + image


def unpack(record: bytes) -> tuple[int, memoryview | np.ndarray]:
    """What was packed, as views of the record. Raises: ValueError when it is no such record, or of another version."""
    if len(record) < _HEADER.size or record[:2] != b"KD":
        raise ValueError("not a record that launch/prepare.py wrote")
    _, version, kind, label = _HEADER.unpack_from(record)
    if version != FORMAT or kind not in (_FILE, _RAW):
        raise ValueError(f"format {version}, kind {kind}; this version reads format {FORMAT}")
    body = memoryview(record)[_HEADER.size :]
    if kind == _FILE:
        return label, body
    if len(body) < _SIZE.size:
        raise ValueError("it is cut short")
    h, w = _SIZE.unpack_from(body)
    return label, np.frombuffer(body, np.uint8, offset=_SIZE.size).reshape(h, w, 3)


def open_writer(path: Path) -> ArrayRecordWriter:
    """A new shard: `write(pack(...))`, then `close()`. One record a group, for reading in any order; images are
    compressed already, and raw ones are meant to be fast."""
    return ArrayRecordWriter(str(path), "group_size:1,uncompressed")


@dataclasses.dataclass(frozen=True)
class Shard:
    """What dataset.json says of one."""

    name: str
    records: int
    sha256: str
    labels: list[int] | None


@dataclasses.dataclass(frozen=True)
class Index:
    """What dataset.json says."""

    num_classes: int | None
    class_names: Sequence[str] | None
    rows: Mapping[str, int]
    splits: Mapping[str, Sequence[Shard]]


def write_index(folder: Path, index: Index) -> None:
    """Writes dataset.json, whole or not at all."""
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(index)}))
    os.replace(partial, folder / INDEX)


def read_index(folder: Path) -> Index:
    """What was written. Raises: UserError when it is damaged, of another version or contradicts itself."""
    file = folder / INDEX
    try:
        content = json.loads(file.read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError(f"another format than {FORMAT}, which this version reads")
        index = Index(**content)
        names, classes = index.class_names, index.num_classes
        if names is not None and (len(names) != classes or not all(isinstance(name, str) for name in names)):
            raise ValueError("class_names do not fit num_classes")
        of_split = {split: [Shard(**shard) for shard in found] for split, found in content["splits"].items()}
        for shard in (shard for found in of_split.values() for shard in found):
            labels = shard.labels or [-1] * shard.records
            if len(labels) != shard.records or os.path.basename(shard.name) != shard.name:
                raise ValueError(f"shard {shard.name} is described wrongly")
            if min(labels, default=-1) < -1 or max(labels, default=-1) >= (classes or 0):
                raise ValueError(f"the labels of {shard.name} do not fit num_classes")
        return dataclasses.replace(index, splits=of_split)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}); pack the set again") from error


class ArrayRecordReader:
    """Our own shards: the directory of a dataset.json, or without one a directory, a glob or a brace range.

    Without a dataset.json opening costs a pass over all records, for their labels; shards whose names begin with a
    split's (train-00000-of-00010.arrayrecord) have it, of others a tenth is held out, by row number.
    """

    OPEN_SHARDS = 64  # the number of open files is limited

    def __init__(self, name: str, split: str) -> None:
        self._init_cache()
        classes, names = None, None
        split_is_theirs = True
        if os.path.isfile(os.path.join(name, INDEX)):
            index = read_index(Path(name))
            chosen = index.splits[splits.choose(split, index.splits, f"data source 'arrayrecord:{name}'")]
            self.files = [Path(name, shard.name) for shard in chosen]
            labels = [shard.labels or [-1] * shard.records for shard in chosen]
            classes, names = index.num_classes, index.class_names
        elif os.path.isfile(os.path.join(name, JOURNAL)):
            raise UserError(f"data source 'arrayrecord:{name}' is not packed to its end; give that command again")
        else:
            self.files, split_is_theirs = shards(name, SUFFIX, split, "arrayrecord")
            labels = [self._scan(f) for f in range(len(self.files))]
        stored = np.array([label for of_shard in labels for label in of_shard], np.int32)
        top = int(stored.max(initial=-1))
        self.num_classes = None if top < 0 else classes or top + 1
        self.class_names = None if top < 0 or names is None else tuple(names)
        keys = (b"%d" % row for row in range(len(stored)))
        self._rows = np.arange(len(stored)) if split_is_theirs else splits.held_out(keys, split)
        self._labels = stored[self._rows]
        self._ends = np.cumsum([len(of_shard) for of_shard in labels])  # of shard f: the first row after it

    def _init_cache(self) -> None:
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_shards", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_cache()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> memoryview | np.ndarray:
        f, record = self._place(row)
        shard = self._open(f)
        try:
            return unpack(shard.read([record])[0])[1]  # threads may share it
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.where(row)} cannot be read ({reason(error)}); pack the set again") from error

    def labels(self) -> np.ndarray:
        return self._labels

    def label_of(self, row: int) -> int:
        return int(self._labels[row])

    def where(self, row: int) -> str:
        f, record = self._place(row)
        return f"record {record} of {self.files[f]}"

    def _place(self, row: int) -> tuple[int, int]:
        stored = int(self._rows[row])
        f = int(np.searchsorted(self._ends, stored, side="right"))
        return f, stored - (int(self._ends[f - 1]) if f else 0)

    def _open(self, f: int) -> _Shard:
        """Shard f, through a cache of the OPEN_SHARDS last used; one in use by a thread stays open until it is done."""
        with self._lock:
            if f not in self._shards:
                self._shards[f] = _open_shard(self.files[f])
                if len(self._shards) > self.OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(f)
            return self._shards[f]

    def _scan(self, f: int) -> list[int]:
        shard, step = self._open(f), 64
        try:
            n = shard.num_records()
            blocks = (shard.read(start, min(start + step, n)) for start in range(0, n, step))
            return [unpack(record)[0] for block in blocks for record in block]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.files[f]} cannot be read ({reason(error)}); pack the set again") from error


def _open_shard(file: Path) -> _Shard:
    if not os.path.isfile(file):  # nothing else is opened: a FIFO would wait for writers
        raise UserError(f"{file} is missing or no regular file; fetch it, or pack the set again")
    shard = _Shard(str(file), options="readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=1 << 15)
    if not shard.ok():
        raise UserError(f"{file} is no ArrayRecord file, or cut short; fetch it, or pack the set again")
    return shard
