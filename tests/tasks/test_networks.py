"""The networks of tasks: what they look at, and which options they refuse."""

import pytest
import torch

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.tasks.byte_transformer import ByteTransformer, ByteTransformerTask
from gmn_optim.tasks.datasets import load_fashion_mnist_8x8, load_photograph, load_text
from gmn_optim.tasks.image_cnn import ImageCNNTask, build_cnn
from gmn_optim.tasks.image_fit import ImageFitTask, all_pixels, fourier_features, pixel_places
from gmn_optim.tasks.image_mlp import ImageMLPTask
from gmn_optim.tasks.window_mlp import WindowMLPTask


def test_transformers_do_not_look_ahead(seeded: None) -> None:
    network = ByteTransformer(9, 8, 2, 2, 6)
    symbols = torch.randint(9, (3, 6))
    changed = symbols.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 9
    torch.testing.assert_close(network(symbols)[:, :4], network(changed)[:, :4])
    assert not torch.allclose(network(symbols)[:, 4:], network(changed)[:, 4:])
    assert not torch.allclose(network(symbols)[0], network(symbols.flip(1))[0].flip(0))


def test_windows_follow_the_text() -> None:
    text = torch.arange(49, dtype=torch.uint8).repeat(40)
    task = ByteTransformerTask(text, width=8, context=12)
    symbols, following = task.sample_batch(torch.Generator(), (2,))
    assert torch.equal((symbols + 1) % 49, following) and symbols.shape == (2, 16, 12)
    validation, test = task.held_out("validation"), task.held_out("test")
    assert torch.equal(validation[0].flatten()[:12], text[-196:-184].long())
    assert torch.equal(test[0].flatten()[:12], text[-98:-86].long())


@pytest.mark.parametrize("options", [{"heads": 3}, {"context": 4_000, "text": load_text("carroll")[:10_000]}])
def test_transformers_that_do_not_fit_are_refused(options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match="expected heads that divide"):
        ByteTransformerTask(**{"text": load_text("carroll"), "width": 16} | options)


def test_windows_are_one_input_for_each_place_and_symbol() -> None:
    text = torch.arange(49, dtype=torch.uint8).repeat(40)
    task = WindowMLPTask(text, window=3, batch_size=5)
    inputs, following = task.sample_batch(torch.Generator(), (2,))
    on = inputs.unflatten(-1, (3, 49)).max(-1)
    assert torch.equal((on.indices + torch.tensor([3, 2, 1])) % 49, following.unsqueeze(-1).expand(2, 5, 3))
    standard = torch.nn.functional.one_hot(torch.arange(49), 49).sub(1 / 49).mul(49 / 48**0.5)
    torch.testing.assert_close(inputs[0, 0, :49], standard[on.indices[0, 0, 0]].float())
    validation, test = task.held_out("validation")[1], task.held_out("test")[1]
    assert torch.equal(validation[:9], text[-193:-184].long()) and torch.equal(test[:9], text[-95:-86].long())


def test_windows_need_a_text() -> None:
    with pytest.raises(InvalidArgumentError, match="100 symbols; expected a text of more than 160"):
        WindowMLPTask(load_text("carroll")[:100])


@pytest.mark.parametrize("downsampling", ["stride", "max", "average"])
@pytest.mark.parametrize("readout", ["mean", "flatten"])
@pytest.mark.parametrize("side", [8, 14])
def test_convolutions_fit_every_image(downsampling: str, readout: str, side: int) -> None:
    network = build_cnn((1, side, side), (3, 4, 5), 10, downsampling, readout, "gelu")
    assert network(torch.zeros(2, 1, side, side)).shape == (2, 10)


def test_options_that_do_not_exist_are_refused() -> None:
    data = load_fashion_mnist_8x8()
    with pytest.raises(InvalidArgumentError, match="downsampling 'min'"):
        ImageCNNTask(data, downsampling="min")
    with pytest.raises(InvalidArgumentError, match="nothing is left"):
        ImageCNNTask(data, (2, 2, 2, 2), "max")
    with pytest.raises(InvalidArgumentError, match="expected 3 channels of a square"):
        ImageCNNTask(data, image_channels=3)
    with pytest.raises(InvalidArgumentError, match="Did you mean 'relu'"):
        ImageMLPTask(data, activation="rellu")
    with pytest.raises(InvalidArgumentError, match="expected 'siren' or 'fourier'"):
        ImageFitTask(load_photograph("coffee"), encoding="wavelet")


def test_a_picture_is_measured_on_all_its_pixels() -> None:
    places = pixel_places(10, 20)
    assert len(places.unique(dim=0)) == 200 and places.abs().max() < 1
    for part in all_pixels(places, torch.zeros(200, 3)):
        assert torch.equal(part.inputs, places)


def test_colours_are_where_they_were() -> None:
    picture = load_photograph("rocket")
    places = pixel_places(64, 64).unflatten(0, (64, 64))
    assert places[0, 63].tolist() == [-1 + 1 / 64, 1 - 1 / 64]
    task = ImageFitTask(picture, (8,))
    inputs, colours = task.held_out("test")
    rows, columns = ((inputs + 1) * 32).floor().long().T
    scaled = (picture.float() - picture.float().mean()) / picture.float().std()
    torch.testing.assert_close(colours, scaled[rows, columns])


def test_fourier_features_are_the_same_each_time() -> None:
    places = pixel_places(4, 4)
    assert torch.equal(fourier_features(places, 8, 2.0), fourier_features(places, 8, 2.0))
