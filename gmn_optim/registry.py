"""A table from names to things, whose misses are helpful."""

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from gmn_optim.errors import InvalidArgumentError, UnknownNameError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Named entries of one kind, added by a decorator.

    Args:
        kind: What an entry is, in words, for messages.

    Example:
        >>> bodies = Registry("body")
        >>> @bodies.register("ds")
        ... def deep_set():
        ...     return "DS"
        >>> bodies["ds"]()
        'DS'
        >>> bodies["sd"]
        Traceback (most recent call last):
            ...
        gmn_optim.errors.UnknownNameError: no body is named 'sd'. Did you mean 'ds'? Known: ds.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that enters its argument under ``name``.

        Raises:
            InvalidArgumentError: the name is taken.
        """

        def enter(entry: Entry) -> Entry:
            if name in self._entries:
                raise InvalidArgumentError(f"a {self._kind} named {name!r} is registered already; choose another name")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> Entry:
        """Return the entry called ``name``, or raise :class:`UnknownNameError` with near matches."""
        if name not in self._entries:
            raise UnknownNameError(unknown_name_message(self._kind, name, list(self._entries)))
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        """Return whether ``name`` is registered."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in order of registration."""
        return iter(self._entries)


def unknown_name_message(kind: str, name: str, known: list[str]) -> str:
    """Return the sentence for a name that is not among ``known``, with the nearest ones first."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    near += [candidate for candidate in known if name and name in candidate and candidate not in near][:3]
    guess = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"no {kind} is named {name!r}.{guess} Known: {', '.join(sorted(known)) or 'none'}."
