"""One image and one key make one view, inside the compiled step.

Every operation is torchvision's, written so that a batch of images is a few batched matrix products and elementwise
passes: a crop with its resize and its flip is `rows @ image @ columns.T`, and so is a Gaussian blur. A view depends on
its image and its key alone, but for the *order* of the colour jitter, which a batch shares (a switch that is vmapped
would run every branch). Inside, an image is three planes (3, h, w): a last axis of 3 wastes the lanes of a TPU.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from ssl_kd.errors import UserError
from ssl_kd.images import Images, resample_weights


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What may happen to an image, in this order: crop and flip, jitter, grayscale, blur, solarize.

    Probabilities lie in [0, 1]; an operation whose probability or strength is 0 is not compiled at all.
    Raises UserError for a value outside its range.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the crop box over area of the image, uniform; within (0, 1]
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop box, log-uniform; above 0
    flip: float = 0.5  # probability of a left-right mirror
    jitter: float = 0.0  # probability of the four jitter operations together
    brightness: float = 0.0  # strength b >= 0: factor uniform in [max(0, 1 - b), 1 + b]
    contrast: float = 0.0  # strength, as brightness
    saturation: float = 0.0  # strength, as brightness
    hue: float = 0.0  # strength h in [0, 0.5]: shift uniform in [-h, h], in turns of the colour circle
    grayscale: float = 0.0  # probability of losing all colour
    blur: float = 0.0  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # standard deviation, uniform, in pixels of the view; above 0
    solarize: float = 0.0  # probability of inverting the values at or above 0.5

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a probability within [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite strength of at least 0")
        self._require("hue", 0 <= self.hue <= 0.5, "a strength within [0, 0.5] turns")
        self._require("crop_scale", 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "low <= high within (0, 1]")
        for name in ("crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            self._require(name, 0 < low <= high < math.inf, "low <= high, both finite and above 0")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"augmentation key '{name}' is {getattr(self, name)}: give it {rule}.")


# MoCo-v2 (Chen et al. 2020, arXiv 2003.04297, and the authors' code).
_MOCO_V2 = Augmentation(
    jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5, blur_sigma=(0.1, 2.0)
)
# DINO (Caron et al. 2021, arXiv 2104.14294, and the authors' code); a method gives each crop its scale.
_DINO = dataclasses.replace(_MOCO_V2, saturation=0.2)
PRESETS: dict[str, Augmentation] = {
    "mocov2": _MOCO_V2,
    "dino_global1": dataclasses.replace(_DINO, blur=1.0),
    "dino_global2": dataclasses.replace(_DINO, blur=0.1, solarize=0.2),
    "dino_local": _DINO,
    "weak": Augmentation(),  # ReSSL's teacher view: crop and flip
    "small": dataclasses.replace(_MOCO_V2, blur=0.0),  # colour images of at most 64 pixels have no detail to blur away
    "grey": Augmentation(jitter=0.8, brightness=0.4, contrast=0.4),  # small grey images: nothing that acts on colour
}

# Each group of draws has its own number, so that adding an operation leaves the draws of the others as they were.
# Append only: another numbering changes the views of every recorded run.
_CROP, _FLIP, _JITTER, _GRAYSCALE, _BLUR, _SOLARIZE = range(6)

_CROP_TRIES = 10  # torchvision's


def augment(images: Images, keys: Array, order_key: Array, spec: Augmentation, size: int) -> Array:
    """One view per image.

    Args:
      images: B of them; a view sees its own image alone, as if its canvas ended with it.
      keys: (B,) typed PRNG keys; row i alone decides the view of image i, whatever stands beside it.
      order_key: one typed PRNG key for the order of the jitter operations, shared by the batch (torchvision draws an
        order per image).
      spec: what may happen; static under jit.
      size: height and width of a view, in pixels; static under jit.

    Returns:
      float32 RGB (B, size, size, 3) in [0, 1], un-normalised.

    Raises:
      TypeError: images are not uint8 (floats in [0, 1] would come out black).
    """
    if images.pixels.dtype != jnp.uint8:
        raise TypeError(f"augment takes uint8 images, not {images.pixels.dtype}")
    return jax.vmap(functools.partial(_view, order_key=order_key, spec=spec, size=size))(images, keys)


def _view(image: Images, key: Array, order_key: Array, spec: Augmentation, size: int) -> Array:
    """One image -> (size, size, 3) float32."""
    height, width = image.size.astype(jnp.float32)
    canvas_height, canvas_width = image.canvas
    crop_draws = _uniform(key, _CROP, 2 * _CROP_TRIES + 2)
    top, left, box_height, box_width = crop_box(crop_draws, height, width, spec)
    rows = resample_weights(top, box_height, height, canvas_height, size)
    columns = resample_weights(left, box_width, width, canvas_width, size)
    if spec.flip:
        columns = jnp.where(_happens(key, _FLIP, spec.flip), columns[::-1], columns)
    # The values stay 0..255 until after the products: they are exact even where a product rounds to bfloat16.
    planes = _both_ways(rows, jnp.moveaxis(image.pixels, -1, 0).astype(jnp.float32), columns) / 255

    if spec.jitter:
        planes = _jitter(planes, _uniform(key, _JITTER, 5), order_key, spec)
    if spec.grayscale:
        planes = jnp.where(_happens(key, _GRAYSCALE, spec.grayscale), grayscale(planes), planes)
    if spec.blur:
        chance, u = _uniform(key, _BLUR, 2)
        low, high = spec.blur_sigma
        blurring = blur_matrix(low + (high - low) * u, high, size)
        blurring = jnp.where(chance < spec.blur, blurring, jnp.eye(size))
        planes = _both_ways(blurring, planes, blurring)
    if spec.solarize:
        planes = jnp.where(_happens(key, _SOLARIZE, spec.solarize), solarize(planes), planes)
    return jnp.moveaxis(jnp.clip(planes, 0, 1), 0, -1)  # a row of weights may sum to 1 + 1e-7


def _uniform(key: Array, group: int, count: int) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, group), (count,))


def _happens(key: Array, group: int, probability: float) -> Array:
    return _uniform(key, group, 1)[0] < probability


def _both_ways(rows: Array, planes: Array, columns: Array) -> Array:
    """rows (s, h), planes (3, h, w), columns (t, w) -> (3, s, t)."""
    return jnp.einsum("csw,tw->cst", jnp.einsum("sh,chw->csw", rows, planes), columns)


def crop_box(
    draws: Array, height: Array | float, width: Array | float, spec: Augmentation
) -> tuple[Array, Array, Array, Array]:
    """torchvision's RandomResizedCrop.get_params: a random box of whole pixels inside an image of (height, width).

    The first of ten candidates that fits; when none does, the largest centred box whose ratio is allowed.

    Args:
      draws: float32 (22,) uniform in [0, 1): ten areas, ten ratios, then top and left.
      height, width: of the image, in pixels.
      spec: its crop_scale and crop_ratio are used.

    Returns:
      top, left, box height, box width: float32 scalars that hold whole numbers of pixels.
    """
    area_draws, ratio_draws, place_draws = jnp.split(draws, (_CROP_TRIES, 2 * _CROP_TRIES))
    (low_scale, high_scale), (low_ratio, high_ratio) = spec.crop_scale, spec.crop_ratio
    area = height * width * (low_scale + (high_scale - low_scale) * area_draws)
    ratio = jnp.exp(math.log(low_ratio) + math.log(high_ratio / low_ratio) * ratio_draws)
    heights, widths = jnp.round(jnp.sqrt(area / ratio)), jnp.round(jnp.sqrt(area * ratio))

    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits & (jnp.cumsum(fits) == 1)
    any_fits = jnp.any(fits)
    central_height = jnp.minimum(height, jnp.round(width / low_ratio))
    central_width = jnp.minimum(width, jnp.round(height * high_ratio))
    box_height = jnp.where(any_fits, jnp.sum(jnp.where(first, heights, 0)), central_height)
    box_width = jnp.where(any_fits, jnp.sum(jnp.where(first, widths, 0)), central_width)
    top = jnp.floor(jnp.where(any_fits, place_draws[0] * (height - box_height + 1), (height - central_height) / 2))
    left = jnp.floor(jnp.where(any_fits, place_draws[1] * (width - box_width + 1), (width - central_width) / 2))
    return top, left, box_height, box_width


def blur_matrix(sigma: Array | float, sigma_max: float, size: int) -> Array:
    """A Gaussian blur along one axis; a two-dimensional blur applies it to rows and to columns.

    The kernel is exp(-d²/2σ²) at whole distances d up to the radius min(⌈3 sigma_max⌉, size - 1), normalised; borders
    reflect without repeating the edge pixel (torchvision's gaussian_blur, whose radius is an argument instead).

    Args:
      sigma: standard deviation, pixels; above 0.
      sigma_max: the largest sigma of the batch, which fixes the radius.
      size: pixels along the axis.

    Returns:
      float32 (size, size), rows that sum to 1.
    """
    radius = min(math.ceil(3 * sigma_max), size - 1)

    def kernel(distance: Array) -> Array:
        return jnp.where(distance <= radius, jnp.exp(-0.5 * jnp.square(distance / sigma)), 0)

    last = size - 1
    out, source = jnp.meshgrid(jnp.arange(size, dtype=jnp.float32), jnp.arange(size, dtype=jnp.float32), indexing="ij")
    weights = (
        kernel(jnp.abs(out - source))
        + jnp.where(source > 0, kernel(out + source), 0)  # pixel -j is pixel j
        + jnp.where(source < last, kernel(2 * last - out - source), 0)  # pixel last + j is pixel last - j
    )
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _jitter(planes: Array, draws: Array, order_key: Array, spec: Augmentation) -> Array:
    """torchvision's ColorJitter, applied with probability spec.jitter; its four operations in a random order."""
    chance, *amounts = draws
    choices = (
        (brightness, spec.brightness, 1.0),
        (contrast, spec.contrast, 1.0),
        (saturation, spec.saturation, 1.0),
        (hue, spec.hue, 0.0),
    )
    operations = []
    for (operation, strength, neutral), u in zip(choices, amounts, strict=True):
        if strength:
            low, high = neutral - min(strength, 1.0), neutral + strength
            amount = jnp.where(chance < spec.jitter, low + (high - low) * u, neutral)
            operations.append(lambda planes, operation=operation, amount=amount: operation(planes, amount))
    # The order comes from order_key alone, so vmap leaves the index un-batched and each switch runs one branch.
    for choice in jax.random.permutation(order_key, len(operations)):
        planes = jax.lax.switch(choice, operations, planes)
    return planes


def _blend(planes: Array, other: Array | float, factor: Array | float) -> Array:
    return jnp.clip(factor * planes + (1 - factor) * other, 0, 1)


def _luma(planes: Array) -> Array:
    red, green, blue = planes
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def brightness(planes: Array, factor: Array | float) -> Array:
    """(3, h, w) in [0, 1], factor >= 0 -> the same, blended with black (torchvision's adjust_brightness)."""
    return _blend(planes, 0.0, factor)


def contrast(planes: Array, factor: Array | float) -> Array:
    """(3, h, w) in [0, 1], factor >= 0 -> the same, blended with its mean gray (torchvision's adjust_contrast)."""
    return _blend(planes, jnp.mean(_luma(planes)), factor)


def saturation(planes: Array, factor: Array | float) -> Array:
    """(3, h, w) in [0, 1], factor >= 0 -> the same, blended with its gray (torchvision's adjust_saturation)."""
    return _blend(planes, grayscale(planes), factor)


def hue(planes: Array, shift: Array | float) -> Array:
    """(3, h, w) in [0, 1], shift in turns -> the same, its HSV hue turned (torchvision's adjust_hue).

    The way back from HSV is the branch-free form f(n) = V - C·clip(min(k, 4 - k), 0, 1), k = (n + 6H) mod 6.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    divisor = jnp.where(chroma == 0, 1, chroma)
    sixths = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )

    def channel(n: int) -> Array:
        turn = (n + sixths) / 6 + shift
        k = 6 * (turn - jnp.floor(turn))  # several times faster on a CPU than a float remainder
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)])


def grayscale(planes: Array) -> Array:
    """(3, h, w) -> (3, h, w): its gray three times, weights .2989, .587, .114 (torchvision's rgb_to_grayscale)."""
    return jnp.broadcast_to(_luma(planes), planes.shape)


def solarize(planes: Array) -> Array:
    """(3, h, w) in [0, 1] -> the same with the values at or above 0.5 inverted (torchvision's solarize)."""
    return jnp.where(planes >= 0.5, 1 - planes, planes)


def cutmix(a: Array, b: Array, lam: Array | float, centre: Array) -> tuple[Array, Array]:
    """Pastes one box of images b into images a, the same for all rows (CutMix, Yun et al. 2019; arXiv 1905.04899).

    The box has the image's ratio and sides ⌊side · √(1 − lam)⌋, reaches half of that, rounded down, to either side of
    its centre, and is clipped to the image. In float32 a side next to a whole number may come out one pixel off the
    float64 one; the share that is returned is counted from the box, whatever it became.

    Args:
      a, b: (B, H, W, C) of one shape; a receives.
      lam: scalar in [0, 1], the share of a that is asked for.
      centre: (2,) integers, row and column in [0, H) and [0, W).

    Returns:
      The mixed images, and the share of their area that is left of a: a scalar of lam's dtype, at least float32.
    """
    height, width = a.shape[1:3]
    lam = jnp.asarray(lam)

    def inside(side: int, middle: Array) -> Array:
        half = jnp.floor(side * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
        place = jnp.arange(side)
        return (place >= middle - half) & (place < middle + half)

    rows, columns = inside(height, centre[0]), inside(width, centre[1])
    mixed = jnp.where((rows[:, None] & columns)[..., None], b, a)
    return mixed, 1 - jnp.sum(rows) * jnp.sum(columns) / (height * width)
