"""The compiled step: facts that hold for every method."""

import dataclasses
from contextlib import closing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import VARIANTS, Rig, rig_of, three_steps, tiny_config, worst

from ssl_kd.checkpoint import Checkpoints
from ssl_kd.images import Images
from ssl_kd.memory import Queue
from ssl_kd.state import abstract, create_state
from ssl_kd.step import TrainStep

every_method = pytest.mark.parametrize("variant", VARIANTS, scope="module")  # its tests follow each other


def everything_moved(first, last):
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(last), strict=True):
        assert np.isfinite(after).all()
        assert not np.array_equal(before, after), f"{jax.tree_util.keystr(path)} never moved"


@every_method
def test_three_steps_train_what_is_trained_with_one_trace(variant):
    first, last, metrics = three_steps(variant)
    method = rig_of(variant).recipe.method
    assert rig_of(variant).step._cache_size() == 1
    assert last.step == 3 and last.nonfinite == 0
    # A relation without positives has no precision.
    assert all(np.isfinite(value) for m in metrics for name, value in m.items() if name != "relation_precision")
    assert set(last.trained) == set(method.trained) and set(last.averaged) == set(method.averaged)
    for name in method.trained:
        everything_moved(first.trained[name], last.trained[name])
    for name, stats in first.batch_stats.items():  # every network's statistics follow its own forwards
        assert not stats or worst(stats, last.batch_stats[name]) > 1e-3


@pytest.mark.parametrize("names", [("tiny", "tiny_bottleneck"), ("tiny_vit", "tiny_vit")], ids=" and ".join)
def test_two_models_of_a_kind_teach_each_other(names):
    """CNNs, and ViTs whose T-Heads are wider than their tokens; a CNN with a ViT is every other test's."""
    config = tiny_config("mokd")
    for role, name in zip(("student", "teacher"), names, strict=True):
        stem = "small" if name == "tiny_vit" else "small_s2"
        config[role].update(name=name, width=0.5, stem=stem, drop_path=0.0)
    rig, rows = Rig(config), np.arange(16, dtype=np.int32)
    step, state = TrainStep(rig.recipe, rig.mesh), rig.create()
    shapes = jax.eval_shape(lambda: step.views(0, {"image": rig.data.image[rows]}, rows))
    views = {name: np.random.default_rng(i).random(x.shape, x.dtype) for i, (name, x) in enumerate(shapes.items())}

    def loss(trained):
        return step.loss(trained, state, rig.frozen, views, step.context(state, {"index": rows, "label": rows}, 0))

    (total, (_, metrics, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.trained)
    assert all(np.isfinite(value) and value > 0 for value in (total, *metrics.values()))
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(gradient).all() and np.any(gradient), jax.tree_util.keystr(path)


@every_method
def test_memory_advances_by_a_batch_a_step(variant):
    """Queues overwrite their oldest rows, all with one pointer; prototypes and centres move."""
    rig = rig_of(variant)
    state = rig.create()
    before = jax.device_get(state.memory)
    after = jax.device_get(rig.run(1, state)[0].memory)
    count = rig.config.batch_size

    def parts(memory):
        return jax.tree.leaves(memory, is_leaf=lambda part: isinstance(part, Queue))

    for old, new in zip(parts(before), parts(after), strict=True):
        if not isinstance(old, Queue):
            assert not np.array_equal(old, new)
            continue
        assert (old.ptr, new.ptr) == (0, count)
        for name in (name for name, rows in old.rows.items() if rows.ndim == 2):
            np.testing.assert_array_equal(old.rows[name][count:], new.rows[name][count:])
            assert (old.rows[name][:count] != new.rows[name][:count]).any(axis=1).all()
            np.testing.assert_allclose(np.linalg.norm(new.rows[name][:count], axis=1), 1, rtol=1e-5)


@every_method
def test_averages_follow_their_source(variant):
    rig = rig_of(variant)
    state = rig.create()
    before = jax.device_get(state.averaged)
    state, _ = rig.run(1, state)
    for name, (source, schedule) in rig.recipe.method.averaged.items():
        m = schedule(0.0)
        expected = jax.tree.map(
            lambda a, p, m=m: m * a + (1 - m) * p, before[name], jax.device_get(state.trained[source])
        )
        assert worst(expected, state.averaged[name]) < 1e-6


def test_the_first_step_of_an_epoch_has_a_whole_epoch():
    """The compiled quotient step / steps per epoch would miss it for some of these."""
    rig = rig_of("moco_v2")
    state, batch = rig.create(), rig.batch(0)
    for per_epoch in (7, 41, 97, 5004):
        step = TrainStep(dataclasses.replace(rig.recipe, steps_per_epoch=per_epoch), rig.mesh)
        epoch = jax.jit(
            lambda number, step=step: step.context(state.replace(step=number), {**batch, "label": 0}, 0).epoch
        )
        assert [float(epoch(jnp.int32(n * per_epoch))) for n in (1, 2, 11)] == [1, 2, 11]


@pytest.mark.parametrize("variant", ["rekd-frozen", "disco", "seed", "compress", "simreg", "bingo"])
def test_a_frozen_teacher_is_not_in_the_state(variant):
    """What is not in the state cannot be written, nor checkpointed."""
    state = three_steps(variant)[1]
    assert "teacher" not in {**state.trained, **state.averaged, **state.batch_stats}


@every_method
def test_a_restored_state_goes_on_as_if_nothing_had_happened(variant, tmp_path):
    """Through a checkpoint, whose digest of every leaf is checked; the steps are those already compiled."""
    rig = rig_of(variant)
    state, _ = rig.run(1)
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = checkpoints.restore(abstract(partial(create_state, rig.recipe), rig.replicated))
    last, _ = rig.run(2, restored)
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(last), three_steps(variant)[1]))


