"""Losses against naive loops and closed forms; methods/ has the authors' own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_kd.losses import (
    contrast_logits,
    dino_loss,
    info_nce,
    normalize,
    relation_targets,
    similarity,
    sinkhorn,
    soft_cross_entropy,
    squared_distance,
)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (3, 7), (8, 65)])
def test_equal_logits_cost_exactly_the_log_of_their_number(batch, rows):
    q = jnp.ones((batch, 4)) / 2
    value = info_nce(contrast_logits(q, q, jnp.ones((rows, 4)) / 2, 0.2))
    np.testing.assert_allclose(value, np.log(rows + 1), rtol=1e-6)
    everything = soft_cross_entropy(jnp.zeros((batch, rows + 1)), relation_targets(jnp.ones((batch, rows), bool)))
    np.testing.assert_allclose(everything, np.log(rows + 1), rtol=1e-6)


def naive_relation_contrast(q, k, queue, relation, temperature):
    total = 0.0
    for i in range(len(q)):
        candidates = [k[i], *queue]
        logits = np.array([q[i] @ a / temperature for a in candidates])
        log_sum = np.log(np.sum(np.exp(logits)))
        positives = [0, *(1 + np.flatnonzero(relation[i]))]
        total -= sum(logits[p] - log_sum for p in positives) / len(positives)
    return total / len(q)


@pytest.mark.parametrize(("batch", "rows", "dim"), [(1, 1, 3), (5, 17, 8), (8, 64, 16)])
def test_relation_contrast_equals_a_naive_loop(batch, rows, dim):
    rng = np.random.default_rng(rows)
    q, k, queue = unit(rng, batch, dim), unit(rng, batch, dim), unit(rng, rows, dim)
    relation = rng.random((batch, rows)) < 0.3

    @jax.jit
    def contrast(q, k, queue, relation):
        return soft_cross_entropy(contrast_logits(q, k, queue, 0.2), relation_targets(relation))

    value = contrast(*map(np.float32, (q, k, queue)), relation)
    np.testing.assert_allclose(value, naive_relation_contrast(q, k, queue, relation, 0.2), rtol=1e-5)


def test_no_relation_is_info_nce_in_value_and_gradient():
    rng = np.random.default_rng(0)
    logits = jnp.float32(rng.normal(size=(6, 11)))
    targets = relation_targets(jnp.zeros((6, 10), bool))
    ours = jax.value_and_grad(soft_cross_entropy)(logits, targets)
    reference = jax.value_and_grad(info_nce)(logits)
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_normalize_keeps_a_zero_row_and_its_gradient_finite():
    grad = jax.grad(lambda x: jnp.sum(normalize(x)))(jnp.zeros((1, 3)))
    assert jnp.all(jnp.isfinite(grad))
    np.testing.assert_array_equal(normalize(jnp.zeros((1, 3))), 0)


def test_bfloat16_embeddings_are_compared_in_float32():
    a = jnp.ones((2, 300), jnp.bfloat16) * 1.01
    assert similarity(a, a).dtype == jnp.float32
    np.testing.assert_allclose(similarity(a, a), 300 * float(a[0, 0]) ** 2, rtol=1e-6)


def test_sinkhorn_balances_rows_exactly_and_columns_nearly():
    scores = jnp.float32(np.random.default_rng(1).uniform(-1, 1, (64, 8)))
    codes = sinkhorn(scores, iterations=50)
    np.testing.assert_allclose(jnp.sum(codes, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(codes, axis=0), 8, rtol=1e-2)


def test_three_sinkhorn_iterations_equal_a_naive_loop():
    scores = np.random.default_rng(2).uniform(-1, 1, (5, 3))
    codes = np.exp(scores / 0.05)
    for _ in range(3):
        codes /= codes.sum(axis=0)
        codes /= codes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sinkhorn(jnp.float32(scores)), codes, rtol=2e-4, atol=1e-6)


def test_sinkhorn_survives_a_prototype_nobody_is_near():
    codes = sinkhorn(jnp.array([[1.0, -9.0], [1.0, -9.0]]))
    assert jnp.all(jnp.isfinite(codes))


def naive_dino_loss(student, teacher, centre, student_temperature, teacher_temperature):
    pairs = []
    for g, targets in enumerate(teacher):
        for v, logits in enumerate(student):
            if v != g:
                target = jax.nn.softmax((targets - centre) / teacher_temperature)
                pairs.append(soft_cross_entropy(logits / student_temperature, target))
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(
    ("crops", "globals_", "batch", "dim"), [(2, 1, 1, 3), (2, 2, 3, 5), (5, 2, 4, 7), (3, 3, 2, 4)]
)
def test_dino_loss_equals_a_naive_loop_over_pairs(crops, globals_, batch, dim):
    rng = np.random.default_rng(crops)
    student, teacher, centre = (
        jnp.float32(rng.normal(size=shape)) for shape in ((crops, batch, dim), (globals_, batch, dim), (dim,))
    )
    ours, reference = (
        jax.jit(jax.value_and_grad(loss))(student, teacher, centre, 0.1, 0.05) for loss in (dino_loss, naive_dino_loss)
    )
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_dino_loss_of_a_student_that_knows_nothing_is_the_log_of_the_width():
    """In bfloat16 too: it is computed in float32."""
    teacher = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 50)), jnp.bfloat16)
    value = jax.jit(dino_loss)(jnp.full((4, 3, 50), 7, jnp.bfloat16), teacher, jnp.zeros(50), 0.1, 0.04)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.log(50), rtol=1e-5)


def test_dino_loss_and_its_gradient_are_finite_for_confident_logits():
    student = jnp.array([[[1e4, 0.0]], [[0.0, 1e4]]])
    value, grad = jax.jit(jax.value_and_grad(dino_loss))(student, student, jnp.zeros(2), 0.1, 0.04)
    np.testing.assert_allclose(value, 1e5, rtol=1e-6)
    np.testing.assert_allclose(grad, 5 * np.array([[[1, -1]], [[-1, 1]]]), rtol=1e-6)


@pytest.mark.parametrize(("crops", "globals_"), [(1, 1), (1, 2), (2, 3)])
def test_dino_loss_needs_pairs(crops, globals_):
    with pytest.raises(ValueError, match=f"{globals_} teacher crops and {crops} student crops"):
        dino_loss(jnp.zeros((crops, 2, 3)), jnp.zeros((globals_, 2, 3)), jnp.zeros(3), 0.1, 0.04)


def test_squared_distance_of_unit_rows_is_two_minus_two_cosines():
    """SimReg's loss."""
    rng = np.random.default_rng(3)
    a, b = unit(rng, 6, 5), unit(rng, 6, 5)
    value = squared_distance(normalize(jnp.float32(3 * a)), jnp.float32(b))
    np.testing.assert_allclose(value, np.mean(2 - 2 * np.sum(a * b, axis=1)), rtol=1e-5)
