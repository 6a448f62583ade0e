"""Nothing grows with the number of steps: no container, no object, no memory, and no work of a step.

Ten thousand steps with times and the memory of the process: ``examples/benchmarks/long_run.py``.
"""

import gc
import itertools
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gmn_optim import GMNOptimizer
from gmn_optim.memory_usage import MemoryUsage
from tests.cases import loss_of, mlp, optimizer_for, train

PERIOD = 12
"""Steps after which each situation below repeats itself."""

Situation = Callable[[nn.Module, GMNOptimizer, int], object]


def batch(size: int = 8) -> Tensor:
    """Return inputs (size, 5)."""
    return torch.randn(size, 5)


def plainly(model: nn.Module, optimizer: GMNOptimizer, number: int) -> None:
    """Take a step as most loops do."""
    train(model, optimizer, [batch()])


def with_batches_of_many_sizes(model: nn.Module, optimizer: GMNOptimizer, number: int) -> None:
    """Take a step on a batch of another size than before, an empty one at times."""
    optimizer.zero_grad()
    model(batch(number % 4)).square().sum().backward()
    optimizer.step()


def with_evaluation_between(model: nn.Module, optimizer: GMNOptimizer, number: int) -> None:
    """Take a step, then look at the loss in ways that leave no gradient, or one that is thrown away."""
    train(model, optimizer, [batch()])
    with torch.no_grad():
        model(batch())
    model(batch())
    loss_of(model, batch()).backward()
    optimizer.zero_grad()


def with_steps_on_nothing_finite(model: nn.Module, optimizer: GMNOptimizer, number: int) -> None:
    """Take a step, at times on a loss that is not a number."""
    train(model, optimizer, [batch()], scale=float("nan") if number % 3 == 0 else 1.0)


def with_gradients_zeroed_and_accumulated(model: nn.Module, optimizer: GMNOptimizer, number: int) -> None:
    """Take a step on three backward passes over gradients that were set to zero in place."""
    optimizer.zero_grad(set_to_none=False)
    for _ in range(3):
        loss_of(model, batch(4)).backward()
    optimizer.step()


def with_layers_frozen_in_turn(model: nn.Module, optimizer: GMNOptimizer, number: int) -> None:
    """Take a step with one layer frozen, or none."""
    for place, layer in enumerate((model[0], model[2], model[4], nn.Identity())):
        layer.requires_grad_(place != number % 4)
    train(model, optimizer, [batch()])


def with_states_saved_and_loaded(model: nn.Module, optimizer: GMNOptimizer, number: int) -> None:
    """Take a step, and load the state that it left."""
    train(model, optimizer, [batch()])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.stats(), optimizer.summary(), optimizer.memory_usage()


SITUATIONS: tuple[Situation, ...] = (
    plainly,
    with_batches_of_many_sizes,
    with_evaluation_between,
    with_steps_on_nothing_finite,
    with_gradients_zeroed_and_accumulated,
    with_layers_frozen_in_turn,
    with_states_saved_and_loaded,
)


class CountCalls(TorchDispatchMode):
    """Counts operations on tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one."""
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Run:
    """A model and its optimizer in a situation."""

    def __init__(self, arm: str, situation: Situation, model: nn.Module) -> None:
        torch.manual_seed(0)
        self.model, self.situation, self.number = model, situation, 0
        self.optimizer = optimizer_for(model, arm)

    def go_on(self, periods: int) -> None:
        """Take the steps of some periods."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(periods * PERIOD):
                self.situation(self.model, self.optimizer, self.number)
                self.number += 1
        self.optimizer.zero_grad()

    def count_calls(self) -> Counter[str]:
        """Take the steps of a period; return the operations that they took."""
        with CountCalls() as counted:
            self.go_on(1)
        return counted.calls


def containers(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, int]]:
    """Yield the place and the length of every container that an object of this package holds, also inside others."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if type(value).__module__.partition(".")[0] == "gmn_optim":
        for name, entry in getattr(value, "__dict__", {}).items():
            yield from containers(entry, f"{path}.{name}", seen)
    if isinstance(value, dict | list | tuple | set | frozenset):
        yield path, len(value)
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from containers(entry, f"{path}[]", seen)


def lengths(optimizer: GMNOptimizer) -> Counter[str]:
    """Return the summed lengths of the containers at each place."""
    found: Counter[str] = Counter()
    for path, length in containers(optimizer):
        found[path] += length
    return found


def modules() -> list[ModuleType]:
    """Return the modules of the package that are loaded."""
    return [module for name, module in sorted(sys.modules.items()) if name.partition(".")[0] == "gmn_optim"]


def cached() -> Counter[str]:
    """Return how much each module keeps in dicts of its own and in cached functions."""
    found: Counter[str] = Counter()
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, dict) and not name.startswith("__"):
                found[f"{module.__name__}.{name}"] = len(value)
            elif hasattr(value, "cache_info"):
                found[f"{module.__name__}.{name}"] = value.cache_info().currsize
    return found


