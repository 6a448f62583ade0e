"""The packaged Fashion-MNIST is the real one, made smaller by area averaging; a bad file is refused by name."""

import gzip
import hashlib
import runpy
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from gmn_optim.errors import DataError
from gmn_optim.tasks.datasets import FASHION_MNIST_8X8, ImageData, load_fashion_mnist_8x8

ROOT = Path(__file__).resolve().parents[2]
SHA256 = "683507553681d929f0c6fd99e51ebf6268c3caa2569b1e9d069cb5ce7377c776"


def packaged_file() -> Path:
    """Return the file in the checkout."""
    return Path(str(resources.files("gmn_optim.tasks.data"))) / FASHION_MNIST_8X8


@pytest.fixture(name="data")
def fixture_data() -> ImageData:
    """Return the packaged data."""
    return load_fashion_mnist_8x8()


@pytest.fixture(scope="module", name="maker")
def fixture_maker() -> dict:
    """Return the names that the script which made the file defines."""
    return runpy.run_path(str(ROOT / "examples" / "data" / "make_fashion_mnist_8x8.py"))


def test_file_is_the_known_one() -> None:
    """The file's hash, which its notice states too."""
    assert hashlib.sha256(packaged_file().read_bytes()).hexdigest() == SHA256
    assert SHA256 in (packaged_file().parent / "NOTICE.md").read_text(encoding="utf-8")


def test_shapes_and_types(data: ImageData) -> None:
    """Rows of pixels and classes, each image in one piece of memory."""
    assert data.train_images.shape == (60000, 64)
    assert data.test_images.shape == (10000, 64)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train_images.is_contiguous() and data.test_images.is_contiguous()


def test_classes_are_balanced(data: ImageData) -> None:
    """As published: 6,000 and 1,000 of each class."""
    assert torch.bincount(data.train_labels).tolist() == [6000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10


@pytest.mark.parametrize(("part", "mean"), [("train_images", 72.9404), ("test_images", 73.1466)])
def test_area_averaging_keeps_the_mean(data: ImageData, part: str, mean: float) -> None:
    """The means of the original pixels, up to rounding (which is not quite even, because of the dark border)."""
    assert getattr(data, part).double().mean().item() == pytest.approx(mean, abs=0.02)


def test_second_call_reads_nothing(data: ImageData) -> None:
    """The tensors are shared."""
    assert load_fashion_mnist_8x8(None) is data


def test_copy_can_be_named(data: ImageData) -> None:
    """A path gives the same data, as text or as a path."""
    copy = load_fashion_mnist_8x8(str(packaged_file()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(copy, data, strict=True))


def test_missing_file(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(DataError, match=r"absent\.npz is missing"):
        load_fashion_mnist_8x8(tmp_path / "absent.npz")


def cut_off(content: bytes) -> bytes:
    """Return the first half."""
    return content[: len(content) // 2]


def overwritten(content: bytes) -> bytes:
    """Return the content with a hole in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(1000) + content[middle + 1000 :]


@pytest.mark.parametrize("damage", [cut_off, overwritten, lambda content: b"", lambda content: b"<html></html>"])
def test_damaged_file(tmp_path: Path, damage) -> None:
    """Cut off, overwritten, empty, or another kind of file altogether."""
    path = tmp_path / "damaged.npz"
    path.write_bytes(damage(packaged_file().read_bytes()))
    with pytest.raises(DataError, match=r"damaged\.npz is damaged"):
        load_fashion_mnist_8x8(path)


def small_arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """Return blank arrays of the right shapes and types, except for those given."""
    shapes = {"train_images": (60000, 64), "train_labels": 60000, "test_images": (10000, 64), "test_labels": 10000}
    return {key: np.zeros(shape, np.uint8) for key, shape in shapes.items()} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((60000, 784), np.uint8)}, r"train_images as uint8 of shape \(60000, 784\)"),
        ({"test_labels": np.zeros(9999, np.uint8)}, r"test_labels as uint8 of shape \(9999,\)"),
        ({"test_images": np.zeros((10000, 64), np.float32)}, r"test_images as float32 of shape \(10000, 64\)"),
        ({"train_labels": np.full(60000, 10, np.uint8)}, "train_labels up to 10"),
    ],
)
def test_other_arrays(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    """A sound file with other contents is refused, and the message tells what was found."""
    np.savez_compressed(tmp_path / "other.npz", **small_arrays(**changes))
    with pytest.raises(DataError, match=rf"other\.npz holds {message}"):
        load_fashion_mnist_8x8(tmp_path / "other.npz")


def test_missing_array(tmp_path: Path) -> None:
    """An npz without one of the four arrays."""
    arrays = small_arrays()
    del arrays["test_labels"]
    np.savez_compressed(tmp_path / "other.npz", **arrays)
    with pytest.raises(DataError, match="test_labels"):
        load_fashion_mnist_8x8(tmp_path / "other.npz")


def test_array_instead_of_archive(tmp_path: Path) -> None:
    """A single array, with or without pickled objects."""
    for name, array in {"plain.npy": np.zeros(3), "pickled.npy": np.array([{}])}.items():
        np.save(tmp_path / name, array, allow_pickle=True)
        with pytest.raises(DataError, match=rf"{name} is damaged"):
            load_fashion_mnist_8x8(tmp_path / name)


def test_maker_averages_areas(maker: dict) -> None:
    """Against a direct way: repeat each old pixel 8 times and average blocks of 28."""
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    fine = images.repeat(8, axis=1).repeat(8, axis=2).astype(np.int64)
    expected = np.rint(fine.reshape(5, 8, 28, 8, 28).mean(axis=(2, 4))).reshape(5, 64)
    np.testing.assert_array_equal(maker["shrink"](images), expected)
    np.testing.assert_array_equal(maker["overlaps"](8, 28).sum(axis=1), 28)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array of bytes as a gzip-compressed IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_source(folder: Path, maker: dict) -> None:
    """Write four small source files."""
    for key, name in maker["SOURCES"].items():
        shape = (3, 28, 28) if key.endswith("images") else (3,)
        write_idx(folder / name, np.random.default_rng(1).integers(0, 10, shape, dtype=np.uint8))


def test_maker_repeats_itself(maker: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs give the same bytes."""
    write_source(tmp_path, maker)
    for name in ("first.npz", "second.npz"):
        maker["main"]([str(tmp_path), "--output", str(tmp_path / name)])
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    with np.load(tmp_path / "first.npz") as archive:
        assert {key: archive[key].shape for key in archive} == {
            "train_images": (3, 64), "train_labels": (3,), "test_images": (3, 64), "test_labels": (3,)
        }  # fmt: skip
    assert "sha256" in capsys.readouterr().out


def test_maker_refuses_bad_sources(maker: dict, tmp_path: Path) -> None:
    """Missing and damaged files are named."""
    with pytest.raises(SystemExit, match=r"lacks train-images-idx3-ubyte\.gz, .*dataset-fashion-mnist"):
        maker["main"]([str(tmp_path), "--output", str(tmp_path / "out.npz")])
    write_source(tmp_path, maker)
    for content in (b"no gzip", gzip.compress(b"no idx"), gzip.compress(b"\0\0\x08\x03\0\0")):
        (tmp_path / maker["SOURCES"]["test_images"]).write_bytes(content)
        with pytest.raises(SystemExit, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
            maker["main"]([str(tmp_path), "--output", str(tmp_path / "out.npz")])
    assert not (tmp_path / "out.npz").exists()
