"""Settings of the tests of training loops."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gmn_optim import GMNOptimizer
from tests.integrations.checks import EVERY_LAYER


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are many times slower on several threads, above all when other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def weights_that_serve_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``GMNOptimizer(model)`` take weights that serve vectors and tables too, and read all neurons.

    What is tested here is the loop around the optimizer. With fewer parameters to serve, less could go wrong.
    """
    defaults = {**GMNOptimizer.__init__.__kwdefaults__, "weights": EVERY_LAYER}
    monkeypatch.setattr(GMNOptimizer.__init__, "__kwdefaults__", defaults)


@pytest.fixture
def averaged_steps(monkeypatch: pytest.MonkeyPatch, weights_that_serve_every_layer: None) -> None:
    """Let ``GMNOptimizer(model)`` take the weights that it takes outside of these tests, whose steps are averaged."""
    defaults = {**GMNOptimizer.__init__.__kwdefaults__, "weights": "default"}
    monkeypatch.setattr(GMNOptimizer.__init__, "__kwdefaults__", defaults)


@pytest.fixture
def clean_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, which stays empty."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not list(folder.iterdir())


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Let no test see the precision or the accumulation that another one chose: Accelerate keeps both globally."""
    state = pytest.importorskip("accelerate.state")
    variables = dict(os.environ)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
