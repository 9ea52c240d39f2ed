"""The bench: its parts are the step's, no matrix product missing and none twice."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import VARIANTS, Rig, rig_of, tiny_config

from ssl_kd.bench import bench, flops_of, listed_calls, step_parts
from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.models import backbone_calls
from ssl_kd.report import bench_table
from ssl_kd.run import prepare
from ssl_kd.step import TrainStep


def jaxpr_flops(function, *arguments):
    return flops_of(jax.jit(function).trace(*arguments).jaxpr)


def test_operations_of_products_and_convolutions_are_the_textbooks():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 7))
    assert jaxpr_flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5 * 7
    assert jaxpr_flops(lambda a: jax.lax.scan(lambda c, x: (c + x @ x.T, None), jnp.eye(4), a), a) == 3 * 2 * 4 * 5 * 4
    x, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 3, 10))

    def conv(x, kernel, stride=1):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=dims, feature_group_count=2
        )

    products = 2 * (2 * 8 * 8 * 10) * 9 * 3
    assert jaxpr_flops(conv, x, kernel) == products
    assert jaxpr_flops(jax.grad(lambda k: conv(x, k).sum()), kernel) == 2 * products
    strided = 2 * (2 * 4 * 4 * 10) * 9 * 3
    of_x = jaxpr_flops(jax.grad(lambda x: conv(x, kernel, 2).sum()), x) - strided
    assert of_x == strided


def shapes_of(rig):
    rows = np.arange(16, dtype=np.int32)
    images = dict.fromkeys(("image", "mate"), Images.whole(np.zeros((16, 12, 12, 3), np.uint8)))
    views = jax.eval_shape(lambda images: TrainStep(rig.recipe, rig.mesh).views(0, images, rows), images)
    return views, {"index": rows, "label": rows}


CALLS = {"disco": 5, "bingo": 5, "mokd": 6, "mokd-alone": 3}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_network_of_the_method_is_called(variant):
    rig = rig_of(variant)
    method, (views, batch) = rig.recipe.method, shapes_of(rig)
    state = rig.shapes
    calls = listed_calls(TrainStep(rig.recipe, rig.mesh), state, rig.frozen, views, batch, None)
    assert {call[0] for call in calls} == {*method.trained, *method.averaged, *method.frozen}
    assert len(calls) == CALLS.get(variant, len({call[0] for call in calls}))
    assert {call[1] for call in calls if call[0] in method.frozen} <= {"running"}


def test_stand_in_features_give_the_loss_of_the_backbones_they_came_from():
    rig = rig_of("rekd")
    step = TrainStep(rig.recipe, rig.mesh)

    @jax.jit
    def losses(state, images):
        rows = np.arange(16, dtype=np.int32)
        views = step.views(state.step, {"image": images}, rows)
        context = step.context(state, {"index": rows, "label": rows}, 0)
        with backbone_calls() as calls:
            loss, _ = step.loss(state.trained, state, rig.frozen, views, context)
        with backbone_calls([call.features for call in calls]):
            again, _ = step.loss(state.trained, state, rig.frozen, views, context)
        with backbone_calls([jax.tree.map(lambda x: -x, call.features) for call in calls]):
            other, _ = step.loss(state.trained, state, rig.frozen, views, context)
        return loss, again, other

    loss, again, other = losses(rig.create(), rig.data.image[:16])
    assert loss == again != other


@pytest.mark.parametrize(
    ("variant", "accum", "devices"),
    [("rekd", 1, 1), ("rekd-frozen", 2, 1), ("disco", 1, 8), ("moco_v2", 1, 8), ("bingo", 1, 1), ("mokd", 1, 1)],
    ids=str,
)
def test_parts_add_up_to_the_operations_of_the_step(variant, accum, devices):
    """Traced only, so every product of every part is compared, the smallest too."""
    method, fields = VARIANTS[variant]
    config = tiny_config(method, **fields)
    config.optim.accum, config.bn_groups = accum, 2
    rig, step_flops = Rig(config, devices), []

    def count(state, images):
        parts = step_parts(TrainStep(rig.recipe, rig.mesh), state, rig.frozen, images)
        step_flops.append(sum(part.flops() for part in parts.values() if part.counted))

    jax.eval_shape(count, rig.shapes, rig.data.image[: 16 // accum])
    whole = flops_of(rig.step.trace(rig.shapes, rig.frozen, rig.batch(0), rig.data).jaxpr)
    assert step_flops == [whole]


def test_figures_of_a_streamed_run(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_kd.bench.ROUNDS", 1)
    monkeypatch.setattr("ssl_kd.bench.HOST_SECONDS", 0.3)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # the tests that follow live on them
    config = tiny_config("moco_v2")
    config.update_from_flattened_dict({"data.train": "train[:96]", "data.test": "test[:40]", "data.resident": "off"})
    config.image_size = 28
    run = runs.prepared(config, tmp_path)
    figures = json.loads(json.dumps(bench(run, budget=0.1), allow_nan=False))
    counted = {name for name, part in figures["parts"].items() if part["counted"]}
    assert counted == {
        "augmentation",
        "student forward + backward",
        "student_momentum forward",
        "heads, relations, losses",
        "optimizer, averages, memory",
    }
    assert set(figures["parts"]) - counted == {"student forward"}
    assert all(part["seconds"] > 0 for part in figures["parts"].values())
    assert figures["limit"] in counted and figures["host_images_per_second"] > 0
    assert figures["host_seconds_per_image"].keys() == {"reading", "decoding", "sending"}
    assert "ms an image of one thread: reading 0." in bench_table(figures).caption
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_teacher_may_be_untrained_where_only_time_counts(tmp_path):
    config = tiny_config("disco")
    config.image_size = 28
    with pytest.raises(UserError, match=r"set teacher\.source=workdir:PATH"):
        prepare(config, tmp_path)
    run = prepare(config, tmp_path, untrained=True)
    assert set(run.frozen()) == {"teacher"} and run.frozen()["teacher"]["params"]
