"""Checkpoints of real torch, hand-written ones, and hostile ones.

The files in golden/torch were written by golden/torch/make.py with torch itself. Where torch is installed, what is read
is compared with torch.load, for these and for what the writer below makes.
"""

import itertools
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.fuzz_weights import fuzz
from ssl_kd.errors import UserError
from ssl_kd.weights.torchfile import read_safetensors, read_torch, read_weights, tensors

try:
    import torch
except ImportError:
    torch = None

GOLDEN = Path(__file__).parents[1] / "golden" / "torch"
FORMATS = ("", "_legacy", "_protocol4")


# --- a writer of torch's formats ----------------------------------------------------------------------------------


class Raw(bytes):
    """Opcodes that leave one thing on the stack."""


def pickled(value) -> bytes:
    match value:
        case Raw():
            return value
        case dict():
            return b"}(" + b"".join(pickled(k) + pickled(v) for k, v in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(pickled, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(pickled, value)) + b"t"
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)
    raise TypeError(type(value))


def named(name: str) -> Raw:
    return Raw(b"c" + name.replace(" ", "\n").encode() + b"\n")


def called(name: str, *arguments) -> Raw:
    return Raw(named(name) + pickled(arguments) + b"R")


def storage(key="0", count=6, kind="Float", legacy=False, tag="storage") -> Raw:
    pid = (tag, named(f"torch {kind}Storage"), key, "cuda:0", count, *[None] * legacy)
    return Raw(pickled(pid) + b"Q")


def tensor(size, stride, offset=0, stored=None, **storage_fields) -> Raw:
    source = storage(**storage_fields) if stored is None else stored
    return called(
        "torch._utils _rebuild_tensor_v2", source, offset, size, stride, False, called("collections OrderedDict")
    )


def copies(call: Raw, times: int = 5_000) -> Raw:
    """A list of one call's results, over arguments that are written once."""
    function, arguments = call.index(b"("), call[:-1]
    once = Raw(arguments[:function] + b"q\0" + arguments[function:] + b"q\1R")
    return Raw(b"](" + once + b"h\0h\1R" * times + b"e")


def write_zip(path, tree, data=None, root="archive", order=None, method=zipfile.ZIP_STORED, extra=()) -> Path:
    """`data`: storage key -> array."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + pickled(tree) + b".")
        archive.writestr(f"{root}/version", "3\n")
        if order is not None:
            archive.writestr(f"{root}/byteorder", order)
        for key, array in (data or {}).items():
            with archive.open(f"{root}/data/{key}", "w", force_zip64=True) as entry:
                entry.write(array.tobytes())
        for name in extra:
            archive.writestr(name, b"anything")
    return path


def write_legacy(path, tree, data=None, version=1001, keys=None) -> Path:
    data = data or {}
    keys = list(data) if keys is None else keys
    pickles = (0x1950A86A20F9469CFC6C, version, {"little_endian": True}, tree, keys)
    content = b"".join(b"\x80\x02" + pickled(part) + b"." for part in pickles)
    content += b"".join(struct.pack("<q", array.size) + array.tobytes() for array in data.values())
    path.write_bytes(content)
    return path


WRITERS = {"zip": write_zip, "legacy": write_legacy}


def same(found, expected) -> None:
    """Equal trees: types, values, dtypes, shapes."""
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray) and found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert type(found) is dict and list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert type(found) is type(expected) and found == expected


def agrees_with_torch(path) -> None:
    """Compares with torch.load, where torch is installed."""
    if torch is None:
        return

    def plain(value):
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous()
            bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
            return bits.numpy().view(ml_dtypes.bfloat16) if bits is not value else value.numpy()
        if isinstance(value, torch.storage.TypedStorage):
            return np.array(value._untyped_storage.tolist(), np.uint8)
        if isinstance(value, torch.dtype):
            return np.dtype(str(value).removeprefix("torch."))
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, torch.Size):
            return tuple(value)
        return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value

    same(read_torch(path), plain(torch.load(path, map_location="cpu", weights_only=False)))


def refused(path, *words, read=read_torch) -> str:
    """The one sentence in which a file is refused: it names the file."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and message.endswith(".") and "\n" not in message
    assert all(word in message for word in words), message
    return message


