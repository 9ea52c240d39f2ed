"""Optimizers, schedules and averages against the references' own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_kd.optim import decay_mask, make_optimizer, moving_average, warmup_cosine


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_five_steps_equal_torch(golden, name):
    g = golden("micro_bn_ema_optim")
    with jax.enable_x64(True):
        params = jnp.asarray(g["in_opt_p0"], jnp.float64)
        rates = jnp.asarray(g["in_opt_lr"])
        state = None
        for step in range(5):
            decay = float(g["hp_sgd_wd"]) if name == "sgd" else float(g["in_opt_wd_adamw"][step])
            optimizer = make_optimizer(name, lambda i: rates[i], weight_decay=decay, decay="all")
            state = optimizer.init(params) if state is None else state
            grads = jnp.asarray(g["in_opt_grads"][step], jnp.float64)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            reference = g[f"f64_out_{name}"][step]
            assert np.abs(params - reference).max() <= 1e-11 + 1e-9 * np.abs(reference).max()


def test_moving_average_equals_the_moco_reference(golden):
    g = golden("micro_bn_ema_optim")
    names = [n.removeprefix("in_ema_q/") for n in g.files if n.startswith("in_ema_q/")]
    params = [n for n in names if "running" not in n and "tracked" not in n]
    after = moving_average(
        {n: g[f"in_ema_k/{n}"] for n in params}, {n: g[f"in_ema_q/{n}"] for n in params}, float(g["hp_ema_m"])
    )
    assert len(params) == 5
    for name in params:
        np.testing.assert_allclose(after[name], g[f"out_ema_k/{name}"], rtol=1e-6, atol=1e-7)


def test_cosine_equals_the_moco_line_at_the_start_of_every_epoch(golden):
    reference = golden("schedules")["moco_disco_bingo_cos_per_epoch"]
    steps = 7
    rate = warmup_cosine(0.03, 200 * steps, 0)
    ours = [float(rate(epoch * steps)) for epoch in range(200)]
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-8)


def test_warmup_cosine_equals_ressl_at_every_step(golden):
    reference = golden("schedules")["ressl_per_iter_20ep_6it_warm5"]
    rate = warmup_cosine(float(reference.max()), 120, 30)
    np.testing.assert_allclose([float(rate(i)) for i in range(120)], reference, rtol=1e-5, atol=1e-8)


def test_masks_choose_what_decays():
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3), "scale": jnp.zeros(3)}
    assert decay_mask(params, "all") == {"kernel": True, "bias": True, "scale": True}
    assert decay_mask(params, "weights") == {"kernel": True, "bias": False, "scale": False}


def test_spared_parameters_do_not_decay():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer("sgd", lambda _: 1.0, weight_decay=0.1, decay="weights")
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1)
    np.testing.assert_array_equal(updates["bias"], 0)
