import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import apply, normal, parameter_count, shapes, variables_of

from ssl_kd.errors import UserError
from ssl_kd.models.alexnet import AlexNet, AlexNetTV, _mean_grid


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
        ("small_s2", 32, 5, (8, 4, 2, 2, 2)),
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


@pytest.mark.parametrize("stem", ["imagenet", "small", "small_s2"])
def test_min_size_is_the_smallest_size_with_a_map(stem):
    model = AlexNet(width=0.1, stem=stem)
    assert AlexNetTV(stem=stem).min_size == model.min_size
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
    with pytest.raises(UserError, match="imagenet, small, small_s2"):
        _ = AlexNet(stem="cifar").min_size


def test_torchvisions_takes_images_of_any_size_and_has_no_batch_norm():
    model = AlexNetTV(width=0.25)
    assert not model.fixed_size
    assert AlexNet().fixed_size
    (small, at_64), (large, at_224) = shapes(model, 64), shapes(model, 224)
    assert jax.tree.map(lambda leaf: leaf.shape, at_64) == jax.tree.map(lambda leaf: leaf.shape, at_224)
    assert [f.shape[1:] for f in large.stages] == [(55, 55, 16), (27, 27, 48), (13, 13, 96), (13, 13, 64), (13, 13, 64)]
    assert small.pooled.shape == large.pooled.shape == (2, model.pooled_dim) == (2, 1024)
    assert set(at_64) == {"params"}
    assert at_64["params"]["features_0"]["bias"].shape == (16,)


@pytest.mark.parametrize(("n", "side"), [(13, 6), (6, 6), (4, 6), (1, 6), (7, 3)])
def test_grid_of_means_is_over_torchs_windows(n, side):
    x = normal((1, n, n + 1, 2))

    def window(i, n):
        return slice(i * n // side, -(-(i + 1) * n // side))

    want = [[x[:, window(i, n), window(j, n + 1)].mean((1, 2)) for j in range(side)] for i in range(side)]
    got = _mean_grid(x, side)
    np.testing.assert_allclose(got, np.array(want).transpose(2, 0, 1, 3), rtol=1e-5, atol=1e-6)


def test_torchvisions_drops_half_before_both_layers_when_asked():
    model, x = AlexNetTV(width=0.25, stem="small"), normal((64, 8, 8, 3))
    variables = variables_of(model, x)
    still = apply(model, variables, x, "running")
    dropped = apply(model, variables, x, "running", dropout=True, rngs={"dropout": jax.random.key(0)})
    for a, b in zip(still.stages, dropped.stages, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(still.pooled - dropped.pooled).max() > 0.1
    layers = {**variables["params"], "classifier_1": {"kernel": jnp.zeros((2304, 1024)), "bias": jnp.ones(1024)}}
    layers["classifier_4"] = {"kernel": jnp.eye(1024), "bias": jnp.zeros(1024)}
    second = apply(model, {"params": layers}, x, "running", dropout=True, rngs={"dropout": jax.random.key(0)}).pooled
    assert set(np.unique(second)) == {0, 2}  # what stays is doubled
    np.testing.assert_allclose((second == 0).mean(), 0.5, atol=0.01)  # five standard deviations of 65 536 draws


def test_batch_norms_variant_drops_nothing():
    model, x = AlexNet(width=0.1, stem="small"), normal((2, 8, 8, 3))
    variables = variables_of(model, x)
    still = apply(model, variables, x, "running").pooled
    np.testing.assert_array_equal(apply(model, variables, x, "running", dropout=True).pooled, still)


@pytest.mark.parametrize(("network", "name"), [(AlexNet, "fc8"), (AlexNetTV, "classifier_6")])
def test_classes_add_a_classifier(network, name):
    features, variables = shapes(network(width=0.1, stem="small", classes=3), 8)
    assert features.logits.shape == (2, 3)
    assert variables["params"][name]["kernel"].shape == (features.pooled.shape[1], 3)
