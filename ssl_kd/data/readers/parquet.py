"""Hugging Face parquet directories, read without the `datasets` package."""

import json
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssl_kd.data.splits import choose
from ssl_kd.errors import UserError, reason

if TYPE_CHECKING:
    import pyarrow.parquet as pq


class ParquetReader:
    """A split of a Hugging Face parquet directory.

    Files `SPLIT-*.parquet` lie in the directory itself, its `data/`, or one sub-folder; the columns are found in the
    schema's `huggingface` metadata, else by type and name. Labels are read at once; of the images, the least recently
    used row groups beyond CACHE_BYTES (still encoded) are forgotten. That is little, because every reader process has
    such a cache, and all together are to stay within 2 GB. A set larger than it costs about a row group per image in
    random order: write it with small row groups (16 rows).
    """

    CACHE_BYTES = 256 << 20

    def __init__(self, name: str, split: str) -> None:
        self.files = _split_files(Path(name), split)
        self._init_cache()
        schema = self._open(0).schema_arrow
        self.image, self.label, classes, names = _columns(schema, self.files[0])
        groups, labels = [], []
        for f in range(len(self.files)):
            file = self._open(f)
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            groups += [(f, g, size) for g, size in enumerate(sizes)]
            if self.label:
                column = self._load(f, None, self.label)
                labels.append(pc.fill_null(column, -1).to_numpy().astype(np.int32))
        self.groups = [(f, g) for f, g, _ in groups]
        self.ends = np.cumsum([size for *_, size in groups])  # ends[k]: first row after group k
        self._labels = np.concatenate(labels) if labels else np.full(len(self), -1, np.int32)
        top = int(self._labels.max(initial=-1))
        self.num_classes = None if top < 0 else classes or top + 1
        self.class_names = None if top < 0 else names
        if classes and top >= classes:
            raise UserError(f"{self.files[0].parent} has label {top}, but its metadata names only {classes} classes")

    def _init_cache(self) -> None:
        self._handles: dict[int, pq.ParquetFile] = {}
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_handles", "_cache", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_cache()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def where(self, row: int) -> str:
        k = int(np.searchsorted(self.ends, row, side="right"))
        f, _ = self.groups[k]
        first = next(self.ends[j - 1] if j else 0 for j, (file, _) in enumerate(self.groups) if file == f)
        return f"row {row - first} of {self.files[f]}"

    def read(self, row: int) -> pa.Buffer:
        k = int(np.searchsorted(self.ends, row, side="right"))
        encoded = self._group(k)[row - (int(self.ends[k - 1]) if k else 0)]
        if not encoded.is_valid:
            raise UserError(f"{self.where(row)} has no image bytes; write the images into the parquet files")
        return encoded.as_buffer()

    def labels(self) -> np.ndarray:
        return self._labels

    def label_of(self, row: int) -> int:
        return int(self._labels[row])

    def _group(self, k: int) -> pa.ChunkedArray:
        """The encoded images of row group k, through the cache."""
        with self._lock:  # a ParquetFile serves one thread at a time
            if k in self._cache:
                self._cache.move_to_end(k)
                return self._cache[k]
            images = self._cache[k] = self._load(*self.groups[k], self.image)
            self._cached_bytes += images.nbytes
            while len(self._cache) > 1 and self._cached_bytes > self.CACHE_BYTES:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
            return images

    def _open(self, f: int) -> "pq.ParquetFile":
        import pyarrow.parquet as pq  # here, for it starts a client of cloud stores, which takes seconds

        if f not in self._handles:
            try:
                self._handles[f] = pq.ParquetFile(self.files[f])
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(self.files[f], error) from error
        return self._handles[f]

    def _load(self, f: int, group: int | None, column: str) -> pa.ChunkedArray:
        """One column of a row group (None: of the whole file); 'image.bytes' names a struct's field."""
        file = self._open(f)
        try:
            table = file.read(columns=[column]) if group is None else file.read_row_group(group, columns=[column])
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.files[f], error) from error
        if table.num_columns != 1:
            raise UserError(f"{self.files[f]} lacks the column {column!r} of {self.files[0].name}; they must agree")
        values = table.column(0)
        return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is corrupt or truncated ({reason(error)}); fetch it again")


def _split_files(root: Path, split: str) -> list[Path]:
    """The parquet files of a split, in order."""
    if not root.is_dir():
        raise UserError(f"data source 'hf:{root}': there is no directory {root}; give a directory of parquet files")
    folders = [root, root / "data", *sorted(p for p in root.iterdir() if p.is_dir() and p.name != "data")]
    found: dict[Path, dict[str, list[Path]]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.parquet")):
            name = re.sub(r"-\d.*", "", file.stem)  # train-00000-of-00001-1a2b3c -> train
            found.setdefault(folder, {}).setdefault(name, []).append(file)
    names = {name for splits in found.values() for name in splits}
    if not names:
        raise UserError(f"data source 'hf:{root}' has no parquet files at all; give the directory that holds them")
    split = choose(split, names, f"data source 'hf:{root}'")
    holders = [folder for folder, splits in found.items() if split in splits]
    if len(holders) > 1:
        where = ", ".join(f"hf:{folder}" for folder in holders)
        raise UserError(f"{root} has split {split!r} in several folders; choose one of {where}")
    files = found[holders[0]][split]
    total = re.search(r"-of-0*(\d+)", files[0].stem)
    if total and len(files) != int(total[1]):
        raise UserError(f"{holders[0]} has {len(files)} of the {total[1]} files of split {split!r}; fetch the others")
    return files


def _columns(schema: pa.Schema, file: Path) -> tuple[str, str | None, int | None, tuple[str, ...] | None]:
    """(image column, label column or None, number of classes and their names if declared).

    Both are those that the `huggingface` metadata types as Image and ClassLabel, else the columns of a fitting type;
    of several, the one with the usual name, else the first.
    """
    raw = (schema.metadata or {}).get(b"huggingface", b"{}")
    features = (json.loads(raw).get("info") or {}).get("features") or {}

    def pick(kind: str, fits: Any, usual: tuple[str, ...]) -> str | None:
        declared = [n for n in schema.names if isinstance(features.get(n), dict) and features[n].get("_type") == kind]
        names = declared or [field.name for field in schema if fits(field)]
        return next((n for n in usual if n in names), names[0] if names else None)

    def is_image(field: pa.Field) -> bool:
        if pa.types.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        return pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)

    label_names = ("label", "labels", "fine_label")  # by name: an integer column may also be an id or a size
    image = pick("Image", is_image, ("image", "img"))
    label = pick("ClassLabel", lambda field: field.name in label_names and pa.types.is_integer(field.type), label_names)
    if image is None:
        raise UserError(
            f"{file} has no image column (it has {', '.join(schema.names)}); use a struct with 'bytes', or binary"
        )
    declared = features.get(label) or {}
    names = tuple(declared.get("names") or ()) or None
    classes = len(names) if names else declared.get("num_classes")
    return image + ".bytes" * pa.types.is_struct(schema.field(image).type), label, classes, names
