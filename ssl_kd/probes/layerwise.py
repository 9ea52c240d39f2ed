"""The layer-wise linear probe: a linear classifier on every layer of a frozen network, as AlexNet is judged in print.

The protocol is SeLa's (arXiv 1911.05371, and the authors' code): each map is max-pooled to at most 9600 values, passes
a batch norm without affine, one mean and variance a channel, and a linear layer; SGD trains on random crops, and the
ten crops of a test image vote by the mean of their logits. Three things are ours:
- pooling windows adapt to the map; at 224 px AlexNet's maps get the authors' sides of 10, 6, 5, 5 and 6;
- the pooled feature is judged as well;
- the classifiers start at zero, not at random: their problem is convex.
"""

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial

from ssl_kd.augment import Augmentation, augment
from ssl_kd.data.loader import Loader
from ssl_kd.data.resident import Resident, decide_resident
from ssl_kd.data.sources import Source
from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.log import Bar, console
from ssl_kd.losses import promote
from ssl_kd.mesh import REPLICATED, SHARDED, spread
from ssl_kd.models import Network, NetworkSpec
from ssl_kd.models.alexnet import AlexNet
from ssl_kd.models.embed import crop_side, square
from ssl_kd.models.layers import BatchNorm, Features, Norm
from ssl_kd.probes.features import extract, require_labels
from ssl_kd.recipe import stream
from ssl_kd.trained import TrainedNetwork

POOLED_VALUES = 9600
"""Most values of a map that its classifier sees."""

EPOCHS, DROP_EVERY = 36, 10
"""Published length, and the epochs after which the learning rate drops to a tenth; other lengths scale both."""

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-5

TRAINING_VIEW = Augmentation(crop_scale=(0.08, 1.0))
"""torchvision's standard random resized crop and flip."""

Layers = tuple[jax.Array, ...]
"""One array a layer, fine to coarse, the pooled feature last."""

PerLayer = tuple[dict[str, jax.Array], ...]
"""What a classifier holds, one dict a layer, in the same order."""


class Classifiers(NamedTuple):
    """A linear classifier on every layer, at one step of their training.

    Attributes:
      step: int32 scalar, steps done.
      weights: a layer's {'kernel' (values, classes), 'bias' (classes,)}.
      velocity: SGD's, as the weights.
      stats: a layer's running {'mean' (C,), 'var' (C,)}.
    """

    step: jax.Array
    weights: PerLayer
    velocity: PerLayer
    stats: PerLayer


