"""Reads weights: torch.save's two formats, without torch and without running what they say, and safetensors.

Nothing is allocated that the file has no bytes for. A torch checkpoint is a pickle, which `unpickle` interprets.
Formats: torch/serialization.py (`_save` and `_legacy_save`) of torch 2.13.
"""

import io
import json
import shlex
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ssl_kd.errors import UserError
from ssl_kd.weights.unpickle import ForeignError, Storages, check_tree, require, unpickle

# Keys below which checkpoints keep a state dict.
WRAPPERS = (
    *("state_dict", "state_dict_ema", "model", "model_state", "model_state_dict", "model_ema", "ema", "net", "network"),
    *("module", "encoder", "backbone", "teacher", "student"),
)

_TABLE_BYTES = 8 << 20  # of a pickle, a zip directory or a safetensors header: enough for 12 000 tensors

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
# What zipfile, struct, numpy and this module raise for bytes that are not as they should be.
_DAMAGE = (
    *(ValueError, TypeError, LookupError, OverflowError, OSError),
    *(NotImplementedError, struct.error, zipfile.BadZipFile),
)


def read_weights(path: str | Path, key: str = "") -> tuple[dict[str, np.ndarray], list[str], dict[str, str]]:
    """The named tensors of a torch checkpoint or a safetensors file, told apart by content.

    Args:
      key: of several state dicts in a checkpoint, the wanted one's; see `tensors`.

    Returns:
      name -> array as stored, the names of entries that are no tensors, and the metadata of a safetensors file.

    Raises:
      UserError: if the file is missing, damaged, of another kind, or holds no or several state dicts.
    """
    with _File(path) as file:
        is_safetensors = file.read(9)[8:] == b"{"
    if not is_safetensors:
        return *tensors(read_torch(path), path, key), {}
    if key:
        raise UserError(f"{path} is a safetensors file, which holds one state dict: do not choose key {key!r} in it.")
    arrays, metadata = read_safetensors(path)
    return arrays, [], metadata


