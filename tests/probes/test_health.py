import jax
import numpy as np
import pytest
import runs

from ssl_kd.errors import UserError
from ssl_kd.probes.health import ROWS, health, signs_of_collapse
from ssl_kd.probes.judge import Judge, remedies


@pytest.mark.parametrize("dims", [2, 8, 33])
def test_both_ends_of_every_axis_spread_evenly(dims):
    found = health(np.vstack([np.eye(dims), -np.eye(dims)]).astype(np.float32))
    np.testing.assert_allclose(found["feature_std"], 1, rtol=1e-12)
    np.testing.assert_allclose(found["effective_rank"], dims, rtol=1e-12)


def test_one_direction_is_collapse():
    direction = np.random.default_rng(0).standard_normal(40)
    found = health((np.linspace(1, 5, 100)[:, None] * direction).astype(np.float32))
    np.testing.assert_allclose(found["feature_std"], 0, atol=1e-6)
    np.testing.assert_allclose(found["effective_rank"], 1, rtol=1e-4)


def test_lengths_do_not_count():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((50, 8))
    found, scaled = health(features), health(features * rng.uniform(0.1, 10, (50, 1)))
    np.testing.assert_allclose(list(scaled.values()), list(found.values()))


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20)])
def test_the_rank_is_the_entropy_of_the_singular_values(shape):
    features = np.random.default_rng(2).standard_normal(shape)
    singular = np.linalg.svd(features / np.linalg.norm(features, axis=1, keepdims=True), compute_uv=False)
    share = singular / singular.sum()
    np.testing.assert_allclose(health(features)["effective_rank"], np.prod(share**-share), rtol=1e-9)


def test_evenly_spread_gaussians_have_unit_std():
    found = health(np.random.default_rng(3).standard_normal((20000, 16)))
    np.testing.assert_allclose(found["feature_std"], 1, atol=0.01)
    np.testing.assert_allclose(found["effective_rank"], 16, atol=0.05)


def test_a_long_set_is_sampled_from_end_to_end():
    """Sorted by class, as folders are: four times as many rows as are used, one axis after the other."""
    features = np.repeat(np.eye(4), ROWS, axis=0)
    np.testing.assert_allclose(health(features)["effective_rank"], 4, rtol=1e-6)


def test_a_dead_network_is_collapse():
    assert health(np.zeros((10, 4), np.float32)) == {"feature_std": 0.0, "effective_rank": 1.0}


def test_no_rows_are_a_user_error():
    with pytest.raises(UserError, match="empty"):
        health(np.zeros((0, 4)))


def test_only_what_is_under_its_floor_is_a_sign():
    found = {"feature_std": 0.02, "effective_rank": 40.0}
    assert signs_of_collapse(found, {"feature_std": 0.02, "effective_rank": 3.0}) == ""
    assert signs_of_collapse(found, {"feature_std": 0.03, "effective_rank": 3.0}) == "feature_std 0.02 is under 0.03"
    assert "effective_rank 40 is under 50" in signs_of_collapse(found, {"feature_std": 0.03, "effective_rank": 50})


def test_collapse_is_said_once_with_what_to_try_and_health_is_not(tmp_path, capsys):
    run = runs.prepared(runs.config("moco_v2"), tmp_path)
    judge, state = Judge(run), run.create_now()
    capsys.readouterr()
    assert judge.quick(state)["collapsed"] == 0 and capsys.readouterr().out == ""
    dead = state.replace(trained=jax.tree.map(lambda x: 0 * x, state.trained))
    assert judge.quick(dead)["collapsed"] == judge.quick(dead)["collapsed"] == 1
    said = capsys.readouterr().out
    assert said.count("\n") == said.count("collapse") == 1 and "feature_std 0 is under 0.03" in said
    assert "a lower optim.lr" in said and "method.queue" in said and "teacher" not in said


def test_what_to_try_is_what_the_run_has(tmp_path):
    assert not any("bn_groups" in tip for tip in remedies(runs.prepared(runs.config("moco_v2"), tmp_path)))
    assert any("bn_groups" in tip for tip in remedies(runs.prepared(runs.config("moco_v2", bn_groups=1), tmp_path)))
    dino = remedies(runs.prepared(runs.config("mokd"), tmp_path))
    assert any("centre_momentum" in tip for tip in dino) and not any("queue" in tip for tip in dino)
