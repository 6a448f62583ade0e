"""Loops of generative models and of neural representations: several networks, several losses, odd batches."""

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from tests.cases import assert_same, distance, snapshot
from tests.integrations.checks import Loop, assert_served, falls, train_copy_nominally


def make_gan() -> tuple[nn.Module, nn.Module]:
    """Return a generator and a discriminator."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(True), nn.Linear(16, 5))
    return generator, nn.Sequential(nn.Linear(5, 16), nn.LeakyReLU(0.2, True), nn.Linear(16, 1), nn.Flatten(0))


def test_a_gan_as_in_torch_s_tutorial_is_served_on_both_sides() -> None:
    generator, discriminator = make_gan()
    of_generator, of_discriminator = GMNOptimizer(generator, lr=0.5), GMNOptimizer(discriminator, lr=0.5)
    score, gaps = nn.BCEWithLogitsLoss(), []
    for _ in range(80):
        real = torch.randn(16, 5) * 0.1 + 1.0
        discriminator.zero_grad()
        score(discriminator(real), torch.ones(16)).backward()
        fake = generator(torch.randn(16, 4))
        score(discriminator(fake.detach()), torch.zeros(16)).backward()
        of_discriminator.step()
        generator.zero_grad()  # what the generator's loss leaves in the discriminator goes at the next round
        score(discriminator(fake), torch.ones(16)).backward()
        of_generator.step()
        gaps.append((fake.mean(0) - real.mean(0)).norm().item())
    assert min(gaps) < 0.6 * gaps[0]
    assert_served(of_discriminator, 80)
    assert_served(of_generator, 80)


def test_a_discriminator_frozen_for_the_generator_s_turn_is_served_in_its_own() -> None:
    generator, discriminator = make_gan()
    of_generator, of_discriminator = GMNOptimizer(generator, lr=0.5), GMNOptimizer(discriminator, lr=0.5)
    for _ in range(40):
        real, fake = torch.randn(16, 5) + 1.0, generator(torch.randn(16, 4))
        of_discriminator.zero_grad()
        (torch.relu(1 - discriminator(real)) + torch.relu(1 + discriminator(fake.detach()))).mean().backward()
        of_discriminator.step()
        before = snapshot(discriminator)
        discriminator.requires_grad_(False)
        of_generator.zero_grad()
        (-discriminator(fake)).mean().backward()
        of_generator.step()
        discriminator.requires_grad_(True)
        assert_same(discriminator, before)
    assert_served(of_discriminator, 40)
    assert_served(of_generator, 40)


def test_one_optimizer_may_train_a_pair_that_is_one_module() -> None:
    generator, discriminator = make_gan()
    pair = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    both = [GMNOptimizer(pair, part.parameters(), lr=0.5) for part in (discriminator, generator)]
    for _ in range(20):
        real, fake = torch.randn(16, 5) + 1.0, generator(torch.randn(16, 4))
        losses = (discriminator(fake.detach()).square() + (discriminator(real) - 1).square()).mean()
        pair.zero_grad()
        losses.backward()
        both[0].step()
        pair.zero_grad()
        (discriminator(fake) - 1).square().mean().backward()
        both[1].step()
    for optimizer in both:
        assert_served(optimizer, 20)


class VariationalAutoencoder(nn.Module):
    """Two heads on one trunk, a sample between, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.mean, self.log_variance = nn.Linear(6, 16), nn.Linear(16, 2), nn.Linear(16, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 6))

    def encode(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and logarithms of variances (b, 2)."""
        hidden = torch.relu(self.trunk(inputs))
        return self.mean(hidden), self.log_variance(hidden)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (b, 6), means and logarithms of variances (b, 2)."""
        mean, log_variance = self.encode(inputs)
        sample = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(sample), mean, log_variance


def binary_images(count: int) -> Tensor:
    """Return noisy copies (b, 6) of two patterns."""
    patterns = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]])
    return (patterns[torch.randint(0, 2, (count,))] - (torch.rand(count, 6) < 0.05).float()).abs()


def evidence_bound(logits: Tensor, images: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return reconstruction plus divergence (), summed over data points as in torch's example."""
    reconstruction = nn.functional.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    return reconstruction - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()


def pass_whole(model: VariationalAutoencoder, images: Tensor) -> Tensor:
    """Return the loss () by a call of the model."""
    logits, mean, log_variance = model(images)
    return evidence_bound(logits, images, mean, log_variance)


def pass_in_parts(model: VariationalAutoencoder, images: Tensor) -> Tensor:
    """Return the loss () by calls of the model's own methods and parts."""
    mean, log_variance = model.encode(images)
    logits = model.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
    return evidence_bound(logits, images, mean, log_variance)


@pytest.mark.parametrize("loss_of", [pass_whole, pass_in_parts])
def test_a_variational_autoencoder_is_served(loss_of) -> None:
    torch.manual_seed(0)
    model, losses = VariationalAutoencoder(), []
    optimizer = GMNOptimizer(model)
    for number in range(100):
        images = binary_images(5 if number % 4 == 3 else 32)  # the last batch of every round is smaller
        optimizer.zero_grad()
        loss = loss_of(model, images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / len(images))
    assert falls(losses)
    assert_served(optimizer, 100)


class Sine(nn.Module):
    """A layer and a sine, with the initial weights of SIREN."""

    def __init__(self, inputs: int, outputs: int, is_first: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if is_first else (6 / inputs) ** 0.5 / 15
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return values (..., o) in [-1, 1]."""
        return torch.sin(15 * self.linear(inputs))


def make_siren() -> nn.Sequential:
    """Return the same small SIREN at every call."""
    torch.manual_seed(0)
    return nn.Sequential(Sine(2, 16, True), Sine(16, 16, False), nn.Linear(16, 1))


def fitting(steps: int, is_sampled: bool, axes: int) -> Loop:
    """Return a loop that fits an image of 12x12 pixels, all at once or random ones, with or without a batch axis."""
    axis = torch.linspace(-1, 1, 12)
    pixels = torch.cartesian_prod(axis, axis)
    values = torch.sin(4 * pixels[:, :1]) * torch.cos(3 * pixels[:, 1:])

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(steps):
            chosen = torch.randint(0, 144, (48,)) if is_sampled else slice(None)
            inputs, targets = pixels[chosen], values[chosen]
            outputs = model(inputs if axes == 2 else inputs[None]).view_as(targets)
            loss = (outputs - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return loop


@pytest.mark.parametrize("axes", [2, 3], ids=["(b, 2)", "(1, p, 2)"])
@pytest.mark.parametrize("is_sampled", [False, True], ids=["all pixels", "random pixels"])
def test_a_siren_fits_an_image_with_factors(is_sampled, axes) -> None:
    model, loop = make_siren(), fitting(60, is_sampled, axes)
    nominal = train_copy_nominally(model, loop)
    torch.manual_seed(1)
    optimizer = GMNOptimizer(model)
    assert falls(loop(model, optimizer), to=0.3)
    assert_served(optimizer, 60)
    assert distance(model, nominal) > 1e-3
