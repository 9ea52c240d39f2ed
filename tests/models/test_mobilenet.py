from dataclasses import replace
from functools import partial

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import apply, branch_rates, normal, shapes, variables_of

from ssl_kd.errors import UserError
from ssl_kd.models.layers import SqueezeExcite
from ssl_kd.models.mobilenet import (
    Architecture,
    MobileNet,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
    Row,
    Squeeze,
    _Block,
)

CHANNELS = {
    MobileNetV2: (16, 24, 32, 96, 320),
    MobileNetV3Large: (16, 24, 40, 112, 960),
    MobileNetV3Small: (16, 16, 24, 48, 576),
}
TINY = Architecture(
    stem=8,
    stages=((Row(1, 3, 1, 1, 8, squeeze=True, relu=True),), (Row(2, 5, 2, 2, 16, squeeze=True),)),
    head=24,
    activation=nn.hard_swish,
    squeeze=Squeeze(lambda given, inside: inside // 4, nn.relu, nn.hard_sigmoid),
)
LATE = replace(TINY, late=32)
PAIR = replace(TINY, stages=((Row(2, 3, 1, 2, 8),),))


def tiny(architecture=TINY, **fields):
    return MobileNet(architecture, **fields)


@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        ("imagenet", 224, (112, 56, 28, 14, 7)),
        ("small", 32, (32, 32, 16, 8, 4)),
        ("small_s2", 32, (16, 16, 8, 4, 2)),
    ],
)
@pytest.mark.parametrize(("network", "channels"), CHANNELS.items())
def test_stages_and_pooled(stem, size, sides, network, channels):
    model = network(stem=stem)
    features, _ = shapes(model, size)
    assert [f.shape for f in features.stages] == [(2, n, n, c) for n, c in zip(sides, channels, strict=True)]
    assert features.pooled.shape == (2, model.pooled_dim) == (2, 1024 if network is MobileNetV3Small else 1280)
    assert features.logits is None


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 32), ("small", 8), ("small_s2", 16)])
def test_min_size_leaves_one_pixel_and_nothing_to_spare(stem, size):
    model = MobileNetV3Small(stem=stem)
    assert {network(stem=stem).min_size for network in CHANNELS} == {size}
    assert shapes(model, size)[0].map.shape[1:3] == (1, 1)
    assert shapes(model, size + 1)[0].map.shape[1:3] == (2, 2)


def test_width_scales_every_layer_to_multiples_of_8():
    (narrow, variables), whole = shapes(MobileNetV3Large(width=0.35), 32), shapes(MobileNetV3Large(), 32)[1]
    assert [f.shape[-1] for f in narrow.stages] == [8, 8, 16, 40, 336]
    assert narrow.pooled.shape[-1] == MobileNetV3Large(width=0.35).pooled_dim == 448
    for scale, full in zip(*(jax.tree.leaves(v["batch_stats"]) for v in (variables, whole)), strict=True):
        assert scale.size % 8 == 0
        assert 0.2 < scale.size / full.size <= 0.65


@pytest.mark.parametrize("architecture", [TINY, LATE])
def test_classes_add_a_classifier_of_the_pooled_feature(architecture):
    x = normal((4, 4, 4, 3))
    variables = variables_of(tiny(architecture, classes=5), x)
    features = apply(tiny(architecture, classes=5), variables, x, "running")
    layer = variables["params"]["classifier"]
    want = np.asarray(features.pooled) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(features.logits, want, rtol=1e-4, atol=1e-6)
    assert features.logits.dtype == jnp.float32


def test_squeeze_excite_weighs_channels_by_all_channels_means():
    x = normal((2, 3, 5, 8))
    layer = SqueezeExcite(4, nn.relu, nn.sigmoid)
    params = jax.tree.map(lambda s: normal(s.shape), layer.init(jax.random.key(0), x)["params"])
    w1, w2 = (params[name]["kernel"][0, 0] for name in ("conv_reduce", "conv_expand"))
    hidden = np.maximum(np.asarray(x).mean((1, 2)) @ w1 + params["conv_reduce"]["bias"], 0)
    weights = 1 / (1 + np.exp(-(hidden @ w2 + params["conv_expand"]["bias"])))
    np.testing.assert_allclose(layer.apply({"params": params}, x), x * weights[:, None, None], rtol=1e-5, atol=1e-6)


