from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_kd.errors import UserError
from ssl_kd.models.heads import (
    DINOHead,
    LinearHead,
    MLPHead,
    RegressionHead,
    THead,
    TokenReduce,
    WeightNormLinear,
)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_head_is_linear_relu_linear():
    head = MLPHead(hidden=6, out=4)
    x = normal((3, 5))
    variables = head.init(jax.random.key(1), x, norm="batch")
    fc1, fc2 = (jax.tree.map(np.asarray, variables["params"][name]) for name in ("fc1", "fc2"))
    hidden = np.maximum(np.asarray(x) @ fc1["kernel"] + fc1["bias"], 0)
    out = head.apply(variables, x, norm="batch")
    np.testing.assert_allclose(out, hidden @ fc2["kernel"] + fc2["bias"], rtol=1e-5, atol=1e-6)


def test_linear_head_is_affine():
    head, x = LinearHead(out=4), normal((3, 5))
    variables = head.init(jax.random.key(1), x, norm="batch")
    fc = variables["params"]["fc"]
    np.testing.assert_allclose(head.apply(variables, x, norm="batch"), x @ fc["kernel"] + fc["bias"], rtol=1e-5)


def assert_uniform(values, bound):
    assert np.abs(values).max() <= bound
    np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.1)  # of a uniform on ±bound
    assert abs(values.mean()) < 0.1 * bound


def test_linear_initialisation_is_torchs_uniform():
    params = MLPHead(hidden=400, out=300).init(jax.random.key(0), jnp.zeros((1, 100)), norm="batch")["params"]
    for layer, fan_in in (("fc1", 100), ("fc2", 400)):
        for name in ("kernel", "bias"):
            assert_uniform(params[layer][name], fan_in**-0.5)


def test_dino_head_starts_as_released():
    """Normal with deviation .02 and no biases, but a last layer as torch makes it, of norm 1."""
    head = DINOHead(fixed_norm=False, hidden=100, bottleneck=50, out=200)
    params = jax.jit(partial(head.init, norm="batch"))(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    for name in ("fc1", "fc2", "fc3"):
        np.testing.assert_allclose(params[name]["kernel"].std(), 0.02, rtol=0.1)
        np.testing.assert_array_equal(params[name]["bias"], 0)
    assert_uniform(params["last"]["v"], 50**-0.5)
    np.testing.assert_array_equal(params["last"]["g"], np.ones((1, 200)))


def test_weight_norm_takes_the_direction_of_v_and_the_length_of_g():
    v, x = normal((5, 3)), normal((4, 5))
    unit = v / jnp.linalg.norm(v, axis=0)
    fixed = WeightNormLinear(3, fixed_norm=True)
    np.testing.assert_allclose(fixed.apply({"params": {"v": 7 * v}}, x), x @ unit, rtol=1e-5, atol=1e-6)
    free = WeightNormLinear(3, fixed_norm=False)
    g = jnp.array([[1.0, 2.0, -3.0]])
    np.testing.assert_allclose(free.apply({"params": {"v": v, "g": g}}, x), x @ unit * g, rtol=1e-5, atol=1e-6)


def test_a_fixed_norm_is_no_parameter():
    """Nothing there for an optimizer to decay."""
    params = jax.eval_shape(WeightNormLinear(3, fixed_norm=True).init, jax.random.key(0), jnp.zeros((1, 2)))["params"]
    assert set(params) == {"v"}


def test_batch_norm_groups_reach_the_regression_head():
    x = normal((4, 3))
    head = RegressionHead(out=2)
    variables = jax.jit(partial(head.init, norm="batch"))(jax.random.key(0), x)

    @partial(jax.jit, static_argnums=0)
    def predict(bn_groups, x):
        return head.clone(bn_groups=bn_groups).apply(variables, x, norm="batch", mutable=["batch_stats"])[0]

    halves = jnp.concatenate([predict(1, half) for half in (x[:2], x[2:])])
    np.testing.assert_allclose(predict(2, x), halves, rtol=1e-4, atol=1e-5)
    assert np.abs(predict(1, x) - halves).max() > 1e-2


def test_a_regression_head_of_three_layers_is_a_user_error():
    with pytest.raises(UserError, match="2 or 4 layers, not 3"):
        RegressionHead(out=2, layers=3).init(jax.random.key(0), jnp.zeros((2, 3)), norm="batch")


def test_thead_does_not_average_over_its_query():
    """Where attention and mlp add nothing, the tokens pass through and the query has no way to them."""
    tokens, query = normal((2, 4, 6)), normal((2, 6), seed=1)
    head = THead(dim=6, heads=2, out=3, depth=1)
    run = jax.jit(lambda params, query=None: head.apply({"params": params}, tokens, (2, 2), query))
    params = jax.jit(lambda key: head.init(key, tokens, (2, 2))["params"])(jax.random.key(0))
    assert np.abs(run(params, query) - run(params)).max() > 1e-6
    params["blocks_0"] = jax.tree.map(jnp.zeros_like, params["blocks_0"])
    np.testing.assert_allclose(run(params, query), run(params), rtol=1e-6)


def test_thead_of_a_grid_that_is_not_square_is_a_user_error():
    with pytest.raises(UserError, match="6 patches do not fill a square"):
        THead(dim=4, heads=1, out=3).init(jax.random.key(0), jnp.zeros((1, 6, 4)), (2, 3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("head", "shape", "args"),
    [
        (MLPHead(hidden=6, out=4), (2, 8), {"norm": "batch"}),
        (LinearHead(out=4), (2, 8), {"norm": "batch"}),
        (RegressionHead(out=4), (2, 8), {"norm": "batch"}),
        (RegressionHead(out=4, layers=2), (2, 8), {"norm": "batch"}),
        (DINOHead(fixed_norm=False, hidden=6, bottleneck=4, out=4), (2, 8), {"norm": "batch"}),
        (TokenReduce(dim=4), (2, 2, 2, 8), {}),
        (THead(dim=8, heads=2, out=4, depth=1), (2, 4, 8), {"grid": (2, 2)}),
    ],
    ids=("mlp", "linear", "regression4", "regression2", "dino", "reduce", "thead"),
)
def test_parameters_gradients_and_output_stay_float32(head, shape, args, dtype):
    head = head.clone(dtype=dtype)

    def shapes(key, x):
        variables = head.init(key, x, **args)

        def loss(params):
            out, _ = head.apply({**variables, "params": params}, x, **args, mutable=["batch_stats"])
            return jnp.sum(out), out

        return variables, *jax.grad(loss, has_aux=True)(variables["params"])

    tree = jax.eval_shape(shapes, jax.random.key(0), jnp.ones(shape, dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
