from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from ssl_kd.errors import UserError
from ssl_kd.probes.linear import accuracy, linear_probe, standardisation, stratified_split, train


@pytest.fixture(scope="module")
def clusters():
    """Three overlapping classes in 6 dimensions: train (90, 6), test (45, 6)."""
    rng = np.random.default_rng(0)
    labels = np.arange(135) % 3
    features = (rng.standard_normal((3, 6))[labels] + rng.standard_normal((135, 6))).astype(np.float32)
    return features[:90], labels[:90], features[90:], labels[90:]


def naive_sgd(x, y, rows, lr, decay, num_classes, epochs, batch, seed):
    """torch.optim.SGD(lr, momentum=0.9, weight_decay) on softmax cross-entropy, one example at a time, in float64."""
    weight, bias = np.zeros((x.shape[1], num_classes)), np.zeros(num_classes)
    weight_velocity, bias_velocity = np.zeros_like(weight), np.zeros_like(bias)
    rng = np.random.default_rng(seed)
    steps = len(rows) // batch
    for epoch in range(epochs):
        order = rng.permutation(rows)
        for step in range(steps):
            weight_grad, bias_grad = decay * weight, decay * bias
            for i in order[step * batch : (step + 1) * batch]:
                scores = np.exp(x[i].astype(np.float64) @ weight + bias)
                error = scores / scores.sum() - np.eye(num_classes)[y[i]]
                weight_grad = weight_grad + np.outer(x[i], error) / batch
                bias_grad = bias_grad + error / batch
            weight_velocity = 0.9 * weight_velocity + weight_grad
            bias_velocity = 0.9 * bias_velocity + bias_grad
            now = lr * (1 + np.cos(np.pi * (epoch * steps + step) / (epochs * steps))) / 2
            weight, bias = weight - now * weight_velocity, bias - now * bias_velocity
    return weight, bias


def test_each_grid_member_is_that_pair_trained_alone(clusters):
    x, y, _, _ = clusters
    rows = np.arange(0, 90, 2)
    grid = [(0.05, 0.0), (0.05, 0.3), (0.7, 0.0), (0.7, 0.02)]
    layers = train(jnp.asarray(x), y, rows, grid, 3, epochs=3, batch_size=8, seed=5)
    for member, (lr, decay) in enumerate(grid):
        weight, bias = naive_sgd(x, y, rows, lr, decay, 3, epochs=3, batch=8, seed=5)
        np.testing.assert_allclose(layers["weight"][:, member], weight, atol=2e-5)
        np.testing.assert_allclose(layers["bias"][member], bias, atol=2e-5)


def test_a_set_below_the_batch_size_is_one_batch(clusters):
    x, y, _, _ = clusters
    layers = train(jnp.asarray(x), y, np.arange(20), [(0.1, 0.0)], 3, epochs=4, batch_size=256, seed=0)
    weight, _ = naive_sgd(x, y, np.arange(20), 0.1, 0.0, 3, epochs=4, batch=20, seed=0)
    np.testing.assert_allclose(layers["weight"][:, 0], weight, atol=1e-5)


def test_accuracy_counts_and_a_diverged_layer_scores_zero():
    weight = jnp.stack([jnp.eye(2), jnp.full((2, 2), jnp.nan)], axis=1)
    layers = {"weight": weight, "bias": jnp.zeros((2, 2))}
    x = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    np.testing.assert_array_equal(accuracy(layers, x, np.array([0, 1, 1])), [2 / 3, 0])


def test_separable_classes_are_perfect():
    rng = np.random.default_rng(1)
    y = np.arange(200) % 4
    x = (np.eye(4)[y] + 0.05 * rng.standard_normal((200, 4))).astype(np.float32)
    result = linear_probe(x[:120], y[:120], x[120:], y[120:], num_classes=4, batch_size=16)
    assert result.accuracy == 1.0
    assert result.holdout_accuracy == 1.0


