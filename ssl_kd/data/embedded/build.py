"""Rebuild the embedded data set: train.png and test.png, a class-balanced subset of Fashion-MNIST.

The idx files come from Debian (about 31 MB, MIT licence):

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb unpacked
    python ssl_kd/data/embedded/build.py unpacked/usr/share/datasets/fashion-mnist

Each file is one grey PNG: 28x28 tiles, ten to a row, tile (r, c) an image of class c. So the labels need no file, any
prefix of 10 k images is exactly balanced, and the set can be looked at. PNG is smaller than a compressed .npz here, and
reading it runs no code. The same input, Pillow and zlib give the same bytes; any others give the same pixels.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PER_CLASS = {"train": ("train", 1000), "test": ("t10k", 400)}  # both from Fashion-MNIST's own split of that name
SEED = 2017


def read_idx(path: Path) -> np.ndarray:
    """One gzipped idx file of unsigned bytes as an array; its fourth byte is the rank, then big-endian sizes."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(np.frombuffer(raw, ">i4", rank, offset=4))


def mosaic(images: np.ndarray, labels: np.ndarray, per_class: int) -> np.ndarray:
    """(N, 28, 28), (N,) -> (28 per_class, 280): `per_class` random images of each class, one class a column."""
    rng = np.random.RandomState(SEED)  # the legacy generator: its permutation is frozen across numpy releases
    columns = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)]
    tiles = images[np.stack(columns, axis=1)]
    return tiles.transpose(0, 2, 1, 3).reshape(per_class * 28, 280)


def main(idx_dir: Path, out_dir: Path) -> None:
    for split, (stem, per_class) in PER_CLASS.items():
        images = read_idx(idx_dir / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(idx_dir / f"{stem}-labels-idx1-ubyte.gz")
        Image.fromarray(mosaic(images, labels, per_class)).save(out_dir / f"{split}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent)
