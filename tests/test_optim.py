"""Schedules, optimizers, groups and averages against the references' own numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from ssl_kd.methods import METHODS
from ssl_kd.optim import Group, clip_each, decay_mask, make_optimizer, moving_average
from ssl_kd.recipe import optimizer_group

PRECISIONS = {"float32": (1e-5, 1e-8), "float64": (1e-9, 1e-11)}
"""rtol and atol; rtol is of the largest entry."""


def assert_equal(ours, reference, precision="float64"):
    rtol, atol = PRECISIONS[precision]
    np.testing.assert_allclose(ours, reference, rtol=0, atol=atol + rtol * np.abs(reference).max())


# Schedules: what a recipe sets → the reference's numbers.

MOKD = {"lr": 0.1, "final_lr": 0.0048, "warmup_epochs": 4.0, "ramp": "through_peak"}
COMPRESS = {"lr": 0.01, "schedule": "stairs", "milestones": (90 / 130, 120 / 130), "factor": 0.2}
SEED = {"lr": 0.03, "warmup_epochs": 5.0, "ramp": "from_base"}
RATES = {
    # name of the array: keys of `optim`, batch_size, epochs, steps of an epoch that the array has
    "moco_disco_bingo_cos_per_epoch": ({"lr": 0.03}, 256, 200, 1),
    "moco_step_per_epoch": ({"lr": 0.03, "schedule": "stairs", "milestones": (0.6, 0.8)}, 256, 200, 1),
    "seed_cos_per_epoch_lrmult1": (SEED, 256, 200, 1),
    "seed_cos_per_epoch_lrmult4": (SEED, 1024, 200, 1),
    "ressl_per_iter_20ep_6it_warm5": ({"lr": 0.05, "warmup_epochs": 5.0}, 256, 20, 6),
    "compress_step_epoch1to130": (COMPRESS, 256, 130, 1),
    "simreg_cos_epoch1to130": ({"lr": 0.05}, 256, 130, 1),
    "mokd_lr_cnn_20ep_5it_warm4": (MOKD, 256, 20, 5),
}
MOKD_DECAY, MOKD_MOMENTUM = "mokd_wd_vit_20ep_5it", "mokd_momentum_20ep_5it"


def group_of(changes, batch_size=256, per_epoch=5, total=100):
    config = base.get_config()
    config.batch_size = batch_size
    config.optim.update(changes)
    return optimizer_group(config, "optim", per_epoch, total)


def evaluated(schedule, total):
    """A schedule's values at all steps, by the counter that optax has."""
    values = jax.jit(jax.vmap(schedule))(np.arange(total, dtype=np.int32))
    assert values.dtype == jnp.asarray(0.0).dtype  # float64 where that is enabled
    return np.asarray(values)


def test_every_reference_schedule_is_compared(golden):
    assert {*RATES, MOKD_DECAY, MOKD_MOMENTUM} == set(golden("schedules").files)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RATES)
