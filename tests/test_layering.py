"""Imports go one way: from captured gradients to the optimizer on one side, to meta-training on the other.

The graph is read from the source, so that imports inside functions and under ``TYPE_CHECKING`` count too.
"""

import ast
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gmn_optim"

# What a module (with everything below it) may import of the package, at most.
ALLOWED = {
    "errors": [],
    "constants": [],
    "configuration": ["errors"],
    "registry": ["errors"],
    "gradients": ["errors"],
    "neurons": [],
    "weight_order": [],
    "neuron_sets": ["constants", "gradients", "neurons"],
    "capture": ["errors", "gradients", "neurons", "weight_order"],
    "capture.neuron_names": [],
}

# What a module (with everything below it) must not import, be it by way of other modules.
FORBIDDEN = {
    "capture": ["nn"],
    "nn": ["capture"],
    "optimizer": ["tasks", "metatrain", "comparison", "cli"],
    "metatrain": ["comparison", "optimizer", "stepping", "places", "routing", "explanation"],
    "comparison": ["cli"],
    "tasks": ["comparison", "metatrain", "optimizer", "stepping", "places", "routing", "explanation", "nn", "rule"],
    "testing": ["metatrain"],
}

Graph = dict[str, set[str]]


def module_files(root: Path) -> dict[str, Path]:
    """Return the file of each module below ``root``; a package goes by its folder's name."""
    names = {path: path.relative_to(root).with_suffix("").parts for path in sorted((root / PACKAGE).rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imported_names(name: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name taken from it or None) for every import statement of a file, relative ones resolved."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A package's __init__ is one level lower than its name tells.
            parts = [*name.split("."), "__init__"] if path.stem == "__init__" else name.split(".")
            base = parts[: -node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def import_graph(root: Path) -> Graph:
    """Return the modules of the package that each module imports by name (its own parents only if it names them)."""
    files = module_files(root)
    graph: Graph = {name: set() for name in files}
    for name, path in files.items():
        for module, taken in imported_names(name, path):
            target = f"{module}.{taken}" if f"{module}.{taken}" in files else module
            if target in files and target != name:
                graph[name].add(target)
    return graph


def within(name: str, part: str) -> bool:
    """Return whether a module is the named part of the package, or below it."""
    return f"{name}.".startswith(f"{PACKAGE}.{part}.")


def loaded(graph: Graph, start: str) -> set[str]:
    """Return all modules that are loaded because of ``start``: what it imports, and what that imports.

    The packages above an imported module are loaded as well. The topmost is left out, unless a module names it:
    it imports the whole inference half for the user's sake.
    """
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph[waiting.pop()]:
            parents = [target.rsplit(".", depth)[0] for depth in range(1, target.count("."))]
            new = {target, *parents} - seen
            seen |= new
            waiting += new
    return seen


def not_allowed(graph: Graph, part: str, allowed: Iterable[str]) -> list[str]:
    """Return the imports, as "a -> b", by which a part of the package goes beyond what it may import."""
    return [
        f"{name} -> {target}"
        for name in sorted(graph)
        if within(name, part)
        for target in sorted(graph[name])
        if not any(within(target, other) for other in [part, *allowed])
    ]


def forbidden(graph: Graph, part: str, others: Iterable[str]) -> list[str]:
    """Return "a -> b" wherever a module of one part loads, be it by way of others, a module of a forbidden part."""
    return [
        f"{name} -> {target}"
        for name in sorted(graph)
        if within(name, part)
        for target in sorted(loaded(graph, name))
        if any(within(target, other) for other in others)
    ]


@pytest.fixture(scope="module", name="graph")
def fixture_graph() -> Graph:
    """Return the graph of this checkout."""
    return import_graph(ROOT)


@pytest.mark.parametrize("part", [*ALLOWED, *FORBIDDEN])
def test_rules_speak_of_existing_modules(graph: Graph, part: str) -> None:
    """A renamed module would otherwise pass its rule for nothing."""
    missing = [name for name in [part, *FORBIDDEN.get(part, [])] if not any(within(module, name) for module in graph)]
    assert not missing, f"no such modules: {missing}; change the rules of this file along with the layout"


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_only_what_is_allowed(graph: Graph, part: str) -> None:
    """The leaves stay leaves."""
    assert not_allowed(graph, part, ALLOWED[part]) == []


@pytest.mark.parametrize("part", FORBIDDEN)
def test_never_loads_what_is_forbidden(graph: Graph, part: str) -> None:
    """The halves of the package stay apart, by way of other modules too."""
    assert forbidden(graph, part, FORBIDDEN[part]) == []


def test_nobody_imports_testing(graph: Graph) -> None:
    """Public assertions are for tests, of this package and of others."""
    users = [name for name, targets in graph.items() if any(within(target, "testing") for target in targets)]
    assert [name for name in users if not within(name, "testing")] == []


def test_nobody_imports_examples_or_tests() -> None:
    """Examples use the library; the library does not use them."""
    found = [
        f"{name} -> {module}"
        for name, path in module_files(ROOT).items()
        for module, _ in imported_names(name, path)
        if module.split(".")[0] in ("examples", "tests")
    ]
    assert found == []


def test_no_import_cycles(graph: Graph) -> None:
    """An order exists in which each module comes after all that it imports."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(reversed(error.args[1])))


def write_package(root: Path, sources: dict[str, str]) -> Graph:
    """Write modules of a made-up package and return its graph."""
    for name, source in sources.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return import_graph(root)


def test_checker_sees_every_way_to_import(tmp_path: Path) -> None:
    """Plain, from, relative, renamed and inside a function: all make an edge, to the module where there is one."""
    graph = write_package(
        tmp_path,
        {
            "__init__.py": "",
            "errors.py": "",
            "nn/__init__.py": "from .sets import Set\n",
            "nn/sets.py": "import gmn_optim.errors as e\nfrom .. import rule\n",
            "rule.py": "def f():\n    from gmn_optim.nn import sets, Other\n",
        },
    )
    assert graph["gmn_optim.nn"] == {"gmn_optim.nn.sets"}
    assert graph["gmn_optim.nn.sets"] == {"gmn_optim.errors", "gmn_optim.rule"}
    assert graph["gmn_optim.rule"] == {"gmn_optim.nn.sets", "gmn_optim.nn"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_checker_follows_imports_and_parents(tmp_path: Path) -> None:
    """A forbidden module is found behind another one, and behind the __init__ above an imported module."""
    graph = write_package(
        tmp_path,
        {
            "__init__.py": "from gmn_optim import optimizer\n",
            "optimizer.py": "import gmn_optim.rule.steps\n",
            "rule/__init__.py": "from gmn_optim import tasks\n",
            "rule/steps.py": "",
            "tasks.py": "",
            "metatrain.py": "import gmn_optim\n",
        },
    )
    assert forbidden(graph, "optimizer", ["tasks"]) == ["gmn_optim.optimizer -> gmn_optim.tasks"]
    assert forbidden(graph, "metatrain", ["optimizer"]) == ["gmn_optim.metatrain -> gmn_optim.optimizer"]
    assert not_allowed(graph, "rule", ["errors"]) == ["gmn_optim.rule -> gmn_optim.tasks"]
