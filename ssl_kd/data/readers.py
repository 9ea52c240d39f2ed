"""Storage formats: the embedded set, Hugging Face parquet directories, prepared TFDS sets; and noise.

A *reader* knows one of them: `len(reader)` and `reader.read(row) -> (uint8 (h, w, 3), label)`. Readers are picklable
and reopen their files lazily.
"""

import functools
import io
import json
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from ssl_kd.errors import UserError


class Reader(Protocol):
    """One split of one storage format."""

    num_classes: int | None

    def __len__(self) -> int: ...
    def read(self, row: int) -> tuple[np.ndarray, int]: ...  # uint8 (h, w, 3), label
    def label_of(self, row: int) -> int: ...  # without decoding the image
    def where(self, row: int) -> str: ...  # for messages


def decode_image(data: bytes | pa.Buffer, where: Callable[[], str]) -> np.ndarray:
    """An image file's bytes -> uint8 (h, w, 3) RGB; grey becomes three equal channels, transparency is dropped.

    Raises: UserError naming `where()` when no decoder reads the bytes.
    """
    view = np.frombuffer(data, np.uint8)
    if view[:2].tobytes() == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(view, colorspace="RGB")  # same pixels as Pillow's, five times as fast
        except ValueError:
            pass  # odd but perhaps readable: Pillow forgives what libjpeg only warns about
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits instead of scaling them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise anything on corrupt bytes: OSError, SyntaxError, struct.error
        reason = _first_line(error).partition(" <")[0]  # less "<_io.BytesIO object at 0x…>"
        raise UserError(f"{where()} is not a readable image ({reason}); restore or remove it") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- embedded -----------------------------------------------------------------------------------------------------


@functools.cache
def _embedded_tiles(split: str) -> np.ndarray:
    """uint8 (n, 28, 28) of the split's mosaic: ten tiles a row, column = class (see embedded/build.py)."""
    with Image.open(Path(__file__).parent / "embedded" / f"{split}.png") as mosaic:
        pixels = np.asarray(mosaic)
    return pixels.reshape(-1, 28, 10, 28).transpose(0, 2, 1, 3).reshape(-1, 28, 28)


class EmbeddedReader:
    """The Fashion-MNIST subset in this package; row r has label r % 10."""

    num_classes: int | None = 10

    def __init__(self, name: str, split: str) -> None:
        if split not in ("train", "test"):
            raise UserError(f"data source 'embedded' has no split {split!r}; it has 'train' and 'test'")
        self.split = split

    def __len__(self) -> int:
        return len(_embedded_tiles(self.split))

    def read(self, row: int) -> tuple[np.ndarray, int]:
        return np.repeat(_embedded_tiles(self.split)[row, :, :, None], 3, axis=-1), self.label_of(row)

    def label_of(self, row: int) -> int:
        return row % 10

    def where(self, row: int) -> str:
        return f"row {row} of the embedded {self.split} split"


# --- Hugging Face parquet -----------------------------------------------------------------------------------------


class ParquetReader:
    """A split of a Hugging Face parquet directory.

    Files `SPLIT-*.parquet` lie in the directory itself, its `data/`, or one sub-folder; the columns are found in the
    schema's `huggingface` metadata, else by type and name. Labels are read at once; of the images, the least recently
    used row groups beyond CACHE_BYTES (per process, still encoded) are forgotten. A set larger than that costs about a
    row group per image in random order: write it with small row groups (16 rows).
    """

    CACHE_BYTES = 4 << 30

    def __init__(self, name: str, split: str) -> None:
        self.files = _split_files(Path(name), split)
        self._init_cache()
        schema = self._open(0).schema_arrow
        self.image, self.label, classes = _columns(schema, self.files[0])
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
        self.labels = np.concatenate(labels) if labels else np.full(len(self), -1, np.int32)
        top = int(self.labels.max(initial=-1))
        self.num_classes = None if top < 0 else classes or top + 1
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

    def read(self, row: int) -> tuple[np.ndarray, int]:
        k = int(np.searchsorted(self.ends, row, side="right"))
        encoded = self._group(k)[row - (int(self.ends[k - 1]) if k else 0)]
        if not encoded.is_valid:
            raise UserError(f"{self.where(row)} has no image bytes; write the images into the parquet files")
        return decode_image(encoded.as_buffer(), lambda: self.where(row)), self.label_of(row)

    def label_of(self, row: int) -> int:
        return int(self.labels[row])

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

    def _open(self, f: int) -> pq.ParquetFile:
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
    return UserError(f"{file} is corrupt or truncated ({_first_line(error)}); fetch it again")


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
    names = sorted({name for splits in found.values() for name in splits})
    if split == "test" and "test" not in names and "validation" in names:
        split = "validation"
    holders = [folder for folder, splits in found.items() if split in splits]
    if not holders:
        there = f"the splits there are {', '.join(names)}" if names else "it holds no parquet files at all"
        raise UserError(f"{root} has no parquet files of split {split!r}; {there}")
    if len(holders) > 1:
        where = ", ".join(f"hf:{folder}" for folder in holders)
        raise UserError(f"{root} has split {split!r} in several folders; choose one of {where}")
    files = found[holders[0]][split]
    total = re.search(r"-of-0*(\d+)", files[0].stem)
    if total and len(files) != int(total[1]):
        raise UserError(f"{holders[0]} has {len(files)} of the {total[1]} files of split {split!r}; fetch the others")
    return files