def test_streamed_batches_equal_resident_ones():
    rig = rig_of("rekd")
    a, _ = rig.run(1)
    index = rig.batch(0)["index"]
    batch = {"index": index, "image": rig.data.image[index], "label": rig.data.label[index]}
    b, _ = TrainStep(rig.recipe, rig.mesh).jit()(rig.create(), rig.frozen, batch, None)
    assert worst(a, b) < 1e-6


def test_a_larger_canvas_changes_nothing():
    """Nor what lies on it beside the images."""
    rig, side = Rig(tiny_config("moco_v2")), 12
    pixels = np.random.default_rng(3).integers(0, 256, (len(rig.data.label), side + 4, side + 3, 3), np.uint8)
    pixels[:, :side, :side] = rig.data.image.pixels
    rig.data = rig.put(dataclasses.replace(rig.data, image=Images(pixels, rig.data.image.size)))
    last, metrics = rig.run(3)
    _, expected, before = three_steps("moco_v2")
    np.testing.assert_allclose([m["loss"] for m in metrics], [m["loss"] for m in before], rtol=1e-5)
    assert worst(last.trained, expected.trained) < 1e-4


def test_a_non_finite_step_is_refused_counted_and_halts_the_state():
    rig = Rig(tiny_config("rekd"))
    state, _ = rig.run(1)
    poisoned = state.replace(trained=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.trained))
    before = jax.device_get(poisoned)
    after, metrics = rig.run(2, poisoned)
    assert [m["nonfinite"] for m in metrics] == [1, 1]
    assert after.step == before.step == 1
    same = jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), before, jax.device_get(after))
    assert all(jax.tree.leaves(same.replace(nonfinite=True)))


def test_tolerated_non_finite_steps_are_skipped():
    config = tiny_config("moco_v2")
    config.max_nonfinite = 1
    rig = Rig(config)
    state = rig.create()
    poisoned = state.replace(trained=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.trained))
    before = jax.device_get(poisoned)
    after, metrics = rig.run(3, poisoned)
    assert [m["nonfinite"] for m in metrics] == [1, 2, 2]  # one is skipped, the second halts
    assert after.step == 1
    assert worst(before.memory, after.memory) == 0 and worst(before.opt, after.opt) == 0


def test_the_rate_after_a_skipped_step_is_the_one_the_optimizer_used():
    config = tiny_config("moco_v2")
    config.max_nonfinite = 1
    rig = Rig(config)
    healthy = jax.device_get(rig.create())
    skipped, _ = rig.run(1, rig.put(healthy.replace(trained=jax.tree.map(lambda x: x * jnp.nan, healthy.trained))))
    before = rig.put(jax.device_get(skipped.replace(trained=healthy.trained, opt=healthy.opt)))
    after, metrics = rig.run(1, before)
    # The first update of SGD with momentum is −lr · (gradient + decay · parameter), whatever the step is called.
    change = jax.tree.map(lambda a, b: a - b, healthy.trained, jax.device_get(after.trained))
    trace = jax.device_get(optax.tree.get(after.opt, "trace"))
    lr = metrics[0]["lr"]
    assert after.step == 2 and lr == float(rig.recipe.rate(0)) != float(rig.recipe.rate(1))
    assert worst(jax.tree.map(lambda t: lr * t, trace), change) < 1e-4


def test_bfloat16_computes_close_to_float32_and_keeps_parameters_float32():
    config = tiny_config("rekd")
    config.compute_dtype = "bfloat16"
    state, metrics = Rig(config).run(1)
    assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics[0]["loss"], three_steps("rekd")[2][0]["loss"], rtol=3e-2)


def test_teacher_relations_and_student_contrast_are_in_one_executable():
    """The whole step is one HLO module, in which both networks' convolutions, the prototype argmax and the
    student's softmax over the queue are found."""
    rig = rig_of("rekd")
    lowered = rig.step.lower(rig.create(), rig.frozen, rig.batch(0), rig.data)
    text = lowered.as_text()
    assert text.count("module @") == 1
    rows, classes = rig.config.method.queue, rig.config.method.prototypes
    assert f"tensor<16x{classes}xf32>" in text  # teacher embeddings against prototypes
    assert f"tensor<16x{rows}xi1>" in text  # the relation matrix
    assert f"tensor<16x{rows + 1}xf32>" in text  # student logits


GOLDEN_LOSSES = {
    "moco_v2": [1.0179685, 2.8473580, 3.4390695],
    "rekd": [1.8949225, 5.6483197, 6.7351751],
}


@pytest.mark.parametrize("variant", GOLDEN_LOSSES)
def test_golden_steps(variant):
    """The first losses of a fixed experiment. If you changed the mathematics on purpose, put the new ones above."""
    losses = [m["loss"] for m in three_steps(variant)[2]]
    np.testing.assert_allclose(losses, GOLDEN_LOSSES[variant], rtol=1e-4, err_msg=f"now {losses}")
