"""Trained networks out of work directories and files: teachers, first weights, probes, and `ssl_kd.load`."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from ssl_kd.checkpoint import Checkpoints, array_digest
from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.models import NetworkSpec
from ssl_kd.models.embed import pooled_features
from ssl_kd.models.vit import interpolate_positions
from ssl_kd.recipe import make_recipe
from ssl_kd.state import abstract, create_state
from ssl_kd.weights.files import FROM_FILE, FROM_HUB, read_source
from ssl_kd.weights.layouts import LAYOUTS
from ssl_kd.workdir import read_json, work_directory

FROM_WORKDIR = "workdir:"

BACKBONE, HEAD = ("name", "width", "stem"), ("head", "head_hidden", "dim", "thead")
ENTRY = ("mean", "std", "resize", "interpolation", "crop_fraction")
"""Keys of a network that come with its weights."""


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A network with its weights.

    Attributes:
      spec: its architecture and preprocessing.
      variables: {'params', 'batch_stats'}.
      digest: SHA-256 of all weights that its checkpoint or file has for it, of a file's classifier too.
      image_size: side of the images it was trained on, pixels.
      description: what it is, for people: 'student at step 300', or 'resnet50, named as by MoCo-v2'.
      origin: what a file says of where it is from: 'sha256', 'licence', …
    """

    spec: NetworkSpec
    variables: dict[str, Any]
    digest: str
    image_size: int
    description: str
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)


@dataclasses.dataclass(frozen=True)
class RunNetwork(TrainedNetwork):
    """One evaluated network of a run: its config, its name there, as 'student', and the step of the checkpoint."""

    config: ConfigDict
    role: str
    step: int


def load_source(
    source: str, model: str = "", role: str = "", step: int | None = None, *, classifier: bool = False
) -> TrainedNetwork:
    """The network of 'workdir:PATH', 'file:PATH[#KEY]' or 'hf:OWNER/REPOSITORY/FILE[#KEY]'.

    Args:
      model: of a file, the key of MODELS preferred where it fits several.
      role, step: of a run, as for `load_network`.
      classifier: keep that of a file, if it has one.

    Raises:
      UserError: if there is no such network, or it cannot be read whole.
    """
    if source.startswith(FROM_WORKDIR):
        return load_network(source.removeprefix(FROM_WORKDIR), role, step)
    if role or step is not None:
        raise UserError(f"{source!r} is a file, which holds one network: choose no network and no step in it.")
    found = read_source(source, model, classifier=classifier)
    description = f"{found.spec.name}, named as by {LAYOUTS[found.layout].about}"
    return TrainedNetwork(found.spec, found.variables, found.digest, found.image_size, description, origin=found.about)


def at_image_size(network: TrainedNetwork, image_size: int) -> TrainedNetwork:
    """With a ViT's position embeddings interpolated to the grid of another image size, by the rule of its family.

    Raises:
      UserError: for images smaller than a patch.
    """
    backbone, params = network.spec.backbone(), network.variables["params"]
    if not backbone.transformer:
        return network
    before, grid = int(not backbone.registers), image_size // backbone.min_size
    positions = params["backbone"]["pos_embed"]
    if grid < 1:
        raise UserError(
            f"images of {image_size} px are smaller than a patch of {network.spec.name!r}, {backbone.min_size} px: "
            "raise image_size or the network's resize."
        )
    if positions.shape[1] == before + grid**2:
        return network
    patches = interpolate_positions(positions[:, before:], (grid, grid), antialias=bool(backbone.registers))
    positions = jnp.concatenate([positions[:, :before], patches], axis=1)
    params = {**params, "backbone": {**params["backbone"], "pos_embed": positions}}
    variables = {**network.variables, "params": params}
    return dataclasses.replace(network, variables=variables, image_size=image_size)


def load_network(workdir: str | Path, role: str = "", step: int | None = None) -> RunNetwork:
    """Reads a network from the newest or a given checkpoint of a run.

    Args:
      workdir: of the run.
      role: network to read; '' = the method's default evaluated network.

    Raises:
      UserError: if there is no such run, network or checkpoint.
    """
    workdir = work_directory(workdir)
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
    return RunNetwork(
        spec=recipe.specs[role],
        variables=variables,
        digest=array_digest(variables),
        image_size=recipe.image_size,
        description=f"{role} at step {int(state.step)}",
        config=config,
        role=role,
        step=int(state.step),
    )


def load(source: str | Path, network: str = "", step: int | None = None) -> tuple[Callable[..., jax.Array], Any]:
    """Embeds images with a trained network: `apply, params = ssl_kd.load(source)`, then `apply(params, images)`.

    `apply` is a pure function of uint8 images (B, H, W, 3) to their pooled features (B, D) float32; jit it as you
    like. It crops or resizes to the size the network was trained at and normalises by itself.

    Args:
      source: the work directory of a run, or 'file:PATH[#KEY]' or 'hf:OWNER/REPOSITORY/FILE[#KEY]' for weights of
        others.
      network: of a run: 'student' (default), or another of its networks, as 'student_momentum' or 'teacher'.
      step: of a run: checkpoint; default the newest.

    Raises:
      UserError: if there is no such run, file, network or checkpoint, or it is damaged.
    """
    foreign = str(source).startswith((FROM_FILE, FROM_HUB))
    found = load_source(str(source) if foreign else f"{FROM_WORKDIR}{source}", role=network, step=step)
    spec = dataclasses.replace(found.spec, dtype=jnp.float32)
    features = pooled_features(spec, found.image_size)
    return lambda params, images: features(params, Images.whole(images)), found.variables
