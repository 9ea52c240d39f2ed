"""ReKD (reconstruction): relation miners against naive loops, and what its ablations reduce to."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Rig, rig_of, three_steps, tiny_config
from test_step import worst

from ssl_kd.losses import contrast_logits, info_nce
from ssl_kd.methods import Context
from ssl_kd.methods.rekd import ReKD, relation_health, usage_entropy
from ssl_kd.models import NetworkSpec

B, K, D = 6, 12, 5


def unit(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def rows(filled=K):
    ids = np.where(np.arange(K) < filled, np.arange(K) % 3, -1).astype(np.int32)
    return {
        "key": unit(1, K, D),
        "teacher": unit(2, K, D),
        "filled": jnp.where(jnp.arange(K) < filled, 1, -1),
        "label": jnp.asarray(ids),
        "prototype": jnp.asarray(ids),
    }


def test_prototype_relation_equals_a_naive_loop_and_ignores_unwritten_rows():
    method, memory = ReKD(queue=K, prototypes=3), rows(filled=7)
    y = jnp.array([0, 1, 2, 0, 1, 2])
    relation = method.relate(unit(3, B, D), y, memory)
    for i in range(B):
        for j in range(K):
            assert bool(relation[i, j]) == (j < 7 and int(y[i]) == j % 3)


def test_assignment_is_the_nearest_prototype():
    method = ReKD(queue=K, prototypes=4)
    u = unit(0, B, D)
    bank = types.SimpleNamespace(centres=unit(5, 4, D))
    np.testing.assert_array_equal(method.assign(u, bank), np.argmax(np.asarray(u) @ np.asarray(bank.centres).T, axis=1))


def test_balanced_assignment_spreads_what_argmax_would_not():
    u = unit(0, 64, D) * 0.05 + jnp.eye(D)[0]
    u /= jnp.linalg.norm(u, axis=1, keepdims=True)
    bank = types.SimpleNamespace(centres=jnp.stack([jnp.eye(D)[0], *unit(6, 3, D)]))
    plain = ReKD(queue=K, prototypes=4).assign(u, bank)
    balanced = ReKD(queue=K, prototypes=4, balanced=True).assign(u, bank)
    assert len(np.unique(plain)) == 1
    assert len(np.unique(balanced)) > 1


@pytest.mark.parametrize("filled", [2, 7, K])
def test_neighbour_relation_is_the_teachers_nearest_written_rows(filled):
    method, memory, u = ReKD(queue=K, miner="neighbour", neighbours=3), rows(filled), unit(3, B, D)
    relation = np.asarray(method.relate(u, None, memory))
    s = np.asarray(u) @ np.asarray(memory["teacher"]).T
    for i in range(B):
        nearest = sorted(range(filled), key=lambda j, i=i: -s[i, j])[:3]
        assert set(np.flatnonzero(relation[i])) == set(nearest)


def test_neighbour_threshold_takes_every_row_above_it():
    method, memory, u = ReKD(queue=K, miner="neighbour", threshold=0.3), rows(9), unit(3, B, D)
    expected = (np.asarray(u) @ np.asarray(memory["teacher"]).T > 0.3) & (np.arange(K) < 9)
    np.testing.assert_array_equal(method.relate(u, None, memory), expected)


def test_soft_targets_equal_the_formula_over_written_rows():
    method, memory, u = ReKD(queue=K, miner="soft", alpha=0.3, teacher_temperature=0.1), rows(5), unit(3, B, D)
    targets, _ = method.targets(u, None, memory)
    e = np.exp(np.asarray(u) @ np.asarray(memory["teacher"])[:5].T / 0.1)
    expected = np.zeros((B, 1 + K))
    expected[:, 0] = 0.3
    expected[:, 1:6] = 0.7 * e / e.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(targets, expected, rtol=1e-4, atol=1e-7)


def test_soft_targets_stay_on_the_own_key_while_nothing_is_written():
    targets, _ = ReKD(queue=K, miner="soft").targets(unit(3, B, D), None, rows(0))
    np.testing.assert_array_equal(targets, np.eye(1 + K)[[0] * B])


def test_a_soft_miner_with_all_weight_on_the_own_key_is_info_nce():
    targets, _ = ReKD(queue=K, miner="soft", alpha=1.0).targets(unit(3, B, D), None, rows(7))
    np.testing.assert_array_equal(targets, np.eye(1 + K)[[0] * B])


def test_without_relations_the_student_is_moco_v2():
    _, moco, moco_metrics = three_steps("moco_v2")
    state, metrics = Rig(tiny_config("rekd", miner="none")).run(3)
    np.testing.assert_allclose([m["student_loss"] for m in metrics], [m["loss"] for m in moco_metrics], rtol=1e-5)
    assert worst(moco.trained["student"], state.trained["student"]) < 1e-4


def test_nothing_flows_from_the_students_loss_into_the_teacher():
    """Whatever the student learns from, the teacher's parameters after three steps are the same."""
    reference = three_steps("rekd")[1].trained["teacher"]
    for variant in ("rekd-neighbour", "rekd-response"):
        assert worst(reference, three_steps(variant)[1].trained["teacher"]) < 1e-5


def test_relations_change_the_student():
    reference = three_steps("moco_v2")[1].trained["student"]
    for variant in ("rekd", "rekd-neighbour", "rekd-response"):
        assert worst(reference, three_steps(variant)[1].trained["student"]) > 1e-4


class Fixed:
    """Stands in for a network: embeds any view as given rows."""

    def __init__(self, rows):
        self.rows = rows

    def embed(self, images, *, norm):
        return self.rows


def context():
    zero = jnp.zeros(())
    index = jnp.arange(B)
    return Context(step=0, epoch=zero, progress=zero, key=None, index=index, label=index % 3)


