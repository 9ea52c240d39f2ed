"""Who is probed, when and on what: a run's network while it trains, at its end, and any network later."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ssl_kd.data.sources import Source, arrays, open_source
from ssl_kd.images import Images
from ssl_kd.log import console
from ssl_kd.mesh import make_mesh, once
from ssl_kd.models.embed import batch_calibrated, pooled_features
from ssl_kd.probes.evaluate import Labelled, evaluate, raw_pixels
from ssl_kd.probes.health import signs_of_collapse
from ssl_kd.probes.layerwise import EPOCHS, layer_probe
from ssl_kd.recipe import short_side
from ssl_kd.state import State
from ssl_kd.trained import RunNetwork, TrainedNetwork

if TYPE_CHECKING:
    from ssl_kd.run import Run

PROBE_BYTES = 2 << 30
"""Largest decoded set that probes keep in host memory."""

CALIBRATION_IMAGES = 512
"""Batch whose statistics a randomly initialised network takes."""


class Judge:
    """The probes of a run: quick ones while it trains, everything at the end."""

    def __init__(self, run: Run):
        self.run = run
        self.role = run.recipe.method.evaluated[0]
        self.apply = pooled_features(run.recipe.specs[self.role], run.config.image_size)
        self.warned = False

    @functools.cached_property
    def quick_sets(self) -> tuple[Labelled, Labelled]:
        few = self.run.config.probe.knn_bank
        return labelled(self.run.train, few), labelled(self.run.test, few)

    def variables(self, state: State) -> dict[str, Any]:
        return {"params": {**state.trained, **state.averaged}[self.role], "batch_stats": state.batch_stats[self.role]}

    def measure(self, apply: Partial, sets: tuple[Labelled, Labelled], *, linear: bool) -> dict[str, float]:
        c = self.run.config.probe
        return evaluate(apply, *sets, ks=c.knn, linear=linear, batch_size=c.batch_size, mesh=self.run.mesh)

    def quick(self, state: State) -> dict[str, float]:
        """On some of the images, all that needs no training: kNN where there are labels, neighbours, health, and 1 or 0
        for whether the features have 'collapsed', which is said the first time."""
        found = self.measure(Partial(self.apply, self.variables(state)), self.quick_sets, linear=False)
        c = self.run.config.probe
        signs = signs_of_collapse(found, {"feature_std": c.min_feature_std, "effective_rank": c.min_effective_rank})
        if signs and not self.warned:
            self.warned = True
            console.print(
                f"Warning: at step {int(state.step)} the {self.role} seems to collapse, for {signs}. What may help, in "
                f"another --workdir: {'; '.join(remedies(self.run))}."
            )
        return found | {"collapsed": float(bool(signs))}

    def final(self, state: State) -> dict[str, Any]:
        """The trained network, raw pixels and the network's random weights under the same probes."""
        c = self.run.config
        sets = labelled(self.run.train, c.probe.train_images), labelled(self.run.test)
        features = {
            self.role: lambda: Partial(self.apply, self.variables(state)),
            "raw pixels": lambda: Partial(raw_pixels),
            "random weights": self.random_features,
        }
        results = {}
        for name, apply in features.items():
            console.print(f"Probing {name} …")
            results[name] = self.measure(apply(), sets, linear=c.probe.linear)
        return results

    def random_features(self) -> Partial:
        """The evaluated network with weights of its own initialisers, its batch-norm fitted to a few images."""
        recipe = self.run.recipe
        source, _ = recipe.method.averaged.get(self.role, (self.role, None))  # an average begins as a copy
        images, _ = arrays(sample(self.run.train, CALIBRATION_IMAGES))

        @functools.partial(jax.jit, compiler_options=once())
        def calibrated(images: Images) -> dict[str, Any]:
            return batch_calibrated(recipe.specs[source], recipe.initial(source), images, recipe.image_size)

        return Partial(self.apply, calibrated(images))


