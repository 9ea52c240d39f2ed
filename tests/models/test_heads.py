import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_kd.models.heads import MLPHead


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_head_is_linear_relu_linear():
    head = MLPHead(hidden=6, out=4)
    x = normal((3, 5))
    variables = head.init(jax.random.key(1), x)
    fc1, fc2 = (jax.tree.map(np.asarray, variables["params"][name]) for name in ("fc1", "fc2"))
    hidden = np.maximum(np.asarray(x) @ fc1["kernel"] + fc1["bias"], 0)
    np.testing.assert_allclose(head.apply(variables, x), hidden @ fc2["kernel"] + fc2["bias"], rtol=1e-5, atol=1e-6)


def test_linear_initialisation_is_torchs_uniform():
    params = MLPHead(hidden=400, out=300).init(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    for layer, fan_in in (("fc1", 100), ("fc2", 400)):
        bound = fan_in**-0.5
        for name in ("kernel", "bias"):
            values = params[layer][name]
            assert np.abs(values).max() <= bound
            np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.1)  # of a uniform on ±bound
            assert abs(values.mean()) < 0.1 * bound


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_and_output_stay_float32(dtype):
    head = MLPHead(hidden=6, out=4, dtype=dtype)
    out, variables = head.init_with_output(jax.random.key(0), jnp.ones((2, 5)))
    assert out.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
