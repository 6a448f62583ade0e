"""Do the captured factors explain the gradient? One random probe per layer tells, without forming the gradient.

With ``v`` of random signs (i), the gradient's ``G v`` must be the sum over all rows of ``g (a . v)``, up to one scale:
loss scaling, clipping, accumulation and averaging multiply the whole gradient, the factors stay as they were captured.
How a layer kind forms that sum is its adapter's business.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gmn_optim.capture.adapters import AbstractLayerAdapter


class Verification(NamedTuple):
    """Whether a layer's factors explain its gradient.

    Attributes:
        explained: Whether the gradient is ``scale`` times what the factors give.
        scale: The ratio; 0 if there is nothing to compare.
        residual: Misfit after scaling, relative to the gradient.
        reason: The likely cause when not explained, else empty.
        vanishing: Parameters of the layer whose gradient is nothing but rounding error: a bias before a normalization,
            or of the keys of an attention.

    Example:
        >>> from gmn_optim.capture import GradientCapture
        >>> layer = torch.nn.Linear(3, 2)
        >>> with GradientCapture(layer) as capture:
        ...     layer(torch.ones(5, 3)).sum().backward()
        >>> _ = layer.weight.grad.mul_(0.25), layer.bias.grad.mul_(0.25)
        >>> capture.verify()[""]
        Verification(explained=True, scale=0.25, residual=0.0, reason='', vanishing=())
    """

    explained: bool
    scale: float
    residual: float
    reason: str
    vanishing: tuple[str, ...] = ()


FEWEST_NUMBERS = 8
"""A layer with fewer outputs gets several probes: one number alone is explained by any factors, at some scale."""


class Precision(NamedTuple):
    """What may differ between two ways of adding up the same products.

    Attributes:
        tolerance: Largest relative misfit.
        noise: Size, relative to a random sum of the same terms, below which a sum is rounding error.
        floor: Size below which a sum is rounding error whatever its terms: numbers so small lose digits.
    """

    tolerance: float
    noise: float
    floor: float = 0.0


@lru_cache
def precision_of(*dtypes: torch.dtype) -> Precision:
    """Return what the least precise of the dtypes allows.

    Example:
        >>> precision_of(torch.float64, torch.bfloat16).tolerance
        0.05
    """
    spacing = max(torch.finfo(dtype).eps for dtype in dtypes)
    floor = max(torch.finfo(dtype).smallest_normal for dtype in dtypes)
    if spacing > 1e-4:
        return Precision(5e-2, 2e-2, floor)
    return Precision(1e-3, 1e-5, floor) if spacing > 1e-8 else Precision(1e-9, 1e-14, floor)


class ProbeSums(NamedTuple):
    """Sums over all rows of one layer call, with how large a random sum of the same terms would be.

    Attributes:
        product: Sum of ``g (a . v)`` for each row of the gradient matrix and each probe (rows * k).
        total: Sum of ``g`` (o).
        product_size: Scalar that ``product`` is measured against.
        total_size: Scalar that ``total`` is measured against.
        precision: How exact the layer's arithmetic was.
    """

    product: Tensor
    total: Tensor
    product_size: Tensor
    total_size: Tensor
    precision: Precision


class CallGradient(NamedTuple):
    """What one call of a layer leaves at its backward pass, in one dtype.

    Attributes:
        weight: The parameter that was used.
        layer_input: What it multiplied.
        output_gradient: Gradient of what the layer returned.
        precision: How exact the arithmetic was.
    """

    weight: Tensor
    layer_input: Tensor
    output_gradient: Tensor
    precision: Precision


class Verdict(NamedTuple):
    """One comparison's part of a :class:`Verification`; ``vanishes`` says that both sides are rounding error."""

    explained: bool
    scale: float
    residual: float
    reason: str = ""
    vanishes: bool = False


class Comparison(NamedTuple):
    """A piece of gradient (o) and what the factors give for it (o)."""

    gradient: Tensor
    from_factors: Tensor
    size: Tensor
    precision: Precision


