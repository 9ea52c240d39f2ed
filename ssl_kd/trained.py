"""Trained networks out of a work directory: frozen teachers, probes, and `ssl_kd.load` for everybody else."""

import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from ssl_kd.checkpoint import Checkpoints, array_digest, read_json
from ssl_kd.errors import UserError
from ssl_kd.models import NetworkSpec
from ssl_kd.models.embed import pooled_features
from ssl_kd.recipe import make_recipe
from ssl_kd.state import abstract, create_state

FROM_WORKDIR = "workdir:"


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """One evaluated network of a run.

    Attributes:
      config: the run's config.
      role: its name in the run, as 'student'.
      spec: its architecture.
      variables: {'params', 'batch_stats'}.
      step: of the checkpoint.
      digest: SHA-256 of the variables.
    """

    config: ConfigDict
    role: str
    spec: NetworkSpec
    variables: dict[str, Any]
    step: int
    digest: str


def load_network(workdir: str | Path, role: str = "", step: int | None = None) -> TrainedNetwork:
    """Reads a network from the newest or a given checkpoint of a run.

    Args:
      workdir: of the run.
      role: network to read; '' = the method's default evaluated network.

    Raises:
      UserError: if there is no such run, network or checkpoint.
    """
    workdir = Path(workdir)
    record = read_json(workdir / "run.json")
    if record is None:
        raise UserError(f"{workdir} holds no run (no run.json): train one there first, or check the path.")
    try:
        config = ConfigDict(record["config"], convert_dict=True)
        recipe = make_recipe(config, record["images"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{workdir / 'run.json'} is not of this version of ssl_kd ({error}): use the version its 'git' names."
        ) from error
    known = (*recipe.method.trained, *recipe.method.averaged)
    role = role or recipe.method.evaluated[0]
    if role not in known:
        raise UserError(f"the run in {workdir} has no network {role!r}: choose one of {', '.join(known)}.")
    with closing(Checkpoints(workdir)) as checkpoints:
        here = SingleDeviceSharding(jax.local_devices()[0])
        state = checkpoints.restore(abstract(lambda: create_state(recipe), here), step)
    variables = {
        "params": {**state.trained, **state.averaged}[role],
        "batch_stats": state.batch_stats[role],
    }
    return TrainedNetwork(config, role, recipe.specs[role], variables, int(state.step), array_digest(variables))


def load(workdir: str | Path, network: str = "", step: int | None = None) -> tuple[Callable[..., jax.Array], Any]:
    """Embeds images with a trained network: `apply, params = ssl_kd.load(workdir)`, then `apply(params, images)`.

    `apply` is a pure function of uint8 images (B, H, W, 3) to their pooled features (B, D) float32; jit it as you
    like. It crops or resizes to the size the network was trained at and normalises by itself.

    Args:
      workdir: of a run.
      network: 'student' (default), or another network of the run, as 'student_momentum' or 'teacher'.
      step: checkpoint; default the newest.

    Raises:
      UserError: if there is no such run, network or checkpoint, or it is damaged.
    """
    found = load_network(workdir, network, step)
    spec = dataclasses.replace(found.spec, dtype=jnp.float32)
    return pooled_features(spec, found.config.image_size), found.variables
