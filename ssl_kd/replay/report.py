"""A replayed step for people: in sentences and a table what was not finite, and a picture of the batch's views."""

import io
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from ssl_kd.log import console
from ssl_kd.replay.capture import Replayable
from ssl_kd.run import Run
from ssl_kd.step import TrainStep
from ssl_kd.workdir import write_json

SAID = 5
"""Arrays and images that are named on the console; replay.json names all."""

DRAWN = 12  # images
TILE, GAP, LINE, TEXT = 96, 4, 18, 360  # side of a view, space between, height and width of text: pixels
LETTERS = 52  # of a path, its last, that have room
NOT_FINITE = (255, 0, 255)  # colour of such a pixel


def write(run: Run, found: Replayable, report: Mapping[str, Any]) -> None:
    """replay.json and replay.png beside the capture, and nothing else into the run; by the first process alone."""
    if jax.process_index() == 0:
        write_json(found.directory / "replay.json", report)
        png = io.BytesIO()
        picture(run, report).save(png, "PNG")
        (found.directory / "replay.png").write_bytes(png.getvalue())


def tell(found: Replayable, report: Mapping[str, Any]) -> None:
    """Prints what a report holds, the most telling first."""
    metrics = report["metrics"]
    console.print(f"Step {report['step']} of {found.workdir}, again from the state in {report['source']}:")
    console.print(f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; {reproduced(report)}.")
    seen = report["witnessed"]
    if finite(seen) != finite(metrics):
        console.print(
            f"Compiled to be looked at, it has loss {seen['loss']}, gradient norm {seen['grad_norm']}: the compiler "
            "sums in another order, or drops NaN in a maximum. What follows is of that."
        )

    table = Table()
    for column in ("network", "of its", "largest absolute value", "not finite"):
        table.add_column(column, justify="left" if column in ("network", "of its") else "right")
    for role, kinds in report["networks"].items():
        for kind, reach in kinds.items():
            table.add_row(role, kind, f"{reach['largest']:.3g}", f"{reach['nonfinite']:,}")
    console.print(table)

    outputs, bad = report["outputs"], [output for output in report["outputs"] if output["nonfinite"]]
    largest = max(outputs, key=lambda output: output["largest"])
    of = f"Of {len(outputs)} outputs of modules, in order of execution,"
    if bad:
        console.print(f"{of} the first that is not finite is {bad[0]['name']}; {len(bad)} are not.")
    else:
        console.print(f"{of} all are finite; the largest is {largest['name']}, {largest['largest']:.3g}.")
    gradients = report["gradients_not_finite"]
    console.print(f"Gradients that are not finite, from the loss backwards: {several(gradients)}.")
    console.print(f"Pushed into memory and not finite: {several(report['pushed_not_finite'])}.")
    far = [(image["where"], lengths(image)) for image in report["longest"]]
    spoilt = [f"{image['where']} ({', '.join(image['views_not_finite'])})" for image in report["views_not_finite"]]
    console.print(f"Images with a view that is not finite: {several(spoilt)}.")
    if report["embeddings_not_finite"] == report["images"]:
        console.print(f"The embeddings of all {report['images']:,} images have no finite length.")
    else:
        console.print(f"Embedded furthest from zero: {several([f'{at} ({how})' for at, how in far])}.")
    if report["float32"]:
        exact = report["float32"]
        said = "precision is the cause, try compute_dtype='float32'" if finite(exact) else "precision is not the cause"
        so = "" if finite(metrics) else f": {said}"
        console.print(f"In float32: loss {exact['loss']}, gradient norm {exact['grad_norm']}{so}.")
    console.print(f"All of it: {found.directory / 'replay.json'}, the batch: {found.directory / 'replay.png'}")


def finite(metrics: Mapping[str, float | str]) -> bool:
    return not any(isinstance(metrics[name], str) for name in ("loss", "grad_norm"))


def reproduced(report: Mapping[str, Any]) -> str:
    """Whether the step is what it was, and if not, what else is not."""
    if not report["recorded"]:
        return "nothing was recorded of it to compare with"
    if not report["differing"]:
        return f"all {len(report['recorded'])} metrics are bit for bit what was recorded"
    then, now = report["recorded_session"], report["session"]
    changed = [key for key in ("devices", "versions", "git") if then and then[key] != now[key]]
    return f"not what was recorded ({several(report['differing'])} differ; changed since: {several(changed)})"


def several(names: list[str]) -> str:
    more = f" and {len(names) - SAID:,} more" if len(names) > SAID else ""
    return ", ".join(names[:SAID]) + more if names else "none"


def lengths(image: Mapping[str, Any]) -> str:
    """Of an image's embeddings, by network."""
    return ", ".join(f"{role} {x if isinstance(x, str) else f'{x:.3g}'}" for role, x in image["lengths"].items())


def picture(run: Run, report: Mapping[str, Any]) -> Image.Image:
    """A line for each image that the report names: the image itself, its views as the step made them, which it is."""
    named = {image["place"]: image for image in [*report["views_not_finite"], *report["longest"]]}
    images = list(named.values())[:DRAWN]
    tiles, pitch = tiles_of(run, report["step"] - 1, images), TILE + GAP
    sheet = Image.new("RGB", (pitch * len(tiles) + TEXT, LINE + pitch * len(images)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, (title, views) in enumerate(tiles):
        draw.text((pitch * column, 2), title, "black", font)
        for row, view in enumerate(views):
            sheet.paste(drawn(view), (pitch * column, LINE + pitch * row))
    for row, image in enumerate(images):
        spoilt = f"not finite: {', '.join(image['views_not_finite'])}" if image["views_not_finite"] else ""
        lines = (f"image {image['place']} of the batch", image["where"][-LETTERS:], lengths(image), spoilt)
        text = "\n".join(lines).encode("ascii", "replace").decode()
        draw.text((pitch * len(tiles), LINE + pitch * row), text, "black", font)
    return sheet


def tiles_of(run: Run, step: int, images: list[Mapping[str, Any]]) -> list[tuple[str, np.ndarray]]:
    """(title, float (n, S, S, 3)) of the images themselves and of each of their views in the step after `step`."""
    index = np.array([image["index"] for image in images], np.int32)
    batch: dict[str, Any] = {"index": index, "image": run.train[index]}
    if run.bag_size:
        batch["mate"] = run.train[np.array([image["mate"] for image in images], np.int32)]
    place = np.array([image["place"] for image in images], np.int32)
    make = jax.jit(lambda batch, place: TrainStep(run.recipe, run.mesh).views(jnp.int32(step), batch, place))
    tiles = [("image", batch["image"].pixels / 255)]
    made = jax.device_get(make(batch, place))
    for name in run.recipe.method.views:
        crops = made[name][:, None] if made[name].ndim == 4 else made[name]
        numbers = [""] if crops.shape[1] == 1 else [f" {number + 1}" for number in range(crops.shape[1])]
        tiles += [(f"{name}{number}", crops[:, n]) for n, number in enumerate(numbers)]
    return tiles


def drawn(view: np.ndarray) -> Image.Image:
    """A view (S, S, 3) in [0, 1] as a tile; pixels that are not finite stand out."""
    finite = np.isfinite(view).all(axis=2, keepdims=True)
    pixels = np.where(finite, np.round(255 * np.clip(np.nan_to_num(view), 0, 1)), NOT_FINITE).astype(np.uint8)
    shrink = Image.Resampling.NEAREST if max(view.shape[:2]) <= TILE else Image.Resampling.BOX
    scale = TILE / max(view.shape[:2])
    size = (max(1, round(view.shape[1] * scale)), max(1, round(view.shape[0] * scale)))
    return Image.fromarray(pixels).resize(size, shrink)
