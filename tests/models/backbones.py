"""What the tests of every backbone need: shapes without compiling, and cheap variables to run it with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes(model, size, batch=2):
    x = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, norm="batch"), x)


def variables_of(model, x):
    """Drawn by numpy: compiling jax's generator for every shape would take most of this file's time."""
    shapes = jax.eval_shape(partial(model.init, norm="batch"), jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return {
        "params": jax.tree.map(lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), s.dtype), shapes["params"]),
        "batch_stats": jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes["batch_stats"]),
    }


def apply(model, variables, x, norm, **kwargs):
    return jax.jit(partial(model.apply, norm=norm, **kwargs))(variables, x)


def parameter_count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
