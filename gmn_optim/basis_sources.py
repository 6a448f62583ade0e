"""What the nominal term's basis of each parameter is made from, as told to the user."""

from collections.abc import Callable, Sequence

from gmn_optim.rule.matrices import Matrix, find_matrices
from gmn_optim.rule.segments import Segment

FACTORS = "Kronecker factors of each data point"
GRAM = "Gram matrices of the gradient"
PLAIN = "plain Adam"
AXES = "the axes, since most weights are small by design"


def basis_sources(
    chunks: Sequence[tuple[int, Sequence[Segment]]], explain: Callable[[str], tuple[bool, str]], turns: bool = True
) -> dict[str, str]:
    """Return what each parameter's basis is made from, by name.

    Args:
        chunks: Parameters with the number of their clock, see :func:`gmn_optim.rule.matrices.find_matrices`.
        explain: From a weight's name to whether factors explain its gradient, and why or why not.
        turns: Whether bases are made at all.

    Example:
        >>> parameters = [Segment("0.weight", (3, 2), "0", "weight"), Segment("scale", (3,))]
        >>> basis_sources([(0, parameters)], lambda name: (True, ""))
        {'0.weight': 'Kronecker factors of each data point', 'scale': 'plain Adam'}
        >>> basis_sources([(0, parameters[:1])], lambda name: (False, "the optimizer is closed"))
        {'0.weight': 'Gram matrices of the gradient: the optimizer is closed'}
    """
    sources = {segment.name: PLAIN for _, segments in chunks for segment in segments}
    for matrix in find_matrices(chunks):
        text = _source(matrix, *explain(matrix.weight.name)) if turns else AXES
        sources[matrix.weight.name] = text
        if matrix.bias is not None:
            sources[chunks[matrix.bias.chunk][1][matrix.bias.segment].name] = text
    return sources


def _source(matrix: Matrix, explained: bool, reason: str) -> str:
    """Return what one matrix's basis is made from."""
    if not matrix.has_basis:
        return PLAIN
    source = FACTORS if explained else GRAM
    if not matrix.turns_rows:
        source += ", columns only"
    elif not matrix.turns_columns:
        source += ", rows only"
    return source if explained else f"{source}: {reason}"