# --- what torch wrote ---------------------------------------------------------------------------------------------

DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)
ONES = np.ones(2, np.float32)
PARAMETERS = {
    "conv.weight": np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2),
    "conv.bias": np.float32([1, 2]),
    "norm.weight": np.float32([2, 3]),
    "norm.bias": np.float32([3, 4]),
}
GROUP = {"lr": 0.0, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False}
EXPECTED = {
    "dtypes": {name: np.arange(3).astype(name) for name in DTYPES.split()},
    "views": {
        "matrix": MATRIX,
        "row": MATRIX[1],
        "transposed": MATRIX.T,
        "strided": MATRIX[:, 1::2],
        "expanded": np.float32([[1, 2]] * 3),
        "scalar": np.array(7, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": ONES,
        "tagged": ONES,
        "storage": np.arange(3, dtype=np.uint8),
        "leaves": [
            *(np.dtype(np.float16), (2, 3), b"\xff\0", b"", None, True, -1, 1 << 40, 1e-3, "ü", (), (1, [2])),
        ],
    },
    "checkpoint": {
        "epoch": 3,
        "arch": "tiny",
        "state_dict": {
            **PARAMETERS,
            "norm.running_mean": np.zeros(2, np.float32),
            "norm.running_var": ONES,
            "norm.num_batches_tracked": np.array(0),
        },
        "optimizer": {
            "state": {i: {"momentum_buffer": np.ones_like(p)} for i, p in enumerate(PARAMETERS.values())},
            "param_groups": [
                {**GROUP, "foreach": None, "differentiable": False, "fused": None, "params": [0, 1, 2, 3]}
            ],
        },
    },
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", EXPECTED)
def test_reads_what_torch_wrote(name, suffix):
    path = GOLDEN / f"{name}{suffix}.pth"
    same(read_torch(path), EXPECTED[name])
    agrees_with_torch(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_views_share_their_storage(suffix):
    tree = read_torch(GOLDEN / f"views{suffix}.pth")
    assert all(np.shares_memory(tree["matrix"], tree[name]) for name in ("row", "transposed", "strided"))
    assert tree["expanded"].strides == (0, 4)


def test_read_weights_finds_the_state_dict_of_a_training_checkpoint():
    for suffix in FORMATS:
        arrays, rest, _ = read_weights(GOLDEN / f"checkpoint{suffix}.pth")
        same(arrays, EXPECTED["checkpoint"]["state_dict"])
        assert rest == []


# --- what the writer wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WRITERS)
def test_writer_and_reader_agree(tmp_path, form):
    values = np.arange(6, dtype=np.float32)
    tree = {"a": tensor((2, 3), (3, 1), legacy=form == "legacy"), "b": [1, None, "é"]}
    path = WRITERS[form](tmp_path / "x.pth", tree, {"0": values})
    same(read_torch(path), {"a": values.reshape(2, 3), "b": [1, None, "é"]})
    agrees_with_torch(path)


def test_every_stride_and_offset_is_numpys(tmp_path):
    values = np.arange(60, dtype=np.int16)
    rng = np.random.default_rng(0)
    views, expected = {}, {}
    for number, axes in enumerate(itertools.permutations(range(3))):
        step = tuple(int(s) for s in rng.integers(1, 3, 3))
        view = values.reshape(3, 4, 5)[1:, :, 1:].transpose(axes)[:: step[0], :: step[1], :: step[2]]
        stride = tuple(s // 2 for s in view.strides)
        views[str(number)] = tensor(view.shape, stride, 21, count=60, kind="Short")
        expected[str(number)] = view
    path = write_zip(tmp_path / "x.pth", views, {"0": values})
    same(read_torch(path), expected)
    agrees_with_torch(path)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8])
def test_big_endian_storages_are_swapped(tmp_path, dtype):
    values = np.arange(6).astype(dtype)
    kind = {"float64": "Double", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long", "uint8": "Byte"}
    swapped = values.view(f"u{values.itemsize}").byteswap()
    tree = {"a": tensor((6,), (1,), kind=kind[values.dtype.name])}
    path = write_zip(tmp_path / "x.pth", tree, {"0": swapped}, order="big")
    same(read_torch(path), {"a": values})
    agrees_with_torch(path)


def test_archive_oddities_that_are_harmless(tmp_path):
    """Roots, unused entries and paths mean nothing here: nothing is extracted."""
    values = np.arange(6, dtype=np.float32)
    tree = {"a": tensor((6,), (1,))}
    for root in ("..", "/etc", "a b", "ä"):
        path = write_zip(tmp_path / "x.pth", tree, {"0": values}, root=root, extra=("../../evil", "/evil"))
        same(read_torch(path), {"a": values})


def test_archives_without_checksums_are_read(tmp_path):
    """torch.serialization.set_crc32_options(False) leaves them 0."""
    values = np.arange(6, dtype=np.float32)
    path = write_zip(tmp_path / "x.pth", {"a": tensor((6,), (1,))}, {"0": values})
    content = bytearray(path.read_bytes())
    for entry in re.finditer(b"PK\1\2", content):
        content[entry.start() + 16 : entry.start() + 20] = bytes(4)
    path.write_bytes(content)
    same(read_torch(path), {"a": values})


def test_untyped_storages_are_bytes(tmp_path):
    pid = ("storage", named("torch.storage UntypedStorage"), "0", "cpu", 4)
    path = write_zip(tmp_path / "x.pth", [Raw(pickled(pid) + b"Q")], {"0": np.arange(4, dtype=np.uint8)})
    same(read_torch(path), [np.arange(4, dtype=np.uint8)])
    agrees_with_torch(path)


def test_parameters_of_old_torch(tmp_path):
    parameter = called("torch.nn.parameter Parameter", tensor((6,), (1,), legacy=True))
    state = pickled((True, False, called("collections OrderedDict")))
    path = write_legacy(tmp_path / "x.pth", {"w": Raw(parameter + state + b"b")}, {"0": np.arange(6, dtype=np.float32)})
    same(read_torch(path), {"w": np.arange(6, dtype=np.float32)})
    agrees_with_torch(path)
    # Still older: the state holds the data.
    path = write_legacy(path, {"w": Raw(parameter + pickled((None,) * 5) + b"b")}, {"0": np.zeros(6, np.float32)})
    refused(path, "sets attributes")


def test_python_2_strings_and_cuda_types(tmp_path):
    key = Raw(b"U\x06weight")
    pid = (
        Raw(b"U\x07storage"),
        named("torch.cuda FloatStorage"),
        Raw(b"T\x01\0\0\0" + b"0"),
        Raw(b"U\x03cpu"),
        6,
        None,
    )
    old = called("torch._utils _rebuild_tensor", Raw(pickled(pid) + b"Q"), 0, (6,), (1,))
    pairs = called("collections OrderedDict", [[key, old]])
    path = write_legacy(tmp_path / "x.pth", pairs, {"0": np.arange(6, dtype=np.float32)})
    same(read_torch(path), {"weight": np.arange(6, dtype=np.float32)})


# --- state dicts in trees -----------------------------------------------------------------------------------------

W, V = np.ones(2), np.zeros(3)


@pytest.mark.parametrize(
    ("tree", "key", "expected"),
    [
        ({"w": W}, "", {"w": W}),
        ({"state_dict": {"w": W}, "queue": V}, "", {"w": W}),
        ({"model": {"state_dict": {"w": W}}, "optimizer": {"w": V}}, "", {"w": W}),
        ({"model": "resnet50", "state_dict": {"w": W}, "teacher": {}}, "", {"w": W}),
        ({"student": {"w": V}, "teacher": {"w": W}}, "teacher", {"w": W}),
        ({"model": {"w": V, "ema": {"w": W}, "net": {"w": V}}}, "model/ema", {"w": W}),
        ({"generator": {"state_dict": {"w": W}}}, "generator", {"w": W}),
    ],
)
def test_tensors_finds_the_state_dict(tree, key, expected):
    assert tensors(tree, "FILE", key)[0] == expected


def test_tensors_names_what_it_drops():
    arrays, rest = tensors({"model": {"w": W, "version": 2, 7: V, "_extra_state": {"w": V}}}, "FILE")
    assert arrays == {"w": W} and rest == ["version", "7", "_extra_state"]


@pytest.mark.parametrize(
    ("tree", "key", "words"),
    [
        ({"student": {"w": V}, "teacher": {"w": W}}, "", "the keys teacher, student."),
        ({"net": {"ema": {"w": V}, "model": {"w": W}}}, "net", "the keys net/model, net/ema."),
        ({"generator": {"w": W}, "epoch": 3}, "", "among 'generator', 'epoch'."),
        ({"generator": {"w": W}}, "teacher", "no key 'teacher': choose one of 'generator'."),
        ({"epoch": 3}, "epoch/w", "it is of type int."),
        ([W], "", "it is of type list."),
        ({}, "", "among no keys."),
        ({str(i): i for i in range(30)}, "", "'19', …."),
    ],
)
def test_tensors_says_what_there_is(tree, key, words):
    with pytest.raises(UserError, match=f"FILE .*{re.escape(words)}$"):
        tensors(tree, "FILE", key)


# --- safetensors --------------------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    arrays = {name: np.arange(4).astype(name).reshape(2, 2) for name in DTYPES.split()}
    arrays |= {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 2), np.float32)}
    save_file(arrays, tmp_path / "x.bin", metadata={"made": "here"})
    found, metadata = read_safetensors(tmp_path / "x.bin")
    same(found, {name: arrays[name] for name in found})
    assert found.keys() == arrays.keys() and metadata == {"made": "here"}
    weights, rest, _ = read_weights(tmp_path / "x.bin")
    same(weights, found)
    assert rest == []
    refused(tmp_path / "x.bin", "'teacher'", read=lambda path: read_weights(path, "teacher"))


def safetensors_of(header: bytes, data: bytes = b"", claimed=None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"1234567"),
        safetensors_of(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', b"12345678"),
        safetensors_of(b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,39999999996]}}', b"12345678"),
        safetensors_of(b'{"a":{"dtype":"F8_E5M2","shape":[2],"data_offsets":[0,2]}}', b"12"),
        safetensors_of(b'{"a":{"dtype":"U8","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}'),
        safetensors_of(b'{"a":1}'),
        safetensors_of(b'{"a":'),
        safetensors_of(b"{}", claimed=3),
        safetensors_of(b"{}", claimed=1 << 40),
        safetensors_of(b"{" + b" " * (9 << 20) + b"}"),
        safetensors_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"12"),
    ],
)
def test_damaged_safetensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", "not a whole safetensors file", read=read_weights)


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "begins with b''"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE ht'"),
        (pickle.dumps({"a": 1}), "no torch checkpoint"),
        (b"x".ljust(257, b"\0") + b"ustar  \0".ljust(600, b"\0"), "tar archive"),
        (b"PK\3\4", "not a whole torch checkpoint"),
    ],
)
def test_other_files(tmp_path, content, word):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", word, read=read_weights)


