"""What a pickle of torch.save means, without running what it says.

Unpickling calls whatever a file names. `unpickle` interprets only the opcodes that torch.save writes, over the few
names of one table, and allocates nothing that the file has no bytes for.
"""

import dataclasses
import io
import math
import pickletools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# Python's objects take up to a hundred times the bytes of a pickle that makes them; these bound what a small file can
# do to memory. torch.save writes some 40 opcodes (200 bytes) a tensor: they suffice for 12 000 tensors.
_WORK = 500_000  # opcodes of a pickle, and elements that functions in it copy
_DEPTH = 64  # of containers in containers


def unpickle(stream: io.BytesIO, storages: "Storages") -> Any:
    """The object of one pickle, which begins where the stream stands; its tensors lie in `storages`.

    Raises:
      ForeignError: for a name that tensors and plain containers do not need.
      ValueError, or another of TypeError, LookupError, OverflowError: for what torch.save does not write.
    """
    return _Machine(stream, storages).run()


def require(condition: bool, reason: str) -> None:
    """Raises ValueError with the reason unless the condition holds."""
    if not condition:
        raise ValueError(reason)


class ForeignError(Exception):
    """A global name that tensors and plain containers do not need; its text is the name."""


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


class Storages:
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
            require(count >= 0 and self._unclaimed >= 0, f"its storage {key[:40]!r} claims more bytes than there are")
            self.arrays[key] = np.empty(count, dtype)
            self._fill(key, self.arrays[key])
        array = self.arrays[key]
        require(array.dtype == dtype and array.size == count, f"its storage {key[:40]!r} has two types or sizes")
        return array


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = 0, hooks: Any = (), metadata: Any = None
) -> np.ndarray:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: a strided view of a storage, counted in elements."""
    require(not metadata, "it has a tensor that is conjugated or negated lazily")
    require(isinstance(storage, np.ndarray) and type(size) is type(stride) is tuple, "it has a tensor without storage")
    numbers = (offset, *size, *stride)
    possible = len(size) == len(stride) <= 64 and all(isinstance(n, int) and 0 <= n < 1 << 63 for n in numbers)
    require(possible, "it has a tensor of impossible size or stride")
    if 0 in size:
        return np.empty(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    distinct = math.prod(n for n, step in zip(size, stride, strict=True) if step)  # the others only repeat
    require(max(last + 1, distinct) <= storage.size, f"a tensor of shape {size} in it is larger than its storage")
    width, memory = storage.itemsize, storage.view(np.uint8)  # as bytes, for bfloat16 is no buffer
    return np.ndarray(size, storage.dtype, memory, offset * width, [step * width for step in stride])


def _set_items(target: Any, items: list[Any]) -> None:
    """Stores [key, value, key, value, …]. Keys are never tuples, whose hash recurses."""
    keys, values = items[::2], items[1::2]
    require(type(target) is dict, "its pickle sets items of what is no dict")
    require(all(isinstance(key, str | int) for key in keys), "its pickle has keys that are not str or int")
    target.update(zip(keys, values, strict=True))


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    _set_items(result, [item for key, value in pairs for item in (key, value)])
    return result


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    require(isinstance(text, str) and encoding == "latin1", "its pickle encodes otherwise than in latin1")
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
        raise ForeignError(repr(name.replace(" ", ".", 1))[1:-1][:100])
    return _GLOBALS[name]


class _Machine:
    """One pickle of protocol 2 or later and the stack it works on. Arguments are parsed of known opcodes alone."""

    def __init__(self, stream: io.BytesIO, storages: Storages):
        self.stream, self.storages = stream, storages
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below the marks
        self.memo: list[Any] = []
        self.work = 0

    def run(self) -> Any:
        """What the pickle leaves."""
        while self.work < _WORK:
            self.work += 1
            code = self.stream.read(1).decode("latin-1")
            op: Any = pickletools.code2op.get(code)  # type: ignore[attr-defined]
            require(op is not None, f"its pickle has an unknown opcode {code!r}" if code else "its pickle has no end")
            if op.name == "STOP":
                require(len(self.stack) == 1 and not self.below, "its pickle leaves more than one thing")
                return self.stack[0]
            if op.name not in _OPCODES:
                raise ValueError(f"its pickle has the opcode {op.name}, which torch.save does not write")
            _OPCODES[op.name](self, op)
        raise ValueError(f"its pickle does more than {_WORK} things")

    def argument(self, op: Any) -> Any:
        return op.arg.reader(self.stream)

    def skip(self, op: Any) -> None:
        self.argument(op)

    # Values.

    def push(self, op: Any) -> None:
        self.stack.append(self.argument(op))

    def push_new(self, op: Any) -> None:
        self.stack.append(_NEW[op.name]())

    def push_bytes_as_text(self, op: Any) -> None:
        """Python 2's str."""
        self.stack.append(self.argument(op).encode("latin-1").decode())

    # What was pushed before.

    def put(self, op: Any) -> None:
        index = self.argument(op)
        require(index <= len(self.memo), f"its pickle numbers its {len(self.memo)} memories up to {index}")
        self.memo[index : index + 1] = [self.stack[-1]]

    def memoize(self, op: Any) -> None:
        self.memo.append(self.stack[-1])

    def get(self, op: Any) -> None:
        self.stack.append(self.memo[self.argument(op)])

    # Containers, of a fixed number of things or of all above the last mark.

    def mark(self, op: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def taken(self, op: Any) -> list[Any]:
        if op.name in _TAKES:
            return [self.stack.pop() for _ in range(_TAKES[op.name])][::-1]
        items, self.stack = self.stack, self.below.pop()
        return items

    def push_tuple(self, op: Any) -> None:
        items = tuple(self.taken(op))
        self.stack.append(items)

    def append(self, op: Any) -> None:
        items = self.taken(op)
        require(type(self.stack[-1]) is list, "its pickle appends to what is no list")
        self.stack[-1].extend(items)

    def set_items(self, op: Any) -> None:
        items = self.taken(op)
        _set_items(self.stack[-1], items)

    # Names and what is done with them.

    def name(self, op: Any) -> None:
        """Two lines, read raw: the opcode's own reader decodes escapes, and warns."""
        lines: list[Any] = [pickletools.read_stringnl(self.stream, False, False) for _ in range(2)]
        self.stack.append(_global(b" ".join(lines).decode()))

    def name_of_stack(self, op: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        require(isinstance(name, str) and isinstance(module, str), "its pickle has a name that is no str")
        self.stack.append(_global(f"{module} {name}"))

    def storage(self, op: Any) -> None:
        self.stack.append(self.storages.get(self.stack.pop()))

    def call(self, op: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        require(callable(function) and isinstance(arguments, tuple), "its pickle calls what is no function")
        self.work += sum(len(part) for part in arguments if isinstance(part, str | list | tuple | dict))
        self.stack.append(function(*arguments))

    def new_object(self, op: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        require(function is _namespace and arguments == (), "its pickle makes an object of an unknown class")
        self.stack.append(function())

    def drop_attributes(self, op: Any) -> None:
        """`_metadata` of a state dict, a command line's; those of a parameter."""
        state, target = self.stack.pop(), self.stack[-1]
        known = isinstance(target, np.ndarray) and isinstance(state, tuple) and len(state) == 3
        require(known or type(target) is dict, "its pickle sets attributes of what has none")


_NEW: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple},
}
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
_ACTIONS: dict[Callable[[_Machine, Any], None], str] = {
    _Machine.skip: "PROTO FRAME",
    _Machine.push: "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES",
    _Machine.push_new: " ".join(_NEW),
    _Machine.push_bytes_as_text: "BINSTRING SHORT_BINSTRING",
    _Machine.put: "BINPUT LONG_BINPUT",
    _Machine.memoize: "MEMOIZE",
    _Machine.get: "BINGET LONG_BINGET",
    _Machine.mark: "MARK",
    _Machine.push_tuple: "TUPLE TUPLE1 TUPLE2 TUPLE3",
    _Machine.append: "APPEND APPENDS",
    _Machine.set_items: "SETITEM SETITEMS",
    _Machine.name: "GLOBAL",
    _Machine.name_of_stack: "STACK_GLOBAL",
    _Machine.storage: "BINPERSID",
    _Machine.call: "REDUCE",
    _Machine.new_object: "NEWOBJ",
    _Machine.drop_attributes: "BUILD",
}
_OPCODES = {name: action for action, names in _ACTIONS.items() for name in names.split()}
"""What torch.save writes → what it does, but for STOP."""


def check_tree(tree: Any, allowed: int) -> None:
    """Refuses what cannot be walked or held: deep nesting (a cycle is endless), repetition, more bytes than allowed."""
    pending: list[tuple[Any, Any, int]] = [("", tree, 0)]
    nodes = total = 0
    while pending:
        name, node, depth = pending.pop()
        match node:
            case dict() | list() | tuple():
                nodes += len(node)
                require(depth <= _DEPTH and nodes <= _WORK, "its containers are nested without end")
                items = node.items() if isinstance(node, dict) else enumerate(node)
                pending += [(key, child, depth + 1) for key, child in items]
            case np.ndarray():
                total += node.nbytes
                require(total <= allowed, f"its tensors up to {str(name)[:60]!r} would take {total} bytes")
            case None | bool() | int() | float() | str() | bytes() | np.dtype():
                pass
            case _:
                raise ValueError("it keeps a function of torch as a value")
