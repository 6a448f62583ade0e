"""Fixtures that several test files share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.capture import adapters
from gmn_optim.rule import UpdateRule
from tests.cases import ARMS, make_rule, mlp


@pytest.fixture
def make_model() -> Callable[..., nn.Sequential]:
    """Return a function that makes the same small model at every call."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return mlp().to(dtype)

    return make


@pytest.fixture
def batches() -> list[Tensor]:
    """Return twelve small batches (8, 5)."""
    return list(torch.randn(12, 8, 5, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def doubles(batches: list[Tensor]) -> list[Tensor]:
    """Return the batches in float64."""
    return [batch.double() for batch in batches]


@pytest.fixture(params=list(ARMS))
def arm(request: pytest.FixtureRequest) -> str:
    """Return the name of every arm in turn."""
    return request.param


@pytest.fixture
def rule(arm: str) -> UpdateRule:
    """Return the rule of every arm in turn, its meta-parameters random and not zero."""
    return make_rule(arm)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the adapters that a test registers."""
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))


@pytest.fixture
def seeded() -> None:
    """Seed what a test draws."""
    torch.manual_seed(0)


@pytest.fixture
def double_precision() -> Iterator[None]:
    """Make new tensors float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
