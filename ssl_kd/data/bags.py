"""Bags of instances (BINGO): each image with its nearest others in a frozen teacher's feature space.

They are mined once, before the first step, and kept in a file; a step draws one mate for every image of its batch.
"""

import contextlib
import functools
import json
import os
import zlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ssl_kd.errors import UserError
from ssl_kd.losses import normalize, similarity

Rows = TypeVar("Rows", np.ndarray, jax.Array)

FORMAT = 1
"""Of the file: raised when its arrays come to mean something else."""

REMEDY = "delete it to have the bags mined anew, or set method.bag_path to another file"


def mine(
    features: np.ndarray | jax.Array,
    neighbours: int,
    *,
    block: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Each image's nearest other images by cosine: int32 (N, neighbours), nearest first, the lower index on a tie.

    The image itself is left out by its index, so that a copy of it counts as a neighbour. Exact, in float32, on one
    device. The work grows with N² D; memory does not: a few times `block`² similarities and three blocks of features.

    Args:
      features: (N, D), finite, of any length; on the host they are sent block by block.
      neighbours: of an image, k; its bag holds k + 1 images.
      block: most images on either side of a product of similarities; 8192 make 256 MiB of them.
      progress: called as progress(images done, N) after each block.

    Raises:
      UserError: unless neighbours lies in [1, N − 1].
    """
    count = len(features)
    require_neighbours(neighbours, count)
    block = -(-count // -(-count // block))  # equal blocks compile once and waste least
    found = np.empty((count, neighbours), np.int32)

    def rows(start: int) -> jax.Array:
        return _whole_block(features[start : start + block], block)

    for start in range(0, count, block):
        query = rows(start)
        nearest = np.full((block, neighbours), -np.inf, np.float32), np.zeros((block, neighbours), np.int32)
        for other in range(0, count, block):
            bank = rows(other)  # sent while the device works on the one before, which must not fall further behind
            nearest = _merge(jax.block_until_ready(nearest), query, bank, start, other, count)
        stop = min(start + block, count)
        found[start:stop] = np.asarray(nearest[1])[: stop - start]
        if progress is not None:
            progress(stop, count)
    return found


def require_neighbours(neighbours: int, count: int) -> None:
    """Raises UserError unless each of `count` images has so many others."""
    if not 1 <= neighbours < count:
        raise UserError(
            f"method.neighbours={neighbours} must be between 1 and {count - 1}, the other images of a training set of "
            f"{count}: change it, or use more images."
        )


@functools.partial(jax.jit, static_argnames="block")
def _whole_block(rows: np.ndarray | jax.Array, block: int) -> jax.Array:
    """Rows of length 1, float32 (block, D); zeros after the last image."""
    return normalize(jnp.pad(rows.astype(jnp.float32), ((0, block - len(rows)), (0, 0))))


@functools.partial(jax.jit, donate_argnums=0)
def _merge(
    nearest: tuple[jax.Array, jax.Array], query_QxD: jax.Array, bank_RxD: jax.Array, start, other, count
) -> tuple[jax.Array, jax.Array]:
    """Similarities and indices (Q, k) of the nearest images, best first, after seeing images other, …, other + R − 1.

    Query row 0 is image `start`. On a tie lax.top_k keeps the order, which is that of the indices.
    """
    k = nearest[0].shape[1]
    itself = start + jnp.arange(len(query_QxD))
    index = other + jnp.arange(len(bank_RxD))
    sims_QxR = similarity(query_QxD, bank_RxD)
    sims_QxR = jnp.where((index == itself[:, None]) | (index >= count), -jnp.inf, sims_QxR)
    sims, columns = jax.lax.top_k(sims_QxR, min(k, len(bank_RxD)))
    sims = jnp.concatenate([nearest[0], sims], axis=1)
    indices = jnp.concatenate([nearest[1], index[columns]], axis=1)
    sims, columns = jax.lax.top_k(sims, k)
    return sims, jnp.take_along_axis(indices, columns, axis=1)


def load_or_mine(
    path: Path,
    features: Callable[[], np.ndarray],
    *,
    images: int,
    neighbours: int,
    data: str,
    teacher: str,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The nearest other images of every image, from a file or mined into it: int32 (images, neighbours), as `mine`.

    One rule for a file the user names and for the default one in the work directory: a file that is there must fit, and
    is never overwritten; one that is not is mined and written, whole or not at all. All processes call this together,
    on a path they share and can write; the first one writes.

    To fit is to have been written with the same `data`, `teacher` and number of neighbours, for as many images: of the
    images, and of their features, nothing else is compared.

    Args:
      features: () → (images, D) of the teacher; called only to mine.
      images: of the training set, N.
      neighbours: of an image, k.
      data: one line by which these images, in this order and as the teacher sees them, are told from others.
      teacher: digest of the weights the features come from.
      progress: of `mine`.

    Raises:
      UserError: if the file is damaged, of another format, or does not fit; if it cannot be written, which every
        process finds out before mining; or unless neighbours lies in [1, images − 1].
    """
    require_neighbours(neighbours, images)
    identity = {"format": FORMAT, "data": data, "teacher": teacher, "neighbours": neighbours}
    there = os.path.exists(path)
    if jax.process_count() > 1:  # one that reads and one that mines would wait for each other
        there = bool(multihost_utils.broadcast_one_to_all(np.asarray(there)))
    if there:
        return _read(path, identity, images)
    with _partial(path) as partial:
        partial.touch()  # a place that cannot be written is known before the work, to all who would wait for each other
    found = mine(features(), neighbours, progress=progress)
    if jax.process_index() == 0:
        with _partial(path) as partial:
            with partial.open("wb") as file:
                np.savez(file, identity=np.array(json.dumps(identity)), indices=found)
            os.replace(partial, path)
    return found


def _read(path: Path, identity: Mapping[str, Any], images: int) -> np.ndarray:
    """The neighbours in a file of this identity. Raises UserError for any other file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            held, indices = dict(json.loads(str(arrays["identity"]))), arrays["indices"]
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise UserError(f"{path} cannot be read as a file of bags ({type(error).__name__}): {REMEDY}.") from error
    differing = [
        f"{name} {held.get(name)!r} there, {wanted!r} now"
        for name, wanted in identity.items()
        if held.get(name) != wanted
    ]
    if differing:
        raise UserError(f"{path} holds other bags ({'; '.join(differing)}): {REMEDY}.")
    if indices.shape != (images, identity["neighbours"]) or indices.dtype != np.int32:
        raise UserError(f"{path} holds {indices.dtype} {indices.shape} and the set {images} images: {REMEDY}.")
    if indices.min() < 0 or indices.max() >= images:
        raise UserError(f"{path} names images that are not among the {images} of the training set: {REMEDY}.")
    return indices


@contextlib.contextmanager
def _partial(path: Path) -> Generator[Path]:
    """Where this process writes the file until it is whole; its folder exists. Raises UserError where that fails.

    Runs that share the file may mine it at the same time: each writes its own, and the last whole one stays.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): free space there, or set method.bag_path to another file."
        ) from error


def mates(neighbours: Rows, index: Rows, seed: int, step: int | jax.Array) -> Rows:
    """One neighbour of each image, drawn uniformly: int32 (B,), a function of seed, step and the image's index alone.

    The draw is integer arithmetic that numpy, where images are read, and jax, in a compiled step, do alike: a reader
    process that called jax.random would take hold of an accelerator.

    Args:
      neighbours: (N, k) int32.
      index: (B,) int32 in [0, N); of the same kind as `neighbours`.
      seed: of the run; its low 32 bits are used.
      step: number of the optimizer step.
    """
    xp = jnp if isinstance(index, jax.Array) else np
    words = (np.uint32(seed & 0xFFFFFFFF), xp.reshape(step, 1).astype(np.uint32), index.astype(np.uint32))
    draw = np.array([zlib.crc32(b"mate")], np.uint32)
    for word in words:
        draw = _scramble(draw ^ word)
    return neighbours[index, draw % np.uint32(neighbours.shape[1])]


def _scramble(x):
    """A bijection of uint32 in which every bit of x stirs all of the result: the last steps of MurmurHash3."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
