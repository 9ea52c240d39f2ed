"""A frozen teacher's features of fixed views of every image: computed once, kept on disk, sent with the batch.

With teacher.cache_views = n an image has n views of each kind, functions of seed, image and number; epoch e shows those
of number e mod n. What the teacher sees then repeats, and its forward becomes a read of D half floats.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_kd.errors import UserError, reason
from ssl_kd.log import Meter, console

FEATURE_DTYPE = np.dtype(np.float16)
"""Eleven significant bits of each feature, in half the bytes."""

IDENTITY = "features.json"

Compute = Callable[[np.ndarray, int], Mapping[str, jax.Array]]
"""(indices int32 (b,) of images, number) → kind of view → their features (b, D), whole on every process."""


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """Features on disk, a file NAME-NUMBER.float16 of rows (N, D) for every kind of view and number. Picklable.

    Attributes:
      names: kinds of views that the teacher sees.
      numbers: n, views of each kind that an image has.
      images, width: N and D.
    """

    directory: Path
    names: tuple[str, ...]
    numbers: int
    images: int
    width: int

    def rows(self, index: np.ndarray, epoch: int) -> dict[str, np.ndarray]:
        """Kind of view → float16 (b, D): the features of these images' views in an epoch."""
        shape, number = (self.images, self.width), epoch % self.numbers
        files = {name: np.memmap(self._path(name, number), FEATURE_DTYPE, "r", shape=shape) for name in self.names}
        return {name: np.asarray(rows[index]) for name, rows in files.items()}

    def fill(
        self,
        compute: Compute,
        identity: Mapping[str, Any],
        batch_size: int,
    ) -> None:
        """Computes what is not there yet. A stopped command goes on at its last whole batch.

        All processes call this together, on a directory they share and can write; the first one writes the features.

        Args:
          compute: see `Compute`.
          identity: what tells these features from others, as JSON can hold it. It is compared with the directory's, and
            so are `names`, `numbers` and `images`; nothing else is.

        Raises:
          UserError: for a directory of other features, one that cannot be written, too little room, or features that
            are not finite in 16 bits.
        """
        with self._writing():
            self._claim(identity)
            there = np.array([self._whole_rows(number) for number in range(self.numbers)])
        if jax.process_count() > 1:  # the others may look when the first has begun
            there = np.array(multihost_utils.broadcast_one_to_all(there))
        missing = int(self.numbers * self.images - there.sum())
        if not missing:
            return
        size = missing * len(self.names) * self.width * FEATURE_DTYPE.itemsize
        free = shutil.disk_usage(self.directory).free
        said = f"{size / 2**20:,.0f} MiB of features, {free / 2**20:,.0f} MiB are free"
        console.print(
            f"The teacher looks at {self.numbers} views of {self.images:,} images: {said}, in {self.directory}."
        )
        if size > free:
            raise UserError(
                f"{self.directory} has no room for {said}: make room, lower teacher.cache_views, or set "
                "teacher.cache_path to another directory."
            )
        began, total = time.monotonic(), self.numbers * self.images
        with Meter(total, total - missing, "view", "compiling the teacher …") as meter:
            for number in range(self.numbers):
                for rows in self._look(compute, number, int(there[number]), batch_size):
                    there[number] = rows
                    left = total - int(there.sum())
                    rate = (missing - left) / (time.monotonic() - began)
                    meter.show(total - left, f"{rate:,.0f} views/s", left / rate)

    def _look(self, compute: Compute, number: int, start: int, batch_size: int) -> Generator[int]:
        """Writes the features of a number's views from row `start` on; yields how many there are."""
        with contextlib.ExitStack() as stack, self._writing():
            files = {}
            if jax.process_index() == 0:
                files = {name: stack.enter_context(self._path(name, number).open("ab")) for name in self.names}
            for file in files.values():
                file.truncate(start * self.width * FEATURE_DTYPE.itemsize)
            running: tuple[int, Mapping[str, jax.Array]] | None = None
            for row in [*range(start, self.images, batch_size), None]:
                following = None
                if row is not None:
                    index = (np.arange(row, row + batch_size) % self.images).astype(np.int32)
                    following = row, compute(index, number)
                if running is not None:  # the device works on the following batch meanwhile
                    done, features = running
                    stop = min(done + batch_size, self.images)
                    for name, values in jax.device_get(features).items():
                        rows = values[: stop - done]
                        if not np.abs(rows).max() <= np.finfo(FEATURE_DTYPE).max:  # nor if it is NaN
                            raise UserError(
                                f"the teacher's features of images {done} to {stop - 1} are not finite in 16 bits: set "
                                "teacher.cache_views=0."
                            )
                        if name in files:
                            files[name].write(rows.astype(FEATURE_DTYPE).tobytes())
                            files[name].flush()
                    yield stop
                running = following

    def _path(self, name: str, number: int) -> Path:
        return self.directory / f"{name}-{number}.{FEATURE_DTYPE.name}"

    def _whole_rows(self, number: int) -> int:
        """Rows that the files of a number all have."""
        files = [self._path(name, number) for name in self.names]
        sizes = [file.stat().st_size if file.exists() else 0 for file in files]
        return min(self.images, min(sizes) // (self.width * FEATURE_DTYPE.itemsize))

    def _claim(self, identity: Mapping[str, Any]) -> None:
        """Notes what the features are of, or compares it with what is noted."""
        path = self.directory / IDENTITY
        shape = {"views": self.names, "numbers": self.numbers, "images": self.images}
        wanted = json.loads(json.dumps({**identity, **shape}))
        if path.exists():
            try:
                there = dict(json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path} is damaged ({reason(error)}): delete {self.directory}.") from error
            differing = [key for key in wanted if there.get(key) != wanted[key]]
            if differing:
                which = "; ".join(f"{key} ({there.get(key)!r} there, {wanted[key]!r} now)" for key in differing)
                raise UserError(
                    f"{self.directory} holds other features: {which}. Delete it to have them computed anew, or set "
                    "teacher.cache_path to another directory."
                )
        else:  # every process writes the same, so that all learn where that fails: they would wait for each other
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{jax.process_index()}.partial")
            partial.write_text(json.dumps(wanted, indent=1))
            os.replace(partial, path)

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        """Makes what the system says of a write one sentence."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.directory} ({reason(error)}): make room, or set teacher.cache_path to another "
                "directory; what is written stays."
            ) from error
