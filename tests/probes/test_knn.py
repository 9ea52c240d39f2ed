import numpy as np
import pytest

from ssl_kd.errors import UserError
from ssl_kd.probes.knn import knn


def naive_knn(bank, bank_labels, queries, query_labels, num_classes, k, temperature):
    hits = 0
    for query, truth in zip(queries.astype(np.float64), query_labels, strict=True):
        sims = []
        for row in bank.astype(np.float64):
            sims.append(row @ query / np.linalg.norm(row) / np.linalg.norm(query))
        scores = np.zeros(num_classes)
        for i in np.argsort(sims)[::-1][:k]:
            scores[bank_labels[i]] += np.exp(sims[i] / temperature)
        hits += scores.argmax() == truth
    return hits / len(queries)


@pytest.fixture(scope="module")
def noisy():
    """Five overlapping classes: kNN errs, differently for each k."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 12))
    labels = rng.integers(0, 5, 231)
    features = (centres[labels] + 1.3 * rng.standard_normal((231, 12))).astype(np.float32)
    return features[:130], labels[:130], features[130:], labels[130:]


@pytest.mark.parametrize(("query_block", "bank_block"), [(512, 16384), (101, 130), (7, 33), (40, 129), (1, 3)])
def test_equals_the_double_loop(noisy, query_block, bank_block):
    found = knn(*noisy, num_classes=5, ks=(1, 10, 50), query_block=query_block, bank_block=bank_block)
    expected = {k: naive_knn(*noisy, 5, k, 0.07) for k in (1, 10, 50)}
    assert found == expected
    assert len(set(expected.values())) == 3  # a mix-up of the ks would show


def test_the_temperature_weighs_the_votes(noisy):
    found = [knn(*noisy, num_classes=5, ks=(50,), temperature=temperature)[50] for temperature in (0.01, 10.0)]
    assert found == [naive_knn(*noisy, 5, 50, temperature) for temperature in (0.01, 10.0)]
    assert found[0] != found[1]


def test_separate_clusters_are_perfect():
    labels = np.arange(60) % 4
    features = np.eye(4, dtype=np.float32)[labels] * np.linspace(1, 9, 60, dtype=np.float32)[:, None]
    assert knn(features[:40], labels[:40], features[40:], labels[40:], num_classes=4, ks=(1, 10)) == {1: 1.0, 10: 1.0}


def test_a_k_above_the_bank_lets_every_row_vote(noisy):
    found = knn(*noisy, num_classes=5, ks=(130, 200, 10**6))
    assert found[130] == found[200] == found[10**6] == naive_knn(*noisy, 5, 130, 0.07)


def test_only_directions_count(noisy):
    bank, bank_labels, queries, query_labels = noisy
    scale = np.float32(2) ** np.arange(-10, 10)[np.arange(130) % 20][:, None]  # powers of two: nothing rounds
    found = knn(bank * scale, bank_labels, queries * 1024, query_labels, num_classes=5, ks=(10,))
    assert found == knn(*noisy, num_classes=5, ks=(10,))


def test_a_tiny_temperature_is_the_nearest_neighbour(noisy):
    found = knn(*noisy, num_classes=5, ks=(1, 100), temperature=1e-5)
    assert found[100] == found[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank_labels": np.full(130, -1)}, "bank .* needs labels"),
        ({"query_labels": None}, "query set .* needs labels"),
        ({"queries": np.zeros((0, 12)), "query_labels": np.zeros(0)}, "empty"),
        ({"ks": (0, 10)}, "at least 1"),
        ({"temperature": 0.0}, "positive"),
        ({"num_classes": 3}, "num_classes is 3"),
    ],
)
def test_unfit_arguments_are_a_user_error(noisy, change, message):
    names = ("bank", "bank_labels", "queries", "query_labels")
    with pytest.raises(UserError, match=message):
        knn(**{**dict(zip(names, noisy, strict=True)), "num_classes": 5, **change})
