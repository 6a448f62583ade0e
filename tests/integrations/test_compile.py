"""Models behind ``torch.compile``: trained by the nominal term with a clear warning, and never silently wrong."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import CaptureWarning, GMNOptimizer
from tests.cases import assert_same, loss_of, snapshot, train
from tests.integrations.checks import assert_served, assert_unserved, falls, train_copy_nominally

BACKENDS = ["aot_eager"]
"""Whose graphs are one node to autograd; those of "eager" show every product, so that their layers may be served."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Let no test see what another one compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def before(model: nn.Module, backend: str) -> tuple[nn.Module, GMNOptimizer]:
    """Compile, then make the optimizer of the model itself."""
    compiled = torch.compile(model, backend=backend)
    return compiled, GMNOptimizer(model)


def before_and_given(model: nn.Module, backend: str) -> tuple[nn.Module, GMNOptimizer]:
    """Compile, then make the optimizer of what the compiler returned."""
    compiled = torch.compile(model, backend=backend)
    return compiled, GMNOptimizer(compiled)


def before_and_run(model: nn.Module, backend: str) -> tuple[nn.Module, GMNOptimizer]:
    """Compile and run once, so that code exists already when the hooks come."""
    compiled = torch.compile(model, backend=backend)
    compiled(torch.ones(8, 5)).sum().backward()
    model.zero_grad()
    return compiled, GMNOptimizer(model)


def after(model: nn.Module, backend: str) -> tuple[nn.Module, GMNOptimizer]:
    """Make the optimizer, then compile; the graph may not even break at a hook."""
    optimizer = GMNOptimizer(model)
    return torch.compile(model, backend=backend, fullgraph=True), optimizer


def in_place(model: nn.Module, backend: str) -> tuple[nn.Module, GMNOptimizer]:
    """Compile without a wrapper around the model."""
    optimizer = GMNOptimizer(model)
    model.compile(backend=backend)
    return model, optimizer


