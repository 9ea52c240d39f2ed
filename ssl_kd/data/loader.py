"""uint8 batches on the mesh, by step number.

The order law: with N images and batch size B an epoch has S = N // B steps, and the global batch of step t is rows
[(t % S) B, (t % S + 1) B) of epoch_order(seed, t // S, N). Nothing else decides what a step sees: not the number of
devices, processes or workers, nor whether the set is resident; so there is no iterator state to save. Where an image
cannot be read, the batch has another in its place (`sources`), with that one's label and index, and so its mates.
"""

import atexit
import contextlib
import dataclasses
import functools
import os
import signal
import weakref
import zlib
from collections.abc import Generator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from ssl_kd.data.bags import mates
from ssl_kd.data.cache import FeatureCache
from ssl_kd.data.resident import Residence, Resident
from ssl_kd.data.sources import Source, arrays, gather
from ssl_kd.errors import UserError
from ssl_kd.mesh import REPLICATED, SHARDED, own_rows, place

_open_generators: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close_generators() -> None:
    """Closes what a script left open: later, amid the interpreter's teardown, grain can no longer stop its threads."""
    for generator in list(_open_generators):
        generator.close()


def _outlive_signals(_worker: int, _workers: int) -> None:
    """What asks a run to stop often reaches its whole group; the loop still needs batches until it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of an epoch: int32 (n,), read-only.

    It sorts n raw 64-bit draws of Philox keyed by (seed, crc32('data'), epoch). numpy promises that raw streams stay as
    they are between releases, which it does not for `Generator.permutation`.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(b"data"), epoch]))
    order = np.argsort(bits.random_raw(n), kind="stable").astype(np.int32)
    order.setflags(write=False)
    return order


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """Step number -> this process's rows of the global batch; sent to grain's worker processes."""

    source: Source
    batch_size: int
    seed: int
    rows: np.ndarray  # (b,) positions of this process within the global batch
    threads: int
    bags: np.ndarray  # int32 (N, k), every image's nearest others; k = 0: no mates
    cache: FeatureCache | None

    def indices(self, step: int) -> np.ndarray:
        """int32 (b,): which images, by the order law."""
        n = len(self.source)
        epoch, k = divmod(int(step), n // self.batch_size)
        return epoch_order(self.seed, epoch, n)[k * self.batch_size + self.rows]

    def __call__(self, step: int) -> dict[str, Any]:
        """image, b `Images`; label int32 (b,); index int32 (b,); with bags also mate, b `Images`; and bad, rows that
        could not be read, with why: a reader process has nobody to tell."""
        image, label, index, bad = gather(self.source, self.indices(step), self.threads)
        batch = {"image": image, "label": label, "index": index}
        if self.bags.shape[1]:
            found = gather(self.source, mates(self.bags, index, self.seed, step), self.threads)
            batch["mate"], bad = found.images, bad | found.bad
        return self.taught(batch, step) | {"bad": bad}

    def taught(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """The batch with what the teacher's features are, if they are kept."""
        if self.cache is None:
            return batch
        return batch | {"cached": self.cache.rows(batch["index"], int(step) // (len(self.source) // self.batch_size))}


class Loader:
    """The batches of a source, placed on the mesh and sharded over its 'data' axis (mesh None: the default device).

    Attributes:
      steps_per_epoch: S = N // B.
      data: the set on the mesh, where it is resident; else None.

    Args:
      batch_size: B, over all processes.
      seed: non-negative.
      resident: where the decoded set lies; only indices are sent of one that the devices hold.
      workers: reader processes; 0 reads in threads of this process, which scales while decoding dominates (it releases
        the interpreter's lock). With workers, the script must be guarded by `if __name__ == "__main__"`.
      bags: int32 (N, k), k others of every image, of which it gets one as its mate of the step (`ssl_kd.data.bags`).
      cache: the teacher's features, for batches to bring along: 'cached', view → float16 (B, D).

    Raises: UserError when the set is smaller than a batch, a batch does not divide over the mesh, or too many images of
      a resident set cannot be read.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        mesh: jax.sharding.Mesh | None,
        resident: Residence,
        workers: int = 0,
        bags: np.ndarray | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        n, shards = len(source), mesh.shape["data"] if mesh else 1
        if batch_size < 1 or n < batch_size:
            raise UserError(f"batch_size={batch_size} must be between 1 and the {n} images of the set; change it")
        if batch_size % shards:
            raise UserError(f"batch_size={batch_size} must be a multiple of the mesh's {shards} devices; change it")
        self.steps_per_epoch = n // batch_size
        self._mesh, self._workers = mesh, workers
        threads = max(1, (os.cpu_count() or 1) // max(1, workers))
        bags = np.zeros((n, 0), np.int32) if bags is None else bags
        self._host = HostBatch(source, batch_size, seed, own_rows(batch_size, mesh), threads, bags, cache)
        self.data = None if resident == "streamed" else self._hold(resident)

    def batches(self, start: int, stop: int) -> Generator[dict[str, Any]]:
        """The batches of steps start, …, stop - 1, sharded over 'data'.

        Resident sets give {'index': int32 (B,)}; others also 'image', B `Images`, with bags 'mate' alike, and 'label'
        int32 (B,), with one batch already sent to the devices while the step before it runs.

        Raises: UserError when too many images cannot be read, whoever met them.
        """
        batches = self._resident(start, stop) if self.data is not None else self._streamed(start, stop)
        _open_generators.add(batches)
        return batches

    def _hold(self, resident: Residence) -> Resident:
        """The whole set on the devices; of one that is split, each process reads its own share."""
        source, bags = self._host.source, self._host.bags
        n = len(source)
        split_over = self._mesh if resident == "sharded" else None
        padded = n + (-n % split_over.shape["data"] if split_over else 0)
        image, _ = arrays(source, own_rows(padded, split_over) % n)
        self._stand_ins = source.stand_ins()
        return Resident(
            image=place(image, self._mesh, SHARDED if split_over else REPLICATED),
            label=place(source.labels(), self._mesh, REPLICATED),
            bag=place(bags, self._mesh, REPLICATED) if bags.shape[1] else None,
            split_over=split_over,
        )

    def _resident(self, start: int, stop: int) -> Generator[dict[str, Any]]:
        for step in range(start, stop):
            batch = {"index": self._stand_ins[self._host.indices(step)]}
            yield place(self._host.taught(batch, step), self._mesh, SHARDED)

    def _streamed(self, start: int, stop: int) -> Generator[dict[str, Any]]:
        if start >= stop:
            return
        ds = grain.MapDataset.range(start, stop).map(self._host)
        ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))  # a batch has its own threads
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads its flags when it starts a worker
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            ds = ds.mp_prefetch(options, worker_init_fn=_outlive_signals)
        ds = ds.map(self._reported)
        if self._workers:
            # Batches arrive in shared memory, freed with the array. Copied, that is now; else it may be after exit.
            ds = ds.map(lambda batch: jax.tree.map(np.array, batch))
        ds = ds.map(lambda batch: place(batch, self._mesh, SHARDED))
        ds = grain.experimental.ThreadPrefetchIterDataset(ds, prefetch_buffer_size=1)
        with contextlib.closing(iter(ds)) as batches:  # else its threads and processes outlive the loop
            yield from batches

    def _reported(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without its bad rows."""
        source = self._host.source
        source.quarantine.report(batch["bad"], source.reader.where)
        return {name: value for name, value in batch.items() if name != "bad"}
