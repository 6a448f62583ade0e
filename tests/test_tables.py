"""Whatever the package has of a family has its row in tests/tables.py, and each row its member."""

import inspect
import sys
from collections.abc import Iterable

import pytest
from torch import nn

import gmn_optim.nn
from gmn_optim import list_weights
from gmn_optim.capture import AbstractLayerAdapter, adapters
from gmn_optim.metatrain import estimators
from gmn_optim.rule.body import bodies
from gmn_optim.rule.memory import factor_memories
from gmn_optim.rule.nominal import nominal_terms
from gmn_optim.tasks import tasks
from tests import tables


def is_own(adapter: AbstractLayerAdapter) -> bool:
    """Return whether an adapter is the package's, and not one of another test or of an example in a docstring."""
    kind = type(adapter)
    return kind.__module__.startswith("gmn_optim.") and vars(sys.modules[kind.__module__]).get(kind.__name__) is kind


def served_layers() -> set[str]:
    """Return the layer kinds that the package's own adapters serve."""
    own = (kind for kind, adapter in adapters._ADAPTERS.items() if is_own(adapter))
    return {kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__ for kind in own}


def public_modules() -> set[str]:
    """Return the modules that gmn_optim.nn offers."""
    return {
        name for name, value in vars(gmn_optim.nn).items() if inspect.isclass(value) and issubclass(value, nn.Module)
    }


def names(kinds: Iterable[type]) -> set[str]:
    """Return the names of types."""
    return {kind.__name__ for kind in kinds}


FAMILIES = {
    # attention returns a pair, and is captured by hooks alone: tests/capture/test_hooks_attention.py
    "LAYERS": (served_layers() - {"MultiheadAttention"}, names(tables.LAYERS)),
    "ARCHITECTURES": (public_modules(), names(tables.ARCHITECTURES)),
    "NOMINAL_TERMS": (set(nominal_terms), set(tables.NOMINAL_TERMS)),
    "ARMS, as nominal": (set(nominal_terms), {config.nominal for config in tables.ARMS.values()}),
    "ARMS, as body": (set(bodies), {config.body for config in tables.ARMS.values() if config.body}),
    "ARMS, as memory": (
        set(factor_memories),
        {config.memory for config in tables.ARMS.values() if config.gradmetanet},
    ),
    "TASKS": (set(tasks), set(tables.TASKS)),
    "ESTIMATORS": (set(estimators), set(tables.ESTIMATORS)),
    "WEIGHTS": (set(list_weights()), set(tables.WEIGHTS)),
}


@pytest.mark.parametrize("table", FAMILIES)
def test_every_member_has_its_row_and_every_row_its_member(table: str) -> None:
    members, rows = FAMILIES[table]
    assert not members - rows, f"no row in tests/tables.py, {table}: {sorted(members - rows)}"
    unknown = sorted(rows - members)
    assert not unknown, f"rows of nothing in tests/tables.py, {table}: {unknown}; is the file imported in __init__.py?"


@pytest.mark.parametrize("table", ["LAYERS", "ARCHITECTURES"])
def test_every_row_has_a_variant(table: str) -> None:
    assert all(case.variants for case in getattr(tables, table).values())
