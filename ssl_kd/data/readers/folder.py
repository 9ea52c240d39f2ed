"""Image files where they lie: a directory, a glob, or a list of paths."""

import codecs
import glob
import heapq
import os
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase

import numpy as np

from ssl_kd.data import splits
from ssl_kd.data.readers.files import Names, read_bytes, shown
from ssl_kd.errors import UserError, reason

SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif")


class FolderReader:
    """The images below a directory, of a glob, or of a .txt file with one path a line (relative to its directory).

    Splits are the sub-directories train, val (valid, validation) and test of a directory that has them; of everything
    else a tenth is held out, by path (`splits.held_out`). The class of an image is the directory directly under its
    split's, the glob's fixed part or the list's directory; there are no labels unless every image lies in such a
    directory and there are two. Classes are numbered in the order of their names, over all splits.

    Rows are sorted by path, those of a list as listed. Only regular files count; hidden ones and, but for lists, those
    without an image's suffix are `skipped`. Links are followed, but no directory is entered twice, so cycles end.
    """

    def __init__(self, name: str, split: str) -> None:
        store = f"data source 'folder:{name}'"
        there: list[str] = []
        self.skipped = 0
        if os.path.isdir(name):
            there = _splits_in(name, store)
            folder = os.path.join(name, splits.choose(split, there, store)) if there else name
            images, self.skipped = _walk(os.fsencode(folder))
        elif name.endswith(".txt") and os.path.isfile(name):
            folder = os.path.dirname(name)
            images = _listed(name)
        elif glob.has_magic(name):
            fixed, pattern = _fixed_part(name)
            folder = os.fsdecode(fixed)
            if not os.path.isdir(folder):
                raise UserError(f"{store}: there is no directory {folder or '.'}; correct the path before the wildcard")
            images, self.skipped = _walk(fixed, lambda path: _leads_to_match(path.split(b"/"), pattern))
            images = [image for image in images if _matches(image.split(b"/"), pattern)]
        else:
            raise UserError(f"{store} is not there; give a directory, a glob like '/photos/**/*.jpg', or a .txt list")
        if not images:
            raise UserError(f"{store} holds no images in {folder or '.'} ({self.skipped} other files); give another")
        self.root = os.fsencode(folder)
        labels, self.class_names = _labels(images, [os.path.join(name, other) for other in there])
        self.num_classes = len(self.class_names) if self.class_names else None
        rows = np.arange(len(images)) if there else splits.held_out(images, split)
        self._names, self._labels = Names(images[row] for row in rows), labels[rows]

    def __len__(self) -> int:
        return len(self._names)

    def read(self, row: int) -> bytes:
        return read_bytes(self._path(row))

    def labels(self) -> np.ndarray:
        return self._labels

    def label_of(self, row: int) -> int:
        return int(self._labels[row])

    def where(self, row: int) -> str:
        return shown(self._path(row))

    def _path(self, row: int) -> bytes:
        return os.path.join(self.root, self._names[row])


def _walk(root: bytes, enter: Callable[[bytes], bool] = lambda _: True) -> tuple[list[bytes], int]:
    """The image files in a directory and those below it that are to be entered, sorted, relative to the root; and how
    many other files were skipped."""
    found, skipped = [], 0
    entered = set()
    pending, links = [b""], list[bytes]()  # links wait, so that a directory is entered under its own name if it has one
    while pending or links:
        folder = pending.pop() if pending else heapq.heappop(links)
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path = os.path.join(folder, entry.name)
                    link = entry.is_symlink()
                    if entry.name.startswith(b"."):
                        skipped += 1
                    elif os.path.isdir(entry.path) if link else entry.is_dir():
                        if enter(path):
                            heapq.heappush(links, path) if link else pending.append(path)
                    elif entry.name.lower().endswith(SUFFIXES) and (
                        os.path.isfile(entry.path) if link else entry.is_file()
                    ):
                        found.append(path)
                    else:
                        skipped += 1
        except OSError as error:
            raise UserError(
                f"directory {shown(os.path.join(root, folder))} cannot be read ({reason(error)}); make it readable"
            ) from error
    return sorted(found), skipped


def _listed(path: str) -> list[bytes]:
    """The lines of a list that are not blank, those below its directory relative to it."""
    lines = read_bytes(path).removeprefix(codecs.BOM_UTF8).splitlines()
    base = os.path.join(os.path.abspath(os.fsencode(os.path.dirname(path))), b"")
    return [os.path.normpath(line.removeprefix(base)) for line in lines if line.strip()]


def _fixed_part(name: str) -> tuple[bytes, list[bytes]]:
    """A glob as the directory above its first wildcard, and the components from there on."""
    parts = os.fsencode(name).split(b"/")
    k = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    return b"/".join(parts[:k]) or (b"/" if name.startswith("/") else b"."), parts[k:]


def _matches(path: Sequence[bytes], pattern: Sequence[bytes]) -> bool:
    """Whether the components match; '**' stands for any number of them."""
    if not pattern or not path:
        return not path and all(part == b"**" for part in pattern)
    if pattern[0] == b"**":
        return _matches(path, pattern[1:]) or _matches(path[1:], pattern)
    return fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _leads_to_match(path: Sequence[bytes], pattern: Sequence[bytes]) -> bool:
    """Whether something below the path may match."""
    for part, wanted in zip(path, pattern, strict=False):
        if wanted == b"**":
            return True
        if not fnmatchcase(part, wanted):
            return False
    return len(path) < len(pattern)


def _splits_in(root: str, store: str) -> list[str]:
    folders = _directories(root)
    there = [folder for folder in folders if folder in splits.NAMES]
    others = sorted(set(folders) - set(there))
    if len(there) == 1 and others:  # a split beside clutter, or a class that happens to be called so?
        raise UserError(
            f"{store} has a directory {there[0]!r} beside others ({shown(', '.join(others[:3]))}); "
            f"give 'folder:{root}/{there[0]}', or 'folder:{root}/**' if they are classes"
        )
    return there


def _directories(root: str) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry.path)]
    except OSError as error:
        raise UserError(f"directory {shown(root)} cannot be read ({reason(error)}); make it readable") from error


def _labels(images: Collection[bytes], split_folders: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """int32 (N,) and the classes' names; -1 and None where directories do not tell."""
    heads = [image.partition(b"/")[0] if b"/" in image else b"" for image in images]
    used = set(heads)
    known = used
    if split_folders:  # a class may lack images in one split; a directory that stands alone is no class
        folders = [_directories(folder) for folder in split_folders]
        known = {os.fsencode(name) for names in folders if len(names) > 1 for name in names}
    if len(known) < 2 or not used <= known or used & {b"", b".."}:
        return np.full(len(heads), -1, np.int32), None
    number = {name: k for k, name in enumerate(sorted(known))}
    return np.fromiter((number[head] for head in heads), np.int32, len(heads)), tuple(shown(name) for name in number)
