"""An image file's bytes -> upright RGB pixels, no more of them than needed, and never so many that they hurt.

JPEG goes to libjpeg-turbo (simplejpeg), which shrinks while it decodes; everything else to Pillow. Headers are read
first, so that an image too large is refused before it is decoded. Image.open is avoided: its own check of sizes warns,
through a filter that threads share, and refuses JPEGs that are small once shrunk.
"""

import io
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ssl_kd.errors import UserError, reason

MAX_PIXELS = 64_000_000  # 4 to 8 bytes each while they are decoded

_PLUGINS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8": JpegImageFile,  # those that libjpeg-turbo alone does not make RGB: CMYK, YCCK, or merely odd
    b"\x89PNG": PngImageFile,
    b"RIFF": WebPImageFile,
    b"GIF8": GifImageFile,  # opens at the first frame
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
}
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    data: bytes | memoryview | pa.Buffer | np.ndarray, where: Callable[[], str], short: int = 0, long: int = 0
) -> np.ndarray:
    """Encoded image (or array) -> uint8 (h, w, 3) RGB, upright (EXIF), no larger than asked, never enlarged.

    Grey becomes three equal channels, transparency is dropped, 16 bits are scaled to 8, of an animation the first frame
    counts. A JPEG is decoded at the smallest scale of its DCT that is enough, at a fraction of the cost of all of it;
    if it then fits, as whatever else fits, it is left so: an exact size would cost as much again.

    Args:
      data: a JPEG, PNG, WebP, GIF, BMP or TIFF file's bytes, or uint8 (h, w, 3) RGB.
      where: names the image in errors.
      short: pixels that are enough for the shorter side (0: all).
      long: pixels of the side of a square that the image is to fit (0: any). One that does not is `reduced`.

    Raises: UserError when the bytes are no readable image, or decoding would hold more than MAX_PIXELS.
    """
    if isinstance(data, np.ndarray):
        return _fitting(data, long, _within(data.shape[:2], short, long))
    view = memoryview(data).cast("B")
    try:
        if view[:2] == b"\xff\xd8":
            try:
                return _decode_jpeg(view, short, long)
            except ValueError:
                pass  # odd but perhaps readable: Pillow forgives what libjpeg only warns about
        return _decode_by_pillow(view, short, long)
    except _TooLarge as error:
        raise UserError(f"{where()} {error}; shrink or remove it") from error
    except Exception as error:  # Pillow's plugins raise anything on corrupt bytes: OSError, SyntaxError, struct.error
        raise UserError(f"{where()} is not a readable image ({reason(error)}); restore or remove it") from error


def reduced(image: np.ndarray, short: int = 0, long: int = 0) -> np.ndarray:
    """uint8 (h, w, 3) -> the same within both bounds, keeping its ratio: its shorter side at most `short`, its longer
    side at most `long` pixels (0: unbounded). Antialiased bilinear (Pillow)."""
    return _resized(image, _within(image.shape[:2], short, long))


def upright_jpeg(data: bytes | memoryview | pa.Buffer) -> tuple[int, int] | None:
    """Height and width of a grey or YCbCr JPEG that needs no turning; None for whatever else."""
    view = memoryview(data).cast("B")
    try:
        header = _jpeg_header(view)
    except ValueError:
        return None
    if view[:2] != b"\xff\xd8" or header.components not in (1, 3) or _orientation(header.exif) in _UPRIGHT:
        return None
    return header.height, header.width


class _TooLarge(Exception):
    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"is {width}x{height} pixels; at most {MAX_PIXELS // 10**6} million are decoded")


def _decode_jpeg(view: memoryview, short: int, long: int) -> np.ndarray:
    """Raises ValueError where libjpeg-turbo has but a warning to give, or cannot make RGB."""
    header = _jpeg_header(view)
    height, width = _within((header.height, header.width), short, long)
    scaled = simplejpeg.decode_jpeg_header(view, min_height=height, min_width=width)[:2]
    if scaled[0] * scaled[1] > MAX_PIXELS or (header.buffered and header.width * header.height > MAX_PIXELS):
        raise _TooLarge(header.width, header.height)
    pixels = simplejpeg.decode_jpeg(view, colorspace="RGB", min_height=height, min_width=width)
    return _turned(_fitting(pixels, long, (height, width)), _orientation(header.exif))


def _decode_by_pillow(view: memoryview, short: int, long: int) -> np.ndarray:
    plugin = next((plugin for magic, plugin in _PLUGINS.items() if view[: len(magic)] == magic), None)
    if plugin is None:
        raise ValueError("not a JPEG, PNG, WebP, GIF, BMP or TIFF file" if len(view) else "it is empty")
    image = plugin(io.BytesIO(view))
    if image.width * image.height > MAX_PIXELS:
        raise _TooLarge(*image.size)
    image.load()
    orientation = _orientation(image.info.get("exif", b""))
    pixels = np.asarray(_rgb(image))
    return _turned(_fitting(pixels, long, _within(pixels.shape[:2], short, long)), orientation)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image.info.pop("transparency", None)  # of a palette: dropped without a warning
    return image if image.mode == "RGB" else image.convert("RGB")


def _fitting(pixels: np.ndarray, long: int, size: tuple[int, int]) -> np.ndarray:
    """The pixels as they are if they fit, else of this height and width."""
    return pixels if not long or max(pixels.shape[:2]) <= long else _resized(pixels, size)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))


def _within(size: tuple[int, ...], short: int, long: int) -> tuple[int, int]:
    """Height and width reduced to both bounds."""
    scale = min(1.0, short / min(size) if short else 1.0, long / max(size) if long else 1.0)
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in _UPRIGHT:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))


class _JpegHeader(NamedTuple):
    width: int
    height: int
    components: int
    buffered: bool  # several scans: the decoder holds all coefficients, at whatever scale
    exif: memoryview | bytes


def _jpeg_header(view: memoryview) -> _JpegHeader:
    """What the segments before the first scan say (ITU-T T.81, annex B). Raises ValueError when they are damaged."""
    at, size, components, exif = 2, (0, 0), 0, memoryview(b"")
    progressive = False
    while at + 4 <= len(view) and view[at] == 0xFF:
        marker = view[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        end = at + 2 + int.from_bytes(view[at + 2 : at + 4])
        body = view[at + 4 : end]
        if marker == 0xE1 and body[:6] == b"Exif\0\0":
            exif = body[6:]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) > 5:  # frame, not tables
            size = int.from_bytes(body[3:5]), int.from_bytes(body[1:3])
            components, progressive = body[5], marker & 3 == 2
        elif marker == 0xDA and body and all(size):
            return _JpegHeader(*size, components, progressive or body[0] < components, exif)
        at = end
    raise ValueError("its header is damaged")


def _orientation(exif: memoryview | bytes) -> int:
    """EXIF tag 0x112, 1 where there is none. By hand, for Pillow warns of whatever else is wrong in the block."""
    exif = exif[6:] if exif[:6] == b"Exif\0\0" else exif
    order = {b"II": "<", b"MM": ">"}.get(bytes(exif[:2]))
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "4xI", exif)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, value = struct.unpack_from(order + "H6xH", exif, entry)
            if tag == 0x112:
                return value
    except struct.error:  # cut short
        pass
    return 1
