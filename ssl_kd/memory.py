"""What a method remembers between steps: small pytrees with one verb each. Names: B batch, K rows, M prototypes."""

import zlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from ssl_kd.losses import normalize, similarity


def random_unit_rows(key: jax.Array, name: str, rows: int, dim: int) -> jax.Array:
    """(rows, dim) float32 unit vectors; a function of key and name, so memories that share a name start alike."""
    return normalize(jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), (rows, dim)))


class Queue(struct.PyTreeNode):
    """First-in first-out rows, aligned: row j of every array in `rows` belongs to the same image.

    Attributes:
      rows: a dict of arrays with K leading rows; those not yet written are random unit vectors, used as negatives.
      ptr: int32 scalar, the next row to write.
    """

    rows: dict[str, jax.Array]
    ptr: jax.Array

    @classmethod
    def create(cls, **rows: jax.Array) -> "Queue":
        return cls(rows=dict(rows), ptr=jnp.zeros((), jnp.int32))

    def push(self, rows: dict[str, jax.Array]) -> "Queue":
        """Overwrites the B oldest rows; any K ≥ B, wrapping row by row."""
        chex.assert_equal_shape_prefix(list(rows.values()), 1)
        size, count = next(iter(self.rows.values())).shape[0], next(iter(rows.values())).shape[0]
        where = (self.ptr + jnp.arange(count)) % size
        written = {name: self.rows[name].at[where].set(new, unique_indices=True) for name, new in rows.items()}
        return Queue(rows=written, ptr=(self.ptr + count) % size)


class PrototypeBank(struct.PyTreeNode):
    """Dynamic semantic prototypes of ReKD in the teacher's embedding space (reconstruction).

    Attributes:
      centres: (M, d) unit rows.
      idle: (M,) int32, steps since a prototype was last assigned an image.
    """

    centres: jax.Array
    idle: jax.Array

    @classmethod
    def create(cls, key: jax.Array, prototypes: int, dim: int) -> "PrototypeBank":
        """Random unit prototypes that count as long idle: the first batches re-seed those that attract no image."""
        centres = random_unit_rows(key, "prototype", prototypes, dim)
        return cls(centres=centres, idle=jnp.full((prototypes,), jnp.iinfo(jnp.int32).max // 2, jnp.int32))

    def update(self, u: jax.Array, y: jax.Array, momentum: float, patience: int) -> tuple["PrototypeBank", jax.Array]:
        """Moves prototypes towards the mean of their images, c_m ← n(a c_m + (1−a) mean_{i: y_i=m} u_i).

        A prototype idle for `patience` steps is re-seeded from the batch rows that fit their own prototype worst,
        at most one prototype a row.

        Args:
          u: (B, d) teacher embeddings.
          y: (B,) int32 assignments made with this bank.
          momentum: a.
          patience: steps.

        Returns:
          The new bank and the (M,) bool mask of prototypes that were re-seeded and so changed their meaning.
        """
        prototypes, batch = self.centres.shape[0], u.shape[0]
        members = jax.nn.one_hot(y, prototypes, dtype=u.dtype)  # B×M
        count = jnp.sum(members, axis=0)
        mean = similarity(members.T, u.T) / jnp.maximum(count, 1)[:, None]
        used = count > 0
        centres = jnp.where(used[:, None], normalize(momentum * self.centres + (1 - momentum) * mean), self.centres)

        idle = jnp.where(used, 0, self.idle + 1)
        expired = idle >= patience
        turn = jnp.cumsum(expired) - 1
        reseeded = expired & (turn < batch)
        fit = jnp.sum(u * self.centres[y], axis=1)
        seeds = u[jnp.argsort(fit)[jnp.clip(turn, 0, batch - 1)]]
        bank = PrototypeBank(
            centres=jnp.where(reseeded[:, None], seeds, centres),
            idle=jnp.where(reseeded, 0, idle),
        )
        return bank, reseeded


Memory = Any
"""A pytree of the above; each method documents its own."""