def test_places_that_are_no_files(tmp_path):
    for read in (read_weights, read_torch, read_safetensors):
        refused(tmp_path, "Is a directory", read=read)
        refused(tmp_path / "none", "No such file", read=read)


@pytest.mark.parametrize(("name", "step"), [("dtypes.pth", 7), ("views_legacy.pth", 3)])
def test_truncated_files_are_refused(tmp_path, name, step):
    content = (GOLDEN / name).read_bytes()
    for size in (*range(0, len(content), step), *range(len(content) - 70, len(content))):
        (tmp_path / "x.pth").write_bytes(content[:size])
        refused(tmp_path / "x.pth", read=read_weights)


def test_damaged_bytes_of_a_storage_are_refused(tmp_path):
    content = bytearray(write_zip(tmp_path / "x.pth", [tensor((6,), (1,))], {"0": np.full(6, 7.25, "f4")}).read_bytes())
    content[content.index(np.float32(7.25).tobytes())] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", "checksum", "archive/data/0")


def test_archives_that_torch_never_writes(tmp_path):
    path, tree, data = tmp_path / "x.pth", [tensor((6,), (1,))], {"0": np.zeros(6, np.float32)}
    refused(write_zip(path, tree, data, method=zipfile.ZIP_DEFLATED), "compressed")
    refused(write_zip(path, tree, data, order="middle"), "byte order")
    refused(write_zip(path, tree, data, extra=("other/data.pkl",)), "2 data.pkl")
    refused(write_zip(path, tree, {"1": data["0"]}), "archive/data/0")
    refused(write_zip(path, tree, {"0": np.zeros(5, np.float32)}), "20 bytes")
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(path, tree, data, extra=("archive/data/0",))
    refused(path, "two entries")
    content = write_zip(path, tree, data).read_bytes()
    at = content.rindex(b"PK\3\4")  # the storage's local header
    path.write_bytes(content[:at] + b"XX" + content[at + 2 :])
    refused(path, "not where its directory says")


