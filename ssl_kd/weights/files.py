"""A network out of a file that somebody trained, and into one that others can read."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from ssl_kd.checkpoint import array_digest
from ssl_kd.errors import UserError
from ssl_kd.models import MODELS, NetworkSpec, init_network
from ssl_kd.weights.layouts import (
    LAYOUTS,
    MOST_PREFIXES,
    PREFIXES,
    TIMM_MODELS,
    from_torch,
    ignored,
    our_names,
    renamed,
    to_torch,
)
from ssl_kd.weights.torchfile import read_weights

FROM_FILE, FROM_HUB = "file:", "hf:"

IMAGE_SIZE = 224
"""Side of the images of a network whose file does not say, pixels."""

METADATA = "ssl_kd"
"""Key of a safetensors header under which `write_network` puts what it knows of a network, as JSON."""

_LISTED = 8  # names in an error before the rest is counted


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A network read from a file.

    Attributes:
      spec: its architecture and preprocessing.
      variables: {'params', 'batch_stats'}, float32 numpy arrays.
      image_size: side of the images it was trained on, pixels.
      layout: key of LAYOUTS whose names the file uses.
      prefix: what it puts before them.
      about: what is known of its origin: 'source', 'sha256', 'licence', …
      aside: names in the file that found no use, but for torch's count of batches in every batch norm.
    """

    spec: NetworkSpec
    variables: dict[str, Any]
    image_size: int
    layout: str
    prefix: str
    about: dict[str, Any]
    aside: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Fit:
    """A file held against one architecture, layout and prefix: which weight goes where, and what does not match."""

    spec: NetworkSpec
    image_size: int
    layout: str
    prefix: str
    places: dict[str, tuple[str, ...]]  # name in the file → path in the variables
    missing: list[str]
    misshapen: list[str]
    unexpected: list[str]

    @property
    def whole(self) -> bool:
        return not self.differences

    @property
    def differences(self) -> list[str]:
        return [*self.missing, *self.misshapen, *self.unexpected]


def split_source(source: str) -> tuple[str, str]:
    """'file:PATH#KEY' → 'file:PATH' and 'KEY', which chooses one of several state dicts; '' without."""
    where, _, key = source.partition("#")
    return where, key


def locate(source: str) -> Path:
    """The file of 'file:PATH' or 'hf:OWNER/REPOSITORY[@REVISION]/FILE', downloaded unless it is in the hub's cache.

    Raises:
      UserError: where there is no such file, or no way to it.
    """
    if source.startswith(FROM_FILE):
        path = Path(source.removeprefix(FROM_FILE)).expanduser()
        if not path.is_file():
            raise UserError(f"there is no file {path}: check {source!r}.")
        return path
    parts = source.removeprefix(FROM_HUB).split("/", 2)  # owner, repository[@revision], file
    if len(parts) < 3 or not all(parts):
        example = "hf:timm/resnet50.a1_in1k/model.safetensors"
        raise UserError(f"{source!r} names no file of the hub: write hf:OWNER/REPOSITORY/FILE, as {example}.")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise UserError(f"{source!r} needs huggingface_hub: pip install 'huggingface_hub>=1'.") from error
    repository, _, revision = "/".join(parts[:2]).partition("@")
    try:
        path = Path(hf_hub_download(repository, parts[2], revision=revision or None))
        with contextlib.suppress(EntryNotFoundError):  # what it says of the model and its images lies beside it
            hf_hub_download(repository, str(Path(parts[2]).with_name("config.json")), revision=revision or None)
        return path
    except Exception as error:  # its own errors, those of its HTTP library, and the system's
        raise UserError(
            f"cannot get {source!r} ({_reason(error)}): check the name and the connection, or download the file and "
            "use file:PATH."
        ) from error


