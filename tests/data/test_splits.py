"""Slices, balanced subsets that are the same for ever, and held-out rows that stay on their side."""

import numpy as np
import pytest

from ssl_kd.data.splits import choose, held_out, parse_split, rows_of
from ssl_kd.errors import UserError


class Labels:
    """A reader of which only the labels matter."""

    def __init__(self, labels, num_classes=None):
        self._labels = np.asarray(labels, np.int32)
        top = int(self._labels.max(initial=-1))
        self.num_classes = num_classes or (top + 1 if top >= 0 else None)

    def __len__(self):
        return len(self._labels)

    def labels(self):
        return self._labels


TEN = Labels(np.arange(4000) % 10)


# --- the grammar


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train", ("train", "")),
        ("my-split_2.0", ("my-split_2.0", "")),
        ("train[:10%]", ("train", ":10%")),
        ("test[-500:]", ("test", "-500:")),
        ("train[:]", ("train", ":")),
        ("all[balanced 1%]", ("all", "balanced 1%")),
        ("train[balanced 100]", ("train", "balanced 100")),
    ],
)
def test_a_split_is_a_name_and_a_selection(text, parts):
    assert parse_split(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "test+train",
        "test[5]",
        "test[10%:10.]",
        "test[balanced]",
        "test[balanced 0]",
        "test[balanced -1]",
        "test[balanced 1%:2%]",
        "test[balanced 1%][:5]",
        "test[:5][balanced 1]",
        "test[balanced 1.5%]",
        "test[]",
        "test[:5]\n",
        "test[:٣]",
        "te/st",
    ],
)
def test_what_is_not_understood(text):
    with pytest.raises(UserError, match=r"is not understood; write it like 'train'.*'train\[balanced 1%\]'"):
        parse_split(text)
    with pytest.raises(UserError, match="not understood"):
        rows_of(text, TEN)


# --- slices


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("test", range(4000)),
        ("test[:]", range(4000)),
        ("test[:10]", range(10)),
        ("test[3990:]", range(3990, 4000)),
        ("test[-10:]", range(3990, 4000)),
        ("test[:-3990]", range(10)),
        ("test[50%:75%]", range(2000, 3000)),
        ("test[-1%:]", range(3960, 4000)),
        ("test[:100%]", range(4000)),
    ],
)
def test_slices(text, rows):
    got = rows_of(text, TEN)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test[5:5]", "empty"),
        ("test[10:5]", "empty"),
        ("test[:4001]", "there are 4000 rows"),
        ("test[-4001:]", "there are 4000 rows"),
        ("test[:101%]", "there are 4000 rows"),
        ("test[-0%:]", "empty"),
        ("test[:0]", "empty"),
    ],
)
def test_bad_slices(text, message):
    with pytest.raises(UserError, match=message):
        rows_of(text, TEN)


def test_no_rows_at_all():
    with pytest.raises(UserError, match="split 'test' is empty"):
        rows_of("test", Labels([]))


# --- balanced subsets


def test_the_balanced_rule_never_changes():
    """Golden: these rows must never change, or accuracies from few labels could not be compared."""
    assert rows_of("train[balanced 1]", TEN).tolist() == [176, 325, 1830, 1932, 2207, 2911, 3049, 3538, 3593, 3934]
    assert rows_of("train[balanced 2]", Labels([0, 1] * 6)).tolist() == [0, 1, 8, 11]


@pytest.mark.parametrize(
    ("amount", "each"), [("1", 1), ("37", 37), ("400", 400), ("1%", 4), ("10%", 40), ("100%", 400), ("60%", 240)]
)
def test_every_class_gives_as_many_rows(amount, each):
    rows = rows_of(f"train[balanced {amount}]", TEN)
    assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(np.bincount(TEN.labels()[rows]), [each] * 10)


def test_a_smaller_subset_lies_within_a_larger_one():
    few, many = (set(rows_of(f"train[balanced {amount}]", TEN).tolist()) for amount in ("1%", "10%"))
    assert few < many


def test_classes_are_balanced_where_the_set_is_not():
    labels = Labels(np.repeat([0, 1, 2, -1], [900, 60, 40, 500]))
    rows = rows_of("train[balanced 3%]", labels)  # 30 of the 1000 labelled rows
    np.testing.assert_array_equal(np.bincount(labels.labels()[rows]), [10, 10, 10])
    assert len(rows_of("train[balanced 1%]", Labels([0, 1, 2]))) == 3  # at least one of each


def test_rows_are_drawn_evenly_from_a_class():
    """Mean place of 100 of 400 rows: uniform, standard error 115.5 / 10 * sqrt(3 / 4) = 10."""
    rows = rows_of("train[balanced 100]", TEN)
    means = [(rows[TEN.labels()[rows] == c] // 10).mean() for c in range(10)]
    assert np.abs(np.array(means) - 199.5).max() < 4 * 10


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (Labels([-1] * 9), "train[balanced 1%]", "needs labels, and this source has none; choose a slice"),
        (Labels([0, 1] * 6), "train[balanced 7]", "takes 7 rows of every class, but class 0 has 6; take fewer"),
        (Labels([0, 0, 2]), "train[balanced 1]", "takes 1 rows of every class, but class 1 has 0"),
        (Labels([0, 1], num_classes=3), "train[balanced 1]", "class 2 has 0"),
        (Labels([0] * 9 + [1]), "train[balanced 50%]", "takes 2 rows of every class, but class 1 has 1"),
    ],
)
def test_too_few_rows(reader, text, message):
    with pytest.raises(UserError, match=message):
        rows_of(text, reader)


# --- stores without splits

PATHS = [b"class%d/image_%05d.jpg" % (i % 7, i) for i in range(5000)]


def test_train_and_test_share_out_the_rows():
    train, test, every = (held_out(PATHS, split) for split in ("train", "test", "all"))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), every)
    np.testing.assert_array_equal(every, np.arange(5000))
    assert train.dtype == test.dtype == every.dtype == np.int64


@pytest.mark.parametrize("keys", [PATHS, [b"%d" % i for i in range(5000)], [b"%06d.jpg" % i for i in range(5000)]])
def test_a_tenth_is_held_out(keys):
    assert 0.09 < len(held_out(keys, "test")) / 5000 < 0.11


def test_a_row_stays_on_its_side():
    """Whatever else there is, and in whatever order."""
    side = {PATHS[row] for row in held_out(PATHS, "test")}
    shuffled = [PATHS[row] for row in np.random.default_rng(0).permutation(5000)][:3000]
    assert {shuffled[row] for row in held_out(shuffled, "test")} == side & set(shuffled)
    assert held_out([b"%d" % i for i in range(60)], "test").tolist() == [23, 27, 33, 37]  # golden: must never change


def test_stores_without_splits_have_these():
    with pytest.raises(UserError, match=r"split 'validation' does not exist .* use 'test' .*, 'train' .* or 'all'"):
        held_out(PATHS, "validation")


def test_names_of_splits():
    assert choose("train", ["train", "val"], "x") == "train"
    for name in ("validation", "valid", "val"):
        assert choose("validation", ["train", name], "x") == choose("val", ["train", name], "x") == name
        assert choose("test", ["train", name], "x") == name
    assert choose("test", ["val", "test"], "x") == "test"
    assert choose("unsupervised", ["unsupervised"], "x") == "unsupervised"
    with pytest.raises(UserError, match=r"^the store has no split 'all'; the splits there are test, train$"):
        choose("all", ["train", "test"], "the store")