def test_legacy_files_that_torch_never_writes(tmp_path):
    path, tree, data = tmp_path / "x.pth", [tensor((6,), (1,), legacy=True)], {"0": np.zeros(6, np.float32)}
    refused(write_legacy(path, tree, data, version=1002), "1001")
    refused(write_legacy(path, tree, data, keys=[]), "other storages")
    refused(write_legacy(path, tree, data, keys=["0", "0"]), "other storages")
    refused(write_legacy(path, tree, data, keys=[[], Raw(b"]" * 10_000 + b"a" * 9_999)]), "lists no storages")
    refused(write_legacy(path, tree, {"0": np.zeros(7, np.float32)}), "another size")


@pytest.mark.parametrize(
    ("item", "word"),
    [
        (tensor((7,), (1,)), "larger than its storage"),
        (tensor((6,), (1,), offset=1), "larger than its storage"),
        (tensor((6,), (1,), offset=-1), "impossible"),
        (tensor((-6,), (1,)), "impossible"),
        (tensor((6,), (-1,)), "impossible"),
        (tensor((6,), (1, 1)), "impossible"),
        (tensor((1,) * 65, (1,) * 65), "impossible"),
        (tensor((1 << 70,), (0,)), "impossible"),
        (tensor((4, 3), (1, 1)), "larger than its storage"),  # windows that overlap
        (tensor((1 << 30,), (0,)), "would take"),
        (tensor((1 << 40, 1 << 40), (0, 0)), ""),
        (tensor((0, 1 << 62, 1 << 62), (0, 0, 0)), ""),
        ([tensor((1 << 20,), (0,))] * 5, "would take"),
        (tensor((6,), (1,), stored="none"), "without storage"),
        (tensor((6,), (1,), stored=tensor((3, 2), (1, 3))), ""),
        (tensor(6, (1,)), "without storage"),
        ([storage(), storage(count=3, kind="Double")], "two types"),
        (storage(count=-1), "claims more"),
        (storage(count=10 << 30), "claims more"),
        (storage(tag="module"), "no storage"),
        (Raw(pickled("0") + b"Q"), "no storage"),
        (Raw(pickled(("storage",)) + b"Q"), "no storage"),
        (
            called("torch._utils _rebuild_tensor_v2", storage(), 0, (6,), (1,), False, None, {"conj": True}),
            "conjugated",
        ),
        (called("torch._utils _rebuild_tensor_v2"), ""),
        (copies(tensor((1,) * 64, (1,) * 64), 20_000), "more than 500000 things"),
    ],
)
def test_tensors_that_claim_too_much(tmp_path, item, word):
    refused(write_zip(tmp_path / "x.pth", item, {"0": np.zeros(6, np.float32)}), "not a whole torch checkpoint", word)


