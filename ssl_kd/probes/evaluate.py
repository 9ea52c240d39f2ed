"""All judges on one network: what `fit` reports at the end and `launch/evaluate.py` on any checkpoint."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ssl_kd.data.sources import Source
from ssl_kd.images import Images
from ssl_kd.models.embed import preprocess
from ssl_kd.probes.consistency import consistency
from ssl_kd.probes.features import extract
from ssl_kd.probes.health import health
from ssl_kd.probes.knn import knn
from ssl_kd.probes.linear import linear_probe

RAW_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images and their labels.

    Attributes:
      images: N of them on the host, or a source.
      labels: int32 (N,), −1 unknown.
      num_classes: 0 when there are no labels, or not for all.
    """

    images: Images | Source
    labels: np.ndarray
    num_classes: int

    def __post_init__(self) -> None:
        if np.any(self.labels < 0):
            object.__setattr__(self, "num_classes", 0)

    @property
    def labels_read(self) -> np.ndarray:
        """The labels of what was read, once all images were: where one could not be, that of its stand-in."""
        return self.labels if isinstance(self.images, Images) else self.labels[self.images.stand_ins()]


def raw_pixels(images: Images) -> jax.Array:
    """The centre of B images, at most 32 × 32 pixels: float32 (B, s·s·3), the baseline that needs no network."""
    x = preprocess(images, min(RAW_SIZE, *images.canvas), 1.0, "bilinear")
    return x.reshape(len(x), -1)


def evaluate(
    apply: Callable[[Images], jax.Array],
    train: Labelled,
    test: Labelled,
    *,
    ks: Sequence[int],
    linear: bool,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """What the features are worth that `apply` gives: health and nearest-neighbour consistency on the test images, and
    where all have labels, kNN and linear accuracy in [0, 1]. Features of a view are made once."""
    test_x = extract(apply, test.images, batch_size=batch_size, mesh=mesh)
    result = health(test_x) | consistency(apply, test.images, test_x, batch_size=batch_size, mesh=mesh)
    if not (train.num_classes and test.num_classes):
        return result
    train_x = extract(apply, train.images, batch_size=batch_size, mesh=mesh)
    classes, train_y, test_y = train.num_classes, train.labels_read, test.labels_read
    found = knn(train_x, train_y, test_x, test_y, num_classes=classes, ks=ks)
    result |= {f"knn{k}": value for k, value in found.items()}
    if linear:
        probe = linear_probe(train_x, train_y, test_x, test_y, num_classes=classes)
        result |= {"linear": probe.accuracy, "linear_lr": probe.lr, "linear_weight_decay": probe.weight_decay}
    return result