def loss_of(method, nets, memory):
    """The loss and what is pushed."""

    @jax.jit
    def outcome(memory):
        loss, aux = method.loss(nets, {"query": None, "key": None}, memory, context())
        return loss, aux.push

    return outcome(memory)


def test_response_knowledge_is_seed_with_the_online_teacher():
    method = ReKD(queue=K, knowledge="response", teacher="frozen", warmup=0.0, teacher_temperature=0.07)
    memory = method.init(jax.random.key(0), dict.fromkeys(("student", "teacher"), NetworkSpec("resnet18", dim=D)))
    q, k, u = unit(1, B, D), unit(2, B, D), unit(3, B, D)
    nets = types.SimpleNamespace(student=Fixed(q), student_momentum=Fixed(k), teacher=Fixed(u))
    loss, _ = loss_of(method, nets, memory)
    queue = np.asarray(memory.queue.rows["teacher"])
    total = 0.0
    for i in range(B):
        teacher = np.array([1.0, *(queue @ np.asarray(u[i]))]) / 0.07
        student = np.array([float(q[i] @ u[i]), *(queue @ np.asarray(q[i]))]) / 0.2
        p = np.exp(teacher - teacher.max()) / np.exp(teacher - teacher.max()).sum()
        total -= p @ (student - np.log(np.exp(student).sum()))
    np.testing.assert_allclose(loss, total / B, rtol=1e-5)


def test_online_loss_while_warm_adds_the_weighted_info_nce_of_the_teacher():
    """Whatever the relations."""
    method = ReKD(queue=K, prototypes=3, teacher_weight=0.5, warmup=1.0)
    memory = method.init(jax.random.key(0), dict.fromkeys(("student", "teacher"), NetworkSpec("resnet18", dim=D)))
    related = {name: row for name, row in rows().items() if name != "teacher"}
    memory = memory.replace(queue=memory.queue.replace(rows={**memory.queue.rows, **related}))
    q, k, t, u = (unit(i, B, D) for i in range(4))
    nets = types.SimpleNamespace(
        student=Fixed(q), student_momentum=Fixed(k), teacher=Fixed(t), teacher_momentum=Fixed(u)
    )
    loss, push = loss_of(method, nets, memory)
    queue = memory.queue.rows
    expected = info_nce(contrast_logits(q, k, queue["key"], 0.2)) + 0.5 * info_nce(
        contrast_logits(t, u, queue["teacher"], 0.2)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    later, _ = loss_of(dataclasses.replace(method, warmup=0.0), nets, memory)
    assert abs(later - expected) > 1e-2
    assert set(push) >= {"key", "teacher", "prototype", "label"}


def test_update_keeps_the_queue_aligned_and_drops_ids_whose_prototype_changed():
    method = ReKD(queue=K, prototypes=3, prototype_momentum=0.5)
    memory = method.init(jax.random.key(0), dict.fromkeys(("student", "teacher"), NetworkSpec("resnet18", dim=D)))
    queue = memory.queue.replace(rows={**memory.queue.rows, "prototype": jnp.arange(K) % 3})
    bank = memory.bank.replace(idle=jnp.array([0, 0, 2 * K]))
    push = {
        "key": unit(7, 4, D),
        "teacher": unit(8, 4, D),
        "prototype": jnp.array([0, 1, 0, 1]),
        "filled": jnp.ones(4, jnp.int32),
        "label": jnp.arange(4),
    }
    after = jax.jit(lambda memory: method.update(memory, push, None))(memory.replace(queue=queue, bank=bank))
    expected = np.where(np.arange(K) % 3 == 2, -1, np.arange(K) % 3)
    expected[:4] = push["prototype"]
    np.testing.assert_array_equal(after.queue.rows["prototype"], expected)
    for name in push:
        np.testing.assert_array_equal(after.queue.rows[name][:4], push[name])
    np.testing.assert_array_equal(after.bank.idle, [0, 0, 0])


def test_rekd_needs_positives_before_it_reports_precision():
    metrics = three_steps("rekd")[2]
    assert metrics[0]["positives"] == 0 and np.isnan(metrics[0]["relation_precision"])
    assert metrics[2]["positives"] > 0 and 0 <= metrics[2]["relation_precision"] <= 1


def test_relation_health_closed_forms():
    label, queue_label = jnp.array([0, 1]), jnp.array([0, 0, 1, -1])
    relation = jnp.array([[True, False, True, True], [False, False, False, False]])
    health = jax.jit(relation_health)(relation, label, queue_label)
    np.testing.assert_allclose(health["positives"], 1.5, rtol=1e-6)
    np.testing.assert_allclose(health["relation_precision"], 0.5, rtol=1e-6)
    soft = relation_health(jnp.array([[0.75, 0.0, 0.25, 0.0]]), label[:1], queue_label)
    np.testing.assert_allclose(soft["relation_precision"], 0.75, rtol=1e-6)


def test_usage_entropy_is_one_when_uniform_and_zero_when_collapsed():
    np.testing.assert_allclose(usage_entropy(jnp.arange(12) % 4, 4), 1, rtol=1e-6)
    np.testing.assert_allclose(usage_entropy(jnp.array([2, 2, 2, -1]), 4), 0, atol=1e-6)


@pytest.mark.parametrize(
    "fields", [{"knowledge": "response", "teacher": "self"}, {"miner": "neighbour", "neighbours": 99, "queue": 10}]
)
def test_impossible_fields_are_refused(fields):
    with pytest.raises(ValueError, match=r"method\."):
        ReKD(**fields)


def test_self_mining_has_no_teacher():
    method = rig_of("rekd-self").recipe.method
    assert method.trained == ("student",) and method.frozen == ()
