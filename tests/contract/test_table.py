"""The table of Adam's contract: every row is proved by tests that exist, and the README shows exactly these rows."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.contract.table import ON_A_GPU, ROWS, Row, Status, render

ROOT = Path(__file__).resolve().parents[2]
HEADING = "## Adam's contract"


@cache
def names_of_tests(file: Path) -> set[str]:
    """Return the names of the test functions in a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def section() -> str:
    """Return the README's section on the contract."""
    _, found, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n{HEADING}\n")
    assert found, f"README.md has no section {HEADING!r}"
    return rest.partition("\n## ")[0]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.torch_test} {row.status.value}" for row in ROWS])
def test_every_row_is_proved_by_tests_that_exist(row: Row) -> None:
    assert row.proofs
    for proof in row.proofs:
        file, _, name = proof.partition("::")
        assert name in names_of_tests(ROOT / "tests" / file), f"no such test: {proof}"


def test_a_reason_is_given_for_what_is_refused_and_only_for_that() -> None:
    assert all(bool(row.why) == (row.status is Status.REFUSED) for row in ROWS)
    assert {row.status for row in ROWS} == set(Status)


def test_no_promise_stands_twice() -> None:
    asked = [(row.torch_test, row.status) for row in ROWS]
    assert len(set(asked)) == len(asked)
    assert not {row.torch_test for row in ROWS} & set(ON_A_GPU) and sorted(ON_A_GPU) == list(ON_A_GPU)


def test_the_readme_shows_exactly_these_rows() -> None:
    shown = [line for line in section().splitlines() if "|" in line]
    assert "\n".join(shown) == render(), "put what `python -m tests.contract.table` prints into the README"
    assert render() in section()


def test_the_readme_names_what_was_left_out() -> None:
    assert all(f"`{name}`" in section() for name in ON_A_GPU)