def test_rates_equal_the_references(golden, name, precision):
    changes, batch_size, epochs, per_epoch = RATES[name]
    reference = golden("schedules")[name]
    # Ours moves at every step where a reference holds it within an epoch: they agree at the first step of each.
    inside = 7 if per_epoch == 1 else 1
    steps = per_epoch * inside
    with jax.enable_x64(precision == "float64"):
        rate = group_of(changes, batch_size, steps, epochs * steps).rate
        assert_equal(evaluated(rate, epochs * steps)[::inside], reference, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mokd_weight_decay_and_momentum_equal_the_reference(golden, precision):
    reference = golden("schedules")
    with jax.enable_x64(precision == "float64"):
        decay = group_of({"weight_decay": 0.04, "final_weight_decay": 0.4}).weight_decay
        assert_equal(evaluated(decay, 100), reference[MOKD_DECAY], precision)
        _, momentum = METHODS["mokd"]().averaged["student_momentum"]
        ours = evaluated(lambda step: momentum(step.astype(float) / 100), 100)
        assert_equal(ours, reference[MOKD_MOMENTUM], precision)


def test_a_decay_without_an_end_is_constant():
    np.testing.assert_array_equal(evaluated(group_of({"weight_decay": 5e-4}).weight_decay, 100), np.float32(5e-4))


def test_a_group_counts_its_epochs_in_steps_and_keeps_its_values():
    config = base.get_config()
    fields = {"paths": ("teacher",), "name": "adamw", "decay": "weights", "momentum": 0.8, "clip": 3.0}
    config.optim.update(**fields, last_layer_epochs=1.5)
    group = optimizer_group(config, "optim", 6, 60)
    config.optim.update(lr=9.0, weight_decay=9.0)
    assert fields.items() <= vars(group).items() and group.last_layer_steps == 9
    assert (float(group.rate(0)), float(group.weight_decay(0))) == pytest.approx((0.03, 1e-4))


# Optimizers.


def run(optimizer, params, grads):
    """Parameters after each of the steps, one axis before theirs."""

    def step(carry, grads):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), grads)[1])()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("skip", ["", "_skip"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_five_steps_equal_torch(golden, name, skip, precision):
    """One optimizer whose rate and decay are schedules. `_skip`: torch found no gradient in steps 0 and 2."""
    g = golden("micro_bn_ema_optim")
    with jax.enable_x64(precision == "float64"):
        rates, params, grads = (jnp.asarray(g[f"in_opt_{x}"], precision) for x in ("lr", "p0", "grads"))
        decays = jnp.asarray(g["in_opt_wd_adamw"] if name == "adamw" else np.full(5, g["hp_sgd_wd"]), precision)
        group = Group(
            paths=(),
            name=name,
            rate=lambda step: rates[step],
            weight_decay=lambda step: decays[step],
            momentum=float(g["hp_sgd_momentum"]),
        )
        ours = run(group.transform((lambda step: (step == 0) | (step == 2)) if skip else None), params, grads)
        assert ours.dtype == precision
        assert_equal(ours, g[f"{'f64_' * (precision == 'float64')}out_{name}{skip}"], precision)


def test_clipping_equals_the_mokd_reference(golden):
    g = golden("micro_bn_ema_optim")
    grads = {name: jnp.asarray(g[f"in_clip_{name}"]) for name in "abc"}
    clipped, _ = clip_each(float(g["hp_clip"])).update(grads, optax.EmptyState())
    for name in "abc":
        assert_equal(clipped[name], g[f"out_clip_{name}"], "float32")
    norms = [float(jnp.linalg.norm(grads[name])) for name in "abc"]
    assert norms == pytest.approx(list(g["out_clip_norms"])) and norms[0] > float(g["hp_clip"]) > norms[1]


def plain(rate=1.0, **fields):
    """SGD without momentum or decay: an update of gradient 1 is minus the rate."""
    fields = {"paths": (), "name": "sgd", "weight_decay": lambda _: 0.0, "momentum": 0.0, **fields}
    return Group(rate=lambda _: rate, **fields)


def test_a_group_clips_every_tensor_by_its_own_norm_before_all_else():
    optimizer = plain(clip=3.0, weight_decay=lambda _: 0.5).transform()
    grads = {"long": jnp.array([0.0, 30.0]), "short": jnp.array([1.0, 0.0]), "none": jnp.zeros(2)}
    params = jax.tree.map(jnp.ones_like, grads)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["long"], [-0.5, -3.5], rtol=1e-6)
    np.testing.assert_allclose(updates["short"], [-1.5, -0.5], rtol=1e-6)
    np.testing.assert_array_equal(updates["none"], [-0.5, -0.5])


# Groups.


def tree(paths, value=1.0, shape=(2,)):
    """Nested dicts with an array at each path."""
    params = {}
    for path in paths:
        *names, leaf = path.split("/")
        node = params
        for name in names:
            node = node.setdefault(name, {})
        node[leaf] = jnp.full(shape, value)
    return params


def first_update(groups, params):
    """Path → first component of the update for gradients of 1."""
    optimizer = make_optimizer(groups)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    return {"/".join(key.key for key in path): -float(leaf[0]) for path, leaf in leaves}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 2, 1)])
