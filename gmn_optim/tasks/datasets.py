"""Data sets that ship with the package, as tensors.

Nothing is downloaded. Pixels, features and labels are as in the file: a task decides how to scale them.
"""

import functools
import os
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gmn_optim.errors import DataError
from gmn_optim.registry import unknown_name_message
from gmn_optim.tasks.archive import packaged, read_arrays, require_bytes

FASHION_MNIST_8X8 = "fashion_mnist_8x8.npz"
_TEXTS = ("austen", "carroll", "milton")
_PHOTOGRAPHS = ("coffee", "chelsea", "rocket", "hubble", "astronaut")
_SYMBOLS = "\n !\"'(),-.0123456789:;?abcdefghijklmnopqrstuvwxyz"


class ImageData(NamedTuple):
    """Labelled images in two parts; images are rows of pixels, channel by channel.

    Attributes:
        train_images: Levels from 0 to 255 (n, d) uint8.
        train_labels: Classes from 0 (n,) int64.
        test_images: Levels from 0 to 255 (m, d) uint8.
        test_labels: Classes from 0 (m,) int64.

    Example:
        >>> load_fashion_mnist_8x8().train_labels[:3].tolist()
        [9, 0, 0]
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class TableData(NamedTuple):
    """Labelled rows of features in two parts.

    Attributes:
        train_features: Whole numbers (n, d) uint8.
        train_labels: Classes from 0 (n,) int64.
        test_features: Whole numbers (m, d) uint8.
        test_labels: Classes from 0 (m,) int64.

    Example:
        >>> load_letters().train_features[0].tolist()
        [2, 4, 4, 3, 2, 7, 8, 2, 9, 11, 7, 7, 1, 8, 5, 6]
    """

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor


Labelled = TypeVar("Labelled", ImageData, TableData)


def subset(data: Labelled, start: int, stop: int) -> Labelled:
    """Return some of the training examples as a data set of its own, whose test part is their last eighth.

    Example:
        >>> part = subset(load_letters(), 0, 800)
        >>> part.train_features.shape, part.test_labels.shape
        (torch.Size([700, 16]), torch.Size([100]))
    """
    middle = stop - (stop - start) // 8
    return type(data)(data[0][start:middle], data[1][start:middle], data[0][middle:stop], data[1][middle:stop])


def load_fashion_mnist_8x8(path: str | os.PathLike[str] | None = None) -> ImageData:
    """Return Fashion-MNIST at 8 x 8 pixels, made from the original by area averaging.

    A second call returns the same tensors again: clone before writing into them. So do the other loaders.

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
    return _labelled(ImageData, FASHION_MNIST_8X8, path, (60000, 10000, 64), 9)


def load_fashion_mnist_14x14(path: str | os.PathLike[str] | None = None) -> ImageData:
    """Return the first half of Fashion-MNIST at 14 x 14 pixels, each the mean of 2 x 2.

    Args:
        path: Another copy of the file; None takes the one in the package.

    Returns:
        The first 30,000 training and 5,000 test images of 196 pixels each, in 10 classes.

    Raises:
        DataError: the file is missing, damaged, or holds arrays of another shape or type.

    Reference:
        Xiao et al. (2017), "Fashion-MNIST", arXiv 1708.07747.

    Example:
        >>> load_fashion_mnist_14x14().train_images.shape
        torch.Size([30000, 196])
    """
    return _labelled(ImageData, "fashion_mnist_14x14.npz", path, (30000, 5000, 196), 9)


def load_letters(path: str | os.PathLike[str] | None = None) -> TableData:
    """Return the UCI letter recognition data: 16 statistics of the image of a distorted capital letter.

    Args:
        path: Another copy of the file; None takes the one in the package.

    Returns:
        16,000 training and 4,000 test rows of 16 numbers from 0 to 15, in 26 classes.

    Raises:
        DataError: the file is missing, damaged, or holds arrays of another shape or type.

    Reference:
        Slate (1991), "Letter Recognition", UCI Machine Learning Repository, doi 10.24432/C5ZP40.

    Example:
        >>> load_letters().test_features.shape
        torch.Size([4000, 16])
    """
    return _labelled(TableData, "letters.npz", path, (16000, 4000, 16), 25)


def load_text(name: str, path: str | os.PathLike[str] | None = None) -> Tensor:
    """Return a text as numbers of 49 symbols: lower-case letters, digits, punctuation, space and end of line.

    Args:
        name: ``austen`` (Emma), ``carroll`` (Alice's Adventures in Wonderland) or ``milton`` (Paradise Lost).
        path: Another copy of the file; None takes the one in the package.

    Returns:
        The beginning of the text (n,) uint8, n being 600,000, 144,325 and 300,000.

    Raises:
        DataError: no text has this name, or the file is missing, damaged, or holds something else.

    Example:
        >>> text = load_text("carroll")[:35]
        >>> "".join(text_symbols()[symbol] for symbol in text)
        "alice's adventures in wonderland by"
    """
    return _named_bytes("texts.npz", path, _TEXTS, (None,), len(_SYMBOLS) - 1)[_known("text", name, _TEXTS)]


def text_symbols() -> str:
    """Return the symbols that the numbers of :func:`load_text` stand for.

    Example:
        >>> len(text_symbols())
        49
    """
    return _SYMBOLS


def load_photograph(name: str, path: str | os.PathLike[str] | None = None) -> Tensor:
    """Return a photograph of 64 x 64 pixels in red, green and blue, free of copyright.

    Args:
        name: ``coffee``, ``chelsea`` (a cat), ``rocket``, ``hubble`` (the deep field) or ``astronaut``.
        path: Another copy of the file; None takes the one in the package.

    Returns:
        Levels from 0 to 255 (64, 64, 3) uint8.

    Raises:
        DataError: no photograph has this name, or the file is missing, damaged, or holds something else.

    Example:
        >>> load_photograph("coffee").shape
        torch.Size([64, 64, 3])
    """
    pictures = _named_bytes("photographs.npz", path, _PHOTOGRAPHS, (64, 64, 3), 255)
    return pictures[_known("photograph", name, _PHOTOGRAPHS)]


def _known(kind: str, name: str, names: tuple[str, ...]) -> str:
    """Return the name, or raise :class:`DataError` with near matches."""
    if name not in names:
        raise DataError(unknown_name_message(kind, name, list(names)))
    return name


@functools.lru_cache(maxsize=8)
def _labelled(
    kind: type[Labelled], name: str, path: str | os.PathLike[str] | None, sizes: tuple[int, int, int], last_class: int
) -> Labelled:
    """Read and check examples and labels in two parts, once."""
    file = packaged(name, path)
    arrays = read_arrays(file, kind._fields)
    for key, size in zip(kind._fields, (sizes[0], sizes[0], sizes[1], sizes[1]), strict=True):
        is_label = key.endswith("labels")
        shape = (size,) if is_label else (size, sizes[2])
        require_bytes(str(file), key, arrays[key], shape, last_class if is_label else 255)
        arrays[key] = arrays[key].astype(np.int64) if is_label else arrays[key]
    return kind(**{key: torch.from_numpy(array) for key, array in arrays.items()})


@functools.lru_cache(maxsize=8)
def _named_bytes(
    name: str, path: str | os.PathLike[str] | None, keys: tuple[str, ...], shape: tuple[int | None, ...], largest: int
) -> Mapping[str, Tensor]:
    """Read and check arrays of bytes of one shape, once."""
    file = packaged(name, path)
    arrays = read_arrays(file, keys)
    for key, array in arrays.items():
        require_bytes(str(file), key, array, shape, largest)
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
