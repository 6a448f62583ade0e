"""Data sets that ship with the package, as tensors.

Nothing is downloaded. Pixels and labels are as in the file: a task decides how to scale them.
"""

import functools
import os
import zipfile
import zlib
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gmn_optim.errors import DataError

FASHION_MNIST_8X8 = "fashion_mnist_8x8.npz"
_FASHION_MNIST_SHAPES = {
    "train_images": (60000, 64),
    "train_labels": (60000,),
    "test_images": (10000, 64),
    "test_labels": (10000,),
}
# What numpy, zipfile and zlib raise for a file that was cut off, overwritten or is of another kind.
_DAMAGED = (OSError, ValueError, KeyError, IndexError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class ImageData(NamedTuple):
    """Labelled images in two parts; images are rows of pixels.

    Attributes:
        train_images: Grey levels from 0 to 255 (n, d) uint8.
        train_labels: Classes from 0 (n,) int64.
        test_images: Grey levels from 0 to 255 (m, d) uint8.
        test_labels: Classes from 0 (m,) int64.

    Example:
        >>> load_fashion_mnist_8x8().train_labels[:3].tolist()
        [9, 0, 0]
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_fashion_mnist_8x8(path: str | os.PathLike[str] | None = None) -> ImageData:
    """Return Fashion-MNIST at 8 x 8 pixels, made from the original by area averaging.

    A second call returns the same tensors again: clone before writing into them.

    Args:
        path: Another copy of the file; None takes the one in the package.

    Returns:
        60,000 training and 10,000 test images of 64 pixels each, in 10 classes.

    Raises:
        DataError: the file is missing, damaged, or holds arrays of another shape or type.

    Reference:
        Xiao et al. (2017), "Fashion-MNIST", arXiv 1708.07747.

    Example:
        >>> data = load_fashion_mnist_8x8()
        >>> data.train_images.shape, data.test_labels.shape
        (torch.Size([60000, 64]), torch.Size([10000]))
        >>> data.train_images[0].reshape(8, 8)[:, 3].tolist()
        [0, 1, 45, 79, 187, 201, 209, 43]
    """
    return _load(None if path is None else Path(path))


@functools.lru_cache(maxsize=2)
def _load(path: Path | None) -> ImageData:
    """Read and check the file once."""
    file = resources.files("gmn_optim.tasks.data") / FASHION_MNIST_8X8 if path is None else path
    arrays = _read_arrays(file, list(_FASHION_MNIST_SHAPES))
    _check_arrays(str(file), arrays)
    return ImageData(
        train_images=torch.from_numpy(arrays["train_images"]),
        train_labels=torch.from_numpy(arrays["train_labels"].astype(np.int64)),
        test_images=torch.from_numpy(arrays["test_images"]),
        test_labels=torch.from_numpy(arrays["test_labels"].astype(np.int64)),
    )


def _read_arrays(file: "Path | resources.abc.Traversable", keys: list[str]) -> dict[str, np.ndarray]:
    """Return the named arrays of an npz file, each image's pixels side by side in memory.

    Raises:
        DataError: the file is missing or damaged, or lacks one of them.
    """
    try:
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            return {key: np.ascontiguousarray(archive[key]) for key in keys}
    except FileNotFoundError as error:
        raise DataError(f"the data file {file} is missing; reinstall the package or give the path of a copy") from error
    except _DAMAGED as error:
        raise DataError(f"the data file {file} is damaged or of another kind ({error}); get it anew") from error


def _check_arrays(file: str, arrays: dict[str, np.ndarray]) -> None:
    """Raise :class:`DataError` unless all arrays have the data set's shapes, bytes as type, and ten classes."""
    for key, shape in _FASHION_MNIST_SHAPES.items():
        array = arrays[key]
        if array.shape != shape or array.dtype != np.uint8:
            found = f"{array.dtype} of shape {array.shape}"
            raise DataError(f"the data file {file} holds {key} as {found}; expected uint8 of shape {shape}")
        if key.endswith("labels") and array.max() > 9:
            raise DataError(f"the data file {file} holds {key} up to {array.max()}; expected classes 0 to 9")
