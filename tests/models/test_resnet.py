import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import apply, normal, parameter_count, shapes, variables_of

from ssl_kd.errors import UserError
from ssl_kd.models.resnet import ResNet, ResNet18, ResNet34, ResNet50, ResNet50w2, ResNet101, ResNet152


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (ResNet18, 11_176_512),
        (ResNet34, 21_284_672),
        (ResNet50, 23_508_032),
        (ResNet101, 42_500_160),
        (ResNet152, 58_143_808),
    ],
)
def test_parameter_counts_are_torchvisions_without_fc(network, count):
    assert parameter_count(shapes(network(), 64)[1]) == count


@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        ("imagenet", 224, (56, 28, 14, 7)),
        ("imagenet", 32, (8, 4, 2, 1)),
        ("small", 32, (32, 16, 8, 4)),
        ("small", 8, (8, 4, 2, 1)),
        ("small_s2", 28, (14, 7, 4, 2)),
        ("small_s2", 16, (8, 4, 2, 1)),
    ],
)
@pytest.mark.parametrize(("network", "expansion"), [(ResNet18, 1), (ResNet50, 4)])
def test_stages_and_pooled(stem, size, sides, network, expansion):
    model = network(width=0.5, stem=stem)
    features, _ = shapes(model, size)
    channels = [32 * expansion * 2**i for i in range(4)]
    assert [f.shape for f in features.stages] == [(2, n, n, c) for n, c in zip(sides, channels, strict=True)]
    assert features.pooled.shape == (2, model.pooled_dim) == (2, channels[-1])


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 32), ("small", 8), ("small_s2", 16)])
def test_min_size_leaves_one_pixel_and_nothing_to_spare(stem, size):
    model = ResNet18(stem=stem)
    assert model.min_size == size
    assert shapes(model, size)[0].map.shape[1:3] == (1, 1)


def test_twice_as_wide_are_all_layers():
    features, variables = shapes(ResNet50w2(width=0.25), 32)
    assert [f.shape[-1] for f in features.stages] == [128, 256, 512, 1024]
    assert features.pooled.shape[-1] == ResNet50w2(width=0.25).pooled_dim == 1024
    assert variables["params"]["conv1"]["kernel"].shape[-1] == 32
    assert variables["params"]["layer1_0"]["conv1"]["kernel"].shape[-1] == 32


def test_classes_add_a_classifier():
    features, variables = shapes(tiny(classes=3), 8)
    assert features.logits.shape == (2, 3)
    assert variables["params"]["fc"]["kernel"].shape == (features.pooled.shape[1], 3)
    assert shapes(tiny(), 8)[0].logits is None


def test_bottleneck_strides_in_its_3x3():
    """v1.5: the 1×1 keeps the resolution, so it sees every pixel; with stride there three of four would be dead."""
    model = ResNet(stage_sizes=(1, 1), block="bottleneck", width=0.125, stem="small")
    x = normal((1, 8, 8, 3))
    variables = variables_of(model, x)
    _, captured = apply(model, variables, x, "running", capture_intermediates=True, mutable=["intermediates"])
    block = captured["intermediates"]["layer2_0"]
    assert block["conv1"]["__call__"][0].shape == (1, 8, 8, 16)
    assert block["conv2"]["__call__"][0].shape == (1, 4, 4, 16)
    assert block["downsample_0"]["__call__"][0].shape == (1, 4, 4, 64)


def tiny(**fields):
    return ResNet(stage_sizes=(1, 1), block="basic", width=0.125, stem="small_s2", **fields)


def test_block_with_zeroed_last_scale_is_the_identity():
    """Without downsampling it is relu(0 + x) = x, its input being rectified."""
    x = normal((4, 8, 8, 3))
    variables = variables_of(tiny(), x)
    last = variables["params"]["layer1_0"]["bn2"]
    last.update(scale=jnp.zeros(8), bias=jnp.zeros(8))
    kwargs = {"capture_intermediates": True, "mutable": ["intermediates"]}
    features, captured = apply(tiny(), variables, x, "batch", **kwargs)
    stem = jax.nn.relu(captured["intermediates"]["bn1"]["__call__"][0])
    np.testing.assert_array_equal(features.stages[0], stem)
    np.testing.assert_allclose(features.pooled, features.map.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(("fields", "last"), [({}, 1.0), ({"zero_init_residual": True}, 0.0)])
def test_zero_init_residual_zeroes_the_last_scale_of_a_block_only(fields, last):
    @jax.jit
    def scales(key):
        params = tiny(**fields).init(key, jnp.zeros((2, 8, 8, 3)), norm="batch")["params"]
        return {name: params["layer2_0"][name]["scale"] for name in ("bn1", "bn2", "downsample_1")}

    got = scales(jax.random.key(0))
    assert {name: set(np.asarray(scale).tolist()) for name, scale in got.items()} == {
        "bn1": {1.0},
        "bn2": {last},
        "downsample_1": {1.0},
    }


def test_bfloat16_computes_narrow_and_pools_wide():
    features, variables = shapes(tiny(dtype=jnp.bfloat16), 8)
    assert {f.dtype for f in features.stages} == {jnp.dtype(jnp.bfloat16)}
    assert features.pooled.dtype == jnp.float32
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
    x = normal((4, 16, 16, 3))
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
        _ = ResNet18(stem="cifar").min_size