def read_network(path: Path, model: str = "", *, key: str = "", classifier: bool = False) -> WeightFile:
    """Reads a network from a file in any known layout, which is detected. Nothing keeps its random values.

    Args:
      path: of a safetensors or torch file.
      model: key of MODELS preferred where several fit.
      key: of several state dicts in a torch file, the wanted one's.
      classifier: keep the classifier, if the file has one.

    Raises:
      UserError: for a file that cannot be read, or fits no model whole.
    """
    tensors, others, metadata = read_weights(path, key)
    about: dict[str, Any] = {"source": path.name, "sha256": sha256(path)}
    if METADATA in metadata:
        spec, image_size, layout, recorded = _recorded(path, metadata[METADATA])
        fit, about = _hold(tensors, spec, image_size, layout, ""), about | recorded
    else:
        config = _hub_config(path)
        fit = _detect(path, tensors, model, config.get("model", ""))
        about |= {key: config[key] for key in ("license", "interpolation", "crop_pct") if key in config}
    if not fit.whole:
        raise UserError(f"{path} does not fit {fit.spec.name!r}, which is nearest: {_report(fit)}.")
    if infinite := [name for name in fit.places if not np.isfinite(tensors[name]).all()]:
        raise UserError(f"{path} has weights that are not finite: {_listed(infinite)}; use an earlier checkpoint.")
    spec = fit.spec
    if METADATA not in metadata:
        spec = dataclasses.replace(spec, **{key: config[key] for key in ("mean", "std") if key in config})
    if spec.classes and not classifier:
        spec = dataclasses.replace(spec, classes=0)
    expected = flatten_dict(_shapes(spec, fit.image_size))
    places = {place: name for name, place in fit.places.items() if place in expected}
    arrays = {place: _placed(tensors[name], place, expected[place].shape) for place, name in places.items()}
    if spec.backbone().transformer:
        _fold_class_position(arrays, expected)
    unused = sorted(name for name in tensors.keys() - places.values() if not name.endswith("num_batches_tracked"))
    return WeightFile(
        spec=spec,
        variables={"params": {}, "batch_stats": {}} | unflatten_dict(arrays),
        image_size=fit.image_size,
        layout=fit.layout,
        prefix=fit.prefix,
        about=about,
        aside=(*unused, *others),
    )


def write_network(
    path: Path, spec: NetworkSpec, variables: Any, image_size: int, about: Mapping[str, Any], layout: str = "ssl_kd"
) -> None:
    """Writes a network as safetensors under the names of a layout, whole or not at all.

    Its metadata say what the network is, so that `read_network` needs not guess, where it is from, and the digest of
    its weights. Layouts but ssl_kd's leave its heads out.

    Raises:
      UserError: where the file cannot be written.
    """
    if layout != "ssl_kd":
        spec = dataclasses.replace(spec, head="none", head_hidden=0, dim=0, thead=0)
    names, places, tensors = LAYOUTS[layout], our_names(_shapes(spec, image_size)), {}
    arrays = {place: np.asarray(array) for place, array in flatten_dict(variables).items() if place in places.values()}
    for name, their in renamed(places, names).items():
        array = np.ascontiguousarray(to_torch(places[name], arrays[places[name]]))
        tensors[their] = array[:, :, 0, 0] if name == names.linear else array
    about = {**about, "digest": array_digest({"params": {}, "batch_stats": {}} | unflatten_dict(arrays))}
    record = {"spec": _plain(spec), "image_size": image_size, "layout": layout, "about": about}
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(tensors, {METADATA: json.dumps(record), "format": "pt"}))
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another file or free space.") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _shapes(spec: NetworkSpec, image_size: int) -> Any:
    return jax.eval_shape(lambda: init_network(spec, jax.random.key(0), image_size))


def _detect(path: Path, tensors: Mapping[str, np.ndarray], preferred: str, known: str) -> _Fit:
    """The whole fit that uses most of the file; where there is none, the nearest. `known`, if any, is the model."""
    fits: list[_Fit] = []
    for models in ((known,),) if known else ((preferred,), MODELS) if preferred else (MODELS,):
        fits = [fit for model in models for fit in _fits(tensors, model)]
        whole = [fit for fit in fits if fit.whole]
        best = [fit for fit in whole if len(fit.places) == max(len(fit.places) for fit in whole)]
        if len(names := dict.fromkeys(fit.spec.name for fit in best)) > 1:
            raise UserError(
                f"{path} fits several models: say whether it is {' or '.join(names)}, by teacher.name or student.name "
                "in a recipe, else by --model."
            )
        if best:
            return best[0]
    if not fits:
        raise UserError(
            f"{path} holds none of the networks known here; its names are {_listed(list(tensors))}: add a table of "
            "names to ssl_kd/weights/layouts.py."
        )
    return min(fits, key=lambda fit: len(fit.differences))


