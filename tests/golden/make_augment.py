"""Makes augment.npz with Pillow: `python tests/golden/make_augment.py`. Recorded with Pillow 13.0.0."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# (left, top, right, bottom) of a 40 x 60 image -> (width, height)
RESIZES = (
    ((0, 0, 60, 40), (32, 32)),  # shrink, both axes by different scales
    ((13, 5, 41, 37), (28, 28)),  # one axis kept, the other shrunk
    ((3, 20, 13, 29), (24, 24)),  # grow
    ((50, 30, 60, 40), (32, 32)),  # grow, in the corner of the image
    ((0, 7, 59, 8), (7, 5)),  # a single row
    ((2.5, 3.25, 40.75, 30.5), (16, 20)),  # parts of pixels
)
ENHANCERS = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
FACTORS = (0.0, 0.6, 1.0, 1.4)


def main() -> None:
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:40, :60]
    smooth = 127 + 90 * np.stack([np.sin(row / 7 + column / 9), np.cos(row / 5), np.sin(column / 11 - row / 13)], -1)
    image = np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    picture = Image.fromarray(image)
    arrays = {
        "image": image,
        "factors": np.array(FACTORS),
        "grayscale": np.asarray(ImageOps.grayscale(picture)),
        "solarize": np.asarray(ImageOps.solarize(picture, threshold=128)),
        "resize_boxes": np.array([box for box, _ in RESIZES], np.float64),
    }
    for name, enhancer in ENHANCERS.items():
        arrays[name] = np.stack([np.asarray(enhancer(picture).enhance(factor)) for factor in FACTORS])
    red = Image.fromarray(image[..., 0].astype(np.float32) / 255)  # mode F: Pillow does not round
    for number, (box, out) in enumerate(RESIZES):
        arrays[f"resize_{number}"] = np.asarray(red.resize(out, Image.Resampling.BILINEAR, box=box))
    np.savez_compressed(Path(__file__).with_name("augment.npz"), **arrays)


if __name__ == "__main__":
    main()
