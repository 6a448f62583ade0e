"""The configuration of an update rule, as it is saved in a card."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gmn_optim.configuration import is_count, refuse_unknown_keys
from gmn_optim.errors import InvalidArgumentError
from gmn_optim.nn.gradmetanet import GradMetaNetConfig
from gmn_optim.rule.body import AbstractBody, bodies
from gmn_optim.rule.memory import factor_memories
from gmn_optim.rule.nominal import nominal_terms

Check = tuple[str, bool, str]
"""The name of a value, whether it is good, and what it must be."""


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """What an update rule is made of. Arms of the paper are configurations: SGDM, DS, DS+GMN.

    Attributes:
        nominal: Name of the nominal term.
        body: Name of the learned body, or None for the nominal term alone.
        gradmetanet: Sizes of the GradMetaNet whose embedding the body reads, or None. Its ``out_channels`` have no
            effect: ``width`` takes their place.
        memory: Name of the factor memory, ``slots`` or ``moments``.
        data_points: Rows (data points times positions) that GradMetaNet reads at each step.
        width: Hidden width of the body, and channels that GradMetaNet writes for it.
        depth: Hidden layers of the body; the one in the eigenbasis has one in any case.
        gated: Whether the body also scales the nominal term, ``nominal * exp(s) + beta * d``; the paper's does not.
        scheduled: Whether alpha follows a meta-learned schedule, ``alpha exp(10 w . time features)``; the paper's is
            constant.
        decay: Initial decay of that schedule: alpha starts as ``alpha exp(-decay (tanh(t / 1000 - 1) + tanh 1))``.
        alpha: Initial step size; None for the nominal term's own.
        beta: Initial weight of the learned term.
        setpoint: A controller starts as one that holds the mean cosine between gradients and steps of late at minus
            this; 0 to start as the nominal term.
        largest_pace: A controller multiplies steps by the exponential of this at most.
        annealing: Steps in which that bound falls by log 2 in a model of two matrices with 200 inputs at most; fewer
            for more inputs, more for more matrices, see :class:`gmn_optim.rule.controller.Controller`. 0 for one that
            stays.
        concentration: How much that bound falls where gradients are made of few rows alone, see the same class; 0 for
            one that does not mind.
        epochs: In about so many times through the data of a classifier that bound falls by log 2 at least, and where
            few rows make gradients it falls the more the oftener rows were seen, see the same class; 0 for one that
            does not mind.
        share: What a body in the eigenbasis writes is multiplied by it: 1 as meta-trained, 0 for the nominal term.
        least_size: A body in the eigenbasis leaves a model to the nominal term if one of its matrices is smaller at
            first (root mean square against torch's initialization, zeros excepted); 0 to serve all.
        guard: A tensor's learned step larger than this share of its size (root mean squares, plus 0.1 for the
            size) is replaced by the nominal one.
        follow_every: Steps between two looks of a nominal term with bases, and of a body in them, at the factors, after
            the first hundred steps; before them fewer. A rule with a GradMetaNet looks at every step.
        largest_element: Of a step that preconditioners make, see
            :class:`gmn_optim.rule.schedule_free.KroneckerScheduleFreeTerm`; 0 for no bound.

    Example:
        >>> RuleConfig(nominal="adam", body=None).arm
        'adam'
        >>> RuleConfig(gradmetanet=GradMetaNetConfig()).arm
        'momentum+ds+gmn'
    """

    nominal: str = "momentum"
    body: str | None = "ds"
    gradmetanet: GradMetaNetConfig | None = None
    memory: str = "slots"
    data_points: int = 32
    width: int = 32
    depth: int = 3
    gated: bool = False
    scheduled: bool = False
    decay: float = 0.0
    alpha: float | None = None
    beta: float = 0.001
    setpoint: float = 0.0
    largest_pace: float = 0.8
    annealing: float = 0.0
    concentration: float = 0.0
    epochs: float = 0.0
    share: float = 1.0
    least_size: float = 0.0
    guard: float = 1.0
    follow_every: int = 10
    largest_element: float = 0.0

    def __post_init__(self) -> None:
        for registry, name in ((nominal_terms, self.nominal), (bodies, self.body), (factor_memories, self.memory)):
            if name is not None or registry is not bodies:
                registry[str(name)]  # raises with near matches
        checks = [*self._ranges(), *self._of_controllers(), *self._of_eigenbases(), *self._of_parts()]
        faults = [f"{name} = {getattr(self, name)!r} must be {wanted}" for name, good, wanted in checks if not good]
        if faults:
            raise InvalidArgumentError("unusable rule configuration: " + "; ".join(faults))

    def _ranges(self) -> list[Check]:
        """Return what each value is checked for by itself."""
        counts = {"data_points": 65_536, "follow_every": 1_000, "width": 4_096, "depth": 64}
        truths = "gated", "scheduled"
        return [
            *((name, is_count(getattr(self, name), most), f"whole, 1 to {most}") for name, most in counts.items()),
            ("alpha", self.alpha is None or _is_positive(self.alpha), "positive, at most 1e6"),
            *((name, _is_positive(getattr(self, name)), "positive, at most 1e6") for name in ("beta", "guard")),
            ("largest_pace", _is_positive(self.largest_pace) and self.largest_pace <= 5, "positive, at most 5"),
            ("largest_element", self._bounds_elements(), "0, or positive if the nominal term makes preconditioners"),
            ("share", self.share == 0 or _is_positive(self.share), "0 or positive, at most 1e6"),
            ("decay", self.decay == 0 or _is_positive(self.decay), "0 or positive"),
            *((name, type(getattr(self, name)) is bool, "true or false") for name in truths),
        ]

    def _bounds_elements(self) -> bool:
        """Return whether the largest element fits the nominal term."""
        has_elements = nominal_terms[self.nominal].makes_preconditioners
        return self.largest_element == 0 or (has_elements and _is_positive(self.largest_element))

    def _of_controllers(self) -> list[Check]:
        """Return checks of what belongs to a controller alone."""
        names, is_controller = ("setpoint", "annealing", "concentration", "epochs"), self.body == "controller"
        values = {name: getattr(self, name) for name in names}
        return [
            (name, value == 0 or (is_controller and _is_positive(value)), "0, or positive if the body is a controller")
            for name, value in values.items()
        ]

    def _of_eigenbases(self) -> list[Check]:
        """Return checks of what belongs to a body in the eigenbasis alone, and of its nominal term."""
        good_size = self.least_size == 0 or (self.in_eigenbasis and _is_positive(self.least_size))
        good_body = not self.in_eigenbasis or (nominal_terms[self.nominal].uses_factors and not self.gated)
        return [
            ("least_size", good_size, "0, or positive if the body is in the eigenbasis"),
            ("share", self.share == 1 or self.in_eigenbasis, "1 unless the body is in the eigenbasis"),
            ("body", good_body, "another with this nominal term, or gated"),
        ]

    def _of_parts(self) -> list[Check]:
        """Return checks of parts that need another one."""
        reads = self.gradmetanet is not None
        takes = not self.in_eigenbasis or bodies[str(self.body)].takes_gradmetanet
        return [
            ("decay", self.decay == 0 or self.scheduled, "0 unless the rule is scheduled"),
            ("gradmetanet", not reads or self.body is not None, "None if body is None"),
            ("gradmetanet", not reads or takes, "None with this body"),
        ]

    @property
    def in_eigenbasis(self) -> bool:
        """Return whether the body works in the bases of the nominal term."""
        return self.body is not None and not issubclass(bodies[self.body], AbstractBody)

    @property
    def reads_neurons(self) -> bool:
        """Return whether a GradMetaNet reads the neurons of the model; in the eigenbasis it reads others."""
        return self.gradmetanet is not None and not self.in_eigenbasis

    @property
    def needs_factors(self) -> bool:
        """Return whether the learned term can serve only parameters whose gradient factors explain."""
        return self.gradmetanet is not None or self.in_eigenbasis

    @property
    def arm(self) -> str:
        """Return the arm's name, such as ``momentum+ds+gmn``."""
        return "+".join([self.nominal, *([self.body] if self.body else []), *(["gmn"] if self.gradmetanet else [])])

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RuleConfig":
        """Return the configuration that :meth:`to_dict` wrote.

        Raises:
            InvalidArgumentError: a key is unknown (a file of a newer version) or a value makes no sense.
        """
        refuse_unknown_keys("rule configuration", values, cls)
        arguments = {"follow_every": 1, **values}  # files that do not say are of rules that looked at every step
        if arguments.get("gradmetanet") is not None:
            arguments["gradmetanet"] = GradMetaNetConfig.from_dict(arguments["gradmetanet"])
        return cls(**arguments)


def _is_positive(value: object) -> bool:
    """Return whether a value, perhaps from a file, is a positive number of a sensible size."""
    return type(value) in (int, float) and 0 < value <= 1e6