def _fits(tensors: Mapping[str, np.ndarray], model: str) -> Iterator[_Fit]:
    """A file held against a model in every layout and after every prefix that gives it most of the model's names."""
    bare = NetworkSpec(model, head="none")
    names = our_names(_shapes(bare, IMAGE_SIZE))
    for prefix in dict.fromkeys(prefix for name in tensors for prefix in _prefixes(name)):
        for key, layout in LAYOUTS.items():
            possible = layout.detected and (not layout.prefixes or prefix.endswith(layout.prefixes))
            if possible and re.search(layout.models, model):
                found = sum(prefix + name in tensors for name in renamed(names, layout).values())
                if found > len(names) / 2:
                    spec = dataclasses.replace(bare, mean=layout.mean, std=layout.std)
                    yield _hold(tensors, _with_head(tensors, spec, key, prefix), None, key, prefix)


def _prefixes(name: str) -> Iterator[str]:
    prefix = ""
    for _ in range(MOST_PREFIXES + 1):
        yield prefix
        prefix += next((following for following in PREFIXES if name.startswith(following, len(prefix))), "")


def _with_head(tensors: Mapping[str, np.ndarray], spec: NetworkSpec, layout: str, prefix: str) -> NetworkSpec:
    """With the projection head that the layout names and the file has, its widths read off the weights."""
    if not (kind := LAYOUTS[layout].head):
        return spec
    smallest = dataclasses.replace(spec, head=kind, head_hidden=1, dim=1)
    names = [name for name in our_names(_shapes(smallest, IMAGE_SIZE)) if name.startswith("projection.")]
    theirs = renamed(names, LAYOUTS[layout])
    stored = {name: tensors.get(prefix + theirs[name], np.zeros(0)) for name in names}
    matrices = [array for name, array in stored.items() if array.ndim == 2 and not name.endswith(".g")]
    if not all(array.size for array in stored.values()) or not matrices:
        return spec
    hidden = len(matrices[0]) if len(matrices) > 1 else 0
    return dataclasses.replace(spec, head=kind, head_hidden=hidden, dim=len(matrices[-1]))


def _hold(
    tensors: Mapping[str, np.ndarray], spec: NetworkSpec, image_size: int | None, layout: str, prefix: str
) -> _Fit:
    """Holds a file against an architecture, with the classifier that the file has; without a size, with its grid."""
    none = dataclasses.replace(spec, classes=0)
    one = our_names(_shapes(dataclasses.replace(spec, classes=1), image_size or IMAGE_SIZE))
    theirs = {name: prefix + their for name, their in renamed(one, LAYOUTS[layout]).items()}
    network = our_names(_shapes(none, image_size or IMAGE_SIZE)).keys()
    claimed = {theirs[name] for name in network}
    last = [theirs[name] for name in one if name not in network and theirs[name] not in claimed]
    classes = {tensors[name].shape[0] for name in last if name in tensors and tensors[name].ndim}
    spec = dataclasses.replace(none, classes=max(classes, default=0))
    if image_size is None:
        image_size = _image_size(spec, tensors.get(theirs.get("pos_embed", ""), np.zeros(0)))
    expected = _shapes(spec, image_size)
    shapes, places, missing, misshapen = flatten_dict(expected), {}, [], []
    for name, place in our_names(expected).items():
        their, shape = theirs[name], shapes[place].shape
        if their not in tensors:
            missing.append(their)
        elif not _fills(tensors[their], place, shape, class_position=getattr(spec.backbone(), "registers", 0) > 0):
            stored = f"{tensors[their].dtype}{list(tensors[their].shape)}"
            misshapen.append(f"{their} ({stored}, not {list(_torch_shape(place, shape))})")
        else:
            places[their] = place
    unexpected = [
        name for name in tensors if name not in claimed | set(theirs.values()) and not ignored(name, tensors[name])
    ]
    return _Fit(spec, image_size, layout, prefix, places, missing, misshapen, unexpected)