def test_entries_over_the_same_bytes_cannot_multiply(tmp_path):
    """A zip bomb: many storages in the directory, one in the file."""
    size = 1 << 20
    tree = [storage(key=str(key), count=size, kind="Byte") for key in range(9)]
    small = {str(key): np.zeros(1, np.uint8) for key in range(1, 9)}
    path = write_zip(tmp_path / "x.pth", tree, {"0": np.zeros(size, np.uint8), **small})
    content = bytearray(path.read_bytes())
    first, *others = (at.start() for at in re.finditer(b"PK\1\2(?=.{42}archive/data/)", content, re.DOTALL))
    for at in others:
        for start, end in ((16, 28), (42, 46)):  # checksum and sizes; place
            content[at + start : at + end] = content[first + start : first + end]
    path.write_bytes(content)
    refused(path, "claims more")


# --- hostile pickles ----------------------------------------------------------------------------------------------


def nested(depth: int) -> Raw:
    return Raw(b"]" * depth + b"a" * (depth - 1))


def doubled(times: int) -> Raw:
    """A tuple of twice a tuple of twice …: 2 ** times leaves."""
    return Raw(b"]" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times)))


HOSTILE = {
    "REDUCE": lambda f: called("posix system", f"touch {f}"),
    "GLOBAL": lambda f: called("builtins eval", f"__import__('pathlib').Path({str(f)!r}).touch()"),
    "STACK_GLOBAL": lambda f: Raw(b"\x8c\x05posix\x8c\x06system\x93" + pickled((f"touch {f}",)) + b"R"),
    "INST": lambda f: Raw(b"(" + pickled(f"touch {f}") + b"iposix\nsystem\n"),
    "OBJ": lambda f: Raw(b"(" + named("posix system") + pickled(f"touch {f}") + b"o"),
    "NEWOBJ": lambda f: Raw(named("pathlib Path") + pickled((str(f),)) + b"\x81"),
    "BUILD": lambda f: Raw(named("fractions Fraction") + b")R" + pickled({"__setstate__": 1}) + b"b"),
    "getattr": lambda f: called("builtins getattr", named("torch Size"), "__class__"),
    "numpy scalar": lambda f: called("numpy.core.multiarray scalar", 1),
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_code_is_refused_and_never_runs(tmp_path, form, name):
    marker = tmp_path / "it_ran"
    payload = HOSTILE[name](marker)
    if name in ("REDUCE", "GLOBAL", "STACK_GLOBAL", "INST"):
        pickle.loads(b"\x80\x04" + payload + b".")  # the attack is real
        assert marker.exists()
        marker.unlink()
    path = WRITERS[form](tmp_path / "x.pth", {"state_dict": payload})
    refused(
        path, "opcode INST" if name == "INST" else "which is not tensors and plain containers: if you trust the file"
    )
    assert not marker.exists()


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        (Raw(b"]r\0\0\0\x80"), "numbers its 0 memories"),
        (Raw(b"]q\1"), "numbers its 0 memories"),
        (Raw(b"h\0"), ""),
        (Raw(b"j\xff\xff\xff\xff"), ""),
        (nested(100_000), "nested without end"),
        (Raw(b")" + b"\x85" * 100_000), "nested without end"),
        (Raw(b"}" + pickled("a") * 1 + Raw(b"}" + pickled("a")) * 100 + b"N" + b"s" * 101), "nested without end"),
        (Raw(b"]q\0h\0a"), "nested without end"),
        (doubled(200), "nested without end"),
        (doubled(30), "nested without end"),
        (Raw(b"(" * 100_000), ""),
        (Raw(b"}" + pickled((1,)) + b"Ns"), "str or int"),
        (Raw(b"}" + b")" + b"\x85" * 100_000 + b"Ns"), "str or int"),
        (Raw(b"}(N"), ""),
        (Raw(b"}(" + pickled("a") + b"u"), ""),
        (Raw(b")Na"), "no list"),
        (Raw(b"]" + pickled("a") + b"Ns"), "no dict"),
        (Raw(b"NNR"), "no function"),
        (Raw(pickled("a") + b")R"), "no function"),
        (Raw(named("torch Size") + b"NR"), "no function"),
        (Raw(named("torch Size") + b")}b"), ""),
        (Raw(b"]}b"), "sets attributes"),
        (called("torch Size"), ""),
        (named("torch Size"), "a function of torch"),
        (named("torch FloatStorage"), "a function of torch"),
        (called("_codecs encode", "a", "rot13"), "latin1"),
        (called("_codecs encode", "∞", "latin1"), ""),
        (called("collections OrderedDict", "ab"), ""),
        (called("__builtin__ bytes", 1 << 40), ""),
        (Raw(b"0"), "opcode POP"),
        (Raw(b"P0\n"), "opcode PERSID"),
        (Raw(b"S'\\d'\n"), "opcode STRING"),  # pickletools warns about its argument
        (Raw(b"\x82\x01"), "opcode EXT1"),
        (Raw(b"\xff"), "unknown opcode"),
        (Raw(b"X\xff\xff\xff\xffabc"), ""),
        (Raw(b"\x8d" + b"\xff" * 7 + b"\x7fabc"), "opcode BINUNICODE8"),
        (Raw(b"B\xff\xff\xff\xffabc"), ""),
        (Raw(b"U\x02\xff\xfe"), ""),
        (Raw(b"X\x01\0\0\0\xff"), ""),
        (Raw(b"I1\n"), "opcode INT"),
        (Raw(b"cos\n"), ""),
        (Raw(b"](" + b"N" * 500_000 + b"e"), "more than 500000 things"),
        (copies(called("_codecs encode", "a" * 100_000, "latin1")), "more than 500000 things"),
        (copies(called("collections OrderedDict", [[str(i), i] for i in range(1000)])), "more than 500000 things"),
        (Raw(b"]" * 10_000 + b"a" * 9_999 + pickled("a") + b"\x93"), "no str"),
    ],
)
def test_pickles_that_torch_never_writes(tmp_path, payload, word):
    for path in (write_zip(tmp_path / "x.pth", payload), write_legacy(tmp_path / "y.pth", payload)):
        refused(path, "not a whole torch checkpoint", word)


