"""Images and their files, for the tests beside this one."""

import io

import numpy as np
from PIL import Image


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def noise(n: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def smooth(h: int, w: int, seed: int = 0) -> np.ndarray:
    """What JPEG keeps."""
    return np.asarray(Image.fromarray(noise(1, 5, 5, seed)[0]).resize((w, h), Image.Resampling.BICUBIC))
