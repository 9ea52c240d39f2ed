"""BINGO: the authors' numbers, and which views and weights meet in its loss."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import Check, Fixed, precisions, queue_of, run

from ssl_kd.losses import contrast_logits, info_nce, normalize
from ssl_kd.methods import Context, bingo
from ssl_kd.methods.bingo import BINGO, contrasts, random_cutmix
from ssl_kd.models import NetworkSpec

B, K, D, SIDE = 6, 20, 5, 8
ROLES = {"s_anchor": "anchor", "s_neighbour": "mate", "s_mix": "mix"}


@precisions
@pytest.mark.parametrize("phase", ["early", "late"])
def test_bingo(golden, exact, phase, monkeypatch):
    """Embeddings are given here, so that the mixed view is a name and its share the fixture's."""
    with jax.enable_x64(exact):
        check = Check(golden("bingo_loss"), exact)
        method = BINGO(
            temperature=float(check.fixture["hp_T"]),
            queue=64,
            single_epochs=11.0 if phase == "early" else 0.0,
            late_weight=float(check.fixture["hp_lam_late"][1]),
        )
        memory = queue_of(check, "in_queue", "teacher")
        for call in range(2):
            share = check.array("hp_mix_lam", call)
            monkeypatch.setattr(bingo, "random_cutmix", lambda key, a, b, alpha, share=share: ("mix", share))
            names = (*ROLES, "t_anchor", "t_neighbour")
            value, metrics, grads, memory = run(
                method,
                memory,
                {name: check.array(f"in_{name}_raw", call) for name in names},
                lambda raw: {
                    "student": Fixed("batch", **{view: raw[name] for name, view in ROLES.items()}),
                    "teacher": Fixed("running", anchor_key=raw["t_anchor"], mate_key=raw["t_neighbour"]),
                },
            )
            check.equal(value, f"out_loss_total_{phase}", call)
            for name, view in ROLES.items():
                check.equal(metrics[view], f"out_loss_{name[2:]}_{phase}", call)
                check.equal(grads[name], f"grad_{name[2:]}_raw_{phase}", call)
            check.equal(memory.rows["teacher"].T, "out_queue_after", call)
            assert int(memory.ptr) == check.fixture["out_ptr_after"][call, 0]


@precisions
def test_logits_and_the_loss_that_skips_them(golden, exact):
    """`contrasts` is InfoNCE over the authors' logits, which it never writes down."""

    @jax.jit
    def both(s, positives, queue, temperature):
        logits = [contrast_logits(s, t, queue, temperature) for t in positives]
        return logits, [info_nce(rows) for rows in logits], contrasts(s, positives, queue, temperature)

    with jax.enable_x64(exact):
        check = Check(golden("bingo_loss"), exact)
        temperature = float(check.fixture["hp_T"])
        queues = check.array("in_queue").T, check.array("f64_out_queue_after", 0).T
        for (call, queue), name in itertools.product(enumerate(queues), ROLES):
            s = normalize(check.array(f"in_{name}_raw", call))
            positives = [check.array(f"in_t_{image}_raw", call) for image in ("anchor", "neighbour")]
            positives = normalize(jnp.stack(positives))
            logits, expected, found = both(s, positives, queue, temperature)
            check.equal(jnp.stack(logits, axis=1), f"out_logits_{name[2:]}", call)
            np.testing.assert_allclose(found, expected, rtol=1e-12 if exact else 2e-6)


# --- what meets in the loss


class Linear:
    """A network that is one matrix; notes the batch-norm mode it is asked for."""

    def __init__(self, seed):
        self.weights = np.random.default_rng(seed).normal(size=(SIDE * SIDE * 3, D)).astype(np.float32)
        self.norms = []

    def embed(self, images, *, norm):
        self.norms.append(norm)
        return images.reshape(len(images), -1) @ self.weights


def setting(method, epoch=0.0, inverse=None, seed=0):
    """(networks, views, memory, context) of random images."""
    rng = np.random.default_rng(seed)
    views = {name: jnp.float32(rng.random((B, SIDE, SIDE, 3))) for name in method.views}
    nets = types.SimpleNamespace(student=Linear(1), teacher=Linear(2))
    spec = NetworkSpec("resnet18", dim=D)
    memory = method.init(jax.random.key(3), {"student": spec, "teacher": spec})
    context = Context(
        step=jnp.int32(0),
        epoch=jnp.float32(epoch),
        progress=jnp.float32(0),
        key=jax.random.key(seed),
        index=jnp.arange(B),
        label=jnp.arange(B),
        inverse=inverse,
    )
    return nets, views, memory, context


def naive(method, epoch, nets, views, memory, key):
    """The terms, image by image."""
    queue = np.asarray(memory.rows["teacher"], np.float64)

    def embed(network, view):
        rows = np.asarray(view, np.float64).reshape(B, -1) @ network.weights
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    mixed, share = random_cutmix(key, views["anchor"], views["mate"], method.cutmix_alpha)
    keys = [embed(nets.teacher, views[name]) for name in ("anchor_key", "mate_key")]
    other = method.late_weight if epoch >= method.single_epochs else 0.0
    terms = {}
    for name, view, weight in (
        ("anchor", views["anchor"], 1 - other),
        ("mate", views["mate"], other),
        ("mix", mixed, float(share)),
    ):
        s, total = embed(nets.student, view), 0.0
        for i in range(B):
            for w, k in ((weight, keys[0][i]), (1 - weight, keys[1][i])):
                scores = np.exp(np.array([s[i] @ k, *(queue @ s[i])]) / method.temperature)
                total -= w * np.log(scores[0] / scores.sum())
        terms[name] = total / B
    return terms, keys[0]