def remedies(run: Run) -> list[str]:
    """What to try against collapse, of what the run has."""
    method, config = run.recipe.method, run.config
    shuffles = any(view.shuffled for view in method.views.values())
    tips = {
        "a lower optim.lr": True,
        "less optim.weight_decay": config.optim.weight_decay > 0,
        "more optim.warmup_epochs": True,
        "a longer method.queue": method.queue > 0,
        "bn_groups above 1, which hides a batch's statistics from its keys": shuffles and config.bn_groups == 1,
        "method.key_temperature further below method.temperature": hasattr(method, "key_temperature"),
        "method.centre_momentum further below 1": hasattr(method, "centre_momentum"),
        "a lower method.teacher_temperature": hasattr(method, "teacher_temperature"),
        "launch/evaluate.py on the teacher, whose features may be no better": bool(method.frozen),
    }
    return [tip for tip, fits in tips.items() if fits]


def headline(found: Mapping[str, float]) -> str:
    """What a progress bar says of a probe: the first kNN accuracy, without labels the neighbours that are shared."""
    accuracies = [value for name, value in found.items() if name.startswith("knn")]
    if accuracies:
        return f"kNN {100 * accuracies[0]:.1f} %"
    return f"shared neighbours {100 * found['nn_consistency']:.1f} %" if "nn_consistency" in found else ""


def sample(source: Source, count: int) -> Source:
    """A fixed random choice of `count` images, because sets may be sorted by class; all, if there are fewer."""
    if count >= len(source):
        return source
    return source.take(np.sort(np.random.default_rng(0).choice(len(source), count, replace=False)))


def labelled(source: Source, count: int = sys.maxsize) -> Labelled:
    """`count` of the images with their labels; decoded once where the host's memory takes that."""
    source = sample(source, count)
    if source.nbytes <= PROBE_BYTES:
        images, labels = arrays(source)
        return Labelled(images, labels, source.num_classes or 0)
    return Labelled(source, source.labels(), source.num_classes or 0)


def probe_network(
    found: TrainedNetwork, config: ConfigDict, *, source: str = "", train: str = "", test: str = ""
) -> dict[str, Any]:
    """The final probes on a network of a checkpoint or a file.

    Args:
      config: of its run, or a default one, which has the data and splits that are not given.

    Raises:
      UserError: if the data is not there.
    """
    train_set, test_set = open_splits(config, source, train, test)
    apply, c = Partial(pooled_features(found.spec, found.image_size), found.variables), config.probe
    sets = labelled(train_set, c.train_images), labelled(test_set)
    row = evaluate(apply, *sets, ks=c.knn, linear=True, batch_size=c.batch_size, mesh=make_mesh())
    return {row_name(found): row}


def probe_layers(
    found: TrainedNetwork,
    config: ConfigDict,
    *,
    source: str = "",
    train: str = "",
    test: str = "",
    epochs: float = EPOCHS,
) -> dict[str, dict[str, float]]:
    """The layer-wise linear probe, on all training images, of a network and data chosen as for `probe_network`.

    Raises:
      UserError: as `probe_network` and `layer_probe`.
    """
    sets = open_splits(config, source, train, test)
    row = layer_probe(found, *sets, image_size=found.image_size, epochs=epochs, mesh=make_mesh(), progress=True)
    return {row_name(found): row}


def row_name(network: TrainedNetwork) -> str:
    """What a table calls it, whose title says where it is from."""
    return network.description if isinstance(network, RunNetwork) else network.spec.name


def open_splits(config: ConfigDict, source: str, train: str, test: str) -> tuple[Source, Source]:
    """Training and test images; what is '' is the config's."""
    spec = source or config.data.source
    splits = train or config.data.train, test or config.data.test
    train_set, test_set = (open_source(spec, split, short_side(config), config.data.max_bad) for split in splits)
    return train_set, test_set
