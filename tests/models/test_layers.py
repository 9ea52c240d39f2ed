from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ssl_kd.errors import UserError
from ssl_kd.models.convolution import convolve, max_pool
from ssl_kd.models.layers import BatchNorm, Conv, Features, pick_stem, scaled

GOLDEN = Path(__file__).parents[1] / "golden" / "micro_bn_ema_optim.npz"

# batch, height, width, in, out, kernel, stride, padding
BY_TAPS = [
    (3, 5, 7, 4, 6, 1, 1, 0),
    (3, 5, 6, 4, 6, 1, 2, 0),
    (2, 3, 2, 4, 8, 3, 1, 1),
    (2, 1, 1, 4, 5, 5, 1, 2),
    (2, 5, 6, 4, 6, 3, 2, 1),
    (2, 8, 7, 64, 4, 5, 2, 2),
    (2, 6, 9, 4, 4, 4, 3, 0),
]
WINOGRAD = [(32, 4, 4, 128, 130, 3, 1, 1), (14, 5, 8, 130, 128, 3, 1, 1), (2, 17, 16, 128, 128, 3, 1, 1)]
# In eight, four and two parts of the batch, and in one.
PARTS = [
    (16, 16, 16, 32, 4, 3, 1, 1),
    (12, 14, 14, 3, 4, 3, 1, 1),
    (8, 12, 12, 32, 4, 5, 1, 2),
    (16, 16, 16, 16, 4, 3, 1, 1),
]
PLAIN = [(2, 5, 5, 128, 128, 3, 1, 1), (64, 8, 8, 64, 128, 3, 1, 1), (64, 8, 8, 128, 128, 3, 1, 0)]
DEPTHWISE = [(2, 5, 6, 8, 8, 3, 1, 1), (4, 9, 8, 6, 6, 5, 2, 2), (3, 7, 6, 6, 6, 3, 2, 1), (1, 6, 7, 5, 5, 5, 1, 2)]


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def reference_conv(x, kernel, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def primitives(shape, groups=1):
    batch, height, width, channels, features, k, stride, padding = shape
    x = jax.ShapeDtypeStruct((batch, height, width, channels), jnp.float32)
    kernel = jax.ShapeDtypeStruct((k, k, channels // groups, features), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda x, w: convolve(x, w, stride=stride, padding=padding, groups=groups))(x, kernel)
    return str(jaxpr)


def assert_equals_lax(shape, groups=1):
    """In value and both gradients, in float64."""
    batch, height, width, channels, features, k, stride, padding = shape
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(batch, height, width, channels)))
        kernel = jnp.asarray(rng.normal(size=(k, k, channels // groups, features)))

        @jax.jit
        def values_and_gradients(x, kernel):
            out, pull = jax.vjp(lambda x, w: convolve(x, w, stride=stride, padding=padding, groups=groups), x, kernel)
            want, want_pull = jax.vjp(lambda x, w: reference_conv(x, w, stride, padding, groups), x, kernel)
            cotangent = jnp.sin(jnp.arange(want.size)).reshape(want.shape)
            return (out, *pull(cotangent)), (want, *want_pull(cotangent))

        for got, expected in zip(*values_and_gradients(x, kernel), strict=True):
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("shape", BY_TAPS, ids=str)
def test_convolution_by_taps_equals_lax_in_value_and_gradients(shape):
    assert "conv_general_dilated" not in primitives(shape)
    assert_equals_lax(shape)


@pytest.mark.parametrize("shape", WINOGRAD, ids=str)
def test_winograd_convolution_equals_lax_in_value_and_gradients(shape):
    assert "conv_general_dilated" not in primitives(shape)
    assert_equals_lax(shape)


def test_winograd_errs_no_more_than_the_convolution_in_float32():
    x, kernel = normal((16, 8, 8, 128)), normal((3, 3, 128, 128), seed=1)

    def results(convolve, dtype):
        out, pull = jax.vjp(convolve, x.astype(dtype), kernel.astype(dtype))
        return out, *pull(jnp.sin(jnp.arange(out.size, dtype=dtype)).reshape(out.shape))

    results = jax.jit(results, static_argnums=(0, 1))
    with jax.enable_x64(True):
        exact = map(np.asarray, results(lambda x, w: reference_conv(x, w, 1, 1), jnp.float64))
    for got, want in zip(results(lambda x, w: convolve(x, w, padding=1), jnp.float32), exact, strict=True):
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_depthwise_convolution_by_shifts_equals_lax_in_value_and_gradients(shape):
    assert "conv_general_dilated" not in primitives(shape, groups=shape[3])
    assert_equals_lax(shape, groups=shape[3])


@pytest.mark.parametrize(("shape", "parts"), list(zip(PARTS, (8, 4, 2, 1), strict=True)), ids=str)
def test_the_kernel_gradient_by_parts_of_the_batch_equals_lax(shape, parts):
    batch, height, width, channels, features, k, stride, padding = shape
    x, kernel = jnp.ones((batch, height, width, channels)), jnp.ones((k, k, channels, features))
    jaxpr = jax.make_jaxpr(jax.grad(lambda w: convolve(x, w, stride=stride, padding=padding).sum()))(kernel)
    assert str(jaxpr).count("conv_general_dilated") == 2 + parts  # value, gradient of x and those of the parts
    assert_equals_lax(shape)


def test_bfloat16_kernel_gradients_are_added_up_in_float32():
    x, kernel = normal((16, 16, 16, 32)), normal((3, 3, 32, 4), seed=1)

    def gradient(convolve, dtype):
        return jax.jit(jax.grad(lambda w: convolve(x.astype(dtype), w).astype(jnp.float32).sum()))(kernel.astype(dtype))

    exact = gradient(lambda x, w: reference_conv(x, w, 1, 1), jnp.float32)
    ours = gradient(lambda x, w: convolve(x, w, padding=1), jnp.bfloat16)
    # One rounding of inputs and one of the result: as good as the convolution in one piece.
    whole = gradient(lambda x, w: reference_conv(x, w, 1, 1), jnp.bfloat16)
    error, of_whole = (jnp.abs(g.astype(jnp.float32) - exact).mean() for g in (ours, whole))
    assert ours.dtype == jnp.bfloat16 and error <= 1.2 * of_whole


@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_convolution_stays_where_nothing_is_faster(shape):
    assert "conv_general_dilated" in primitives(shape)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_accelerators_always_convolve(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for shape in BY_TAPS + WINOGRAD + PARTS:
        assert "conv_general_dilated" in primitives(shape) and "custom_vjp" not in primitives(shape)
    assert "conv_general_dilated" in primitives((2, 5, 6, 8, 8, 3, 1, 1), groups=8)


def test_grouped_convolution_is_one_convolution_per_group():
    shape = (2, 5, 5, 6, 4, 3, 1, 1)
    assert "conv_general_dilated" in primitives(shape, groups=2)
    x = normal((2, 5, 5, 6))
    kernel = normal((3, 3, 3, 4), seed=1)
    halves = [reference_conv(x[..., 3 * g : 3 * g + 3], kernel[..., 2 * g : 2 * g + 2], 1, 1) for g in range(2)]
    got = convolve(x, kernel, padding=1, groups=2)
    np.testing.assert_allclose(got, jnp.concatenate(halves, -1), rtol=1e-5, atol=1e-5)


def test_conv_module_pads_like_torch_and_computes_in_its_dtype():
    x = normal((2, 9, 9, 3))
    conv = Conv(7, kernel=5, stride=2, use_bias=True, dtype=jnp.bfloat16)
    params = conv.init(jax.random.key(1), x)["params"]
    assert {name: (p.shape, p.dtype) for name, p in params.items()} == {
        "kernel": ((5, 5, 3, 7), jnp.float32),
        "bias": ((7,), jnp.float32),
    }
    params["bias"] = jnp.arange(7.0)
    out = conv.apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    exact = Conv(7, kernel=5, stride=2, use_bias=True).apply({"params": params}, x)
    np.testing.assert_allclose(exact, reference_conv(x, params["kernel"], 2, 2) + jnp.arange(7.0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0.05, atol=0.05)


def test_conv_kernel_variance_is_two_over_fan_out():
    kernel = Conv(64, kernel=3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))["params"]["kernel"]
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 64)) ** 0.5, rtol=0.03)


@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 2, 0), (3, 2, 1)])
def test_max_pool_equals_reduce_window_in_value_and_gradient(monkeypatch, window, stride, padding):
    x = normal((2, 7, 8, 3)) - 3  # negative values: padding must never win

    def value_and_gradient(x):
        out, pull = jax.vjp(lambda x: max_pool(x, window, stride, padding), x)
        return out, *pull(out)

    out, gradient = jax.jit(value_and_gradient)(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = jax.jit(lambda x: value_and_gradient(x)).trace(x)
    assert "reduce_window" in str(traced.jaxpr)
    want, expected = traced.lower().compile()(x)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def run_batch_norm(golden, prefix, dtype):
    """The fixture's run: two training batches, then batch 0 in running mode. Names as in the fixture."""
    x = jnp.asarray(golden["in_bn_x"].transpose(0, 1, 3, 4, 2), dtype)
    cotangent = jnp.asarray(golden["in_bn_cotangent"].transpose(0, 1, 3, 4, 2), dtype)
    params = {name: jnp.asarray(golden[f"in_bn_{torch}"], dtype) for name, torch in NAMES}
    stats = {name: jnp.asarray(golden[f"in_bn_running_{name}"], dtype) for name in ("mean", "var")}
    layer = BatchNorm(momentum=1 - float(golden["hp_bn_momentum"]), epsilon=float(golden["hp_bn_eps"]), dtype=dtype)

    results = {name: [] for name in RESULTS}
    for batch in range(2):

        def forward(params, x, stats=stats):
            variables = {"params": params, "batch_stats": stats}
            return layer.apply(variables, x, norm="batch", mutable=["batch_stats"])

        @jax.jit
        def trained(params, x, cotangent, forward=forward):
            out, pull, updates = jax.vjp(forward, params, x, has_aux=True)
            return out, updates["batch_stats"], *pull(cotangent)

        out, stats, grad_params, grad_x = trained(params, x[batch], cotangent[batch])
        row = (out.transpose(0, 3, 1, 2), grad_x.transpose(0, 3, 1, 2), grad_params["scale"], grad_params["bias"])
        for name, value in zip(RESULTS, (*row, stats["mean"], stats["var"]), strict=True):
            results[name].append(value)
    evaluated = layer.apply({"params": params, "batch_stats": stats}, x[0], norm="running")
    results = {name: jnp.stack(values) for name, values in results.items()}
    results["out_bn_eval"] = evaluated.transpose(0, 3, 1, 2)
    return {name: (value, golden[prefix + name]) for name, value in results.items()}


NAMES = (("scale", "weight"), ("bias", "bias"))
RESULTS = (
    "out_bn_train",
    "grad_bn_x",
    "grad_bn_weight",
    "grad_bn_bias",
    "out_bn_running_mean",
    "out_bn_running_var",
)


@pytest.mark.parametrize(
    ("prefix", "dtype", "rtol", "grad_rtol", "atol"),
    [("", jnp.float32, 1e-5, 2e-5, 2e-6), ("f64_", jnp.float64, 1e-9, 1e-9, 1e-11)],
)
def test_batch_norm_reproduces_torch(prefix, dtype, rtol, grad_rtol, atol):
    golden = np.load(GOLDEN)
    with jax.enable_x64(dtype == jnp.float64):
        for name, (got, want) in run_batch_norm(golden, prefix, dtype).items():
            assert got.dtype == dtype, name
            limit = atol + (grad_rtol if name.startswith("grad") else rtol) * np.abs(want).max()
            assert np.abs(got - want).max() <= limit, name


def test_grouped_batch_norm_is_a_loop_over_contiguous_groups():
    x = 3 + 2 * normal((6, 4, 5, 3))
    layer = BatchNorm(groups=3)
    variables = layer.init(jax.random.key(1), x, norm="batch")
    out, updates = layer.apply(variables, x, norm="batch", mutable=["batch_stats"])

    means, variances = [], []
    for g in range(3):
        rows = np.asarray(x[2 * g : 2 * g + 2], np.float64)
        mean, var = rows.mean((0, 1, 2)), rows.var((0, 1, 2))
        np.testing.assert_allclose(out[2 * g : 2 * g + 2], (rows - mean) / np.sqrt(var + 1e-5), rtol=1e-5, atol=1e-5)
        means.append(mean)
        variances.append(rows.var((0, 1, 2), ddof=1))
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.1 * np.mean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9 + 0.1 * np.mean(variances, 0), rtol=1e-5)


