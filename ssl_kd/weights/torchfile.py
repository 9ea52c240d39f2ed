"""Reads weights: torch.save's two formats, without torch and without running what they say, and safetensors.

A torch checkpoint is a pickle, and unpickling calls whatever a file names. Here `_unpickle` interprets only the opcodes
that torch.save writes, over the few names of one table, and nothing is allocated that the file has no bytes for.
Formats: torch/serialization.py (`_save` and `_legacy_save`) of torch 2.13.
"""

import dataclasses
import io
import json
import math
import pickletools
import shlex
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ssl_kd.errors import UserError

# Keys below which checkpoints keep a state dict.
WRAPPERS = (
    *("state_dict", "state_dict_ema", "model", "model_state", "model_state_dict", "model_ema", "ema", "net", "network"),
    *("module", "encoder", "backbone", "teacher", "student"),
)

# Python's objects take up to a hundred times the bytes of a pickle that makes them; these bound what a small file can
# do to memory. torch.save writes some 40 opcodes (200 bytes) a tensor: they suffice for 12 000 tensors.
_TABLE_BYTES = 8 << 20  # of a pickle, a zip directory or a safetensors header
_WORK = 500_000  # opcodes of a pickle, and elements that functions in it copy
_DEPTH = 64  # of containers in containers

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
            _require(header <= min(file.size - 8, _TABLE_BYTES), f"its header claims {header} of {file.size} bytes")
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
            _check_tree(tree, max(8 * file.size, 16 << 20))
            return tree
    except _ForeignError as error:
        raise UserError(
            f"{path} contains {error}, which is not tensors and plain containers: if you trust the file, run where "
            f"torch is installed {_conversion(path)} which writes its state_dict as safetensors."
        ) from error
    except MemoryError as error:
        raise UserError(f"{path} does not fit into this machine's memory: read it on a larger one.") from error
    except _DAMAGE as error:
        raise _damaged(path, "torch checkpoint", error) from error


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


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
        _require(size <= _TABLE_BYTES, f"it has a table of {size} bytes")
        return super().read(size)

    def fill(self, array: np.ndarray) -> None:
        """Reads the bytes of a contiguous array."""
        _require(self.readinto(array.view(np.uint8).data) == array.nbytes, "it ends too early")


