"""What the tests of every backbone need: shapes without compiling, and cheap variables to run it with."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssl_kd.models.convolution import plain_convolutions


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes(model, size, batch=2):
    x = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    with plain_convolutions():  # faster to trace
        return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, norm="batch"), x)


def variables_of(model, x):
    """Drawn by numpy: compiling jax's generator for every shape would take most of this file's time."""
    with plain_convolutions():
        shapes = jax.eval_shape(partial(model.init, norm="batch"), jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return {
        "params": jax.tree.map(lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), s.dtype), shapes["params"]),
        "batch_stats": jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes.get("batch_stats", {})),
    }


def apply(model, variables, x, norm, **kwargs):
    return jax.jit(partial(model.apply, norm=norm, **kwargs))(variables, x)


def parameter_count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def branch_rates(model, block, rows=4096):
    """How often stochastic depth leaves out each branch of each `block` of a model, (blocks, branches), over `rows`.

    Every branch that stays must be scaled so that the expectation does, and branches are left out independently.
    """
    x = jnp.zeros((rows, model.min_size, model.min_size, 3))
    variables = variables_of(model, x[:2])

    @jax.jit
    def branch_scales(variables, x):
        scales = []

        def intercept(function, args, kwargs, context):
            if isinstance(context.module, block):
                scales.append(args[-1].reshape(-1, rows))
            return function(*args, **kwargs)

        with nn.intercept_methods(intercept):
            model.apply(variables, x, norm="running", dropout=True, rngs={"dropout": jax.random.key(3)})
        return scales

    scales = np.array(branch_scales(variables, x))
    rates = (scales == 0).mean(-1)
    np.testing.assert_allclose(scales.max(-1) * (1 - rates), 1, atol=0.05)
    assert all(len(np.unique(branch)) <= 2 for branches in scales for branch in branches)
    assert np.abs(np.corrcoef(scales[rates > 0]) - np.eye((rates > 0).sum())).max() < 0.07
    return rates