def tensors(tree: Any, where: str | Path, key: str = "") -> tuple[dict[str, np.ndarray], list[str]]:
    """The one state dict in a checkpoint: at its top or below the usual WRAPPERS.

    Args:
      tree: as `read_torch` returns.
      where: names the checkpoint in messages.
      key: keys to look below, joined by '/', as 'teacher' or 'model/ema'.

    Returns:
      name -> array, and the names of entries that are no tensors.

    Raises:
      UserError: if there is none or more than one.
    """
    for part in key.split("/") if key else ():
        if not isinstance(tree, dict) or part not in tree:
            raise UserError(f"{where} has no key {key!r}: choose one of {_keys(tree)}.")
        tree = tree[part]
    found = _state_dicts(tree)
    if not found:
        raise UserError(f"{where} has no tensors where they are expected: choose the key of them among {_keys(tree)}.")
    if len(found) > 1:
        choices = ", ".join("/".join(filter(None, (key, name))) for name in found)
        raise UserError(f"{where} holds several state dicts: choose one of the keys {choices}.")
    (entries,) = found.values()
    arrays = {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    return arrays, [str(k) for k in entries if k not in arrays]


def _state_dicts(tree: Any, name: str = "") -> dict[str, dict[Any, Any]]:
    """Path -> dict with tensors, as deep as wrappers lead."""
    if not isinstance(tree, dict):
        return {}
    found: dict[str, dict[Any, Any]] = {}
    for wrapper in WRAPPERS:
        found |= _state_dicts(tree.get(wrapper), f"{name}/{wrapper}" if name else wrapper)
    return found or ({name: tree} if any(isinstance(leaf, np.ndarray) for leaf in tree.values()) else {})


def _keys(tree: Any) -> str:
    if not isinstance(tree, dict):
        return f"no keys: it is of type {type(tree).__name__}"
    return (", ".join(repr(k)[:60] for k in list(tree)[:20]) or "no keys") + ", …" * (len(tree) > 20)


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays (bfloat16 as ml_dtypes.bfloat16) and the metadata of a safetensors file.

    Raises:
      UserError: if it cannot be read, or its header and its bytes disagree.
    """
    try:
        with _File(path) as file:
            header = int.from_bytes(file.read(8), "little")
            require(header <= min(file.size - 8, _TABLE_BYTES), f"its header claims {header} of {file.size} bytes")
        with safe_open(path, framework="np") as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}, weights.metadata() or {}  # noqa: SIM118
    except (SafetensorError, AttributeError, *_DAMAGE) as error:  # AttributeError: a type unknown to numpy, as float8
        raise _damaged(path, "safetensors file", error) from error


def read_torch(path: str | Path) -> Any:
    """The object that torch.save wrote, as plain containers.

    Returns:
      dict (also for OrderedDict), list, tuple, str, bytes, int, float, bool, None; numpy arrays for tensors, parameters
      and storages, which share memory where they did in torch; np.dtype for torch's.

    Raises:
      UserError: if the file is missing, damaged, of another kind, or contains anything else.
    """
    try:
        with _File(path) as file:
            head = file.read(512)
            if head.startswith(b"PK\3\4"):
                tree = _read_zip(file)
            elif _LEGACY_MAGIC in head[:32]:
                tree = _read_legacy(file)
            elif head[257:262] == b"ustar":
                raise UserError(f"{path} is a tar archive, as torch before 0.1.10 wrote: save it with a later one.")
            else:
                raise UserError(f"{path} is no torch checkpoint (it begins with {head[:12]!r}): fetch it again.")
            check_tree(tree, max(8 * file.size, 16 << 20))
            return tree
    except ForeignError as error:
        raise UserError(
            f"{path} contains {error}, which is not tensors and plain containers: if you trust the file, run where "
            f"torch is installed {_conversion(path)} which writes its state_dict as safetensors."
        ) from error
    except MemoryError as error:
        raise UserError(f"{path} does not fit into this machine's memory: read it on a larger one.") from error
    except _DAMAGE as error:
        raise _damaged(path, "torch checkpoint", error) from error


def _damaged(path: str | Path, kind: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"{path} is not a whole {kind} ({reason}): fetch it again, or write it anew.")


def _conversion(path: str | Path) -> str:
    """A shell command that lets torch unpickle the file."""
    source, target = (json.dumps(f"{path}{suffix}", ensure_ascii=False) for suffix in ("", ".safetensors"))
    code = (
        "import torch; from safetensors.torch import save_file; "
        f'c = torch.load({source}, "cpu", weights_only=False); '
        f"c = next((c[k] for k in {json.dumps(WRAPPERS)} if k in c), c) if isinstance(c, dict) else c; "
        "c = c if isinstance(c, dict) else c.state_dict(); "
        f"save_file({{k: v.clone().contiguous() for k, v in c.items() if torch.is_tensor(v)}}, {target})"
    )
    return f"`python -c {shlex.quote(code)}`"


# --- files --------------------------------------------------------------------------------------------------------


class _File(io.BufferedReader):
    """A file of known size; what is read as `bytes` is small, whatever a header says."""

    def __init__(self, path: str | Path):
        try:
            super().__init__(io.FileIO(path))
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}): check the path.") from error
        self.size = self.seek(0, io.SEEK_END)
        self.seek(0)

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.size - self.tell())  # the buffer would allocate what is asked for
        size = left if size is None or size < 0 else min(size, left)
        require(size <= _TABLE_BYTES, f"it has a table of {size} bytes")
        return super().read(size)

    def fill(self, array: np.ndarray) -> None:
        """Reads the bytes of a contiguous array."""
        require(self.readinto(array.view(np.uint8).data) == array.nbytes, "it ends too early")


def _read_zip(file: _File) -> Any:
    """The format since torch 1.6: an archive of ROOT/data.pkl, ROOT/byteorder and ROOT/data/KEY for each storage."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        require(len(entries) == len(archive.infolist()), "its archive has two entries of one name")

    def fill(name: str, array: np.ndarray) -> None:
        entry = entries[name]
        sizes = {entry.file_size, entry.compress_size, array.nbytes}
        require(len(sizes) == 1, f"{name!r} in it has {entry.file_size} bytes, not {array.nbytes}, or is compressed")
        require(not entry.compress_type and not entry.flag_bits & 1, f"{name!r} in it is compressed or encrypted")
        file.seek(entry.header_offset)
        signature, *lengths = struct.unpack("<4s22xHH", file.read(30))
        require(signature == b"PK\3\4", f"{name!r} in it is not where its directory says")
        file.seek(sum(lengths), io.SEEK_CUR)
        file.fill(array)
        checksum = zlib.crc32(array.view(np.uint8).data)
        require(entry.CRC in (0, checksum), f"the checksum of {name!r} in it is wrong")  # torch can leave it 0

    def table(name: str) -> bytes:
        content = np.empty(min(entries[name].file_size, file.size, _TABLE_BYTES), np.uint8)
        fill(name, content)
        return content.tobytes()

    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    require(len(roots) == 1, f"its archive has {len(roots)} data.pkl")
    order = table(f"{roots[0]}/byteorder").decode() if f"{roots[0]}/byteorder" in entries else "little"
    require(order in ("little", "big"), f"its byte order is {order[:20]!r}")

    def fill_storage(key: str, array: np.ndarray) -> None:
        fill(f"{roots[0]}/data/{key}", array)
        if order != sys.byteorder:
            array.view(f"u{array.itemsize}").byteswap(inplace=True)

    return unpickle(io.BytesIO(table(f"{roots[0]}/data.pkl")), Storages(file.size, fill_storage))


def _read_legacy(file: _File) -> Any:
    """The format before torch 1.6: five pickles, then each storage as its int64 count and its little-endian bytes."""
    file.seek(0)
    pickles = io.BytesIO(file.read(min(file.size, _TABLE_BYTES)))
    storages, none = Storages(file.size), Storages(0)
    _, version, _ = (unpickle(pickles, none) for _ in range(3))  # magic number, version, sizes of C's types
    require(version == 1001, "its protocol version is not 1001")
    tree = unpickle(pickles, storages)
    keys = unpickle(pickles, none)
    require(isinstance(keys, list) and all(isinstance(key, str) for key in keys), "it lists no storages")
    require(sorted(keys) == sorted(storages.arrays), "its tensors use other storages than it lists")
    file.seek(pickles.tell())
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        require(count == storages.arrays[key].size, f"its storage {key!r} has another size than its tensors say")
        file.fill(storages.arrays[key])
    return tree