def test_block_of_equal_shape_with_zeroed_last_scale_is_the_identity():
    x = normal((4, 4, 4, 3))
    variables = variables_of(tiny(), x)
    last = variables["params"]["blocks_1_1"]["bn3"]
    last.update(scale=jnp.zeros(16), bias=jnp.zeros(16))
    kwargs = {"capture_intermediates": True, "mutable": ["intermediates"]}
    features, captured = apply(tiny(), variables, x, "running", **kwargs)
    np.testing.assert_array_equal(features.map, captured["intermediates"]["blocks_1_0"]["__call__"][0])


def test_starts_as_timms():
    """Normal, variance 2 / (k · k · features of a group): of 25 for a depthwise 5×5. No biases."""
    wide = replace(TINY, stages=((Row(1, 3, 1, 1, 256),), (Row(1, 5, 2, 2, 512, squeeze=True),)))
    params = jax.jit(partial(tiny(wide).init, norm="batch"))(jax.random.key(0), jnp.zeros((2, 4, 4, 3)))["params"]
    block = params["blocks_1_0"]
    for kernel, features in ((block["conv_dw"], 25), (block["conv_pw"], 512), (block["se"]["conv_expand"], 512)):
        np.testing.assert_allclose(kernel["kernel"].std(), (2 / features) ** 0.5, rtol=0.05)
    np.testing.assert_array_equal(block["se"]["conv_expand"]["bias"], 0)


@pytest.mark.parametrize(("architecture", "counted"), [(TINY, 3), (LATE, 4)])
def test_drop_path_rises_by_timms_rule(architecture, counted):
    rates = branch_rates(tiny(architecture, drop_path=0.5), _Block)
    np.testing.assert_allclose(rates, 0.5 * np.arange(3)[:, None] / counted, atol=0.03)


def test_nothing_is_dropped_unless_asked():
    model, x = tiny(drop_path=0.5), normal((8, 4, 4, 3))
    variables = variables_of(model, x)
    still = apply(model, variables, x, "running").pooled
    np.testing.assert_array_equal(apply(tiny(), variables, x, "running", dropout=True).pooled, still)
    rngs = {"dropout": jax.random.key(0)}
    assert np.abs(apply(model, variables, x, "running", dropout=True, rngs=rngs).pooled - still).max() > 1e-5
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):  # the stream it would need
        apply(model, variables, x, "running", dropout=True)


@pytest.mark.parametrize("architecture", [TINY, LATE])
def test_bfloat16_computes_narrow_and_pools_wide(architecture):
    features, variables = shapes(tiny(architecture, dtype=jnp.bfloat16, classes=3), 8)
    assert {f.dtype for f in features.stages} == {jnp.dtype(jnp.bfloat16)}
    assert features.pooled.dtype == features.logits.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_batch_mode_moves_every_statistic_and_running_mode_none():
    x = normal((4, 4, 4, 3))
    variables = variables_of(tiny(LATE), x)
    _, running = apply(tiny(LATE), variables, x, "running", mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, running["batch_stats"], variables["batch_stats"])
    _, batch = apply(tiny(LATE), variables, x, "batch", mutable=["batch_stats"])
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), batch["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("architecture", [TINY, LATE])
def test_batch_norm_groups_reach_every_layer(architecture):
    x = normal((4, 4, 4, 3))
    variables = variables_of(tiny(architecture), x)
    grouped = apply(tiny(architecture, bn_groups=2), variables, x, "batch")
    halves = [apply(tiny(architecture), variables, half, "batch").pooled for half in (x[:2], x[2:])]
    np.testing.assert_allclose(grouped.pooled, jnp.concatenate(halves), rtol=1e-4, atol=1e-5)


def test_remat_computes_more_and_the_same():
    """Also the same drops: they are drawn outside of what is recomputed."""
    x = normal((4, 4, 4, 3))
    variables = variables_of(tiny(PAIR), x)

    def compiled(model):
        def loss(params):
            kwargs = {"norm": "batch", "dropout": True, "rngs": {"dropout": jax.random.key(5)}}
            features, updates = model.apply({**variables, "params": params}, x, mutable=["batch_stats"], **kwargs)
            return jnp.sum(features.pooled**2), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(variables["params"]).compile()

    plain, remat = (compiled(tiny(PAIR, drop_path=0.5, remat=remat)) for remat in (False, True))
    assert plain.cost_analysis()["flops"] < remat.cost_analysis()["flops"]
    for a, b in zip(*(jax.tree.leaves(step(variables["params"])) for step in (plain, remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_unknown_stem_is_a_user_error():
    with pytest.raises(UserError, match="imagenet, small, small_s2"):
        _ = MobileNetV2(stem="cifar").min_size
