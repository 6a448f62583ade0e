"""What a slot's process tells the others after a truncation, as a row of numbers of a fixed length."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TEXT = 256
"""Bytes of a task's name, or of an error's message: all that is told of it."""


class SlotReport(NamedTuple):
    """Meta-losses of one truncation, or why there are none.

    Attributes:
        positive: Of the positive sides (pairs); zeros after a failure.
        negative: Of the negative sides (pairs).
        text: The task's name, or the error.
        failed: Which of the two.
        seconds: That the truncation took.

    Example:
        >>> report = SlotReport(torch.tensor([1.0]), torch.tensor([2.0]), "mlp")
        >>> SlotReport.decode(report.encode(), torch.float32) == report
        True
    """

    positive: Tensor
    negative: Tensor
    text: str
    failed: bool = False
    seconds: float = 0.0

    @staticmethod
    def width(pairs: int) -> int:
        """Return the length of a row."""
        return 2 * pairs + 2 + TEXT

    def encode(self) -> Tensor:
        """Return the report as numbers (width)."""
        text = self.text.encode()[:TEXT].ljust(TEXT, b"\0")
        return torch.cat(
            [
                self.positive.double(),
                self.negative.double(),
                torch.tensor([self.failed, self.seconds, *text], dtype=torch.float64),
            ]
        )

    @classmethod
    def decode(cls, row: Tensor, dtype: torch.dtype) -> "SlotReport":
        """Return the report that :meth:`encode` turned into a row, its losses of ``dtype``."""
        positive, negative = row[: -TEXT - 2].to(dtype).chunk(2)
        text = bytes(int(byte) for byte in row[-TEXT:].tolist()).rstrip(b"\0").decode(errors="ignore")
        return cls(positive, negative, text, bool(row[-TEXT - 2]), row[-TEXT - 1].item())


def report_of(advance: Callable[[], tuple[str, Tensor, Tensor]], pairs: int) -> SlotReport:
    """Return the report of a truncation, given as a function that returns task name and losses of both sides.

    An error becomes a report, since the other processes wait for one.
    """
    started = time.monotonic()
    try:
        name, positive, negative = advance()
    except Exception as error:
        return SlotReport(torch.zeros(pairs), torch.zeros(pairs), f"{type(error).__name__}: {error}", failed=True)
    return SlotReport(positive, negative, name, seconds=time.monotonic() - started)
