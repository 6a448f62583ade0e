"""The other packaged files: the known ones, with the contents that their notice states; bad ones are refused."""

import hashlib
import runpy
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from gmn_optim.errors import DataError
from gmn_optim.tasks.data_folder import load_fashion_mnist
from gmn_optim.tasks.datasets import (
    load_fashion_mnist_8x8,
    load_fashion_mnist_14x14,
    load_letters,
    load_photograph,
    load_text,
    text_symbols,
)
from gmn_optim.tasks.resizing import area_average, resize_images

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(Path(str(resources.files("gmn_optim.tasks.data"))).glob("*.npz"))
LOADERS = {
    "fashion_mnist_14x14": load_fashion_mnist_14x14,
    "letters": load_letters,
    "texts": lambda path: load_text("austen", path),
    "photographs": lambda path: load_photograph("coffee", path),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_the_known_ones(path: Path) -> None:
    notice = (path.parent / "NOTICE.md").read_text(encoding="utf-8")
    assert f"# {path.name}" in notice and hashlib.sha256(path.read_bytes()).hexdigest() in notice


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 10_000_000


def test_images_are_those_of_the_smaller_file() -> None:
    small, large = load_fashion_mnist_8x8(), load_fashion_mnist_14x14()
    assert torch.equal(small.train_labels[:30_000], large.train_labels)
    assert torch.equal(small.test_labels[:5_000], large.test_labels)
    means = [images.float().mean(1) for images in (small.test_images[:5_000], large.test_images)]
    torch.testing.assert_close(*means, rtol=0, atol=1.0)


def test_images_are_the_means_of_published_ones() -> None:
    try:
        whole = load_fashion_mnist()
    except DataError as error:
        pytest.skip(str(error))
    differences = area_average(whole.test_images[:5_000].unflatten(1, (28, 28)), 14).flatten(1)
    assert torch.equal(differences, load_fashion_mnist_14x14().test_images)
    assert torch.equal(resize_images(whole, 8).test_images, load_fashion_mnist_8x8().test_images)


def test_areas_are_averaged_as_by_the_script() -> None:
    shrink = runpy.run_path(str(ROOT / "examples" / "data" / "make_fashion_mnist_8x8.py"))["shrink"]
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    np.testing.assert_array_equal(area_average(torch.from_numpy(images), 8).flatten(1).numpy(), shrink(images))


def test_letters_are_of_every_class() -> None:
    data = load_letters()
    counts = torch.bincount(torch.cat([data.train_labels, data.test_labels]))
    assert len(counts) == 26 and counts.sum() == 20_000 and counts.min() == 734 and counts.max() == 813


def test_texts_are_english() -> None:
    words = {"austen": "emma woodhouse", "carroll": "white rabbit", "milton": "man's first disobedience"}
    for name, expected in words.items():
        text = "".join(text_symbols()[symbol] for symbol in load_text(name)[:3_000])
        assert expected in text.replace("\n", " ")
    with np.load(next(path for path in FILES if path.name == "texts.npz")) as archive:
        assert archive["symbols"].tobytes().decode() == text_symbols()


def test_names_are_checked() -> None:
    with pytest.raises(DataError, match="Did you mean 'austen'"):
        load_text("austin")
    with pytest.raises(DataError, match="no photograph is named 'cat'"):
        load_photograph("cat")


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    content = next(path for path in FILES if path.stem == name).read_bytes()
    path = tmp_path / "damaged.npz"
    with pytest.raises(DataError, match=r"damaged\.npz is missing"):
        LOADERS[name](path)
    for damage in (content[: len(content) // 2], b"", b"<html></html>"):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=r"damaged\.npz is damaged"):
            LOADERS[name](path)


@pytest.mark.parametrize(
    ("name", "key", "array", "message"),
    [
        ("letters", "train_labels", np.full(16_000, 26, np.uint8), "train_labels up to 26; expected 0 to 25"),
        ("letters", "test_features", np.zeros((4_000, 17), np.uint8), r"shape \(4000, 17\)"),
        ("texts", "austen", np.full(9, 49, np.uint8), "austen up to 49; expected 0 to 48"),
        ("texts", "milton", np.zeros((3, 3), np.uint8), r"milton as uint8 of shape \(3, 3\)"),
        ("photographs", "rocket", np.zeros((64, 64, 3), np.float32), "rocket as float32"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, name: str, key: str, array: np.ndarray, message: str) -> None:
    with np.load(next(path for path in FILES if path.stem == name)) as archive:
        np.savez(tmp_path / "other.npz", **{**archive, key: array})
    with pytest.raises(DataError, match=rf"other\.npz holds .*{message}"):
        LOADERS[name](tmp_path / "other.npz")
