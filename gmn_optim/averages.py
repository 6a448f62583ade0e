"""Averages of parameters, which evaluation is better off with: the way there, and the way back.

Where a nominal term averages its steps, parameters are where gradients are best taken, between the newest point and the
average of all. What the newest point owes to the noise of the last batches is in them to a share; the average has less.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmn_optim.rule import Layout, RuleState, UpdateRule

SHARE, TRAINED, AHEAD = "average_share", "trained", "ahead"
"""Entries of a parameter's state: what the average weighs in it, and during evaluation its values in training and what
the state's e is multiplied by to get from these to the average."""

Groups = Sequence[Mapping[str, Any]]
Entries = MutableMapping[str, Any]
State = MutableMapping[Tensor, Entries]


class AveragedParameter(NamedTuple):
    """A parameter with an average of its own.

    Attributes:
        parameter: It.
        entries: Its state.
        ahead: From it to the average, as a multiple of e.
    """

    parameter: Tensor
    entries: Entries
    ahead: float


def find_averages(groups: Groups, state: State, step_size: Callable[[Tensor], float]) -> list[AveragedParameter]:
    """Return how far it is from each parameter to its average.

    In training a parameter is ``y = (1 - beta) z + beta x`` with the newest point z and the average x, and its state
    holds ``e = (x - z) / (lr alpha)``, so ``x = y + (1 - beta) lr alpha e``. That is exact as long as lr is what it was
    while steps of late were taken, and weight decay shrinks x and z alike. Where lr has fallen since it is closer to y,
    and too far away where lr has just risen many times.

    Args:
        groups: Of the optimizer.
        state: Of the optimizer.
        step_size: From the steps that a parameter has taken () to alpha.

    Reference:
        Defazio et al. (2024), "The road less scheduled", arXiv 2405.15682, equations 3 to 5.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> entries = {"step": torch.ones(()), "nominal_0": torch.ones(2), "average_share": torch.tensor(0.75)}
        >>> group = {"params": [weight], "lr": 1.0, "momentum": None}
        >>> round(find_averages([group], {weight: entries}, lambda step: 0.1)[0].ahead, 6)
        0.025
    """
    sizes: dict[float, float] = {}
    found: dict[int, AveragedParameter] = {}  # torch lets a parameter stand twice in a group
    for group in groups:
        for parameter in group["params"]:
            entries = state.get(parameter, {})
            if SHARE not in entries:
                continue
            number = float(entries["step"])
            if number not in sizes:
                sizes[number] = step_size(entries["step"])
            beta = entries[SHARE].item() if group["momentum"] is None else float(group["momentum"])
            ahead = float(group["lr"]) * sizes[number] * (1 - beta)
            found[id(parameter)] = AveragedParameter(parameter, entries, ahead)
    return [*found.values()]


def begin_shares(rule: UpdateRule, layout: Layout, states: Mapping[str, Entries], like: Tensor) -> None:
    """Make room in the states of parameters, by name, for what averages weigh, one number for all of a chunk."""
    for chunk in layout.chunks if rule.nominal.averages_steps else ():
        share = like.new_ones(())
        for entries in (states[segment.name] for segment in chunk.segments):
            share.copy_(entries.get(SHARE, share))
            entries[SHARE] = share


def keep_shares(rule: UpdateRule, layout: Layout, packed: RuleState, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Note in the states of parameters, by name, what their averages weigh, which is known after the first step."""
    shares = rule.nominal.average_shares(layout, packed.bases)
    for chunk, share in zip(layout.chunks if shares else (), shares, strict=True):
        for segment in chunk.segments:
            states[segment.name][SHARE].copy_(share)


def warn_of_unknown_averages(rule: UpdateRule, state: State) -> None:
    """Warn if steps are averaged, and a state of an older version does not tell how yet."""
    if rule.nominal.averages_steps and any("nominal_0" in e and SHARE not in e for _, e in _tensors_in(state)):
        warnings.warn(
            "eval() leaves parameters as they are: their state is of an older version, which did not keep what "
            "averages weigh; they are known after the next step",
            UserWarning,
            stacklevel=4,
        )


class EvaluationMode:
    """Whether parameters stand at their averages, and the way there and back.

    An object of its own, since libraries wrap an optimizer in objects of its class, whose attributes are not its own.

    Args:
        state: Of the optimizer. Parameters that stand at their averages have their values in training there.

    Example:
        >>> EvaluationMode({}).is_on
        False
    """

    def __init__(self, state: State) -> None:
        self.read(state)

    def read(self, state: State) -> None:
        """Find out from a state that was loaded where parameters stand."""
        self.is_on = any(TRAINED in entries for _, entries in _tensors_in(state))

    def enter(self, found: Sequence[AveragedParameter], state: State) -> None:
        """Set parameters to their averages, and keep what they were in their state; all or, on failure, none."""
        try:
            for each in found:  # all copies before the first change: memory may not suffice
                each.entries[AHEAD] = torch.tensor(each.ahead, dtype=torch.float64)
                each.entries[TRAINED] = each.parameter.detach().clone()
            for each in found:
                each.parameter.copy_(_average_of(each.entries))
        except BaseException:
            self.leave(state)
            raise
        self.is_on = True

    def leave(self, state: State) -> None:
        """Set parameters to what they were in training, but for elements that were given other values since."""
        for parameter, entries in _tensors_in(state):
            trained = entries.get(TRAINED)
            if trained is not None and trained.shape == parameter.shape:
                stays = parameter != _average_of(entries)
                parameter.copy_(torch.where(stays, parameter, trained))
            entries.pop(TRAINED, None)
            entries.pop(AHEAD, None)
        self.is_on = False


def _average_of(entries: Mapping[str, Any]) -> Tensor:
    """Return the average of a parameter, the same bits at every call."""
    trained = entries[TRAINED]
    ahead = entries[AHEAD].item() * entries["nominal_0"].reshape(trained.shape)
    return (trained + ahead).to(trained.dtype)


def _tensors_in(state: State) -> Iterator[tuple[Tensor, Entries]]:
    """Yield parameters and their entries; a user may keep other things in a state."""
    return ((parameter, entries) for parameter, entries in state.items() if isinstance(parameter, Tensor))
