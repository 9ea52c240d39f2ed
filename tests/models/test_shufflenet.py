from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import apply, normal, shapes, variables_of

from ssl_kd.errors import UserError
from ssl_kd.models.shufflenet import ShuffleNetV2, ShuffleNetV2x0_5, ShuffleNetV2x1_0, _Block


def tiny(**fields):
    return ShuffleNetV2((8, 16, 24), repeats=(2,), stem="small_s2", **fields)


@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        ("imagenet", 224, (28, 14, 7, 7)),
        ("imagenet", 65, (9, 5, 3, 3)),
        ("small", 32, (16, 8, 4, 4)),
        ("small_s2", 32, (8, 4, 2, 2)),
    ],
)
@pytest.mark.parametrize(
    ("network", "channels"), [(ShuffleNetV2x1_0, (116, 232, 464, 1024)), (ShuffleNetV2x0_5, (48, 96, 192, 1024))]
)
def test_stages_and_pooled(stem, size, sides, network, channels):
    model = network(stem=stem)
    features, _ = shapes(model, size)
    assert [f.shape for f in features.stages] == [(2, n, n, c) for n, c in zip(sides, channels, strict=True)]
    assert features.pooled.shape == (2, model.pooled_dim) == (2, 1024)
    assert features.logits is None


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 32), ("small", 8), ("small_s2", 16)])
def test_min_size_leaves_one_pixel_and_nothing_to_spare(stem, size):
    model = ShuffleNetV2x0_5(stem=stem)
    assert model.min_size == size
    assert shapes(model, size)[0].map.shape[1:3] == (1, 1)
    assert shapes(model, size + 1)[0].map.shape[1:3] == (2, 2)


@pytest.mark.parametrize(
    ("width", "channels"), [(0.5, [58, 116, 232, 512]), (0.05, [8, 12, 24, 52]), (2.0, [232, 464, 928, 2048])]
)
def test_width_scales_every_layer_to_even_numbers(width, channels):
    features, variables = shapes(ShuffleNetV2x1_0(width=width), 32)
    assert [f.shape[-1] for f in features.stages] == channels
    assert variables["params"]["conv1_0"]["kernel"].shape[-1] == max(8, 24 * width)


def test_block_of_stride_1_passes_the_first_half_and_alternates():
    x = normal((2, 4, 4, 12))
    block = _Block(features=12, stride=1, bn_groups=1, dtype=jnp.float32)
    variables = jax.jit(partial(block.init, norm="running"))(jax.random.key(0), x)
    apply = jax.jit(partial(block.apply, norm="running"))
    out = np.asarray(apply(variables, x))
    np.testing.assert_array_equal(out[..., ::2], x[..., :6])
    assert (out[..., 1::2] >= 0).all()
    other = np.asarray(apply(variables, np.concatenate([np.zeros((2, 4, 4, 6), np.float32), x[..., 6:]], -1)))
    np.testing.assert_array_equal(other[..., 1::2], out[..., 1::2])  # the second branch sees the second half alone


def test_classes_add_a_classifier_of_the_pooled_feature():
    features, variables = shapes(ShuffleNetV2x0_5(classes=5), 32)
    assert features.logits.shape == (2, 5)
    assert variables["params"]["fc"]["kernel"].shape == (1024, 5)


def test_bfloat16_computes_narrow_and_pools_wide():
    features, variables = shapes(ShuffleNetV2x0_5(dtype=jnp.bfloat16, classes=3), 32)
    assert {f.dtype for f in features.stages} == {jnp.dtype(jnp.bfloat16)}
    assert features.pooled.dtype == features.logits.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_batch_mode_moves_every_statistic_and_running_mode_none():
    x = normal((4, 8, 8, 3))
    variables = variables_of(tiny(), x)
    _, running = apply(tiny(), variables, x, "running", mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, running["batch_stats"], variables["batch_stats"])
    _, batch = apply(tiny(), variables, x, "batch", mutable=["batch_stats"])
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), batch["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


def test_batch_norm_groups_reach_every_layer():
    x = normal((4, 8, 8, 3))
    variables = variables_of(tiny(), x)
    grouped = apply(tiny(bn_groups=2), variables, x, "batch")
    halves = [apply(tiny(), variables, half, "batch").pooled for half in (x[:2], x[2:])]
    np.testing.assert_allclose(grouped.pooled, jnp.concatenate(halves), rtol=1e-4, atol=1e-5)


def test_remat_computes_more_and_the_same():
    x = normal((4, 4, 4, 3))
    variables = variables_of(tiny(), x)

    def compiled(model):
        def loss(params):
            features, updates = model.apply({**variables, "params": params}, x, norm="batch", mutable=["batch_stats"])
            return jnp.sum(features.pooled**2), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(variables["params"]).compile()

    plain, remat = compiled(tiny()), compiled(tiny(remat=True))
    assert plain.cost_analysis()["flops"] < remat.cost_analysis()["flops"]
    for a, b in zip(*(jax.tree.leaves(step(variables["params"])) for step in (plain, remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_unknown_stem_is_a_user_error():
    with pytest.raises(UserError, match="imagenet, small, small_s2"):
        _ = tiny().clone(stem="cifar").min_size