WAYS = {each.__name__: each for each in (before, before_and_given, before_and_run, after, in_place)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_compiled_model_is_named_once_and_gets_exactly_the_nominal_term(make_model, batches, way, backend) -> None:
    model = make_model()
    nominal = train_copy_nominally(model, lambda *both: train(*both, batches))
    compiled, optimizer = way(model, backend)
    with pytest.warns(CaptureWarning, match="torch.compile") as caught:
        train(compiled, optimizer, batches)
    assert len(caught) == 1
    assert all(f"{name}'" in str(caught[0].message) for name in ("0", "2", "4"))
    assert_unserved(optimizer, [row.parameter for row in optimizer.summary().rows], "torch.compile")
    assert optimizer.stats().served_share == 0.0
    assert_same(model, nominal, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_loss_function_is_named_too(make_model, batches, backend) -> None:
    model = make_model()
    optimizer, losses = GMNOptimizer(model), []
    compiled = torch.compile(lambda inputs: loss_of(model, inputs), backend=backend)
    with pytest.warns(CaptureWarning, match="torch.compile") as caught:
        for batch in batches * 3:
            optimizer.zero_grad()
            loss = compiled(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(caught) == 1 and falls(losses)
    assert_unserved(optimizer, snapshot(model), "torch.compile")


REGIONS = {
    "layer": lambda model, backend: model[2].compile(backend=backend),
    "wrapped layer": lambda model, backend: model.__setitem__(2, torch.compile(model[2], backend=backend)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compile_region", REGIONS.values(), ids=REGIONS)
def test_what_is_not_compiled_stays_served(make_model, batches, compile_region, backend) -> None:
    model = make_model()
    compile_region(model, backend)
    optimizer = GMNOptimizer(model)
    with pytest.warns(CaptureWarning, match="layer '2") as caught:
        train(model, optimizer, batches)
    assert len(caught) == 1 and "layer '0'" not in str(caught[0].message)
    compiled = [name for name in snapshot(model) if name.startswith("2.")]
    assert_unserved(optimizer, compiled, "")
    assert_served(optimizer, len(batches), missed=compiled)


@pytest.mark.parametrize("compile_region", REGIONS.values(), ids=REGIONS)
def test_a_compiled_region_is_called_compiled(make_model, batches, compile_region) -> None:
    model = make_model()
    compile_region(model, "aot_eager")
    optimizer = GMNOptimizer(model)
    with pytest.warns(CaptureWarning):
        train(model, optimizer, batches)
    assert_unserved(optimizer, [name for name in snapshot(model) if name.startswith("2.")], "compile")


class HalfCompiled(nn.Module):
    """A layer that is called once as a module and once inside compiled code."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.compiled = torch.compile(lambda inputs: torch.tanh(self.inner(inputs)), backend="aot_eager")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        return self.last(self.compiled(torch.tanh(self.inner(inputs))))


def test_factors_of_half_the_uses_are_not_taken_for_the_whole(batches) -> None:
    torch.manual_seed(0)
    model = HalfCompiled()
    optimizer = GMNOptimizer(model)
    with pytest.warns(CaptureWarning, match="layer 'inner'") as caught:
        train(model, optimizer, batches)
    assert len(caught) == 1
    assert_unserved(optimizer, ["inner.weight", "inner.bias"], "")
    assert_served(optimizer, len(batches), missed=["inner.weight", "inner.bias"])


def test_products_that_the_compiled_code_shows_to_autograd_are_served(make_model, batches) -> None:
    model = make_model()
    optimizer = before_and_given(model, "eager")[1]
    train(optimizer._model, optimizer, batches)
    assert_served(optimizer, len(batches))


def test_factors_are_back_once_the_model_runs_uncompiled(make_model, batches) -> None:
    model = make_model()
    compiled, optimizer = after(model, "eager")
    with pytest.warns(CaptureWarning):
        train(compiled, optimizer, batches[:2])
    with torch.compiler.set_stance("force_eager"):
        train(compiled, optimizer, batches[2:4])
    train(model, optimizer, batches[4:])
    assert_served(optimizer, len(batches))


def test_compiling_a_copy_of_the_model_disturbs_nothing(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    optimizer = GMNOptimizer(model)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    for batch in batches:
        loss_of(compiled, batch).backward()
        train(model, optimizer, [batch])
    train(twin, GMNOptimizer(twin), batches)
    assert_same(model, twin)
    assert_served(optimizer, len(batches))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_is_the_ordinary_step(make_model, batches, backend) -> None:
    model, twin = make_model(), make_model()
    optimizer = GMNOptimizer(model)
    step = torch.compile(optimizer.step, backend=backend)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        step()
    train(twin, GMNOptimizer(twin), batches)
    assert_same(model, twin)
    assert_served(optimizer, len(batches))


def test_a_train_step_compiled_as_a_whole_is_named_and_learns(make_model, batches) -> None:
    model = make_model()
    nominal = train_copy_nominally(model, lambda *both: train(*both, batches))
    optimizer = GMNOptimizer(model)

    @torch.compile(backend="eager")
    def train_step(inputs: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()

    with pytest.warns(CaptureWarning, match="torch.compile") as caught:
        for batch in batches:
            train_step(batch)
    assert [each.category for each in caught] == [CaptureWarning]
    assert_unserved(optimizer, snapshot(model), "torch.compile")
    assert_same(model, nominal, rtol=1e-5, atol=1e-6)


EXPORTS = {
    "export": lambda model, inputs: torch.export.export(model, (inputs,)).module(),
    "fx": lambda model, inputs: torch.fx.symbolic_trace(model),
    "trace": lambda model, inputs: torch.jit.trace(model, inputs),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_the_model_may_be_exported_between_steps(make_model, batches, export) -> None:
    model, twin = make_model(), make_model()
    optimizer = GMNOptimizer(model)
    for batch in batches[:4]:
        train(model, optimizer, [batch])
        torch.testing.assert_close(export(model, batch)(batch), model(batch))
    train(twin, GMNOptimizer(twin), batches[:4])
    assert_same(model, twin)
    assert_served(optimizer, 4)