class Snapshot(NamedTuple):
    """What there is at a moment: lengths of containers and caches, objects by type, bytes that the optimizer holds."""

    lengths: Counter[str]
    cached: Counter[str]
    objects: Counter[str]
    usage: MemoryUsage


def snapshot_of(run: Run) -> Snapshot:
    """Return what there is now."""
    gc.collect()
    objects = Counter(type(each).__qualname__ for each in gc.get_objects())
    return Snapshot(lengths(run.optimizer), cached(), objects, run.optimizer.memory_usage())


class Measured(NamedTuple):
    """A run before and after some steps, and the operations that early and late ones took.

    Attributes:
        before: What there was before three periods.
        after: What there was after them.
        blocks: Blocks of memory that Python took in them.
        early: Operations of the period before.
        late: Operations of the period after.
    """

    before: Snapshot
    after: Snapshot
    blocks: int
    early: Counter[str]
    late: Counter[str]


CASES = {
    f"{situation.__name__.replace('_', ' ')}, {arm}": (arm, situation)
    for arm, situation in [("adam", plainly), *itertools.product(("slots", "moments"), SITUATIONS)]
}


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    """Return the measures of some arms in every situation, after as many steps as it takes to meet all that recurs."""
    torch.manual_seed(0)
    run = Run(*request.param, mlp())
    gc.collect()
    gc.freeze()  # looking for garbage among all that torch has loaded takes most of the time
    try:
        run.go_on(2)
        snapshot_of(run)  # looking at a storage leaves an object that stays with it
        early, before = run.count_calls(), snapshot_of(run)
        blocks = sys.getallocatedblocks()
        run.go_on(3)
        gc.collect()
        blocks = sys.getallocatedblocks() - blocks
        after, late = snapshot_of(run), run.count_calls()
    finally:
        gc.unfreeze()
    yield Measured(before, after, blocks, early, late)


def test_no_container_of_the_optimizer_grows(measured) -> None:
    assert measured.after.lengths == measured.before.lengths and len(measured.before.lengths) > 10


def test_no_cache_of_a_module_grows(measured) -> None:
    assert measured.after.cached == measured.before.cached


def test_no_object_is_left_behind_by_each_step(measured) -> None:
    grown = measured.after.objects - measured.before.objects
    assert not {name: count for name, count in grown.items() if count >= PERIOD or name in ("Tensor", "Parameter")}


def test_fewer_blocks_of_memory_are_taken_than_there_are_steps(measured) -> None:
    assert measured.blocks < 3 * PERIOD


def test_what_the_optimizer_says_that_it_holds_does_not_grow(measured) -> None:
    assert measured.after.usage == measured.before.usage


def test_late_steps_take_the_operations_of_early_ones(measured) -> None:
    assert measured.late == measured.early and measured.early.total() > 10 * PERIOD


def test_what_is_left_behind_by_each_step_is_seen() -> None:
    torch.manual_seed(0)
    run, kept = Run("slots", plainly, mlp()), []
    run.go_on(1)
    before = snapshot_of(run)
    for number in range(3 * PERIOD):
        kept.append([torch.ones(1)])
        run.optimizer._capture._recorder.probes._vectors[number] = kept[-1][0]
    after = snapshot_of(run)
    assert (after.lengths - before.lengths).total() == 3 * PERIOD
    assert (after.objects - before.objects)["Tensor"] == 3 * PERIOD


# ---------------------------------------------------------------------- layers that take part by turns


def with_another_subset_each_time(model: nn.Sequential, optimizer: GMNOptimizer, number: int) -> None:
    """Take a step of a subset of layers that never took part alone before."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    for place, layer in enumerate(layers):
        layer.requires_grad_(bool((number + 1) >> place & 1))
    train(model, optimizer, [batch()])


def is_bounded(name: str) -> bool:
    """Return whether what is called ``module.name`` is a cache of at most 64 entries."""
    module, _, attribute = name.rpartition(".")
    value = getattr(sys.modules[module], attribute)
    return hasattr(value, "cache_info") and (value.cache_info().maxsize or math.inf) <= 64


def test_layouts_that_do_not_come_again_are_not_kept() -> None:
    layers = [each for _ in range(8) for each in (nn.Linear(4, 4), nn.Tanh())]
    run = Run("slots", with_another_subset_each_time, nn.Sequential(nn.Linear(5, 4), *layers))
    run.go_on(10)
    before = cached()
    run.go_on(10)
    assert [name for name in cached() - before if not is_bounded(name)] == []


def test_a_frozen_layer_holds_its_own_state_only() -> None:
    torch.manual_seed(0)
    run = Run("slots", plainly, mlp())
    run.go_on(1)
    whole = run.optimizer.memory_usage().state
    run.model[0].requires_grad_(False)
    run.go_on(1)
    assert run.optimizer.memory_usage().state < 1.2 * whole  # neurons between two plans stand in both
