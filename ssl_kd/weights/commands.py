"""What launch/teacher.py and launch/export.py do."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from rich.table import Table
from rich.text import Text

from ssl_kd.bench import flops_of
from ssl_kd.data.sources import arrays, open_source
from ssl_kd.errors import UserError
from ssl_kd.log import console
from ssl_kd.models import MODELS, NetworkSpec, backbone_forward, init_network
from ssl_kd.models.convolution import plain_convolutions
from ssl_kd.models.embed import pooled_features
from ssl_kd.probes.features import extract
from ssl_kd.probes.health import health
from ssl_kd.trained import load_source
from ssl_kd.weights.files import FROM_FILE, WeightFile, read_source, write_network
from ssl_kd.weights.layouts import LAYOUTS, TIMM_MODELS

VERIFIED_IMAGES, LEAST_RANK = 64, 1.5


def show_models() -> None:
    """Prints every backbone with its parameters, multiply-adds and feature width at full width, at 224 px."""
    table = Table(title="backbones, without classifier, on 224 × 224 images")
    table.add_column("name")
    for column in ("parameters", "GMAC", "features"):
        table.add_column(column, justify="right")
    table.add_column("timm's name")
    for name in MODELS:
        spec = NetworkSpec(name, head="none")
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        variables = jax.eval_shape(lambda spec=spec: init_network(spec, jax.random.key(0), 224))
        backbone = {key: tree.get("backbone", {}) for key, tree in variables.items()}
        with plain_convolutions():
            jaxpr = jax.make_jaxpr(lambda v, x, spec=spec: backbone_forward(spec, v, x, norm="running")[0])(
                backbone, images
            )
        count = sum(x.size for x in jax.tree.leaves(variables["params"]))
        cells = f"{count / 1e6:.2f} M", f"{flops_of(jaxpr) / 2e9:.2f}", f"{spec.feature_dim:,}"
        table.add_row(name, *cells, TIMM_MODELS.get(name, ""))
    console.print(table)


def inspect(source: str, model: str = "") -> None:
    """Prints what a file holds and which network it is. Raises UserError where it is none whole."""
    show(read_source(source, model, classifier=True))


def convert(source: str, out: str, model: str = "", licence: str = "") -> None:
    """Writes a file's network under our names, with its origin and a digest of its weights.

    Raises:
      UserError: where it cannot be read whole, or not be written.
    """
    if not out.endswith(".safetensors"):
        raise UserError(f"{out!r} must end in .safetensors: that is what is written.")
    found = read_source(source, model, classifier=True)
    licence = licence or str(found.about.get("license", "unknown"))
    about = found.about | {"source": source, "licence": licence}
    write_network(Path(out), found.spec, found.variables, found.image_size, about)
    show(found)
    console.print(f"Written to {out}. Use it: --config.teacher.source={FROM_FILE}{out}")


def verify(file: str) -> None:
    """Checks that a converted file holds what was converted, and that its network sees differences between images.

    Raises:
      UserError: where it does not.
    """
    found = read_source(FROM_FILE + file, classifier=True)
    if "digest" not in found.about:
        raise UserError(f"{file} was not written here, so there is no digest to compare: convert it first.")
    if found.digest != found.about["digest"]:
        raise UserError(
            f"the weights in {file} are not those that were written: make it from {found.about['source']} again."
        )
    show(found)
    images, _ = arrays(open_source("embedded", f"test[:{VERIFIED_IMAGES}]"))
    apply = Partial(pooled_features(found.spec, found.image_size), found.variables)
    rank = health(extract(apply, images, batch_size=8))["effective_rank"]
    if rank < LEAST_RANK:
        raise UserError(f"{file} gives all images one feature: its weights or its preprocessing are wrong.")
    console.print(f"Weights as written; {VERIFIED_IMAGES} images give features of effective rank {rank:.1f}.")


def export(source: str, out: Path, names: str, model: str = "", network: str = "", step: int | None = None) -> None:
    """Writes a network of a run, or of a file with its classifier, under another program's names.

    Args:
      source: as for `load_source`; model, network and step choose in it.

    Raises:
      UserError: for a network that the program does not have, or one that is not there.
    """
    found = load_source(source, model, network, step, classifier=True)
    spec = found.spec
    layout = names_for(names, spec.name)
    write_network(out, spec, found.variables, found.image_size, {**found.origin, "source": source}, layout)
    console.print(f"{spec.name} written to {out} in the naming of {LAYOUTS[layout].about}.")
    if names != "ssl_kd" and (spec.width, spec.stem) != (1.0, "imagenet"):
        console.print(
            f"Its width is {spec.width:g} and its stem {spec.stem!r}: the shapes are not those of {names}'s own model, "
            "which has width 1 and the stem for large images."
        )
    elif names == "timm":
        size = f", img_size={found.image_size}" if spec.backbone().transformer else ""
        there = f"timm.create_model({TIMM_MODELS[spec.name]!r}, num_classes={spec.classes}{size})"
        console.print(f"Load: {there}.load_state_dict(safetensors.torch.load_file({str(out)!r}))")
    console.print(f"It takes {taken(spec)}.")


def names_for(program: str, model: str) -> str:
    """The key of LAYOUTS by which timm, torchvision, detectron2 or ssl_kd calls the weights of a model.

    Raises:
      UserError: where the program does not have the model.
    """
    for key, layout in LAYOUTS.items():
        if key.startswith(program) and re.search(layout.models, model):
            return key
    raise UserError(f"{program} has no model {model!r}: choose --names=ssl_kd.")


def show(found: WeightFile) -> None:
    spec, about = found.spec, found.about
    count = sum(x.size for x in jax.tree.leaves(found.variables["params"]))
    head = f"{spec.head}, {spec.dim} out" if spec.head != "none" else "none"
    rows = {
        "model": f"{spec.name}, {count:,} parameters, {spec.feature_dim:,} features, images of {found.image_size} px",
        "names": LAYOUTS[found.layout].about + (f", after {found.prefix!r}" if found.prefix else ""),
        "projection head": head,
        "classifier": f"{spec.classes} classes" if spec.classes else "none",
        "takes": taken(spec),
        "digest": found.digest,
        "not used": f"{len(found.aside)} entries, as {', '.join(found.aside[:3])}" if found.aside else "nothing",
        **{key: str(value) for key, value in about.items() if key != "digest"},
    }
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # digests are for comparing
    for name, value in rows.items():
        table.add_row(name, Text(value))  # which may hold brackets
    console.print(table)


def taken(spec: NetworkSpec) -> str:
    """What a network takes, and how it is evaluated."""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (spec.mean, spec.std))
    return (
        f"(RGB − ({mean})) / ({std}), RGB in [0, 1], resized by {spec.interpolation} interpolation; evaluated on the "
        f"centre, {spec.crop_fraction:.4g} of the shorter side"
    )
