"""Which layers' gradients are explained by what was captured, and the likely cause where one is not."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from gmn_optim.capture.layers import LayerGroup
from gmn_optim.capture.records import Record, RecordStore
from gmn_optim.capture.verification import Comparison, Probes, ProbeSums, Verification, add_sums, compare
from gmn_optim.errors import CaptureError

NEVER_RAN = (
    "no hook ran since the last clear(): the model runs compiled (hooks were added after torch.compile, or are passed "
    "over inside it), it was not called through its modules, or step() or clear() came after the last backward pass"
)
OUTSIDE_MODULE = (
    "called outside its module, and outside the model's own forward pass or in a way that is not understood "
    "(functional use: a weight must enter a matrix product as it is), or inside a part that torch.compile compiled"
)
LOST = (
    "the parameter is used outside its module (functional use, attention) inside torch.utils.checkpoint, which does "
    "not hand out activations twice"
)
NOT_REACHED = "no backward pass reached it through its module since the last clear()"
MIXED_KINDS = "its weight is shared with a layer of another kind, which reads it in another order"
SECOND_DERIVATIVES = "the loss holds second derivatives (create_graph=True), which the factors do not explain"
EARLIER_PASSES = "the gradient holds earlier backward passes (zero_grad missing)"
OTHER_USE = (
    "the parameter is also used outside its module in a way that is not understood (functional use), the gradient was "
    "changed unevenly after the backward pass, or data points are not on the leading batch axis"
)
BIAS_ELSEWHERE = "the weight's gradient is explained, the bias's is not: it is also used elsewhere, or was changed"


class Observations:
    """What hooks notice besides factors; only used to name causes.

    Attributes:
        called: Identities of the weights of layers that were called.
        differentiated_twice: Identities of weights reached by a backward pass with ``create_graph=True``.
        lost: Identities of weights with a use of which a backward pass could not tell the activations.

    Example:
        >>> Observations().called
        set()
    """

    def __init__(self) -> None:
        self.called: set[int] = set()
        self.differentiated_twice: set[int] = set()
        self.lost: set[int] = set()

    def clear(self) -> None:
        """Forget everything."""
        self.called.clear()
        self.differentiated_twice.clear()
        self.lost.clear()


class _Case(NamedTuple):
    """One group with the records that should explain its gradients."""

    group: LayerGroup
    records: list[Record]

    @property
    def newest(self) -> int:
        """The latest backward pass in the records."""
        return self.records[-1].backward

    def of_newest(self) -> "_Case":
        """Return the case with the records of the latest backward pass only."""
        return self._replace(records=[record for record in self.records if record.backward == self.newest])


def verify_groups(
    groups: Mapping[str, LayerGroup], store: RecordStore, probes: Probes, observations: Observations
) -> dict[str, Verification]:
    """Return a verdict on every group that has a gradient.

    Where all backward passes together do not explain a gradient but the newest one does, the older records are
    dropped from ``store``: the gradient was set to zero in between.

    Args:
        groups: Group name to layers with one weight.
        store: What was captured.
        probes: The probes that were used at capture.
        observations: What else the hooks noticed.

    Raises:
        CaptureError: an adapter's factors do not have the shape of its weight.
    """
    cases = [
        _Case(group, store.of(group.weight) if group.adds_up else [])
        for group in groups.values()
        if _with_gradient(group)
    ]
    cases = [case for case in cases if case.records or _is_moved(case.group)]
    verdicts = _check([case for case in cases if case.records], probes)
    doubtful = [case for case in cases if case.records and not verdicts[case.group.name].explained]
    doubtful = [case.of_newest() for case in doubtful if case.records[0].backward != case.newest]
    for case, verdict in zip(doubtful, _check(doubtful, probes).values(), strict=True):
        if verdict.explained:
            store.keep_pass(case.group.weight, case.newest)
            verdicts[case.group.name] = verdict
    return {case.group.name: _with_reason(case, verdicts.get(case.group.name), observations) for case in cases}


def _check(cases: list[_Case], probes: Probes) -> dict[str, Verification]:
    """Compare the weight's gradient, else the bias's; a bias that fails alone fails its layer."""
    comparisons = [_comparisons(case, probes) for case in cases]
    verdicts = iter(compare([comparison for of_case in comparisons for comparison in of_case]))
    checked: dict[str, Verification] = {}
    for case, of_case in zip(cases, comparisons, strict=True):
        first, *rest = found = [next(verdicts) for _ in of_case]
        failed = [verdict for verdict in rest if not verdict.explained]
        explained, residual, reason = first.explained, first.residual, first.reason
        if explained and failed:
            explained, residual, reason = False, failed[0].residual, failed[0].reason or BIAS_ELSEWHERE
        vanishing = [n for n, v in zip(_with_gradient(case.group), found, strict=True) if v.vanishes]
        checked[case.group.name] = Verification(explained, first.scale, residual, reason, tuple(vanishing))
    return checked


def _comparisons(case: _Case, probes: Probes) -> list[Comparison]:
    """Set the gradients of a group against the sums of its records."""
    sums = add_sums(record.sums for record in case.records)
    return [
        _of_weight(case, parameter, sums, probes)
        if parameter is case.group.weight
        else Comparison(_dense(parameter).flatten(), sums.total, sums.total_size, sums.precision)
        for parameter in _with_gradient(case.group).values()
    ]


def _of_weight(case: _Case, weight: nn.Parameter, sums: ProbeSums, probes: Probes) -> Comparison:
    """Set ``G v`` against the factors' product."""
    owner = case.group.owner
    matrix = owner.adapter.gradient_matrix(owner.module, _dense(weight))
    product = (matrix @ probes.matrix(*reversed(matrix.shape), matrix.dtype, matrix.device)).flatten()
    if product.shape != sums.product.shape:
        raise CaptureError(
            f"{type(owner.adapter).__name__}: the gradient of layer {case.group.name!r} as a matrix is "
            f"{tuple(matrix.shape)}, which gives {len(product)} numbers with the probes; its factors give "
            f"{len(sums.product)}. weight_order, or gradient_matrix and probe, of the adapter must agree."
        )
    return Comparison(product, sums.product, sums.product_size, sums.precision)


