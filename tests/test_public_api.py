import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import gmn_optim

PACKAGE = Path(gmn_optim.__file__).parent
PUBLIC_MODULES = [
    "gmn_optim",
    "gmn_optim.capture",
    "gmn_optim.comparison",
    "gmn_optim.nn",
    "gmn_optim.metatrain",
    "gmn_optim.tasks",
    "gmn_optim.testing",
]


def own_names(module):
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and getattr(value, "__module__", "").startswith(module.__name__)
    }


def test_the_top_level_has_at_most_fifteen_names():
    assert len(gmn_optim.__all__) <= 15
    assert sorted(gmn_optim.__all__) == gmn_optim.__all__


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_public_name_has_a_doctested_example(module):
    finder = doctest.DocTestFinder(recurse=False)
    lacking = [
        name
        for name, value in own_names(importlib.import_module(module)).items()
        if not any(test.examples for test in finder.find(value, name))
    ]
    assert lacking == []


def functions_of(path):
    tree = ast.parse(path.read_text())
    for node in [
        *tree.body,
        *(inner for outer in tree.body if isinstance(outer, ast.ClassDef) for inner in outer.body),
    ]:
        if isinstance(node, ast.FunctionDef):
            yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node


def test_everything_has_annotations_and_everything_public_a_docstring():
    lacking = []
    for place, node in (found for path in PACKAGE.rglob("*.py") for found in functions_of(path)):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if bare or (node.returns is None and node.name != "__init__"):
            lacking.append(f"{place}: no annotation for {bare or 'the result'}")
        setter = any(getattr(d, "attr", "") == "setter" for d in node.decorator_list)
        if not node.name.startswith("_") and not setter and not ast.get_docstring(node):
            lacking.append(f"{place}: no docstring")
    assert lacking == []


def test_the_library_prints_nothing_and_unpickles_nothing():
    faults = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "eval", "exec"):
                faults.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                faults += [
                    f"{path.name}:{node.lineno} {name}" for name in names if name.split(".")[0] in ("pickle", "dill")
                ]
    assert faults == []


def test_importing_the_package_loads_neither_tasks_nor_meta_training():
    heavy = "('gmn_optim.tasks', 'gmn_optim.metatrain', 'gmn_optim.comparison')"
    code = f"import sys, gmn_optim; print([m for m in sys.modules if m.startswith({heavy})])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_module_imports_by_itself():
    names = [
        module.name for module in pkgutil.walk_packages([str(PACKAGE)], "gmn_optim.") if "__main__" not in module.name
    ]
    code = "import importlib, sys; importlib.import_module(sys.argv[1])"
    for name in ("gmn_optim.rule.update", "gmn_optim.nn.product", "gmn_optim.metatrain.evolution"):
        assert name in names
        subprocess.run([sys.executable, "-c", code, name], check=True, capture_output=True)
