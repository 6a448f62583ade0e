"""Checks of configurations, which may come from files that nobody vouches for."""

from collections.abc import Iterable
from dataclasses import fields

from gmn_optim.errors import InvalidArgumentError


def refuse_unknown_keys(what: str, keys: Iterable[str], kind: type) -> None:
    """Raise if not every key is a field of a dataclass: a file of a newer version says what this one would miss.

    Args:
        what: What the keys describe, for the message.
        keys: Keys that were found.
        kind: The dataclass.

    Raises:
        InvalidArgumentError: a key is no field.

    Example:
        >>> from gmn_optim.nn import GradMetaNetConfig
        >>> refuse_unknown_keys("network", ["width", "colour"], GradMetaNetConfig)
        Traceback (most recent call last):
            ...
        gmn_optim.errors.InvalidArgumentError: network has unknown keys ['colour']; known are ['code_channels', ...]
    """
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(keys) - known):
        raise InvalidArgumentError(f"{what} has unknown keys {unknown}; known are {sorted(known)}")


def is_count(value: object, most: int, least: int = 1) -> bool:
    """Return whether a value is a whole number in a range.

    Example:
        >>> is_count(3, most=5), is_count(True, most=5), is_count(3.0, most=5)
        (True, False, False)
    """
    return type(value) is int and least <= value <= most