@pytest.mark.parametrize("epoch", [0.0, 10.999, 11.0, 50.0])
@pytest.mark.parametrize("late_weight", [0.5, 0.2])
def test_the_loss_equals_a_naive_loop(epoch, late_weight):
    method = BINGO(queue=K, late_weight=late_weight)
    nets, views, memory, context = setting(method, epoch)
    loss, aux = method.loss(nets, views, memory, context)
    terms, key = naive(method, epoch, nets, views, memory, context.key)
    assert set(aux.metrics) == set(terms)
    for name, value in terms.items():
        np.testing.assert_allclose(aux.metrics[name], value, rtol=1e-5)
    np.testing.assert_allclose(loss, sum(terms.values()) / 3, rtol=1e-5)
    np.testing.assert_allclose(aux.push["teacher"], key, atol=1e-6)


@pytest.mark.parametrize("single_epochs", [1, 2, 11])
def test_the_phase_changes_with_the_first_step_of_an_epoch(single_epochs):
    method = BINGO(queue=K, late_weight=0.5, single_epochs=single_epochs)
    terms = []
    for epoch in (np.nextafter(np.float32(single_epochs), np.float32(0)), single_epochs):
        nets, views, memory, context = setting(method, epoch)
        terms.append(method.loss(nets, views, memory, context)[1].metrics)
    first, then = terms
    assert first["anchor"] != then["anchor"] and first["mate"] != then["mate"] and first["mix"] == then["mix"]


def test_keys_made_from_a_shuffled_batch_come_back_in_order():
    method, order = BINGO(queue=K), np.random.default_rng(5).permutation(B)
    nets, views, memory, context = setting(method, epoch=50.0)
    plain = method.loss(nets, views, memory, context)
    *_, context = setting(method, epoch=50.0, inverse=jnp.argsort(order))
    shuffled = {name: view[order] if method.views[name].shuffled else view for name, view in views.items()}
    other = method.loss(nets, shuffled, memory, context)
    np.testing.assert_allclose(plain[0], other[0], rtol=1e-6)
    np.testing.assert_allclose(plain[1].push["teacher"], other[1].push["teacher"], atol=1e-6)


@pytest.mark.parametrize("teacher_norm", ["running", "batch"])
def test_three_student_forwards_and_two_of_the_teacher(teacher_norm):
    method = BINGO(queue=K, teacher_norm=teacher_norm)
    nets, *rest = setting(method)
    method.loss(nets, *rest)
    assert nets.student.norms == ["batch"] * 3 and nets.teacher.norms == [teacher_norm] * 2


def test_half_of_the_views_are_the_mates():
    views = BINGO().views
    assert {name for name, view in views.items() if view.source == "mate"} == {"mate", "mate_key"}
    assert {name for name, view in views.items() if view.shuffled} == {"anchor_key", "mate_key"}


def test_only_the_anchors_teacher_embedding_is_queued():
    method = BINGO(queue=K)
    nets, views, memory, context = setting(method)
    _, aux = method.loss(nets, views, memory, context)
    after = method.update(memory, aux.push, context)
    np.testing.assert_array_equal(
        after.rows["teacher"][:B], normalize(nets.teacher.embed(views["anchor_key"], norm=""))
    )
    np.testing.assert_array_equal(after.rows["teacher"][B:], memory.rows["teacher"][B:])
    assert after.ptr == B


def test_the_law_of_the_box():
    """Black pasted into white: the shares left are those of numpy's draws, and other ones for another α."""
    height, width, count = 24, 36, 2000
    white, black = jnp.ones((1, height, width, 1)), jnp.zeros((1, height, width, 1))
    keys = jax.random.split(jax.random.key(0), count)
    rng = np.random.default_rng(0)
    draw, moments = jax.jit(jax.vmap(random_cutmix, (0, None, None, None))), {}
    for alpha in (2.0, 0.5):
        mixed, share = draw(keys, white, black, alpha)
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3, 4)), share, atol=1e-5)
        expected = []
        for cut in np.sqrt(1 - rng.beta(alpha, alpha, count)):
            lengths = []
            for side in (height, width):
                half, centre = int(side * cut) // 2, rng.integers(side)
                lengths.append(min(side, centre + half) - max(0, centre - half))
            expected.append(1 - np.prod(lengths) / (height * width))
        error = np.std(expected) / np.sqrt(count / 2)
        assert abs(np.mean(share) - np.mean(expected)) < 4 * error
        assert abs(np.std(share) - np.std(expected)) < 4 * error  # above the error of a deviation
        moments[alpha] = np.std(share), error
        covered = 1 - np.asarray(mixed).mean(axis=0)[0, :, :, 0]
        np.testing.assert_allclose(covered, covered[::-1, ::-1], atol=0.11)  # a half, rounded down, leans to the top
        assert covered[0, 0] > 0.02 and covered[-1, -1] > 0.02
    assert moments[0.5][0] - moments[2.0][0] > 4 * moments[0.5][1]


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.0}, {"neighbours": 0}, {"late_weight": 1.5}, {"single_epochs": -1.0}, {"cutmix_alpha": 0.0}],
    ids=str,
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=rf"method\.{next(iter(fields))}="):
        BINGO(**fields)


def test_unequal_widths_are_refused():
    specs = {"student": NetworkSpec("resnet18", dim=8), "teacher": NetworkSpec("resnet18", dim=16)}
    with pytest.raises(ValueError, match="bingo"):
        BINGO(queue=K).init(jax.random.key(0), specs)
