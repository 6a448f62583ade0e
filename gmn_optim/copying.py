"""Acting on a model once it is whole: copies of a model that keeps its optimizer are made from within."""

from collections.abc import Callable
from typing import Any

from torch import nn


def once_whole(model: nn.Module, act: Callable[[], None]) -> None:
    """Act now, or, where the copy of a model that keeps its optimizer is still being made, when that is done.

    Copying and unpickling give an object its state by ``__setstate__``, the innermost first: an attribute of the model
    has its own before the model has.

    Args:
        model: The copy.
        act: What to do.

    Example:
        >>> once_whole(nn.Linear(2, 1), lambda: print("whole"))
        whole
    """
    unfinished = _find_unfinished(model)
    if unfinished is None:
        act()
        return
    finish = unfinished.__setstate__

    def finish_and_act(state: dict[str, Any]) -> None:
        unfinished.__dict__.pop("__setstate__", None)
        finish(state)
        once_whole(model, act)

    unfinished.__dict__["__setstate__"] = finish_and_act


def _find_unfinished(model: nn.Module) -> nn.Module | None:
    """Return a module of a model that has no state yet, if there is one."""
    waiting, met = [model], {id(model)}
    while waiting:
        module = waiting.pop()
        if "_modules" not in module.__dict__:
            return module
        new = [child for child in module._modules.values() if child is not None and id(child) not in met]
        waiting += new
        met.update(map(id, new))
    return None
