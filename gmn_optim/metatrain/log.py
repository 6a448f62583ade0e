"""The log of a run: a file of JSON lines, one fact each, that only grows."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG = "log.jsonl"

BEFORE_ALL = -1
"""The outer step before a run begins: a run that left a log but no checkpoint starts anew, and so does its log."""


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return what the whole lines of a log say, nothing if there is no such file."""
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a log, without a last one that a kill cut short."""
    return [line[:-1] for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def drop_unfinished_line(path: Path) -> None:
    """Remove a last line that a kill cut short, so that the next one begins on a line of its own."""
    if path.exists() and not path.read_text(encoding="utf-8").endswith("\n"):
        path.write_text("".join(line + "\n" for line in whole_lines(path)), encoding="utf-8")


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a log that belong to later outer steps."""
    if path.exists():
        lines = [line for line in whole_lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def rounded(values: Sequence[float]) -> list[float | None]:
    """Return numbers with six digits, None where not finite, which JSON lacks.

    Example:
        >>> rounded([0.123456789, float("inf")])
        [0.123457, None]
    """
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
