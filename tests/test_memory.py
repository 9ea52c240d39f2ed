"""Queue and prototype bank against naive loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_kd.memory import PrototypeBank, Queue, random_unit_rows

update = jax.jit(PrototypeBank.update, static_argnames=("momentum", "patience"))


@pytest.mark.parametrize(("size", "batch"), [(8, 8), (7, 3), (10, 4)])
def test_queue_keeps_the_newest_rows_aligned_and_wraps_row_by_row(size, batch):
    queue = Queue.create(key=jnp.zeros((size, 2)), id=jnp.full((size,), -1))
    naive, push = [(-1, 0.0)] * size, jax.jit(Queue.push)
    for call in range(5):
        ids = np.arange(batch, dtype=np.int32) + call * batch
        queue = push(queue, {"key": np.tile(np.float32(ids)[:, None], (1, 2)), "id": ids})
        for j, i in enumerate(ids):
            naive[(call * batch + j) % size] = (i, float(i))
        np.testing.assert_array_equal(queue.rows["id"], [i for i, _ in naive])
        np.testing.assert_array_equal(np.asarray(queue.rows["key"])[:, 1], [x for _, x in naive])


def test_memories_of_one_name_start_alike_and_others_do_not():
    key = jax.random.key(3)
    a, b, c = (random_unit_rows(key, name, 4, 5) for name in ("key", "key", "teacher"))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, rtol=1e-6)


def test_prototypes_move_to_the_mean_of_their_images_and_stay_unit():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 3))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    u = rng.normal(size=(6, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    y = np.array([0, 0, 2, 2, 2, 3])
    bank = PrototypeBank(centres=jnp.float32(centres), idle=jnp.zeros(4, jnp.int32))
    new, reseeded = update(bank, np.float32(u), y, momentum=0.9, patience=10)
    for m in range(4):
        expected = centres[m]
        if (y == m).any():
            expected = 0.9 * centres[m] + 0.1 * u[y == m].mean(axis=0)
            expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(new.centres[m], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(new.idle, [0, 1, 0, 0])
    assert not reseeded.any()


def test_idle_prototypes_are_reseeded_from_the_rows_that_fit_worst():
    centres = jnp.eye(4)
    u = jnp.array([[1.0, 0, 0, 0], [0.6, 0.8, 0, 0], [0.8, 0.6, 0, 0]])
    bank = PrototypeBank(centres=centres, idle=jnp.array([9, 9, 9, 2]))
    new, reseeded = update(bank, u, np.array([0, 0, 0]), momentum=0.9, patience=10)
    np.testing.assert_array_equal(reseeded, [False, True, True, False])
    np.testing.assert_array_equal(new.centres[1], u[1])  # cosine .6 to its prototype: the worst fit comes first
    np.testing.assert_array_equal(new.centres[2], u[2])
    np.testing.assert_array_equal(new.idle, [0, 0, 0, 3])


def test_a_batch_reseeds_at_most_one_prototype_a_row():
    bank = PrototypeBank.create(jax.random.key(0), 10, 4)
    u = bank.centres[:2]
    _, reseeded = update(bank, u, np.array([0, 1]), momentum=0.9, patience=5)
    assert reseeded.sum() == 2
