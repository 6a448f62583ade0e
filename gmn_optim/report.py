"""What an optimizer tells about itself: who updates what, and what happened."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.constants import constant
from gmn_optim.neurons import NeuronSpaces
from gmn_optim.rule import Chunk


class SummaryRow(NamedTuple):
    """One parameter.

    Attributes:
        parameter: Full name.
        shape: Its shape.
        layer: Kind of the layer that owns it.
        updated_by: Arm of the rule, or name of the nominal term alone.
        because: The reason.
    """

    parameter: str
    shape: tuple[int, ...]
    layer: str
    updated_by: str
    because: str


class SpaceRow(NamedTuple):
    """One neuron space.

    Attributes:
        neurons: How many.
        kind: ``input``, ``hidden`` or ``output``.
        depth: How many layers lead to it.
        read_by: Layer that reads these neurons, or ``-``.
        written_by: Layer that writes them, or ``-``.
        shared: ``alone``, or the number of the stream whose other ports lend the factor that this one lacks.
    """

    neurons: int
    kind: str
    depth: int
    read_by: str
    written_by: str
    shared: str


class Summary(NamedTuple):
    """A table of parameters and, if asked for, one of neuron spaces; ``str()`` of it pastes into Markdown."""

    rows: tuple[SummaryRow, ...]
    spaces: tuple[SpaceRow, ...] = ()

    def __str__(self) -> str:
        """Return the tables as text."""
        tables = [_tabulate(SummaryRow._fields, self.rows)]
        return "\n\n".join(tables + ([_tabulate(SpaceRow._fields, self.spaces)] if self.spaces else []))


class ParameterReport(NamedTuple):
    """The newest step of one parameter.

    Attributes:
        update_rms: Root mean square of what was subtracted, without weight decay.
        cosine: Cosine between the step that was subtracted and the gradient; 0 where either is zero.
        guarded: Steps whose learned part was replaced by the nominal term, in all.
        skipped: Steps at which its gradient was not finite, in all.
    """

    update_rms: float
    cosine: float
    guarded: int
    skipped: int


class StepReport(NamedTuple):
    """What happened so far.

    Attributes:
        steps: Steps taken.
        guarded: Guarded steps, added up over parameters.
        skipped: Skipped steps, added up over parameters.
        served_share: Share of the trained elements that the learned term serves.
        parameters: By name, the newest step of each parameter that took part in it or was ever skipped.
    """

    steps: int
    guarded: int
    skipped: int
    served_share: float
    parameters: dict[str, ParameterReport]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first being the header, as aligned Markdown columns.

    Example:
        >>> print(format_table([("a", "bb"), ("ccc", "d")]))
        a   | bb
        --- | --
        ccc | d
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(lines)


def describe_spaces(spaces: NeuronSpaces) -> tuple[SpaceRow, ...]:
    """Return a row for each neuron space.

    Example:
        >>> from gmn_optim.neurons import chain_spaces
        >>> describe_spaces(chain_spaces([4, 3, 2]))[1]
        SpaceRow(neurons=3, kind='hidden', depth=1, read_by='1', written_by='0', shared='alone')
    """
    return tuple(
        SpaceRow(
            space.width,
            space.kind,
            space.depth,
            "-" if space.reader is None else space.reader or "(model)",
            "-" if space.writer is None else space.writer or "(model)",
            "alone" if space.stream is None else f"stream {space.stream}",
        )
        for space in spaces.spaces
    )


def _tabulate(fields: Sequence[str], rows: Sequence[tuple[object, ...]]) -> str:
    """Return rows under their fields' names."""
    header = tuple(name.replace("_", " ") for name in fields)
    return format_table([header, *(tuple(str(cell) for cell in row) for row in rows)])


class MeasuredChunk(NamedTuple):
    """Per parameter of a chunk, the sums of step^2, gradient^2 and step * gradient (segments, 3), and its lr."""

    chunk: Chunk
    sums: Tensor
    lrs: Sequence[float | Tensor]


LARGE = 4_096
"""Elements of a segment, on average, from which products of whole segments are quicker than those of elements."""


def measure_chunk(chunk: Chunk, step: Tensor, gradient: Tensor, lrs: Sequence[float | Tensor]) -> MeasuredChunk:
    """Return the measures of a chunk's newest step at lr 1 (size), without a transfer to the host."""
    if chunk.size >= LARGE * len(chunk.segments):
        pairs = zip(step.split(chunk.sizes), gradient.split(chunk.sizes), strict=True)
        products = [torch.dot(*two) for one, other in pairs for two in ((one, one), (other, other), (one, other))]
        return MeasuredChunk(chunk, torch.stack(products).view(-1, 3), lrs)
    means = chunk.mean_per_segment(torch.stack([step.square(), gradient.square(), step * gradient], dim=-1))
    return MeasuredChunk(chunk, means * _counts(chunk.sizes, means.dtype, means.device), lrs)


@dataclass
class StepLog:
    """What is counted and measured from step to step.

    Attributes:
        steps: Steps taken.
        skipped: By name, steps at which a parameter's gradient was not finite.
        guarded: By name, steps whose learned part was replaced by the nominal term (); views of what
            :meth:`guard_counts` returned.
        measured: The newest step of every chunk; before anybody asked, of the newest look at the factors.
        is_read: Whether anybody asked.

    Example:
        >>> StepLog(steps=3).describe(served_share=1.0)
        StepReport(steps=3, guarded=0, skipped=0, served_share=1.0, parameters={})
    """

    steps: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    guarded: dict[str, Tensor] = field(default_factory=dict)
    measured: list[MeasuredChunk] = field(default_factory=list)
    is_read: bool = False

    def guard_counts(self, chunk: Chunk, device: torch.device) -> Tensor:
        """Return a chunk's counts of guarded steps so far (segments), to be added to without waiting for the device."""
        zero = torch.zeros((), dtype=torch.long, device=device)
        names = [segment.name for segment in chunk.segments]
        counts = torch.stack([self.guarded.get(name, zero).to(device) for name in names])
        self.guarded.update(zip(names, counts.unbind(), strict=True))
        return counts

    def describe(self, served_share: float) -> StepReport:
        """Return the report, given the share of elements that the learned term serves."""
        self.is_read = True
        guarded = {name: int(count) for name, count in self.guarded.items()}
        newest = self._newest()
        parameters = {
            name: ParameterReport(*newest.get(name, (0.0, 0.0)), guarded.get(name, 0), self.skipped[name])
            for name in dict.fromkeys([*newest, *self.skipped])
        }
        return StepReport(self.steps, sum(guarded.values()), sum(self.skipped.values()), served_share, parameters)

    def _newest(self) -> dict[str, tuple[float, float]]:
        """Return root mean square and cosine of each parameter's newest step."""
        newest = {}
        for chunk, sums, lrs in self.measured:
            for segment, (step, gradient, product), lr in zip(chunk.segments, sums.tolist(), lrs, strict=True):
                scale = (step * gradient) ** 0.5
                size = (step / max(segment.size, 1)) ** 0.5
                newest[segment.name] = (size * float(lr), product / scale if scale > 0 else 0.0)
        return newest


@constant()
def _counts(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the number of elements of each segment (s, 1)."""
    return torch.tensor(sizes, dtype=dtype, device=device).unsqueeze(-1)