class Probes:
    """Random signs for each input width, the same at every call; the global generator is left alone.

    Args:
        seed: Of the own generator.

    Example:
        >>> sorted(set(Probes(0).vector(32, torch.float32, torch.device("cpu")).tolist()))
        [-1.0, 1.0]
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._vectors: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def vector(self, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the probe (width)."""
        key = (width, dtype, device)
        if key not in self._vectors:
            generator = torch.Generator().manual_seed(self._seed)
            signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
            self._vectors[key] = signs.to(device, dtype)
        return self._vectors[key]

    def matrix(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return so many probes (inputs, k) that ``G v`` has numbers enough besides the one scale that is fitted."""
        count = min(inputs, -(-FEWEST_NUMBERS // max(1, outputs)))
        return self.vector(inputs * count, dtype, device).view(count, inputs).mT

    def sums(self, adapter: AbstractLayerAdapter, module: nn.Module, call: CallGradient) -> ProbeSums:
        """Return the sums over all rows of one call of a layer."""
        rows, columns = adapter.gradient_matrix(module, call.weight).shape
        probes = self.matrix(columns, rows, call.output_gradient.dtype, call.output_gradient.device)
        terms = adapter.probe(module, call.layer_input, call.output_gradient, probes)
        backprops = adapter.backprops(module, call.output_gradient)
        return ProbeSums(
            terms.product.flatten(),
            backprops.sum((0, 1)),
            terms.size,
            torch.linalg.vector_norm(backprops),
            call.precision,
        )


def add_sums(parts: Iterable[ProbeSums]) -> ProbeSums:
    """Return the sums over several calls, as imprecise as the worst of them.

    Example:
        >>> from gmn_optim.capture.linear import LinearAdapter
        >>> layer = nn.Linear(3, 2)
        >>> call = CallGradient(layer.weight, torch.ones(5, 3), torch.ones(5, 2), precision_of(torch.float32))
        >>> one = Probes(0).sums(LinearAdapter(), layer, call)
        >>> add_sums([one, one]).total
        tensor([10., 10.])
    """
    first, *rest = parts
    for part in rest:
        # layers of two kinds with one weight have outputs of two widths, and no bias whose gradient both explain
        total = first.total + part.total if first.total.shape == part.total.shape else first.total[:0]
        sizes = first.product_size + part.product_size, first.total_size + part.total_size
        precision = Precision(*map(max, first.precision, part.precision))
        first = ProbeSums(first.product + part.product, total, *sizes, precision)
    return first


def compare(comparisons: list[Comparison]) -> list[Verdict]:
    """Return a verdict on each comparison, with one transfer to the host for all.

    The reason stays empty where the two sides plainly differ: the numbers do not tell why.

    Args:
        comparisons: On any devices, with vectors of any lengths.

    Example:
        >>> ones, exact = torch.ones(3), precision_of(torch.float32)
        >>> compare([Comparison(0.5 * ones, ones, torch.ones(()), exact)])
        [Verdict(explained=True, scale=0.5, residual=0.0, reason='', vanishes=False)]
    """
    measured = _measure(comparisons)
    return [
        _judge(_Measured(*numbers), comparison.precision)
        for comparison, numbers in zip(comparisons, measured, strict=True)
    ]


class _Measured(NamedTuple):
    """Numbers of one comparison: ratio, misfit after scaling, norms of both sides, size of a random sum."""

    scale: float
    misfit: float
    gradient: float
    from_factors: float
    size: float


def _measure(comparisons: list[Comparison]) -> list[list[float]]:
    """Return the fields of ``_Measured`` for each comparison."""
    if not comparisons:
        return []
    device = comparisons[0].gradient.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    gradients, others = (
        pad_sequence([comparison[side].to(device, wide) for comparison in comparisons], batch_first=True)
        for side in (0, 1)
    )
    sizes = torch.stack([comparison.size.to(device, wide) for comparison in comparisons])
    power = others.square().sum(1)
    scales = (gradients * others).sum(1) / power.where(power > 0, 1)
    misfits = (gradients - scales.unsqueeze(1) * others).norm(dim=1)
    return torch.stack([scales, misfits, gradients.norm(dim=1), others.norm(dim=1), sizes], 1).tolist()


def _judge(measured: _Measured, precision: Precision) -> Verdict:
    """Turn the numbers of one comparison into a verdict."""
    noise = max(precision.noise * measured.size, precision.floor)
    if not all(map(math.isfinite, measured)):
        return Verdict(False, 0.0, 1.0, "the gradient or the factors are not finite")
    if measured.from_factors <= noise:
        # A sum that is zero in exact arithmetic (a bias before a norm) leaves rounding error on both sides.
        explained = measured.gradient <= 10 * noise
        return Verdict(explained, float(explained), float(not explained), vanishes=explained and measured.gradient > 0)
    if measured.gradient == 0:
        return Verdict(False, 0.0, 1.0, "the gradient was set to zero after the backward pass")
    residual = measured.misfit / measured.gradient
    explained = residual <= precision.tolerance or measured.misfit <= abs(measured.scale) * noise
    return Verdict(explained, measured.scale, residual)
