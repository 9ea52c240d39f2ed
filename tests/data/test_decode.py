"""Every mode, orientation and size; and no bytes that crash, hang, warn or fill the memory."""

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from pictures import encode, noise, smooth
from PIL import Image, ImageFile, ImageOps

from ssl_kd.data import decode as module
from ssl_kd.data.decode import MAX_PIXELS, decode, reduced, upright_jpeg
from ssl_kd.errors import UserError

RGB = noise(1, 16, 16)[0]
GREY = RGB[..., 0]


def read(data, **bounds):
    image = decode(data, lambda: "picture 7", **bounds)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, -1)


# --- modes and formats


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "quality": 30}])
@pytest.mark.parametrize("shape", [(16, 16), (37, 23), (1, 1), (8, 200)])
def test_jpeg_has_pillows_pixels(options, shape):
    data = encode(smooth(*shape), "JPEG", **options)
    np.testing.assert_array_equal(read(data), by_pillow(data))


def palette(transparency=None):
    image = Image.fromarray(GREY).convert("P")
    if transparency is not None:
        image.info["transparency"] = transparency
    return encode(image)


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (encode(GREY, "JPEG"), by_pillow(encode(GREY, "JPEG"))),
        (encode(RGB), RGB),
        (encode(GREY), grey(GREY)),
        (encode(np.dstack([RGB, GREY])), RGB),
        (encode(np.dstack([GREY, GREY.T])), grey(GREY)),
        (encode(Image.fromarray(RGB), transparency=(1, 2, 3)), RGB),
        (palette(), grey(GREY)),
        (palette(transparency=3), grey(GREY)),
        (palette(transparency=bytes(range(256))), grey(GREY)),
        (encode(Image.fromarray(GREY > 99)), grey(255 * (GREY > 99).astype(np.uint8))),
        (encode(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257), grey(np.arange(256).reshape(16, 16))),
        (encode(GREY.astype(np.int32) * 256, "TIFF"), grey(GREY)),
        (encode(RGB, "WEBP", lossless=True), RGB),
        (encode(np.dstack([RGB, np.full_like(GREY, 255)]), "WEBP", lossless=True), RGB),
        (encode(RGB, "BMP"), RGB),
        (encode(GREY, "BMP"), grey(GREY)),
        (encode(GREY, "GIF"), grey(GREY)),
        (encode(RGB, "TIFF"), RGB),
        (encode(RGB, "TIFF", big_tiff=False, compression="tiff_lzw"), RGB),
    ],
    ids=[
        "grey jpeg",
        "rgb",
        "grey",
        "rgba",
        "grey alpha",
        "transparent colour",
        "palette",
        "palette, one transparent",
        "palette, all translucent",
        "1 bit",
        "16 bit",
        "32 bit",
        "webp",
        "webp alpha",
        "bmp",
        "grey bmp",
        "gif",
        "tiff",
        "tiff lzw",
    ],
)
def test_modes_become_rgb(data, want):
    for form in (data, memoryview(data), pa.py_buffer(data)):
        np.testing.assert_array_equal(read(form), want)


def deep_rgb_png(pixels: np.ndarray) -> bytes:
    """uint16 (h, w, 3), which Pillow cannot write."""
    h, w = pixels.shape[:2]

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_of_each_colour_are_scaled():
    np.testing.assert_array_equal(read(deep_rgb_png(RGB.astype(np.uint16) * 256 + 255)), RGB)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.fromarray(np.full((9, 7, 3), value, np.uint8)) for value in (40, 200)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(read(data), np.full((9, 7, 3), 40, np.uint8))


def test_cmyk_jpeg_has_its_colours():
    image = smooth(32, 32)
    data = encode(Image.fromarray(image).convert("CMYK"), "JPEG", quality=95)
    assert upright_jpeg(data) is None and upright_jpeg(encode(image, "JPEG")) == (32, 32) and not upright_jpeg(b"\xff")
    assert np.abs(read(data).astype(int) - image).mean() < 4


def test_ycck_jpeg_has_its_colours():
    """Such a file holds the YCbCr of the CMY inks, and says so in its Adobe segment. Pillow writes CMYK inverted."""
    image = smooth(32, 32)
    ink = Image.fromarray(image).convert("CMYK")
    luma_chroma = Image.merge("RGB", ink.split()[:3]).convert("YCbCr")
    stored = Image.merge("CMYK", [*(ImageOps.invert(plane) for plane in luma_chroma.split()), ink.split()[3]])
    data = encode(stored, "JPEG", quality=95, subsampling=0)
    at = data.index(b"Adobe")
    assert data[at + 11] == 0
    data = data[: at + 11] + b"\2" + data[at + 12 :]  # the transform: none -> YCCK
    assert np.abs(read(data).astype(int) - image).mean() < 4


