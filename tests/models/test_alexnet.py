import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import apply, normal, parameter_count, shapes, variables_of

from ssl_kd.errors import UserError
from ssl_kd.models.alexnet import AlexNet


def hand_count(stem_kernel, channels, side, fc):
    """Convolutions without bias, two batch-norm vectors each, two linear layers with bias."""
    kernels = (stem_kernel, 5, 3, 3, 3)
    convs = sum(k * k * a * b for k, a, b in zip(kernels, (3, *channels), channels, strict=False))
    fcs = (channels[-1] * side * side + 1) * fc + (fc + 1) * fc
    return convs + 2 * sum(channels) + fcs


@pytest.mark.parametrize(
    ("stem", "size", "kernel", "sides"),
    [
        ("imagenet", 224, 11, (55, 27, 13, 13, 13)),
        ("imagenet", 63, 11, (15, 7, 3, 3, 3)),
        ("small", 28, 5, (14, 7, 3, 3, 3)),
        ("small", 32, 5, (16, 8, 4, 4, 4)),
        ("small", 64, 5, (32, 16, 8, 8, 8)),
    ],
)
@pytest.mark.parametrize(("width", "channels"), [(1.0, (96, 256, 384, 384, 256)), (0.5, (48, 128, 192, 192, 128))])
def test_stages_pooled_and_parameter_count(stem, size, kernel, sides, width, channels):
    model = AlexNet(width=width, stem=stem)
    features, variables = shapes(model, size)
    assert [f.shape for f in features.stages] == [(2, n, n, c) for n, c in zip(sides, channels, strict=True)]
    assert features.pooled.shape == (2, model.pooled_dim) == (2, int(4096 * width))
    last_side = (sides[-1] - 3) // 2 + 1 if stem == "imagenet" else sides[-1]
    assert parameter_count(variables) == hand_count(kernel, channels, last_side, model.pooled_dim)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_min_size_is_the_smallest_size_with_a_map(stem):
    model = AlexNet(width=0.1, stem=stem)
    assert 0 not in shapes(model, model.min_size)[1]["params"]["fc6"]["kernel"].shape
    with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
        shapes(model, model.min_size - 1)


def test_bfloat16_computes_narrow_and_pools_wide():
    model = AlexNet(width=0.1, stem="small", dtype=jnp.bfloat16)
    features, variables = shapes(model, 16)
    assert {f.dtype for f in features.stages} == {jnp.dtype(jnp.bfloat16)}
    assert features.pooled.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_features_are_rectified_and_running_mode_treats_each_image_alone():
    model = AlexNet(width=0.1, stem="small", bn_groups=2)
    x = normal((4, 16, 16, 3))
    variables = variables_of(model, x)
    features, updates = apply(model, variables, x, "running", mutable=["batch_stats"])
    assert all((leaf >= 0).all() for leaf in jax.tree.leaves(features))
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    alone = apply(model, variables, x[:1], "running")
    np.testing.assert_allclose(alone.pooled, features.pooled[:1], rtol=1e-4, atol=1e-6)


def test_batch_norm_groups_reach_every_layer():
    x = normal((4, 16, 16, 3))
    variables = variables_of(AlexNet(width=0.1, stem="small"), x)
    grouped = apply(AlexNet(width=0.1, stem="small", bn_groups=2), variables, x, "batch")
    halves = [apply(AlexNet(width=0.1, stem="small"), variables, half, "batch") for half in (x[:2], x[2:])]
    want = jnp.concatenate([half.pooled for half in halves])
    np.testing.assert_allclose(grouped.pooled, want, rtol=1e-4, atol=1e-5)


def test_unknown_stem_is_a_user_error():
    with pytest.raises(UserError, match="imagenet, small"):
        _ = AlexNet(stem="small_s2").min_size