def _columns(schema: pa.Schema, file: Path) -> tuple[str, str | None, int | None]:
    """(image column, label column or None, number of classes if declared).

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
    classes = len(declared.get("names") or ()) or declared.get("num_classes")
    return image + ".bytes" * pa.types.is_struct(schema.field(image).type), label, classes


# --- TensorFlow Datasets ------------------------------------------------------------------------------------------


class TfdsReader:
    """A split of a TFDS set prepared as array_record, read without TensorFlow; the directory is TFDS_DATA_DIR's."""

    def __init__(self, name: str, split: str) -> None:
        spec = f"data source 'tfds:{name}'"
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            remedy = "pip install tensorflow-datasets array_record importlib_resources"
            raise UserError(f"{spec} cannot be read ({_first_line(error)}); run: {remedy}") from error
        try:
            builder = tfds.builder(name, file_format="array_record")
        except (ValueError, AttributeError, LookupError, OSError) as error:
            raise UserError(f"{spec} cannot be opened ({_first_line(error)}); check its name") from error
        if not builder.info.splits:
            prepare = f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
            raise UserError(
                f"{spec} is not prepared in {builder.data_dir}; where tensorflow is installed, run: "
                f'python -c "import tensorflow_datasets as tfds; {prepare}"'
            )
        if split not in builder.info.splits:
            raise UserError(f"{spec} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        features = builder.info.features
        images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
        if not images:
            raise UserError(f"{spec} has no image feature (it has {', '.join(features)}); choose an image set")
        self.name, self.split, self.image = name, split, images[0]
        self.label = labels[0] if labels else None
        self.num_classes = features[self.label].num_classes if self.label else None
        self.rows = builder.as_data_source(split, decoders={self.image: tfds.decode.SkipDecoding()})

    def __reduce__(self) -> tuple:
        return TfdsReader, (self.name, self.split)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> tuple[np.ndarray, int]:
        return decode_image(self.rows[row][self.image], lambda: self.where(row)), self.label_of(row)

    def label_of(self, row: int) -> int:
        return int(self.rows[row][self.label]) if self.label else -1

    def where(self, row: int) -> str:
        return f"row {row} of tfds:{self.name} {self.split}"


# --- synthetic ----------------------------------------------------------------------------------------------------


class SyntheticReader:
    """Noise, for timing without a data set: 'synthetic:64x10000' is 10 000 images of 64 px; row r has label r % 10."""

    num_classes: int | None = 10

    def __init__(self, name: str, split: str) -> None:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if not match:
            raise UserError(f"data source 'synthetic:{name}' is not SIDExCOUNT, as synthetic:64x10000")
        self.side, self.count, self.split = int(match[1]), int(match[2]), split

    def __len__(self) -> int:
        return self.count

    def read(self, row: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([zlib.crc32(self.split.encode()), row])
        return rng.integers(0, 256, (self.side, self.side, 3), np.uint8), self.label_of(row)

    def label_of(self, row: int) -> int:
        return row % 10

    def where(self, row: int) -> str:
        return f"row {row} of the synthetic {self.split} split"


READERS: dict[str, Callable[[str, str], Reader]] = {
    "embedded": EmbeddedReader,
    "hf": ParquetReader,
    "tfds": TfdsReader,
    "synthetic": SyntheticReader,
}
