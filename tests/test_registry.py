"""A registry gives back what was entered, and answers a miss with its nearest names."""

import pytest

from gmn_optim.errors import GMNError, InvalidArgumentError, UnknownNameError
from gmn_optim.registry import Registry, unknown_name_message


@pytest.fixture(name="shapes")
def fixture_shapes() -> Registry[int]:
    """Return a registry of three numbers."""
    shapes: Registry[int] = Registry("shape")
    for corners, name in ((4, "square"), (3, "triangle"), (0, "circle")):
        shapes.register(name)(corners)
    return shapes


def test_it_gives_back_what_was_entered(shapes: Registry[int]) -> None:
    assert (shapes["square"], shapes["triangle"], shapes["circle"]) == (4, 3, 0)
    assert list(shapes) == ["square", "triangle", "circle"]
    assert "square" in shapes and "hexagon" not in shapes


def test_registering_returns_the_thing_itself() -> None:
    things: Registry[object] = Registry("thing")

    @things.register("one")
    class One:
        pass

    assert things["one"] is One


def test_a_name_that_is_taken_is_refused_and_keeps_its_entry(shapes: Registry[int]) -> None:
    with pytest.raises(InvalidArgumentError, match="square"):
        shapes.register("square")(5)
    assert shapes["square"] == 4


MISSES = {
    "squere": "no shape is named 'squere'. Did you mean 'square'? Known: circle, square, triangle.",
    "angle": "Did you mean 'triangle'?",
    "zzz": "no shape is named 'zzz'. Known: circle, square, triangle.",
    "": "no shape is named ''. Known: circle, square, triangle.",
}


@pytest.mark.parametrize("name", MISSES)
def test_a_miss_lists_near_names_and_all_names(shapes: Registry[int], name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        shapes[name]
    assert MISSES[name] in str(caught.value)


def test_a_miss_is_a_key_error_and_an_error_of_this_package(shapes: Registry[int]) -> None:
    for kind in (KeyError, GMNError):
        with pytest.raises(kind):
            shapes["hexagon"]


def test_an_empty_registry_says_so() -> None:
    assert unknown_name_message("shape", "square", []) == "no shape is named 'square'. Known: none."
