"""Which network the tensors of a file are: held against every model, layout and prefix that could fit."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ssl_kd.errors import UserError
from ssl_kd.models import HEADS, MODELS, NetworkSpec, init_network
from ssl_kd.weights.layouts import (
    BACKBONE_WEIGHTS,
    LAYOUTS,
    MOST_OTHER_WEIGHTS,
    MOST_PREFIXES,
    PREFIXES,
    ignored,
    our_names,
    renamed,
    to_torch,
)

IMAGE_SIZE = 224
"""Side of the images of a network whose file does not say, pixels."""

Place = tuple[str, ...]
"""Path of a weight in {'params', 'batch_stats'}."""

_LISTED = 8  # names in an error before the rest is counted
_MANY_CLASSES = 7919  # as no other size in a network, so that it tells its classifier


@dataclasses.dataclass(frozen=True)
class Fit:
    """A file held against one architecture, layout and prefix: which weight goes where, and what does not match."""

    spec: NetworkSpec
    image_size: int
    layout: str
    prefix: str
    places: dict[str, Place]  # by name in the file
    missing: list[str]
    misshapen: list[str]
    unexpected: list[str]

    @property
    def whole(self) -> bool:
        return not self.differences

    @property
    def differences(self) -> list[str]:
        return [*self.missing, *self.misshapen, *self.unexpected]

    @property
    def report(self) -> str:
        """What does not match, and what to do if it is only too much."""
        kinds = {"missing": self.missing, "of another shape": self.misshapen, "without a place": self.unexpected}
        text = "; ".join(f"{kind} {listed(names)}" for kind, names in kinds.items() if names)
        return text if self.missing or self.misshapen else f"{text}; a file of the rest alone can be read"


def listed(names: Sequence[str]) -> str:
    """The first of them, in a line."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(repr(name[:100])[1:-1] for name in names[:_LISTED]) + more


def detect(path: Path, tensors: Mapping[str, np.ndarray], preferred: str, known: str) -> Fit:
    """The whole fit that uses most of the file; where there is none, the nearest. `known`, if any, is the model.

    Raises:
      UserError: where several models fit as well, or none is near.
    """
    fits: list[Fit] = []
    for models in ((known,),) if known else ((preferred,), MODELS) if preferred else (MODELS,):
        fits = _nearest_fits(tensors, models)
        whole = [fit for fit in fits if fit.whole]
        best = [fit for fit in whole if len(fit.places) == max(len(fit.places) for fit in whole)]
        if len(names := {fit.spec.name for fit in best}) > 1:
            raise UserError(
                f"{path} fits several models: say whether it is {' or '.join(sorted(names))}, by teacher.name or "
                "student.name in a recipe, else by --model."
            )
        if best:
            return best[0]
    if not fits:
        raise UserError(
            f"{path} holds none of the networks known here; its names are {listed(list(tensors))}: add a table of "
            "names to ssl_kd/weights/layouts.py."
        )
    return min(fits, key=lambda fit: len(fit.differences))


def _nearest_fits(tensors: Mapping[str, np.ndarray], models: Iterable[str]) -> list[Fit]:
    """The fits of all models, in their order, but for models that must differ in more weights than another does.

    To trace them all for their shapes takes 12 s; most of them are ruled out by how many weights they have.
    """
    ranks = [array.ndim for name, array in tensors.items() if not ignored(name, array)]
    count, kernels = len(ranks), ranks.count(4)

    def least(model: str) -> float:
        """Differences that there must be; infinitely many where there can be no fit."""
        whole, convolutions = BACKBONE_WEIGHTS.get(model, (count, kernels))
        fewer = max(whole - count, convolutions - 1 - kernels)  # a layout may have one of them as a linear layer
        more = max(count - whole - MOST_OTHER_WEIGHTS, kernels - convolutions)
        return max(0, fewer, more) if whole < 2 * count else math.inf  # a fit has more than half of the names

    fits: dict[str, list[Fit]] = {}
    fewest: float = math.inf
    for model in sorted(models, key=least):
        if least(model) > fewest or least(model) == math.inf:
            break
        fits[model] = list(_fits(tensors, model))
        fewest = min([fewest, *(len(fit.differences) for fit in fits[model])])
    return [fit for model in models for fit in fits.get(model, ())]


def _fits(tensors: Mapping[str, np.ndarray], model: str) -> Iterator[Fit]:
    """A file held against a model in every layout and after every prefix that gives it most of the model's names."""
    bare = NetworkSpec(model, head="none")
    names = our_names(shapes(bare, IMAGE_SIZE))
    for prefix in dict.fromkeys(prefix for name in tensors for prefix in _prefixes(name)):
        for key, layout in LAYOUTS.items():
            possible = layout.detected and (not layout.prefixes or prefix.endswith(layout.prefixes))
            if possible and re.search(layout.models, model):
                found = sum(prefix + name in tensors for name in renamed(names, layout).values())
                if found > len(names) / 2:
                    entry = {key: getattr(layout, key) for key in ("mean", "std", "interpolation")}
                    spec = _with_head(tensors, dataclasses.replace(bare, **entry), key, prefix)
                    yield hold(tensors, spec, None, key, prefix)


def _prefixes(name: str) -> Iterator[str]:
    prefix = ""
    for _ in range(MOST_PREFIXES + 1):
        yield prefix
        prefix += next((following for following in PREFIXES if name.startswith(following, len(prefix))), "")


