import numpy as np
import pytest

from ssl_kd.errors import UserError
from ssl_kd.probes.health import ROWS, health


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
