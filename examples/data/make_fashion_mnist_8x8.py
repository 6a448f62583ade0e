"""Make the packaged 8x8 version of Fashion-MNIST from the four published files.

The source is a folder with the gzip-compressed IDX files, as Debian's ``dataset-fashion-mnist`` installs them::

    python examples/data/make_fashion_mnist_8x8.py /usr/share/datasets/fashion-mnist

Each new pixel is the mean over the 3.5 x 3.5 old pixels under it, where an old pixel that is cut counts by its area.
The sums are whole numbers, so the result is the same on every machine. The zip entries carry a fixed date: a
second run with the same zlib gives the same bytes.
"""

import argparse
import gzip
import hashlib
import io
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

SIDE, SMALL_SIDE = 28, 8
OUTPUT = Path(__file__).resolve().parents[2] / "gmn_optim" / "tasks" / "data" / "fashion_mnist_8x8.npz"
SOURCES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}


def read_idx(path: Path) -> np.ndarray:
    """Return the array of unsigned bytes in a gzip-compressed IDX file.

    Raises:
        ValueError: the file is no gzip file, no IDX file of unsigned bytes, or is cut off.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:3] != b"\x00\x00\x08":
            raise ValueError("its first bytes are not those of an IDX file of unsigned bytes")
        shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (gzip.BadGzipFile, EOFError, ValueError, IndexError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def overlaps(small: int, large: int) -> np.ndarray:
    """Return how much each of ``small`` equal parts of a line overlaps each of ``large`` ones (small, large).

    Lengths are in units of ``1 / (small * large)`` of the line, which makes them whole: each row sums to ``large``.
    """
    start = np.maximum(np.arange(small)[:, None] * large, np.arange(large) * small)
    stop = np.minimum(np.arange(1, small + 1)[:, None] * large, np.arange(1, large + 1) * small)
    return np.maximum(stop - start, 0)


def shrink(images: np.ndarray) -> np.ndarray:
    """Return images (n, 28, 28) as area averages, rounded to the nearest level (n, 64) uint8.

    Raises:
        ValueError: the images are not 28 x 28.
    """
    if images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"expected images of shape (n, {SIDE}, {SIDE}), found {images.shape}")
    # Whole numbers below 2**24 are exact in float32, which multiplies faster than integers do.
    weights = overlaps(SMALL_SIDE, SIDE).astype(np.float32)
    sums = weights @ images.astype(np.float32) @ weights.T
    return np.rint(sums / SIDE**2).astype(np.uint8).reshape(len(images), SMALL_SIDE**2)


def read_source(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the packaged file, by name.

    Raises:
        ValueError: a file is missing or cannot be used.
    """
    missing = [name for name in SOURCES.values() if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; Debian's dataset-fashion-mnist holds them")
    arrays = {key: read_idx(folder / name) for key, name in SOURCES.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{folder} has {part} images {images.shape} but labels {labels.shape}")
        arrays[f"{part}_images"] = shrink(images)
    return arrays


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed npz whose bytes depend on the arrays and on zlib alone.

    Arrays go in column-major order (all images' first pixel, then all their second), which is 1.6 % smaller than
    image after image; ``numpy.load`` gives the usual shapes either way.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asfortranarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Make the packaged 8x8 version of Fashion-MNIST.")
    parser.add_argument("source", type=Path, help="folder with the four gzip IDX files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="npz file to write (default: the packaged one)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Read, shrink and write; say what was written."""
    options = parse_arguments(arguments)
    try:
        write_npz(options.output, read_source(options.source))
    except (OSError, ValueError) as error:
        sys.exit(f"make_fashion_mnist_8x8: {error}")
    content = options.output.read_bytes()
    print(f"{options.output.name}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