def _image_size(spec: NetworkSpec, positions: np.ndarray) -> int:
    """Side of the images whose square grid of patches has these position embeddings; IMAGE_SIZE without any."""
    grid = math.isqrt(positions.shape[1]) if positions.ndim == 3 else 0
    return spec.backbone().min_size * grid or IMAGE_SIZE


def _torch_shape(place: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return to_torch(place, np.broadcast_to(np.float32(0), shape)).shape


def _fills(array: np.ndarray, place: tuple[str, ...], shape: tuple[int, ...], *, class_position: bool) -> bool:
    """Whether a stored array can be the weight at `place`: a linear layer may be stored for a 1×1 convolution.

    `class_position`: the class token may have a position in the file, though it has none in the model.
    """
    there, here = array.shape, _torch_shape(place, shape)
    if place[-1] == "kernel" and len(here) == 4:
        there += (1,) * (4 - len(there))
    if place[-1] == "pos_embed" and class_position and there == (1, here[1] + 1, here[2]):
        there = here
    return there == here and jnp.issubdtype(array.dtype, jnp.floating)


def _placed(array: np.ndarray, place: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    array = array.astype(np.float32)
    return from_torch(place, array.reshape(_torch_shape(place, shape)) if place[-1] == "kernel" else array)


def _fold_class_position(arrays: dict[tuple[str, ...], np.ndarray], expected: Mapping[tuple[str, ...], Any]) -> None:
    """Where a model keeps no position of the class token, but its file does, the token takes it."""
    place = ("params", "backbone", "pos_embed")
    if arrays[place].shape[1] == expected[place].shape[1] + 1:
        arrays[("params", "backbone", "cls_token")] += arrays[place][:, :1]
        arrays[place] = arrays[place][:, 1:]


def _report(fit: _Fit) -> str:
    """What does not match, in words."""
    kinds = {"missing": fit.missing, "of another shape": fit.misshapen, "without a place": fit.unexpected}
    return "; ".join(f"{kind} {_listed(names)}" for kind, names in kinds.items() if names)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(repr(name[:100])[1:-1] for name in names[:_LISTED]) + more


def _hub_config(path: Path) -> dict[str, Any]:
    """What a config.json beside the file says, as timm's models on the hub have one: 'model', 'mean', 'std', …

    Raises:
      UserError: where it names a model of timm that is not known here.
    """
    try:
        text = json.loads((path.parent / "config.json").read_text())
        architecture, pretrained = text["architecture"], text.get("pretrained_cfg", {})
        mean, std = (tuple(float(x) for x in pretrained.get(key, ())) for key in ("mean", "std"))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}
    config: dict[str, Any] = {key: value for key, value in pretrained.items() if isinstance(value, str | float)}
    config |= {"mean": mean, "std": std} if len(mean) == len(std) == 3 else {}
    models = [model for model, name in TIMM_MODELS.items() if name == architecture]
    if not models:
        raise UserError(
            f"{path.parent / 'config.json'} says that {path.name} is timm's {architecture!r}, which is not known here: "
            "`launch/teacher.py list` shows what is."
        )
    return config | {"model": models[0]}


def _plain(spec: NetworkSpec) -> dict[str, Any]:
    """What a file must say of a network, JSON-able."""
    return {key: value for key, value in dataclasses.asdict(spec).items() if key not in _OF_A_RUN}


_OF_A_RUN = ("drop_path", "bn_groups", "remat", "dtype")
"""Fields of a NetworkSpec that belong to a run, not to the weights."""


def _recorded(path: Path, text: str) -> tuple[NetworkSpec, int, str, dict[str, Any]]:
    """Spec, image size, layout and origin out of the metadata that `write_network` wrote."""
    try:
        record = json.loads(text)
        fields: dict[str, Any] = dict(record["spec"])
        fields |= {key: tuple(fields[key]) for key in ("mean", "std")}
        spec, image_size, layout = NetworkSpec(**fields), record["image_size"], record["layout"]
        _shapes(spec, image_size)
        LAYOUTS[layout]
        return spec, image_size, layout, dict(record["about"])
    except Exception as error:  # whatever a network does with fields that nobody checked
        raise UserError(
            f"the metadata of {path} describe no network of this version ({_reason(error)}): use the version "
            "that wrote it, or remove them."
        ) from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