def _read_zip(file: _File) -> Any:
    """The format since torch 1.6: an archive of ROOT/data.pkl, ROOT/byteorder and ROOT/data/KEY for each storage."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        _require(len(entries) == len(archive.infolist()), "its archive has two entries of one name")

    def fill(name: str, array: np.ndarray) -> None:
        entry = entries[name]
        sizes = {entry.file_size, entry.compress_size, array.nbytes}
        _require(len(sizes) == 1, f"{name!r} in it has {entry.file_size} bytes, not {array.nbytes}, or is compressed")
        _require(not entry.compress_type and not entry.flag_bits & 1, f"{name!r} in it is compressed or encrypted")
        file.seek(entry.header_offset)
        signature, *lengths = struct.unpack("<4s22xHH", file.read(30))
        _require(signature == b"PK\3\4", f"{name!r} in it is not where its directory says")
        file.seek(sum(lengths), io.SEEK_CUR)
        file.fill(array)
        checksum = zlib.crc32(array.view(np.uint8).data)
        _require(entry.CRC in (0, checksum), f"the checksum of {name!r} in it is wrong")  # torch can leave it 0

    def table(name: str) -> bytes:
        content = np.empty(min(entries[name].file_size, file.size, _TABLE_BYTES), np.uint8)
        fill(name, content)
        return content.tobytes()

    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    _require(len(roots) == 1, f"its archive has {len(roots)} data.pkl")
    order = table(f"{roots[0]}/byteorder").decode() if f"{roots[0]}/byteorder" in entries else "little"
    _require(order in ("little", "big"), f"its byte order is {order[:20]!r}")

    def fill_storage(key: str, array: np.ndarray) -> None:
        fill(f"{roots[0]}/data/{key}", array)
        if order != sys.byteorder:
            array.view(f"u{array.itemsize}").byteswap(inplace=True)

    return _unpickle(io.BytesIO(table(f"{roots[0]}/data.pkl")), _Storages(file.size, fill_storage))


def _read_legacy(file: _File) -> Any:
    """The format before torch 1.6: five pickles, then each storage as its int64 count and its little-endian bytes."""
    file.seek(0)
    pickles = io.BytesIO(file.read(min(file.size, _TABLE_BYTES)))
    storages, none = _Storages(file.size), _Storages(0)
    _, version, _ = (_unpickle(pickles, none) for _ in range(3))  # magic number, version, sizes of C's types
    _require(version == 1001, "its protocol version is not 1001")
    tree = _unpickle(pickles, storages)
    keys = _unpickle(pickles, none)
    _require(isinstance(keys, list) and all(isinstance(key, str) for key in keys), "it lists no storages")
    _require(sorted(keys) == sorted(storages.arrays), "its tensors use other storages than it lists")
    file.seek(pickles.tell())
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        _require(count == storages.arrays[key].size, f"its storage {key!r} has another size than its tensors say")
        file.fill(storages.arrays[key])
    return tree


# --- pickles ------------------------------------------------------------------------------------------------------


class _ForeignError(Exception):
    """A global name that tensors and plain containers do not need; its text is the name."""


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


class _Storages:
    """Storages by key: 1-d arrays, allocated once and all together no larger than the file that claims them."""

    def __init__(self, file_size: int, fill: Callable[[str, np.ndarray], None] = lambda key, array: None):
        self.arrays: dict[str, np.ndarray] = {}
        self._unclaimed = file_size
        self._fill = fill

    def get(self, persistent_id: Any) -> np.ndarray:
        """The storage of ('storage', type, key, location, count); the old format appends a None."""
        match persistent_id:
            case ("storage", _StorageType(dtype=dtype), str(key), _, int(count), *view) if view in ([], [None]):
                pass
            case _:
                raise ValueError("it refers to something that is no storage")
        if key not in self.arrays:
            self._unclaimed -= count * dtype.itemsize
            _require(count >= 0 and self._unclaimed >= 0, f"its storage {key[:40]!r} claims more bytes than there are")
            self.arrays[key] = np.empty(count, dtype)
            self._fill(key, self.arrays[key])
        array = self.arrays[key]
        _require(array.dtype == dtype and array.size == count, f"its storage {key[:40]!r} has two types or sizes")
        return array


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = 0, hooks: Any = (), metadata: Any = None
) -> np.ndarray:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: a strided view of a storage, counted in elements."""
    _require(not metadata, "it has a tensor that is conjugated or negated lazily")
    _require(isinstance(storage, np.ndarray) and type(size) is type(stride) is tuple, "it has a tensor without storage")
    numbers = (offset, *size, *stride)
    possible = len(size) == len(stride) <= 64 and all(isinstance(n, int) and 0 <= n < 1 << 63 for n in numbers)
    _require(possible, "it has a tensor of impossible size or stride")
    if 0 in size:
        return np.empty(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    distinct = math.prod(n for n, step in zip(size, stride, strict=True) if step)  # the others only repeat
    _require(max(last + 1, distinct) <= storage.size, f"a tensor of shape {size} in it is larger than its storage")
    width, memory = storage.itemsize, storage.view(np.uint8)  # as bytes, for bfloat16 is no buffer
    return np.ndarray(size, storage.dtype, memory, offset * width, [step * width for step in stride])


def _extend(target: Any, items: list[Any]) -> None:
    _require(type(target) is list, "its pickle appends to what is no list")
    target += items


def _set_items(target: Any, items: list[Any]) -> None:
    """Stores [key, value, key, value, …]. Keys are never tuples, whose hash recurses."""
    keys, values = items[::2], items[1::2]
    _require(type(target) is dict, "its pickle sets items of what is no dict")
    _require(all(isinstance(key, str | int) for key in keys), "its pickle has keys that are not str or int")
    target.update(zip(keys, values, strict=True))


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    _set_items(result, [item for key, value in pairs for item in (key, value)])
    return result


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    _require(isinstance(text, str) and encoding == "latin1", "its pickle encodes otherwise than in latin1")
    return text.encode("latin1")


_DTYPES = {
    **{"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16},
    **{"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_},
}


def _namespace() -> dict[Any, Any]:
    """The command line that DINO, DeiT and timm keep in checkpoints; what it was set to is not read."""
    return {}


_GLOBALS: dict[str, Any] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch._utils _rebuild_parameter_with_state": lambda tensor, requires_grad, hooks, state: tensor,
    "torch.nn.parameter Parameter": lambda tensor: tensor,  # torch 0.1 to 0.3, as torchvision's first weights
    "torch Size": lambda size: size,
    "collections OrderedDict": _ordered_dict,
    "_codecs encode": _encode,
    "__builtin__ bytes": lambda: b"",
    "argparse Namespace": _namespace,
    "torch.storage UntypedStorage": _StorageType(np.dtype(np.uint8)),
    **{f"torch {name}Storage": _StorageType(np.dtype(dtype)) for name, dtype in _DTYPES.items()},
    **{f"torch.cuda {name}Storage": _StorageType(np.dtype(dtype)) for name, dtype in _DTYPES.items()},
    **{f"torch {np.dtype(dtype).name}": np.dtype(dtype) for dtype in _DTYPES.values()},
}


def _global(name: str) -> Any:
    if name not in _GLOBALS:
        raise _ForeignError(repr(name.replace(" ", ".", 1))[1:-1][:100])
    return _GLOBALS[name]


_NEW: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple},
}
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}