# --- orientation


def exif(orientation: int, order: str = "<") -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(order + "HHII", 0x100, 4, 1, 99) + struct.pack(order + "HHIHH", 0x112, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, 2) + entries + bytes(4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_images_are_put_upright(kind, order):
    image = smooth(12, 20)
    seen = set()
    for orientation in range(1, 9):
        data = encode(image, kind, exif=exif(orientation, order), **({"lossless": True} if kind == "WEBP" else {}))
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(read(data), np.asarray(want))
        seen.add(read(data).tobytes())
        assert read(data, short=6, long=10).shape == ((6, 10, 3) if orientation < 5 else (10, 6, 3))
        assert upright_jpeg(data) == ((12, 20) if kind == "JPEG" and orientation == 1 else None)
    assert len(seen) == 8


def test_a_jpeg_that_pillow_decodes_is_put_upright_too():
    image = Image.fromarray(smooth(12, 20)).convert("CMYK")
    upright = read(encode(image, "JPEG"))
    np.testing.assert_array_equal(read(encode(image, "JPEG", exif=exif(6))), np.rot90(upright, -1))


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        exif(6)[:-20],
        exif(0),
        exif(9),
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0" + b"junk" * 9,
    ],
    ids=["empty", "no directory", "cut", "0", "9", "directory far off", "junk"],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_exif_is_passed_over(block, kind):
    image = smooth(12, 20)
    np.testing.assert_array_equal(read(encode(image, kind, exif=block)), by_pillow(encode(image, kind)))


def test_exif_after_other_segments_is_found():
    data = encode(smooth(12, 20), "JPEG", exif=exif(6), comment=b"\xff\xe1\0\x08Exif", icc_profile=bytes(70_000))
    assert read(data).shape == (20, 12, 3)


# --- reduction


