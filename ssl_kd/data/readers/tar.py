"""Tar shards in WebDataset's naming: KEY.jpg with KEY.cls or KEY.json."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssl_kd.data import splits
from ssl_kd.data.readers.files import Names, read_bytes, shards, shown
from ssl_kd.errors import UserError, reason

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_LABEL_BYTES = 1 << 20  # read at most


class TarReader:
    """The images of tar shards: a directory of .tar files, a glob, or 'train-{000000..000012}.tar'.

    A sample is the members whose names agree up to the first dot of the file's name. Its image is its first member
    KEY.jpg, .jpeg, .png, .webp or .bmp; its label the integer in KEY.cls, or 'label' or 'cls' of the object in
    KEY.json. Shards whose names begin with a split's (train-000.tar) have it; of others a tenth is held out, by name.

    Headers are read once, to note where images lie; `read` then fetches one by its offset. Nothing is unpacked:
    members' names never become paths, and links, devices and sparse members are passed over.
    """

    class_names: tuple[str, ...] | None = None

    def __init__(self, name: str, split: str) -> None:
        self.files, split_is_theirs = shards(name, ".tar", split, "tar")
        found = [_index(file) for file in self.files]
        names = [name for shard, _ in found for name in shard]
        if not names:
            raise UserError(f"data source 'tar:{name}' holds no images (members KEY.{', KEY.'.join(IMAGES)})")
        table = np.concatenate([table for _, table in found])
        top = int(table[:, 2].max())
        self.num_classes = None if top < 0 else top + 1
        rows = np.arange(len(names)) if split_is_theirs else splits.held_out(names, split)
        self._names = Names(names[row] for row in rows)
        self._places, self._labels = table[rows, :2], table[rows, 2].astype(np.int32)
        self._file_of = np.repeat(np.arange(len(found), dtype=np.int32), [len(shard) for shard, _ in found])[rows]

    def __len__(self) -> int:
        return len(self._names)

    def read(self, row: int) -> bytes:
        offset, size = self._places[row].tolist()
        return read_bytes(self.files[self._file_of[row]], offset, size)

    def labels(self) -> np.ndarray:
        return self._labels

    def label_of(self, row: int) -> int:
        return int(self._labels[row])

    def where(self, row: int) -> str:
        return f"{shown(self._names[row])} in {self.files[self._file_of[row]]}"


def _index(file: Path) -> tuple[list[bytes], np.ndarray]:
    """The image members of a shard, and int64 (n, 3): offset, size and label of each."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    for name, offset, size in _members(file):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if extension in IMAGES:
            images.setdefault(key, (name, offset, size))
        elif extension in ("cls", "json"):
            label = _label(read_bytes(file, offset, min(size, _LABEL_BYTES)), extension, f"{name} in {file}")
            labels[key] = max(label, labels.get(key, -1))
    names = [name.encode("utf-8", "surrogateescape") for name, *_ in images.values()]
    table = [(offset, size, labels.get(key, -1)) for key, (_, offset, size) in images.items()]
    return names, np.array(table, np.int64).reshape(-1, 3)


def _members(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every plain file in a shard, from its headers alone.

    Raises: UserError when the shard is compressed, damaged, or ends without the zeros that end every archive.
    """
    try:
        with file.open("rb") as archive:
            start = archive.read(8)
            for magic, unpack in _COMPRESSED.items():
                if start.startswith(magic):
                    raise UserError(f"{file} is compressed, so that no image can be read alone; run: {unpack} {file}")
            archive.seek(0)
            with tarfile.open(fileobj=archive, mode="r:", encoding="utf-8") as tar:
                while member := tar.next():
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    if tar.offset <= member.offset:  # negative: it would read the same members for ever
                        raise tarfile.ReadError(f"{member.name} is said to have {member.size} bytes")
                    if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                        yield member.name, member.offset_data, member.size
            # The loop ends as well at a damaged header, and where the file is cut between members.
            archive.seek(tar.offset)
            if archive.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"at byte {tar.offset} is neither a member nor the end")
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{file} is corrupt or truncated ({reason(error)}); fetch it again") from error


def _label(data: bytes, extension: str, where: str) -> int:
    """-1 for a .json without one."""
    try:
        content = int(data) if extension == "cls" else json.loads(data)
        if isinstance(content, dict):
            content = content.get("label", content.get("cls"))
        label = content if isinstance(content, int) else -1
        if not -1 <= label < 2**31:
            raise ValueError(f"{label} is out of range")
    except (ValueError, RecursionError) as error:
        raise UserError(f"label {where} cannot be read ({reason(error)}); write an integer from 0 on") from error
    return label