def test_a_parameter_goes_to_the_longest_path_that_holds_it(order):
    groups = [
        plain(1.0),
        plain(2.0, paths=("student/thead", "student/reduce/kernel")),
        plain(3.0, paths=("student",)),
        plain(4.0, paths=("student/thead/last",)),
    ]
    owners = {
        "student/backbone/conv1/kernel": 3.0,
        "student/thead/norm/scale": 2.0,
        "student/thead/last/v": 4.0,
        "student/thead2/last/v": 3.0,  # a path is whole names
        "student/reduce/kernel": 2.0,
        "student/reduce/bias": 3.0,
        "teacher/student/thead/bias": 1.0,  # and starts at the root
        "teacher/backbone/kernel": 1.0,
    }
    assert first_update([groups[i] for i in order], tree(owners)) == owners


def test_the_first_group_may_take_paths_back():
    groups = [plain(1.0, paths=("student/head",)), plain(2.0, paths=("student",))]
    assert first_update(groups, tree(["student/head/v", "student/v"])) == {"student/head/v": 1, "student/v": 2}


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        (((), ("techer",)), "'techer'"),
        (((), ("student/hea",)), "'student/hea'"),
        (((), ("student/",)), "'student/'"),
        ((("head",),), "'head'"),
        (((), ("student",), ("student",)), "'student' is given twice"),
        (((), ("student", "student")), "'student' is given twice"),
    ],
)
def test_a_path_that_holds_nothing_or_is_claimed_twice_is_refused(paths, sentence):
    optimizer = make_optimizer([plain(paths=p) for p in paths])
    with pytest.raises(ValueError, match=sentence):
        optimizer.init(tree(["student/head/last/v", "teacher/v"]))


def schedules(**fields):
    """Fields of a group whose rate and decay differ at every step."""
    varying = {"rate": lambda step: 0.1 / (1 + step), "weight_decay": lambda step: 0.01 * (1.0 + step)}
    return {"paths": (), **varying, **fields}


def draws(like, steps=6):
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(like)))
    keys = jax.tree.unflatten(jax.tree.structure(like), list(keys))
    return jax.tree.map(lambda p, key: jax.random.normal(key, (steps, *p.shape)), like, keys)


def test_groups_are_separate_optimizers():
    params = tree(["student/fc/kernel", "student/fc/last/v", "teacher/fc/kernel"], shape=(2, 3))
    grads = draws(params)
    first = Group(name="sgd", clip=0.5, **schedules())
    second = Group(name="adamw", decay="weights", **schedules(paths=("teacher",), rate=lambda step: 0.01 * step))
    together = run(make_optimizer([first, second]), params, grads)
    for group, role in ((first, "student"), (second, "teacher")):
        apart = run(group.transform(), params[role], grads[role])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), together[role], apart)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_one_group_is_its_optimizer_without_a_partition(name):
    group = Group(name=name, clip=1.0, decay="weights", **schedules())
    params = tree(["student/fc/kernel", "student/fc/scale"])
    plain_state, state = group.transform().init(params), make_optimizer([group]).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(plain_state)
    partitioned = make_optimizer([dataclasses.replace(group, paths=("student",))])
    assert jax.tree.structure(partitioned.init(params)) != jax.tree.structure(plain_state)
    grads = draws(params)
    alone, together = run(group.transform(), params, grads), run(partitioned, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone, together)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_last_layers_wait_while_the_schedules_go_on(name):
    """Afterwards they are as with an optimizer that begins then: no decay, momentum or counter from before."""
    wait = 3
    group = Group(name=name, last_layer_steps=wait, **schedules())
    params = tree(["student/head/last/v", "student/head/fc1/kernel", "teacher/thead/last/g"], shape=(2, 3))
    grads = draws(params)
    after = run(make_optimizer([group]), params, grads)

    def later(schedule):
        return lambda step: schedule(step + wait)

    fresh = dataclasses.replace(group, rate=later(group.rate), weight_decay=later(group.weight_decay)).transform()
    for role, head, leaf in (("student", "head", "v"), ("teacher", "thead", "g")):
        last = after[role][head]["last"][leaf]
        np.testing.assert_array_equal(last[:wait], 1)
        expected = run(fresh, jnp.ones((2, 3)), grads[role][head]["last"][leaf][wait:])
        np.testing.assert_allclose(last[wait:], expected, rtol=1e-6)
    others = run(group.transform(), jnp.ones((2, 3)), grads["student"]["head"]["fc1"]["kernel"])
    np.testing.assert_allclose(after["student"]["head"]["fc1"]["kernel"], others, rtol=1e-6)