def layer_probe(
    found: TrainedNetwork,
    train: Source,
    test: Source,
    *,
    image_size: int,
    epochs: float = EPOCHS,
    batch_size: int = 192,
    seed: int = 0,
    mesh: Mesh,
    progress: bool = False,
) -> dict[str, float]:
    """Top-1 accuracy in [0, 1] on `test` of a linear classifier on every layer, fine to coarse, by the layer's name.

    AlexNet's layers are 'conv1' … 'conv5' and 'fc7'; others have 'stage 1' …, their maps, and 'pooled'. The network is
    frozen and its batch norm uses running statistics. All classifiers learn from one forward of each batch, so that
    no feature is stored. The result is a function of the arguments; `seed` decides order and crops while training.

    Args:
      image_size: side of the crops, pixels. Test images on a canvas no larger than that have no corners: they vote by
        their centre and its mirror alone.
      epochs: passes over `train`.
      batch_size: images a step; a multiple of the mesh's devices.
      mesh: the devices along its axis 'data' share a batch.
      progress: whether to show a bar.

    Raises:
      UserError: for sets without labels, smaller than a batch or of different classes, and for a diverged network.
    """
    if not 0 < epochs < math.inf:
        raise UserError(f"the layer-wise probe cannot train for epochs={epochs}: use a positive number, as {EPOCHS}.")
    if len(train) < batch_size:
        raise UserError(
            f"the layer-wise probe's training set has {len(train)} images and its batches {batch_size}: "
            "choose a larger set."
        )
    train_labels, test_labels = train.labels(), test.labels()
    require_labels("the layer-wise probe's training set", train_labels, train_labels, train.num_classes or 0)
    require_labels("the layer-wise probe's test set", test_labels, test_labels, test.num_classes or 0)
    if train.num_classes != test.num_classes:
        raise UserError(
            f"the layer-wise probe's training set has {train.num_classes} classes and its test set {test.num_classes}: "
            "choose two splits of one data set."
        )
    resident, why = decide_resident("auto", train.nbytes, mesh.size)
    if progress:
        console.print(why)
    loader = Loader(train, batch_size=batch_size, seed=seed, mesh=mesh, resident=resident)
    steps = max(1, round(epochs * loader.steps_per_epoch))
    probe = LayerProbe(found.spec, image_size, steps, seed, mesh)
    variables = spread(found.variables, probe.replicated)
    classifiers = spread(probe.create(found.variables, train.num_classes or 0), probe.replicated)
    classifiers = fit(probe, classifiers, variables, loader, batch_size, progress)

    crops = 2 * len(crop_places(test.canvas, image_size))
    if progress:
        console.print(f"Testing on {crops} crops of each of {len(test):,} images …")
    predict = Partial(probe.predict, variables, classifiers)
    predicted = extract(predict, test, batch_size=max(1, batch_size // crops), mesh=mesh)
    accuracy = (predicted == test_labels[test.stand_ins()][:, None]).mean(axis=0)
    return dict(zip(layer_names(found.spec, len(accuracy)), accuracy.tolist(), strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class LayerProbe:
    """One network's classifiers: their beginning, a step of their training, and their predictions. All pure.

    Attributes:
      steps: of the whole training.
    """

    spec: NetworkSpec
    image_size: int
    steps: int
    seed: int
    mesh: Mesh

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, REPLICATED)

    def layers(self, variables: Any, views: jax.Array) -> Layers:
        """What the classifiers see of views (B, size, size, 3): pooled maps, then the pooled feature, float32."""
        features = Network(self.spec).apply(variables, views, norm="running", method="features")
        stages, pooled = cast(Features, features).stages, cast(Features, features).pooled
        return (*(promote(adaptive_max_pool(x, pooled_side(x.shape[-1]))) for x in stages), pooled)

    def create(self, variables: Any, classes: int) -> Classifiers:
        """Those of step 0, for so many classes."""
        view = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.float32)
        layers = jax.eval_shape(self.layers, variables, view)
        weights = tuple({"kernel": jnp.zeros((x.size, classes)), "bias": jnp.zeros(classes)} for x in layers)
        stats = tuple({"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])} for x in layers)
        return Classifiers(jnp.zeros((), jnp.int32), weights, jax.tree.map(jnp.zeros_like, weights), stats)

    def step(
        self,
        classifiers: Classifiers,
        variables: Any,
        batch: Mapping[str, Any],
        data: Resident | None,
    ) -> tuple[Classifiers, jax.Array]:
        """The classifiers after one more step, and the mean of their losses. `batch`, `data`: as a Loader has them."""
        if data is not None:
            index = batch["index"]
            batch = {"image": data.take(index), "label": data.label[index]}
            batch = jax.lax.with_sharding_constraint(batch, NamedSharding(self.mesh, SHARDED))
        key = stream(self.seed, "layer probe", classifiers.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(batch["label"])))
        views = augment(batch["image"], keys, key, TRAINING_VIEW, self.image_size)
        rate = learning_rate(classifiers.step, self.steps)
        return advance(classifiers, self.layers(variables, views), batch["label"], rate)

    def predict(self, variables: Any, classifiers: Classifiers, images: Images) -> jax.Array:
        """The classes (B, layers) that the crops of B images vote for; NaN by a network that diverged.

        Floats, exact for every class there is, because that is what `extract` collects.
        """
        crops = mirrored_crops(images, self.image_size, self.spec.crop_fraction, self.spec.interpolation)
        layers = self.layers(variables, crops.reshape(-1, *crops.shape[2:]))
        rows, _ = standardise(layers, classifiers.stats, norm="running")
        votes = []
        for scores in logits(classifiers.weights, rows):
            mean = scores.reshape(*crops.shape[:2], -1).mean(axis=1)
            votes.append(jnp.where(jnp.isfinite(mean).all(axis=1), mean.argmax(axis=1), jnp.nan))
        return jnp.stack(votes, axis=1)


def fit(
    probe: LayerProbe, classifiers: Classifiers, variables: Any, loader: Loader, batch_size: int, progress: bool
) -> Classifiers:
    """The classifiers at the end of their training. Raises UserError where their loss is not finite."""
    train_step = jax.jit(probe.step, donate_argnums=0, out_shardings=probe.replicated)
    flying: deque[jax.Array] = deque()
    began = math.nan
    with (
        Bar(probe.steps, 0) if progress else contextlib.nullcontext() as bar,
        contextlib.closing(loader.batches(0, probe.steps)) as batches,
    ):
        for step, batch in enumerate(batches, 1):
            classifiers, loss = train_step(classifiers, variables, batch, loader.data)
            flying.append(loss)
            # The device works on this step while the host waits for the loss of the one before.
            while len(flying) > (0 if step == probe.steps else 1):
                done, value = step + 1 - len(flying), float(flying.popleft())
                if not math.isfinite(value):
                    raise UserError(
                        f"the layer-wise probe's loss is not finite at step {done}: the network has diverged, or the "
                        "loaded weights do not belong to it; probe an earlier checkpoint."
                    )
                now = time.monotonic()
                began = now if done == 1 else began  # the first step's compilation is no speed
                speed = (done - 1) * batch_size / (now - began) if now > began else math.nan
                left = (probe.steps - done) * batch_size / speed
                if bar:
                    bar.update(done, images_per_second=speed, seconds_left=left, loss=value)
    return classifiers


def advance(
    classifiers: Classifiers, layers: Layers, label: jax.Array, rate: jax.Array | float
) -> tuple[Classifiers, jax.Array]:
    """One step on a batch of layers and its labels (B,), and the mean of the classifiers' cross-entropies.

    Their sum is differentiated: they share nothing, so its gradient is each one's own. As torch has it, weight decay is
    added to the gradient, of biases as well, and the learning rate is not in the velocity.
    """
    rows, stats = standardise(layers, classifiers.stats, norm="batch")

    def loss(weights: PerLayer) -> jax.Array:
        losses = [optax.softmax_cross_entropy_with_integer_labels(z, label).mean() for z in logits(weights, rows)]
        return jnp.sum(jnp.stack(losses))

    value, grads = jax.value_and_grad(loss)(classifiers.weights)
    step, weights, velocity, _ = classifiers
    velocity = jax.tree.map(lambda v, g, w: MOMENTUM * v + g + WEIGHT_DECAY * w, velocity, grads, weights)
    weights = jax.tree.map(lambda w, v: w - rate * v, weights, velocity)
    return Classifiers(step + 1, weights, velocity, stats), value / len(layers)


def standardise(layers: Layers, stats: PerLayer, *, norm: Norm) -> tuple[Layers, PerLayer]:
    """Batch norm without affine, one mean and variance a channel: rows (B, values) of every layer, moved statistics."""
    rows, moved = [], []
    for x, running in zip(layers, stats, strict=True):
        identity = {"scale": jnp.ones(x.shape[-1]), "bias": jnp.zeros(x.shape[-1])}
        variables = {"params": identity, "batch_stats": running}
        x, after = BatchNorm().apply(variables, x, norm=norm, mutable=["batch_stats"])
        rows.append(x.reshape(len(x), -1))
        moved.append(after["batch_stats"])
    return tuple(rows), tuple(moved)


def logits(weights: PerLayer, rows: Layers) -> list[jax.Array]:
    """Every layer's logits (B, classes)."""
    highest = jax.lax.Precision.HIGHEST
    return [jnp.matmul(x, w["kernel"], precision=highest) + w["bias"] for w, x in zip(weights, rows, strict=True)]


def learning_rate(step: jax.Array | int, steps: int) -> jax.Array:
    """Of a step of `steps`: .01, and a tenth of it after each 10 / 36 of them."""
    drops = EPOCHS * step // (DROP_EVERY * steps)
    return LEARNING_RATE * 0.1 ** jnp.asarray(drops, jnp.float32)


def pooled_side(channels: int) -> int:
    """Side of the largest square map of so many channels that has at most 9600 values; at least 1."""
    return max(1, math.isqrt(POOLED_VALUES // channels))


def adaptive_max_pool(x: jax.Array, side: int) -> jax.Array:
    """torch's adaptive max pool of (B, H, W, C): maxima of side × side windows, which may overlap.

    An axis no longer than `side` stays as it is.
    """
    for axis in (1, 2):
        length = x.shape[axis]
        if length > side:
            windows = [(i * length // side, -(-(i + 1) * length // side)) for i in range(side)]
            x = jnp.stack([jax.lax.slice_in_dim(x, *window, axis=axis).max(axis) for window in windows], axis)
    return x


def crop_places(canvas: tuple[int, int], size: int) -> list[tuple[float, float]]:
    """Where the crops of images lie: of what is left beside one, the shares above it and to its left.

    The centre, then, if the canvas is larger than a crop, the four corners.
    """
    corners = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)] if max(canvas) > size else []
    return [(0.5, 0.5), *corners]


def mirrored_crops(images: Images, size: int, crop_fraction: float, interpolation: str) -> jax.Array:
    """Crops of B images and their mirrors, float32 (B, 10, size, size, 3) in [0, 1]; two, not ten, without corners.

    Each crop is as large as the centre that the network is evaluated on, and resized as that is.
    """
    side = crop_side(images, size, crop_fraction)
    left_over = images.size - side[:, None]
    corners = [jnp.floor(left_over * jnp.array(place)).astype(jnp.int32) for place in crop_places(images.canvas, size)]
    crops = [square(images, corner, side, size, interpolation) for corner in corners]
    return jnp.stack([*crops, *(crop[:, :, ::-1] for crop in crops)], axis=1)


def layer_names(spec: NetworkSpec, count: int) -> list[str]:
    """Names of the layers that a probe of the network has, the pooled feature last."""
    stage, pooled = ("conv", "fc7") if isinstance(spec.backbone(), AlexNet) else ("stage ", "pooled")
    return [*(f"{stage}{i}" for i in range(1, count)), pooled]