def test_frames_are_ignored(tmp_path):
    for length in (0, 1, (1 << 64) - 1):
        assert read_torch(write_zip(tmp_path / "x.pth", Raw(b"\x95" + struct.pack("<Q", length) + b"K\x05"))) == 5


def test_attributes_are_inert(tmp_path):
    """`_metadata` of a state dict, and whatever else claims to be an attribute."""
    value = Raw(called("collections OrderedDict") + pickled({"_metadata": {}, "__class__": "evil", "keys": 1}) + b"b")
    found = read_torch(write_zip(tmp_path / "x.pth", value))
    assert type(found) is dict and found == {} and list(found.keys()) == []


def test_names_from_files_stay_on_one_line(tmp_path):
    name = "a\nb" * 100
    path = write_zip(
        tmp_path / "x.pth",
        Raw(pickled(name) + pickled("\ud800".encode("utf-8", "surrogatepass").decode("latin-1")) + b"\x93"),
    )
    assert len(refused(path, r"contains a\nb")) < 1500


def test_the_conversion_is_a_command_that_works(tmp_path):
    path = write_zip(tmp_path / 'a "quoted" file.pth', {"w": called("fractions Fraction")})
    command = re.search("run where torch is installed `(.*)` which", refused(path, "fractions.Fraction"))[1]
    assert subprocess.run(["bash", "-nc", command]).returncode == 0
    if torch is None:
        return
    import fractions

    weight = torch.arange(6.0).reshape(2, 3).t()
    torch.save({"args": fractions.Fraction(1, 2), "model": {"w": weight, "same": weight, "n": 3}}, path)
    command = re.search("`(.*)`", refused(path, "fractions.Fraction"))[1]
    subprocess.run(["bash", "-c", command.replace("python", sys.executable, 1)], check=True)
    same(read_weights(f"{path}.safetensors")[0], {"same": weight.numpy(), "w": weight.numpy()})


def test_memory_stays_near_the_size_of_the_file(tmp_path):
    values = np.zeros(5 << 20, np.float32)
    for name, writer in WRITERS.items():
        path = writer(
            tmp_path / name, [tensor((5 << 20,), (1,), count=5 << 20, legacy=name == "legacy")], {"0": values}
        )
        tracemalloc.start()
        read_torch(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.6 * path.stat().st_size


def test_fuzz(tmp_path):
    report = fuzz(seconds=3, seed=0, folder=tmp_path)
    assert report["findings"] == [] and report["loaded"] > 0 and report["refused"] > 0