def _with_head(tensors: Mapping[str, np.ndarray], spec: NetworkSpec, layout: str, prefix: str) -> NetworkSpec:
    """With the projection head that the layout names and the file has, its widths read off the weights."""
    if not (kind := LAYOUTS[layout].head):
        return spec
    names = our_names(_head_shapes(dataclasses.replace(spec, head=kind, head_hidden=1, dim=1)))
    theirs = renamed(names, LAYOUTS[layout])
    stored = {name: tensors.get(prefix + theirs[name], np.zeros(0)) for name in names}
    matrices = [array for name, array in stored.items() if array.ndim == 2 and not name.endswith(".g")]
    if not all(array.size for array in stored.values()) or not matrices:
        return spec
    hidden = len(matrices[0]) if len(matrices) > 1 else 0
    return dataclasses.replace(spec, head=kind, head_hidden=hidden, dim=len(matrices[-1]))


def hold(tensors: Mapping[str, np.ndarray], spec: NetworkSpec, image_size: int | None, layout: str, prefix: str) -> Fit:
    """Holds a file against an architecture, with the classifier that the file has; without a size, with its grid."""
    none = dataclasses.replace(spec, classes=0)
    one = our_names(shapes(dataclasses.replace(spec, classes=1), image_size or IMAGE_SIZE))
    theirs = {name: prefix + their for name, their in renamed(one, LAYOUTS[layout]).items()}
    network = our_names(shapes(none, image_size or IMAGE_SIZE)).keys()
    claimed = {theirs[name] for name in network}
    last = [theirs[name] for name in one if name not in network and theirs[name] not in claimed]
    classes = {tensors[name].shape[0] for name in last if name in tensors and tensors[name].ndim}
    spec = dataclasses.replace(none, classes=max(classes, default=0))
    if image_size is None:
        image_size = _image_size(spec, tensors.get(theirs.get("pos_embed", ""), np.zeros(0)))
    expected = shapes(spec, image_size)
    registers = getattr(spec.backbone(), "registers", 0) > 0
    places, missing, misshapen = {}, [], []
    for name, place in our_names(expected).items():
        their, shape = theirs[name], expected[place]
        if their not in tensors:
            missing.append(their)
        elif not _fills(tensors[their], place, shape, linear=name == LAYOUTS[layout].linear, class_position=registers):
            stored = f"{tensors[their].dtype}{list(tensors[their].shape)}"
            misshapen.append(f"{their} ({stored}, not {list(torch_shape(place, shape))})")
        else:
            places[their] = place
    unexpected = [
        name for name in tensors if name not in claimed | set(theirs.values()) and not ignored(name, tensors[name])
    ]
    return Fit(spec, image_size, layout, prefix, places, missing, misshapen, unexpected)


def _image_size(spec: NetworkSpec, positions: np.ndarray) -> int:
    """Side of the images whose square grid of patches has these position embeddings; IMAGE_SIZE without any."""
    grid = math.isqrt(positions.shape[1]) if positions.ndim == 3 else 0
    return spec.backbone().min_size * grid or IMAGE_SIZE


def _fills(array: np.ndarray, place: Place, shape: tuple[int, ...], *, linear: bool, class_position: bool) -> bool:
    """Whether a stored array can be the weight at `place`.

    Args:
      linear: a linear layer may be stored for the 1×1 convolution.
      class_position: the class token may have a position in the file, though it has none in the model.
    """
    there, here = array.shape, torch_shape(place, shape)
    if linear:
        there += (1,) * (4 - len(there))
    if place[-1] == "pos_embed" and class_position and there == (1, here[1] + 1, here[2]):
        there = here
    return there == here and jnp.issubdtype(array.dtype, jnp.floating)


def torch_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which torch stores what has a shape here."""
    return to_torch(place, np.broadcast_to(np.float32(0), shape)).shape


def shapes(spec: NetworkSpec, image_size: int) -> dict[Place, tuple[int, ...]]:
    """The shape of every weight of a network. A backbone, which takes up to a second to trace, is traced once."""
    if spec.thead:
        return _traced(spec, image_size)
    backbone = _traced(NetworkSpec(spec.name, spec.width, spec.stem, head="none", classes=_MANY_CLASSES), image_size)
    found = {}
    for place, shape in backbone.items():
        if shape[-1:] != (_MANY_CLASSES,):
            found[place] = shape
        elif spec.classes:
            found[place] = (*shape[:-1], spec.classes)
    return found | _head_shapes(spec)


@functools.cache
def _traced(spec: NetworkSpec, image_size: int) -> dict[Place, tuple[int, ...]]:
    variables = jax.eval_shape(lambda: init_network(spec, jax.random.key(0), image_size))
    return {place: leaf.shape for place, leaf in flatten_dict(variables).items()}


@functools.cache
def _head_shapes(spec: NetworkSpec) -> dict[Place, tuple[int, ...]]:
    if spec.head == "none":
        return {}
    features = jax.ShapeDtypeStruct((1, spec.feature_dim), jnp.float32)
    init = functools.partial(HEADS[spec.head](spec).init, norm="batch")
    variables = jax.eval_shape(init, jax.random.key(0), features)
    return {(place[0], "head", *place[1:]): leaf.shape for place, leaf in flatten_dict(variables).items()}
