"""A network out of a file that somebody trained, and into one that others can read."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from ssl_kd.checkpoint import array_digest
from ssl_kd.errors import UserError
from ssl_kd.images import INTERPOLATIONS
from ssl_kd.models import MODELS, NetworkSpec
from ssl_kd.weights.detect import Place, detect, hold, listed, shapes, torch_shape
from ssl_kd.weights.layouts import LAYOUTS, TIMM_MODELS, from_torch, our_names, renamed, to_torch
from ssl_kd.weights.torchfile import read_weights

FROM_FILE, FROM_HUB = "file:", "hf:"

METADATA = "ssl_kd"
"""Key of a safetensors header under which `write_network` puts what it knows of a network, as JSON."""


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A network read from a file.

    Attributes:
      spec: its architecture and preprocessing.
      variables: {'params', 'batch_stats'}, float32 numpy arrays.
      image_size: side of the images it was trained on, pixels.
      layout: key of LAYOUTS whose names the file uses.
      prefix: what it puts before them.
      digest: SHA-256 of all its weights, of a classifier too, whether that is kept or not.
      about: what is known of its origin: 'source', 'sha256', 'licence', …
      aside: names in the file that found no use, but for torch's count of batches in every batch norm.
    """

    spec: NetworkSpec
    variables: dict[str, Any]
    image_size: int
    layout: str
    prefix: str
    digest: str
    about: dict[str, Any]
    aside: tuple[str, ...]


def read_source(source: str, model: str = "", *, classifier: bool = False) -> WeightFile:
    """The network of 'file:PATH[#KEY]' or 'hf:OWNER/REPOSITORY/FILE[#KEY]'; KEY chooses one of several state dicts.

    Args:
      model, classifier: as for `read_network`.

    Raises:
      UserError: where it is no such source, there is no such model, or as `locate` and `read_network`.
    """
    if not source.startswith((FROM_FILE, FROM_HUB)):
        raise UserError(f"{source!r} is no source of weights: write file:PATH or hf:OWNER/REPOSITORY/FILE.")
    if model and model not in MODELS:
        raise UserError(f"there is no model {model!r}: choose one of {', '.join(MODELS)}.")
    where, _, key = source.partition("#")
    return read_network(locate(where), model, key=key, classifier=classifier)


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
        fit, about = hold(tensors, spec, image_size, layout, ""), about | recorded
    else:
        beside = _beside(path)
        fit, about = detect(path, tensors, model, beside.model), about | beside.about
        fit = dataclasses.replace(fit, spec=dataclasses.replace(fit.spec, **beside.entry))
        if beside.image_size and not fit.spec.backbone().transformer:  # a transformer's is that of its grid
            fit = dataclasses.replace(fit, image_size=beside.image_size)
    if not fit.whole:
        raise UserError(f"{path} does not fit {fit.spec.name!r}, which is nearest: {fit.report}.")
    if infinite := [name for name in fit.places if not np.isfinite(tensors[name]).all()]:
        raise UserError(f"{path} has weights that are not finite: {listed(infinite)}; use an earlier checkpoint.")
    spec, expected = fit.spec, shapes(fit.spec, fit.image_size)
    arrays = {place: _placed(tensors[name], place, expected[place]) for name, place in fit.places.items()}
    if spec.backbone().transformer:
        _fold_class_position(arrays, expected)
    digest = array_digest(_variables(arrays))
    if spec.classes and not classifier:
        spec = dataclasses.replace(spec, classes=0)
        arrays = {place: arrays[place] for place in shapes(spec, fit.image_size)}
    used = {name for name, place in fit.places.items() if place in arrays}
    unused = sorted(name for name in tensors.keys() - used if not name.endswith("num_batches_tracked"))
    return WeightFile(
        spec=spec,
        variables=_variables(arrays),
        image_size=fit.image_size,
        layout=fit.layout,
        prefix=fit.prefix,
        digest=digest,
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
    names, places, tensors = LAYOUTS[layout], our_names(shapes(spec, image_size)), {}
    arrays = {place: np.asarray(array) for place, array in flatten_dict(variables).items() if place in places.values()}
    for name, their in renamed(places, names).items():
        array = np.ascontiguousarray(to_torch(places[name], arrays[places[name]]))
        tensors[their] = array[:, :, 0, 0] if name == names.linear else array
    about = {**about, "digest": array_digest(_variables(arrays))}
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


def _variables(arrays: Mapping[Place, np.ndarray]) -> dict[str, Any]:
    return {"params": {}, "batch_stats": {}} | unflatten_dict(arrays)


def _placed(array: np.ndarray, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    array = array.astype(np.float32)
    return from_torch(place, array.reshape(torch_shape(place, shape)) if place[-1] == "kernel" else array)


def _fold_class_position(arrays: dict[Place, np.ndarray], expected: Mapping[Place, tuple[int, ...]]) -> None:
    """Where a model keeps no position of the class token, but its file does, the token takes it."""
    place = ("params", "backbone", "pos_embed")
    if arrays[place].shape[1] == expected[place][1] + 1:
        arrays[("params", "backbone", "cls_token")] += arrays[place][:, :1]
        arrays[place] = arrays[place][:, 1:]


@dataclasses.dataclass(frozen=True)
class _Beside:
    """What a config.json beside a file says of its network, as timm's models on the hub have one."""

    model: str = ""  # key of MODELS
    entry: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of its NetworkSpec
    image_size: int = 0
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def _beside(path: Path) -> _Beside:
    """Reads the config.json beside a file; one that is not timm's says nothing.

    Raises:
      UserError: where it names a model of timm that is not known here.
    """
    try:
        text = json.loads((path.parent / "config.json").read_text())
        architecture, pretrained = text["architecture"], text.get("pretrained_cfg", {})
        entry = {
            "mean": tuple(float(x) for x in pretrained.get("mean", ())),
            "std": tuple(float(x) for x in pretrained.get("std", ())),
            "interpolation": str(pretrained.get("interpolation")),
            "crop_fraction": float(pretrained.get("crop_pct", 0)),
        }
        image_size = int(pretrained.get("input_size", (3, 0, 0))[-1])
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return _Beside()
    models = [model for model, name in TIMM_MODELS.items() if name == architecture]
    if not models:
        raise UserError(
            f"{path.parent / 'config.json'} says that {path.name} is timm's {architecture!r}, which is not known here: "
            "`launch/teacher.py list` shows what is."
        )
    possible = {key: value for key, value in entry.items() if _ENTRY[key](value)}
    about = {"license": str(pretrained["license"])} if "license" in pretrained else {}
    return _Beside(models[0], possible, image_size, about)


_ENTRY: dict[str, Callable[[Any], bool]] = {
    "mean": lambda value: len(value) == 3,
    "std": lambda value: len(value) == 3 and min(value) > 0,
    "interpolation": lambda value: value in INTERPOLATIONS,
    "crop_fraction": lambda value: 0 < value <= 1,
}
"""Fields of a NetworkSpec that say what a network takes, and whether a value is possible."""


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
        if wrong := [key for key in _ENTRY.keys() & fields.keys() if not _ENTRY[key](fields[key])]:
            raise ValueError(f"{wrong[0]}={fields[wrong[0]]}")
        spec, image_size, layout = NetworkSpec(**fields), record["image_size"], record["layout"]
        shapes(spec, image_size)
        LAYOUTS[layout]
        return spec, image_size, layout, dict(record["about"])
    except Exception as error:  # whatever a network does with fields that nobody checked
        raise UserError(
            f"the metadata of {path} describe no network of this version ({_reason(error)}): use the version "
            "that wrote it, or remove them."
        ) from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
