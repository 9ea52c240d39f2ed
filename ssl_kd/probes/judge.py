"""Who is probed, when and on what: a run's network while it trains, at its end, and any network later."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType
from jax.tree_util import Partial

from ssl_kd.data.sources import Source, arrays, open_source
from ssl_kd.errors import UserError
from ssl_kd.probes.evaluate import Labelled, batch_calibrated, evaluate, pooled_features, raw_pixels
from ssl_kd.state import State
from ssl_kd.trained import load_network

if TYPE_CHECKING:
    from ssl_kd.train import Run

PROBE_BYTES = 2 << 30
"""Largest decoded set that probes keep in host memory."""


class Judge:
    """The probes of a run: a quick kNN while it trains, everything at the end."""

    def __init__(self, run: Run):
        self.run = run
        self.role = run.recipe.method.evaluated[0]
        spec, size = run.recipe.specs[self.role], run.config.image_size
        self.apply, self.size = pooled_features(spec, size), size
        self._sets: tuple[Labelled, Labelled] | None = None

    @property
    def sets(self) -> tuple[Labelled, Labelled]:
        if self._sets is None:
            self._sets = labelled(self.run.train), labelled(self.run.test)
        return self._sets

    def variables(self, state: State) -> dict[str, Any]:
        return {"params": {**state.trained, **state.averaged}[self.role], "batch_stats": state.batch_stats[self.role]}

    def measure(self, apply, train: Labelled, *, linear: bool) -> dict[str, float]:
        c = self.run.config.probe
        return evaluate(
            apply, train, self.sets[1], ks=c.knn, linear=linear, batch_size=c.batch_size, mesh=self.run.mesh
        )

    def quick(self, state: State) -> dict[str, float]:
        """kNN against a part of the training images, and signs of collapse."""
        bank = self.sets[0].head(self.run.config.probe.knn_bank)
        return self.measure(Partial(self.apply, self.variables(state)), bank, linear=False)

    def final(self, state: State) -> dict[str, Any]:
        """The trained network, raw pixels and the network's random weights under the same probes."""
        train, linear = self.sets[0], self.run.config.probe.linear
        spec = self.run.recipe.specs[self.role]
        results = {self.role: self.measure(Partial(self.apply, self.variables(state)), train, linear=linear)}
        if train.num_classes:
            results["raw pixels"] = self.measure(raw_pixels, train, linear=linear)
            fresh = self.variables(self.run.create_now())
            sample = np.stack([self.run.train[i]["image"] for i in range(min(512, len(self.run.train)))])
            random = batch_calibrated(spec, fresh, sample, self.size)
            results["random weights"] = self.measure(Partial(self.apply, random), train, linear=linear)
        return results


def labelled(source: Source) -> Labelled:
    """A source with its labels; decoded once where the host's memory takes that."""
    if len(source) * math.prod(source.image_shape) <= PROBE_BYTES:
        return Labelled(*arrays(source), source.num_classes or 0)
    return Labelled(source, source.labels(), source.num_classes or 0)


def probe_network(
    workdir: str, network: str = "", step: int | None = None, *, source: str = "", train: str = "", test: str = ""
) -> dict[str, Any]:
    """The final probes on any network of any checkpoint; data and splits default to the run's.

    Raises:
      UserError: if the run, network, checkpoint or data is not there, or the data has no labels.
    """
    found = load_network(workdir, network, step)
    c = found.config
    spec = source or c.data.source
    train_set = open_source(spec, train or c.data.train, c.data.canvas)
    if not train_set.num_classes:
        raise UserError(
            f"data.source={spec!r} has no labels, so there is nothing to probe: choose a labelled --source."
        )
    apply = Partial(pooled_features(found.spec, c.image_size), found.variables)
    sets = labelled(train_set), labelled(open_source(spec, test or c.data.test, c.data.canvas))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    row = evaluate(apply, *sets, ks=c.probe.knn, linear=True, batch_size=c.probe.batch_size, mesh=mesh)
    return {f"{found.role} at step {found.step}": row}
