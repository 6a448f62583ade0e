"""Reading the arrays of an npz file, with errors that name the file."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from gmn_optim.errors import DataError

# What numpy, zipfile and zlib raise for a file that was cut off, overwritten or is of another kind.
DAMAGED = (OSError, ValueError, KeyError, IndexError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)

Shape = tuple[int | None, ...]


def packaged(name: str, path: str | os.PathLike[str] | None = None) -> "Path | resources.abc.Traversable":
    """Return a data file of the package, or another copy of it if a path is given."""
    return resources.files("gmn_optim.tasks.data") / name if path is None else Path(path)


def read_arrays(file: "Path | resources.abc.Traversable", keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the named arrays of an npz file, each example's values side by side in memory.

    Raises:
        DataError: the file is missing or damaged, or lacks one of them.
    """
    try:
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            return {key: np.ascontiguousarray(archive[key]) for key in keys}
    except FileNotFoundError as error:
        raise DataError(f"the data file {file} is missing; reinstall the package or give the path of a copy") from error
    except DAMAGED as error:
        raise DataError(f"the data file {file} is damaged or of another kind ({error}); get it anew") from error


def require_bytes(file: str, key: str, array: np.ndarray, shape: Shape, largest: int = 255) -> None:
    """Raise :class:`DataError` unless an array holds bytes up to ``largest`` in this shape (None: any length)."""
    fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if not fits or array.dtype != np.uint8:
        found = f"{array.dtype} of shape {array.shape}"
        raise DataError(f"the data file {file} holds {key} as {found}; expected uint8 of shape {shape}; get it anew")
    if array.size and array.max() > largest:
        raise DataError(f"the data file {file} holds {key} up to {array.max()}; expected 0 to {largest}; get it anew")
