"""Images that cannot be read: each named once, counted, and too many of them the end of a run.

`sources` puts the next readable image of the set in the place of a bad one, and reports it here. A run keeps the list
in its work directory, quarantine.jsonl (processes after the first: quarantine.1.jsonl, …), a line an image:

    {"set": "folder:/photos train", "row": 17, "where": "/photos/b.jpg", "reason": "/photos/b.jpg is not …"}
"""

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax

from ssl_kd.errors import UserError, reason
from ssl_kd.log import console
from ssl_kd.workdir import append

FILE = "quarantine.jsonl"

MIN_BAD = 10
"""Bad images that never stop a run, however small the set, are fewer than this."""

SAID = 10
"""Bad images of a set that are named on the console; all are named in the file, where there is one."""


class Quarantine:
    """The bad images of one set. Thread-safe; a copy sent to a reader process begins anew, and nobody reports to it.

    Attributes:
      name: of the set.
      met: those that this process met in this session: row of the reader → why it cannot be read.
      listed: rows of those, and of all that the file names.

    Args:
      images: of the set.
      max_bad: share of them at which to stop, once there are 10 bad ones. Each process counts what it met.

    Raises: UserError unless max_bad lies in [0, 1].
    """

    def __init__(self, name: str, images: int, max_bad: float = 0.01) -> None:
        if not 0 <= max_bad <= 1:
            raise UserError(f"data.max_bad={max_bad} must be a share of the images, from 0 to 1")
        self.name, self.images, self.max_bad = name, images, max_bad
        self.met: dict[int, str] = {}
        self.listed: set[int] = set()
        self._file: Path | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return Quarantine, (self.name, self.images, self.max_bad)

    def keep(self, file: Path, listed: Iterable[tuple[str, int]]) -> None:
        """From now on writes the list there, and goes on from what is listed, sets and rows."""
        self._file = file
        self.listed |= {row for name, row in listed if name == self.name}

    def report(self, bad: Mapping[int, str], where: Callable[[int], str]) -> None:
        """Takes down rows of the reader that could not be read, and why. What is known already is not said again.

        Args:
          where: names a row.

        Raises: UserError when there are too many by now, or the file cannot be written.
        """
        with self._lock:
            self.met |= bad
            for row in sorted(bad.keys() - self.listed):
                self.listed.add(row)
                self._write({"set": self.name, "row": row, "where": where(row), "reason": bad[row]})
                if len(self.listed) <= SAID:
                    console.print(f"The next image stands in for this one: {bad[row]}.")
                elif len(self.listed) == SAID + 1:
                    console.print(f"More images cannot be read{f'; {self._file} names them' * bool(self._file)}.")
            if bad and len(self.listed) >= MIN_BAD and len(self.listed) > self.max_bad * self.images:
                named = f"{self._file} names them, the last one" if self._file else "the last one"
                raise UserError(
                    f"{len(self.listed)} of the {self.images:,} images of {self.name} cannot be read, more than "
                    f"data.max_bad={self.max_bad:g} allows ({named}: {bad[max(bad)]}); mend them and delete that list, "
                    "or raise data.max_bad"
                )

    def _write(self, line: Mapping[str, str | int]) -> None:
        if self._file is None:
            return
        try:
            append(self._file, json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._file} ({reason(error)}): free space; the run resumes.") from error


def keep_lists(quarantines: Iterable[Quarantine], workdir: Path, *, begun: bool) -> None:
    """Has the bad images of these sets listed in a run's work directory. What is listed there counts if the run has
    `begun`; else it is what an earlier attempt met, which may have been mended since, and is removed."""
    lists = [workdir / FILE, *(workdir / FILE.replace(".", f".{p}.") for p in range(1, jax.process_count()))]
    own = lists[jax.process_index()]
    if not begun:
        own.unlink(missing_ok=True)
        for file in set(_lists(workdir)) - set(lists):  # of an attempt with more processes
            file.unlink(missing_ok=True)
    for quarantine in quarantines:
        quarantine.keep(own, read_list(workdir) if begun else ())


def read_list(workdir: Path) -> set[tuple[str, int]]:
    """Set and row of every image that the lists of a work directory name; a line cut short names none."""
    found = set()
    for file in _lists(workdir):
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
                found.add((str(line["set"]), int(line["row"])))
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _lists(workdir: Path) -> list[Path]:
    return sorted(workdir.glob(FILE.replace(".", "*.")))