def test_every_group_has_its_own_wait():
    groups = [plain(last_layer_steps=1), plain(last_layer_steps=2, paths=("teacher",))]
    params = tree(["student/last/v", "teacher/last/v", "teacher/v"], 0.0)
    after = run(make_optimizer(groups), params, jax.tree.map(lambda p: jnp.ones((3, *p.shape)), params))
    assert [float(v) for v in after["student"]["last"]["v"][:, 0]] == [0, -1, -2]
    assert [float(v) for v in after["teacher"]["last"]["v"][:, 0]] == [0, 0, -1]
    assert [float(v) for v in after["teacher"]["v"][:, 0]] == [-1, -2, -3]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_keeps_every_type(precision):
    """A state or parameters of other types than at the start, weak ones included, would compile the step anew."""
    with jax.enable_x64(precision == "float64"):
        config = base.get_config()
        config.optim.update(warmup_epochs=1.0, last_layer_epochs=1.0, clip=3.0)
        stairs = {"schedule": "stairs", "milestones": (0.5,), "warmup_epochs": 1.0}
        config.optim.groups.teacher = base.optimizer("adamw", paths=("teacher",), final_weight_decay=0.4, **stairs)
        keys = ("optim", "optim.groups.teacher")
        optimizer = make_optimizer([optimizer_group(config, key, 5, 50) for key in keys])
        params = tree(["student/head/last/v", "teacher/head/last/v"], jnp.ones((), precision))

        def types(x):
            return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), x)

        state = jax.eval_shape(optimizer.init, params)
        updates, after = jax.eval_shape(optimizer.update, params, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(jax.eval_shape(lambda x: x, params))


# What decays, and averages.


def test_masks_choose_what_decays():
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3), "scale": jnp.zeros(3), "g": jnp.zeros((1, 3))}
    assert decay_mask(params, "all") == {"kernel": True, "bias": True, "scale": True, "g": True}
    assert decay_mask(params, "weights") == {"kernel": True, "bias": False, "scale": False, "g": True}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_spared_parameters_do_not_decay(name):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = plain(name=name, weight_decay=lambda _: 0.1, decay="weights").transform()
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_moving_average_equals_the_moco_reference(golden):
    g = golden("micro_bn_ema_optim")
    names = [n.removeprefix("in_ema_q/") for n in g.files if n.startswith("in_ema_q/")]
    params = [n for n in names if "running" not in n and "tracked" not in n]
    after = moving_average(
        {n: g[f"in_ema_k/{n}"] for n in params}, {n: g[f"in_ema_q/{n}"] for n in params}, float(g["hp_ema_m"])
    )
    assert len(params) == 5
    for name in params:
        np.testing.assert_allclose(after[name], g[f"out_ema_k/{name}"], rtol=1e-6, atol=1e-7)