def test_the_test_set_only_scores(clusters):
    x, y, test_x, test_y = clusters
    found = linear_probe(x, y, test_x, test_y, num_classes=3, epochs=5, batch_size=16)
    other = linear_probe(x, y, -7 * test_x, (test_y + 1) % 3, num_classes=3, epochs=5, batch_size=16)
    assert replace(found, accuracy=0) == replace(other, accuracy=0)
    assert found.accuracy != other.accuracy


def test_the_score_is_the_winner_trained_on_all_of_train(clusters):
    x, y, test_x, test_y = clusters
    result = linear_probe(x, y, test_x, test_y, num_classes=3, epochs=5, batch_size=16, seed=3)
    mean, scale = x.mean(0), 1 / x.std(0)
    weight, bias = naive_sgd((x - mean) * scale, y, np.arange(90), result.lr, result.weight_decay, 3, 5, 16, 3)
    predicted = ((test_x - mean) * scale @ weight + bias).argmax(1)
    assert result.accuracy == (predicted == test_y).mean()
    assert result.epochs == 5


def test_the_same_seed_gives_the_same_result(clusters):
    first, second = (linear_probe(*clusters, num_classes=3, epochs=3, seed=2) for _ in range(2))
    assert first == second


def test_constant_dimensions_change_nothing(clusters):
    x, y, test_x, test_y = clusters
    noise = 1e9 * np.ones((45, 1), np.float32)  # where train is constant, test may hold anything
    found = linear_probe(
        np.hstack([x, np.full((90, 1), 0.1, np.float32), np.zeros((90, 1), np.float32)]),
        y,
        np.hstack([test_x, noise, noise]),
        test_y,
        num_classes=3,
        epochs=5,
    )
    assert found == linear_probe(x, y, test_x, test_y, num_classes=3, epochs=5)


def test_standardisation_is_batch_norm_without_affine(clusters):
    x = np.hstack([clusters[0] * [1, 1e3, 1e-3, 1, 1, 1], np.full((90, 1), 0.1)]).astype(np.float32)
    mean, scale = standardisation(x)
    y = (x - mean) * scale
    np.testing.assert_allclose(y[:, :6].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(y[:, :6].std(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(y[:, 6], 0)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_the_holdout_is_a_stratified_part_of_train(share):
    labels = np.repeat([4, 0, 7, 2], [200, 50, 2, 1])
    fit, held = stratified_split(labels, share, seed=1)
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held])), np.arange(253))
    for label, count in ((4, 200), (0, 50), (7, 2)):
        assert (labels[held] == label).sum() == min(max(1, round(share * count)), count - 1)
    assert (labels[fit] == 2).sum() == 1


@pytest.mark.parametrize(
    ("lrs", "weight_decays", "at_edge"),
    [
        ((0.0, 0.1), (0.0,), True),
        ((0.1,), (0.0,), False),  # a single value is no search
        ((0.0, 0.1, 1e9), (0.0, 1e9), False),  # nothing lies below a decay of 0
        ((0.1,), (0.1, 1e9), True),
    ],
)
def test_a_winner_at_the_edge_of_the_grid_is_reported(clusters, lrs, weight_decays, at_edge):
    result = linear_probe(*clusters, num_classes=3, lrs=lrs, weight_decays=weight_decays, epochs=5, batch_size=16)
    assert (result.lr, result.weight_decay) == (0.1, weight_decays[0])
    assert result.at_edge is at_edge


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": np.full(90, -1)}, "training set needs labels"),
        ({"test_y": None}, "test set needs labels"),
        ({"train_y": np.full(90, 2)}, "two classes or more"),
        ({"train_x": np.zeros((0, 6)), "train_y": np.zeros(0)}, "empty"),
        ({"train_x": np.eye(3), "train_y": np.arange(3)}, "one image per class"),
        ({"holdout": 0.0}, "holdout is 0.0"),
    ],
)
def test_unfit_arguments_are_a_user_error(clusters, change, message):
    names = ("train_x", "train_y", "test_x", "test_y")
    with pytest.raises(UserError, match=message):
        linear_probe(**{**dict(zip(names, clusters, strict=True)), "num_classes": 3, **change})