def _unpickle(stream: io.BytesIO, storages: _Storages) -> Any:
    """Interprets one pickle of protocol 2 or later. It parses arguments only of opcodes it knows."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks below the marks
    memo: list[Any] = []

    def argument() -> Any:
        return op.arg.reader(stream)

    def taken() -> list[Any]:
        nonlocal stack
        if op.name in _TAKES:
            return [stack.pop() for _ in range(_TAKES[op.name])][::-1]
        items, stack = stack, below.pop()
        return items

    work = 0
    while work < _WORK:
        work += 1
        code = stream.read(1).decode("latin-1")
        op: Any = pickletools.code2op.get(code)  # type: ignore[attr-defined]
        _require(op is not None, f"its pickle has an unknown opcode {code!r}" if code else "its pickle has no end")
        match op.name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument())
            case new if new in _NEW:
                stack.append(_NEW[new]())
            case "BINPUT" | "LONG_BINPUT":
                index = argument()
                _require(index <= len(memo), f"its pickle numbers its {len(memo)} memories up to {index}")
                memo[index : index + 1] = [stack[-1]]
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument()])
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = tuple(taken())
                stack.append(items)
            case "APPEND" | "APPENDS":
                extension = taken()
                _extend(stack[-1], extension)
            case "SETITEM" | "SETITEMS":
                pairs = taken()
                _set_items(stack[-1], pairs)
            case "GLOBAL":  # two lines, read raw: its own reader decodes escapes, and warns
                lines: list[Any] = [pickletools.read_stringnl(stream, False, False) for _ in range(2)]
                stack.append(_global(b" ".join(lines).decode()))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                _require(isinstance(name, str) and isinstance(module, str), "its pickle has a name that is no str")
                stack.append(_global(f"{module} {name}"))
            case "BINPERSID":
                stack.append(storages.get(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                _require(callable(function) and isinstance(arguments, tuple), "its pickle calls what is no function")
                work += sum(len(part) for part in arguments if isinstance(part, str | list | tuple | dict))
                stack.append(function(*arguments))
            case "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                _require(function is _namespace and arguments == (), "its pickle makes an object of an unknown class")
                stack.append(function())
            case "BUILD":  # attributes: `_metadata` of a state dict, a command line's; those of a parameter
                state, target = stack.pop(), stack[-1]
                known = isinstance(target, np.ndarray) and isinstance(state, tuple) and len(state) == 3
                _require(known or type(target) is dict, "its pickle sets attributes of what has none")
            case "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument())
            case "BINSTRING" | "SHORT_BINSTRING":  # Python 2's str
                stack.append(argument().encode("latin-1").decode())
            case "PROTO" | "FRAME":
                argument()
            case "STOP":
                _require(len(stack) == 1 and not below, "its pickle leaves more than one thing")
                return stack[0]
            case _:
                raise ValueError(f"its pickle has the opcode {op.name}, which torch.save does not write")
    raise ValueError(f"its pickle does more than {_WORK} things")


def _check_tree(tree: Any, allowed: int) -> None:
    """Refuses what cannot be walked or held: deep nesting (a cycle is endless), repetition, more bytes than allowed."""
    pending: list[tuple[Any, Any, int]] = [("", tree, 0)]
    nodes = total = 0
    while pending:
        name, node, depth = pending.pop()
        match node:
            case dict() | list() | tuple():
                nodes += len(node)
                _require(depth <= _DEPTH and nodes <= _WORK, "its containers are nested without end")
                items = node.items() if isinstance(node, dict) else enumerate(node)
                pending += [(key, child, depth + 1) for key, child in items]
            case np.ndarray():
                total += node.nbytes
                _require(total <= allowed, f"its tensors up to {str(name)[:60]!r} would take {total} bytes")
            case None | bool() | int() | float() | str() | bytes() | np.dtype():
                pass
            case _:
                raise ValueError("it keeps a function of torch as a value")
