"""What a run sees of a reader: chosen rows, each image whole on one canvas."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssl_kd.data.sources import Source, arrays, open_source
from ssl_kd.errors import UserError


def encode(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def decoded(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Images of one size, uint8 (N, H, W, 3), and their labels."""
    images, labels = arrays(source)
    np.testing.assert_array_equal(images.size, np.broadcast_to(source.canvas, (len(source), 2)))
    return images.pixels, labels


def noise(n: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def write_parquet(path, images: list[bytes]):
    cells = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    column = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": column}), path)


def test_items_are_the_rows_that_were_chosen():
    whole, source = open_source("embedded", "train"), open_source("embedded", "train[100:150]")
    assert len(source) == 50
    np.testing.assert_array_equal(source.image(7), whole.image(107))
    assert source.label(7) == source.labels()[7] == whole.label(107) == 7
    np.testing.assert_array_equal(np.bincount(decoded(source)[1]), [5] * 10)
    with pytest.raises(IndexError):
        source.image(50)
    some = source.take(np.array([7, 7, 0]))
    np.testing.assert_array_equal(decoded(some)[0], [whole.image(k) for k in (107, 107, 100)])


@pytest.mark.parametrize("canvas", [0, -1])
def test_a_canvas_without_pixels(canvas):
    with pytest.raises(UserError, match=rf"data.canvas={canvas} must be 0 \(8/7 of the largest view\) or a side"):
        open_source("embedded", "train", canvas)


def test_empty_set(tmp_path):
    write_parquet(tmp_path / "train.parquet", [])
    with pytest.raises(UserError, match="empty"):
        open_source(f"hf:{tmp_path}", "train")


def pictures(tmp_path, *sizes: tuple[int, int]) -> tuple[str, list[np.ndarray]]:
    """A data source of noise of these sizes, and its images."""
    images = [noise(1, *size, seed=k)[0] for k, size in enumerate(sizes)]
    write_parquet(tmp_path / "train.parquet", [encode(image) for image in images])
    return f"hf:{tmp_path}", images


@pytest.mark.parametrize("canvas", [12, 20, 224])
def test_images_of_one_size_have_no_canvas_but_their_own(tmp_path, canvas):
    spec, images = pictures(tmp_path, *[(12, 15)] * 70)
    source = open_source(spec, "train", canvas)
    assert source.canvas == (12, 15) and source.nbytes == 70 * 12 * 15 * 3
    np.testing.assert_array_equal(decoded(source)[0], images)


def test_images_of_one_larger_size_are_reduced_to_one_smaller(tmp_path):
    spec, images = pictures(tmp_path, *[(24, 30)] * 3)
    source = open_source(spec, "train", canvas=12)
    assert source.canvas == (12, 15)
    for found, image in zip(decoded(source)[0], images, strict=True):
        halved = Image.fromarray(image).resize((15, 12), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found, halved)


def test_images_of_several_sizes_lie_whole_in_the_corner_of_a_square(tmp_path):
    """What fits 12 = 3/2 of 8 stays; else shorter sides reduced to 8, longer ones to 12; nothing enlarged or cut."""
    sizes = {(9, 12): (9, 12), (12, 9): (12, 9), (5, 4): (5, 4), (18, 20): (8, 9), (60, 20): (12, 4), (1, 1): (1, 1)}
    spec, images = pictures(tmp_path, *sizes)
    source = open_source(spec, "train", canvas=8)
    assert source.canvas == (12, 12)
    found, _ = arrays(source)
    np.testing.assert_array_equal(found.size, list(sizes.values()))
    for k, (image, (height, width)) in enumerate(zip(images, sizes.values(), strict=True)):
        expected = np.zeros((12, 12, 3), np.uint8)
        reduced = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        expected[:height, :width] = image if image.shape[:2] == (height, width) else reduced
        np.testing.assert_array_equal(found.pixels[k], expected)


def test_an_image_that_was_not_looked_at_fits_all_the_same(tmp_path):
    """64 of 200 decide on a canvas that lies; among the others one stands, one is larger and one smaller."""
    sizes = [(12, 15)] * 200
    standing, larger, smaller, *_ = sorted(set(range(200)) - set(np.linspace(0, 199, 64).astype(int).tolist()))
    sizes[standing], sizes[larger], sizes[smaller] = (15, 12), (40, 40), (3, 4)
    spec, _ = pictures(tmp_path, *sizes)
    source = open_source(spec, "train", canvas=20)
    assert source.canvas == (12, 15)
    images, _ = arrays(source)
    found = {k: tuple(images.size[k]) for k in (standing, larger, smaller)}
    assert found == {standing: (12, 10), larger: (12, 12), smaller: (3, 4)}