def test_batch_norm_variance_survives_a_large_mean():
    """E[x²] − E[x]² in float32 would be off by several units here."""
    x = 4096 + normal((512, 2))
    layer = BatchNorm()
    out = layer.apply(layer.init(jax.random.key(1), x, norm="batch"), x, norm="batch")
    np.testing.assert_allclose(out.std(0), 1.0, rtol=1e-4)


def test_batch_norm_initial_state_and_modes():
    x = normal((8, 3)).astype(jnp.bfloat16)
    layer = BatchNorm(scale_init=jax.nn.initializers.zeros, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(1), x, norm="batch")
    flat = {"params": {"scale": 0.0, "bias": 0.0}, "batch_stats": {"mean": 0.0, "var": 1.0}}
    for collection, leaves in flat.items():
        for name, value in leaves.items():
            assert variables[collection][name].dtype == jnp.float32
            np.testing.assert_array_equal(variables[collection][name], np.full(3, value, np.float32))

    out, updates = layer.apply(variables, x, norm="running", mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    out, updates = layer.apply(variables, x, norm="batch", mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    assert updates["batch_stats"]["mean"].dtype == jnp.float32
    assert (updates["batch_stats"]["mean"] != 0).all()
    layer.apply(variables, x, norm="batch")  # immutable statistics: the move is dropped
    with pytest.raises(ValueError, match="'train'"):
        layer.apply(variables, x, norm="train")


def test_batch_norm_refuses_groups_it_cannot_form():
    layer = BatchNorm(groups=4)
    variables = layer.init(jax.random.key(0), jnp.zeros((4, 3)), norm="batch")
    with pytest.raises(UserError, match="bn_groups=4 does not divide the batch of 6"):
        layer.apply(variables, jnp.zeros((6, 3)), norm="batch")
    with pytest.raises(UserError, match="bn_groups=4 on a batch of 4 rows leaves one value per channel"):
        layer.apply(variables, jnp.zeros((4, 3)), norm="batch")


def test_features_map_is_the_last_stage_and_a_pytree():
    features = Features(stages=(jnp.zeros((1, 4, 4, 2)), jnp.ones((1, 2, 2, 3))), pooled=jnp.ones((1, 3)))
    assert features.map is features.stages[-1]
    assert len(jax.tree.leaves(features)) == 3


def test_widths_are_multiples_of_eight():
    assert [scaled(96, w) for w in (1.0, 0.5, 0.25, 0.01)] == [96, 48, 24, 8]


def test_unknown_stem_is_named():
    with pytest.raises(UserError, match=r"stem='tiny' .* small, big"):
        pick_stem({"small": 1, "big": 2}, "tiny")