def sizes():
    """Size of an image, both bounds, and the size within them."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        h, w = rng.integers(1, 90, 2).tolist()
        short, long = rng.integers(0, 60, 2).tolist()
        scale = min([1, *([short / min(h, w)] if short else []), *([long / max(h, w)] if long else [])])
        yield (h, w), short, long, (max(1, round(h * scale)), max(1, round(w * scale)))


def test_reduced_images_are_within_both_bounds():
    for size, short, long, within in sizes():
        assert reduced(smooth(*size), short, long).shape[:2] == within
        assert min(within) <= (short or 90) and max(within) <= (long or 90)
    for side in range(1, 300):
        assert min(reduced(noise(1, 300, 437)[0], side).shape[:2]) == side


def test_only_what_does_not_fit_is_reduced():
    for size, short, long, within in sizes():
        want = size if not long or max(size) <= long else within
        assert read(encode(smooth(*size)), short=short, long=long).shape[:2] == want
        assert read(smooth(*size), short=short, long=long).shape[:2] == want


def test_a_jpeg_that_fits_at_a_scale_of_its_dct_is_left_so():
    kept = 0
    for size, short, long, within in sizes():
        got = read(encode(smooth(*size), "JPEG"), short=short, long=long).shape[:2]
        scales = [tuple(-(-side * eighths // 8) for side in size) for eighths in range(1, 9)]
        enough = next(scale for scale in scales if scale[0] >= within[0] and scale[1] >= within[1])
        assert got == (enough if not long or max(enough) <= long else within)
        kept += got == enough != within
    assert kept > 10  # cases in which the new rule shows


@pytest.mark.parametrize("short", [10, 25, 37, 49])
def test_reduction_is_pillows_bilinear(short):
    image = noise(1, 50, 70)[0]
    size = (round(70 * short / 50), short)
    want = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(reduced(image, short), want)
    np.testing.assert_array_equal(read(encode(image), short=short, long=69), want)
    np.testing.assert_array_equal(read(image, short=short, long=69), want)


def test_what_fits_is_untouched():
    assert read(RGB, short=16) is RGB
    np.testing.assert_array_equal(read(encode(RGB), short=4, long=16), RGB)
    assert reduced(RGB, 16, 16) is RGB
    data = encode(smooth(40, 60), "JPEG")
    np.testing.assert_array_equal(read(data, short=40, long=60), by_pillow(data))


@pytest.mark.parametrize("short", [300, 200, 130, 64])
def test_a_jpeg_shrunk_by_its_dct_looks_like_one_shrunk_by_pillow(short):
    data = encode(smooth(375, 500), "JPEG", quality=95)
    width = round(500 * short / 375)
    want = Image.open(io.BytesIO(data)).resize((width, short), Image.Resampling.BILINEAR)
    assert np.abs(read(data, short=short, long=width).astype(int) - np.asarray(want)).mean() < 1


def test_a_jpeg_is_decoded_at_the_smallest_scale_that_is_enough(monkeypatch):
    sizes = []
    jpeg = module.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        module.simplejpeg, "decode_jpeg", lambda *a, **k: sizes.append(jpeg(*a, **k).shape) or jpeg(*a, **k)
    )
    data = encode(smooth(400, 800), "JPEG")
    for bounded, heights in ((0, [400, 400, 400, 200, 150, 50]), (2, [400, 400, 399, 200, 101, 50])):
        shorts = (0, 400, 399, 200, 101, 50)
        assert [read(data, short=short, long=bounded * short).shape[0] for short in shorts] == heights
    assert [shape[0] for shape in sizes] == 2 * [400, 400, 400, 200, 150, 50]


# --- bad and huge images


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_named(kind):
    data = encode(noise(1, 40, 40)[0], kind)
    for cut in (3, 30, len(data) // 2, len(data) - 40):
        with pytest.raises(UserError, match=r"^picture 7 is not a readable image \(.+\); restore or remove it$"):
            read(data[:cut])
        with pytest.raises(UserError, match="picture 7"):
            read(data[:cut], short=8)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"<html>", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"%!PS-Adobe-3.0 EPSF", b"RIFF"]
)
def test_what_is_no_image_is_named(data):
    with pytest.raises(UserError, match=r"^picture 7 is not a readable image \(.+\); restore or remove it$"):
        read(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_one_pixel(kind):
    image = np.full((1, 1, 3), 77, np.uint8)
    for bounds in ({}, {"short": 256}, {"short": 1, "long": 1}):
        np.testing.assert_allclose(read(encode(image, kind), **bounds), image, atol=1)


def test_a_line_of_pixels_keeps_one():
    assert read(encode(noise(1, 1, 5000)[0]), short=256, long=64).shape == (1, 64, 3)


def huge_jpeg(side: int, progressive: bool = False, components: int = 1) -> bytes:
    """Mid-grey everywhere, two bits a block: both Huffman tables know one code, '0', for zero and for end of block."""

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content

    table = bytes([1] + 15 * [0]) + b"\0"
    planes = b"".join(bytes([c, 0x11, 0]) for c in range(1, components + 1))
    bits = 1 if progressive else 2
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + bytes([1] * 64))
        + segment(0xC2 if progressive else 0xC0, struct.pack(">BHHB", 8, side, side, components) + planes)
        + segment(0xC4, b"\0" + table)
        + segment(0xC4, b"\x10" + table)
        + segment(0xDA, bytes([1, 1, 0, 0, 0 if progressive else 63, 0]))
        + bytes((-(-side // 8)) ** 2 * bits // 8)
        + b"\xff\xd9"
    )


def test_a_jpeg_of_400_million_pixels_is_read_where_few_are_wanted():
    np.testing.assert_array_equal(read(huge_jpeg(20_000), short=256, long=256), np.full((256, 256, 3), 128, np.uint8))
    with pytest.raises(UserError, match=r"^picture 7 is 20000x20000 pixels; at most 64 million are decoded; shrink"):
        read(huge_jpeg(20_000))


@pytest.mark.parametrize("data", [huge_jpeg(20_000, progressive=True), huge_jpeg(20_000, components=3)])
def test_a_jpeg_of_several_scans_is_refused_at_any_scale(data):
    """Its decoder holds every coefficient."""
    with pytest.raises(UserError, match=r"20000x20000 pixels; at most 64 million"):
        read(data, short=256)


def huge(kind: str, side: int) -> bytes:
    """A file whose header says side x side."""
    data = encode(np.zeros((2, 2), np.uint8), kind)
    if kind == "PNG":
        header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    at, size = {"GIF": (6, "<HH"), "BMP": (18, "<ii")}[kind]
    content = struct.pack(size, side, side)
    return data[:at] + content + data[at + len(content) :]


@pytest.mark.parametrize("side", [8001, 10_000, 20_000])  # Pillow itself: silent, warns, refuses
@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_bombs_are_refused_before_they_are_decoded(kind, side, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(UserError, match=rf"^picture 7 is {side}x{side} pixels; at most 64 million are decoded"):
        read(huge(kind, side), short=16)


def test_pillows_own_limit_is_left_alone():
    assert Image.MAX_IMAGE_PIXELS != MAX_PIXELS


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damaged_bytes_give_an_image_or_a_sentence(kind):
    whole, rng = (
        encode(smooth(24, 30), kind, **({"exif": exif(6)} if kind != "BMP" and kind != "GIF" else {})),
        np.random.default_rng(0),
    )
    refused = 0
    for _ in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        where = rng.integers(0, min(len(data), 400), 3)
        data[where] = rng.integers(0, 256, 3)
        try:
            read(data.tobytes(), short=20)
        except UserError as error:
            assert str(error).startswith("picture 7 is ") and "\n" not in str(error)
            refused += 1
    assert refused > 0
