"""What stores made of files share: names held compactly, bounded reads of regular files, shards by pattern."""

import glob
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ssl_kd.data.splits import NAMES, choose
from ssl_kd.errors import UserError, reason

MAX_BYTES = 512 << 20  # of one encoded image: more than decode.MAX_PIXELS take uncompressed


class Names:
    """Many byte strings as one, with the offsets at which they end.

    A list of a million paths is a million objects: some 100 MB in each reader process, for pickling takes them one by
    one and counting references un-shares what a fork shared. This is the paths' own bytes, and pickled as fast as they
    are copied.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self.blob = b"".join(names)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.blob[self.ends[i - 1] if i else 0 : self.ends[i]]


def read_bytes(path: bytes | str | os.PathLike[str], offset: int = 0, size: int | None = None) -> bytes:
    """A regular file's bytes, all or `size` from `offset` on. The file is opened anew: nothing to share between
    threads, to pickle or to run out of.

    Raises: UserError naming the file when it cannot be read, is no regular file, has more than MAX_BYTES, or has become
      shorter.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking, lest a FIFO wait for writers
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{shown(path)} is no regular file; remove it")
            size = status.st_size if size is None else size
            if size > MAX_BYTES:
                raise UserError(f"{shown(path)} takes {size} bytes, at most {MAX_BYTES} are read; shrink or remove it")
            data = os.pread(handle, size, offset)
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{shown(path)} cannot be read ({reason(error)}); restore or remove it") from error
    if len(data) != size:
        raise UserError(f"{shown(path)} has become shorter since it was listed; restore it and start again")
    return data


def shards(pattern: str, suffix: str, split: str, kind: str) -> tuple[list[Path], bool]:
    """The shards of a split in sorted order, and whether the split is theirs (else rows are to be held out).

    Args:
      pattern: a directory (of files with the suffix), a glob, or a path with brace ranges: 'train-{000..012}.tar'.
      split: chooses among shards whose names begin with a split's, as 'train-000.tar', if all do.

    Raises: UserError when there are none, a range has gaps, or no shards have the split.
    """
    spec = f"data source '{kind}:{pattern}'"
    files = _matches(pattern, suffix, spec)
    names = {file: re.split(r"[-_.\d]", file.name)[0] for file in files}
    there = set(names.values())
    if not there <= set(NAMES):
        return files, False
    chosen = choose(split, there, spec)
    return [file for file in files if names[file] == chosen], True


def _matches(pattern: str, suffix: str, spec: str) -> list[Path]:
    if os.path.isdir(pattern):
        files = sorted(Path(pattern).glob(f"*{suffix}"))
    elif re.search(r"\{\d+\.\.\d+\}", pattern):
        files = [Path(path) for path in expand(pattern)]
        missing = [file for file in files if not os.path.exists(file)]
        if missing:
            raise UserError(f"{spec} lacks {len(missing)} of {len(files)} files, the first {missing[0]}; fetch them")
    else:
        files = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    if not files:
        raise UserError(f"{spec} matches no files; give a directory of {suffix} files, a glob or a brace range")
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"{spec} matches {file}, which is no regular file; narrow the pattern")
    return files


def expand(pattern: str) -> list[str]:
    """'a{08..10}' -> ['a08', 'a09', 'a10']; several ranges combine, the last fastest."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match[1], match[2]
    numbers = range(int(first), int(last) + 1)
    return [
        head + rest
        for number in numbers
        for head in [pattern[: match.start()] + f"{number:0{len(first)}}"]
        for rest in expand(pattern[match.end() :])
    ]


def shown(path: bytes | str | os.PathLike[str]) -> str:
    """A path for messages: printable whatever its bytes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