def _with_gradient(group: LayerGroup) -> dict[str, nn.Parameter]:
    """Return the group's parameters that have a gradient by name, the weight first; one may be frozen since."""
    return {name: parameter for name, parameter in group.parameters.items() if parameter.grad is not None}


def _is_moved(group: LayerGroup) -> bool:
    """Whether a gradient is not zero: zeros need no factors (``zero_grad(set_to_none=False)`` and no data since)."""
    return any(bool(_dense(parameter).any()) for parameter in _with_gradient(group).values())


def _dense(parameter: nn.Parameter) -> Tensor:
    """Return the gradient, made dense if an embedding left it sparse."""
    gradient = parameter.grad.detach()
    return gradient.to_dense() if gradient.is_sparse else gradient


def _with_reason(case: _Case, verdict: Verification | None, observations: Observations) -> Verification:
    """Name the likely cause of a verdict that has none yet."""
    if verdict is None:
        return Verification(False, 0.0, 1.0, _cause_of_absence(case.group, observations))
    if verdict.explained or verdict.reason:
        return verdict
    return verdict._replace(reason=_cause_of_misfit(case, observations))


def _cause_of_absence(group: LayerGroup, observations: Observations) -> str:
    """Say why there may be a gradient but no factors."""
    if not group.adds_up:
        return MIXED_KINDS
    if id(group.weight) in observations.lost:
        return LOST
    if not observations.called:
        return NEVER_RAN
    return NOT_REACHED if id(group.weight) in observations.called else OUTSIDE_MODULE


def _cause_of_misfit(case: _Case, observations: Observations) -> str:
    """Say why factors may not explain the gradient."""
    if id(case.group.weight) in observations.differentiated_twice:
        return SECOND_DERIVATIVES
    if id(case.group.weight) in observations.lost:
        return LOST
    return EARLIER_PASSES if case.records[0].onto_gradient else OTHER_USE
