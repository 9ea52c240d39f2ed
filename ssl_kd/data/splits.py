"""Which rows: the grammar of `data.split`, class-balanced subsets, and held-out rows of stores without splits."""

import re
import zlib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np

from ssl_kd.errors import UserError

if TYPE_CHECKING:  # readers use the rules below
    from ssl_kd.data.readers import Reader

NAMES = ("train", "validation", "valid", "val", "test")  # of splits, where a store may also hold other things
HELD_OUT = 0.1  # of the rows
_VALIDATION = NAMES[1:4]
_ALSO_CALLED = {"test": ("test", *_VALIDATION), **dict.fromkeys(_VALIDATION, _VALIDATION)}
_GRAMMAR = re.compile(r"([\w.-]+)(?:\[((?:-?\d+%?)?:(?:-?\d+%?)?|balanced [1-9]\d*%?)\])?", re.ASCII)


def parse_split(text: str) -> tuple[str, str]:
    """'train[:10%]' -> ('train', ':10%'): the split's name, and what selects rows of it ('' for all).

    Raises: UserError when the text is neither 'NAME', 'NAME[FIRST:LAST]' nor 'NAME[balanced COUNT]'.
    """
    match = _GRAMMAR.fullmatch(text)
    if not match:
        raise UserError(
            f"split {text!r} is not understood; write it like 'train', 'train[:10000]', 'test[10%:20%]' or "
            "'train[balanced 1%]'"
        )
    return match[1], match[2] or ""


def rows_of(text: str, reader: "Reader") -> np.ndarray:
    """The rows that a split's text selects: int64, sorted, unique.

    'train' is every row. 'train[:10000]', 'train[10%:20%]', 'test[-500:]' are slices, with percentages rounded to the
    nearest row as in TFDS. 'train[balanced 100]' is 100 rows of every class and 'train[balanced 1%]' as many of every
    class as make 1 % of the labelled rows, rounded, at least one: the subsets of label-efficiency probes.

    The rule of balanced subsets never changes, so that all compare on the same images: rows are ranked by n raw 64-bit
    draws of Philox keyed by crc32('balanced') (numpy promises that raw streams stay as they are), and each class gives
    those of lowest rank. So a smaller subset lies within a larger one.

    Raises: UserError when the text is not understood, reaches beyond the rows or selects none, labels are missing, or
      a class has too few rows.
    """
    _, selection = parse_split(text)
    if selection.startswith("balanced "):
        return _balanced(text, selection.removeprefix("balanced "), reader)
    first, last = _slice(text, selection or ":", len(reader))
    return np.arange(first, last)


def _slice(text: str, selection: str, n: int) -> tuple[int, int]:
    def row(bound: str) -> int:
        value = round(int(bound[:-1]) * n / 100) if bound.endswith("%") else int(bound)
        if not -n <= value <= n:
            raise UserError(f"split {text!r} reaches row {bound}, but there are {n} rows; choose a slice within them")
        return value + n if value < 0 or (bound.startswith("-") and value == 0) else value

    start, stop = selection.split(":")
    first, last = row(start or "0"), row(stop or "100%")
    if first >= last:
        raise UserError(f"split {text!r} is empty (rows {first} to {last} of {n}); choose a slice that holds images")
    return first, last


def _balanced(text: str, amount: str, reader: "Reader") -> np.ndarray:
    labels, classes = reader.labels(), reader.num_classes
    if classes is None:
        raise UserError(f"split {text!r} needs labels, and this source has none; choose a slice, as 'train[:1%]'")
    sizes = np.bincount(labels[labels >= 0], minlength=classes)
    percent = amount.endswith("%")
    each = max(1, round(int(amount[:-1]) * int(sizes.sum()) / 100 / classes)) if percent else int(amount)
    scarce = int(np.argmin(sizes))
    if sizes[scarce] < each:
        raise UserError(
            f"split {text!r} takes {each} rows of every class, but class {scarce} has {sizes[scarce]}; take fewer"
        )
    draws = np.random.Philox(np.random.SeedSequence(zlib.crc32(b"balanced"))).random_raw(len(labels))
    order = np.argsort(draws, kind="stable")
    return np.sort(np.concatenate([order[labels[order] == c][:each] for c in range(classes)]))


def held_out(keys: Iterable[bytes], split: str) -> np.ndarray:
    """The rows of a split of a store without splits, by a stable key of each row: int64, sorted.

    'test' is the tenth of the rows whose crc32(key) is lowest, 'train' the others, 'all' every row: so a row stays on
    its side whatever is added to the store, removed from it, or listed before it.

    Raises: UserError on any other split.
    """
    if split not in ("train", "test", "all"):
        raise UserError(
            f"split {split!r} does not exist where images lie without splits; use 'test' (a tenth of them, held out), "
            "'train' (the others) or 'all'"
        )
    test = np.fromiter((zlib.crc32(key) for key in keys), np.uint32) < HELD_OUT * 2**32
    return np.flatnonzero({"train": ~test, "test": test, "all": np.ones_like(test)}[split])


def choose(split: str, there: Collection[str], store: str) -> str:
    """The name under which a store has a split: 'validation' may be called 'valid' or 'val', and stands in for 'test'
    where there is no test split.

    Raises: UserError naming the store and the splits there.
    """
    for name in _ALSO_CALLED.get(split, (split,)):
        if name in there:
            return name
    raise UserError(f"{store} has no split {split!r}; the splits there are {', '.join(sorted(there))}")
