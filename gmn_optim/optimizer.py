"""GMNOptimizer: a learned optimizer in Adam's place."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gmn_optim.averages import EvaluationMode, find_averages, warn_of_unknown_averages
from gmn_optim.capture import GradientCapture, Verification
from gmn_optim.copying import once_whole
from gmn_optim.errors import EvaluationModeError, InvalidParameterError
from gmn_optim.explanation import Routing
from gmn_optim.hyperparameters import (
    DEFAULT_NOMINAL,
    choose_rule,
    default_lr,
    require_model,
    require_one_device,
    require_one_process,
    require_own_parameters,
    require_same_weights,
    require_trainable,
    require_valid_group,
)
from gmn_optim.memory_usage import MemoryUsage, count_bytes
from gmn_optim.packing import restore_precision
from gmn_optim.places import ActiveParameter, Place, find_places, name_parameters, parameters_in
from gmn_optim.report import StepLog, StepReport, Summary
from gmn_optim.routing import find_active, warn_of_misses
from gmn_optim.rule import UpdateRule
from gmn_optim.stepping import Stepper
from gmn_optim.weights import Weights

Params = Iterable[Any]

DEFAULT_ROWS = 128
"""Rows that are kept of each layer: all of most batches of vectors, and a small share of a transformer's tokens."""


class GMNOptimizer(torch.optim.Optimizer):
    """A learned optimizer: a pretrained GradMetaNet reads each data point's gradient and joins a learned update rule.

    Hooks on the model capture every data point's activations and backprops in the ordinary forward and backward
    passes. Parameters with no such factors get the rule's nominal term; :meth:`summary` says who gets what, and why.

    Args:
        model: The module that is trained. Its parameters alone are not enough.
        params: What to train, as any torch optimizer takes it: parameters, named parameters, or groups. None for all.
        weights: Name, alias or path of weights, weights from :func:`load_weights`, or None for a nominal term alone:
            with ``nominal="kronecker_schedule_free"`` an optimizer that needs no meta-training and no schedule.
        lr: Multiplies the learned step; 1.0 is as meta-trained. Every LR scheduler works on it. With ``weights=None``
            it is the ordinary step size of the nominal term. None for 1.0, or the nominal term's own default.
        weight_decay: Decoupled; each step shrinks parameters by the share ``lr * alpha * weight_decay``, where alpha is
            the meta-learned step size, so values mean what they mean for AdamW.
        maximize: Whether to climb instead of descend.
        momentum: Decay of the nominal term's average of gradients, in place of the meta-learned one; schedulers that
            cycle momentum set it. None leaves it as meta-trained.
        nominal: Name of the nominal term, only with ``weights=None``: ``momentum``, ``adam``, ``kronecker_adam`` or
            ``kronecker_schedule_free``.
        rows: The most rows (data points times positions) whose factors are kept for a layer between backward and step;
            None for all. They are of the same data points in all layers, at evenly spaced ranks of the backprops' norm.
        seed: Of the random probe that checks factors against gradients. No other randomness is used.

    Raises:
        ModelExpectedError: ``model`` is not a module.
        InvalidParameterError: a parameter is complex, sparse, not floating or without values, or none belongs to the
            model.
        InvalidArgumentError: another argument makes no sense.
        UnknownNameError: no such weights or nominal term.
        WeightsError: the weights cannot be used.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = GMNOptimizer(model)
        >>> loss = nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.zeros(32, dtype=torch.long))
        >>> optimizer.zero_grad()
        >>> loss.backward()
        >>> optimizer.step()

    Reference:
        Gelberg et al. (2025), "GradMetaNet: An Equivariant Architecture for Learning on Gradients", arXiv 2507.01649.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        weights: str | Path | Weights | UpdateRule | None = "default",
        lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        momentum: float | None = None,
        nominal: str = DEFAULT_NOMINAL,
        rows: int | None = DEFAULT_ROWS,
        seed: int = 0,
    ) -> None:
        require_model(model)
        self._rule, identity = choose_rule(weights, nominal)
        defaults = {
            "lr": default_lr(weights, self._rule) if lr is None else lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "momentum": momentum,
            "weights": identity,
        }
        self._model = model
        self._capture: GradientCapture | None = None
        self._rows, self._seed = rows, seed
        self._stepper, self._log = Stepper(self._rule), StepLog()
        self._verdicts: dict[str, Verification] = {}
        self._places: dict[int, Place] = {}
        self._warned: set[str] = set()
        self._evaluation = EvaluationMode({})
        super().__init__(model.parameters() if params is None else params, defaults)
        require_own_parameters(model, self.param_groups)
        self._attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own lr, weight decay and so on; see ``torch.optim.Optimizer``.

        Raises:
            InvalidParameterError: a parameter is complex, sparse, not floating or without values.
            InvalidArgumentError: a value of the group makes no sense, or is an option of another optimizer.
        """
        require_valid_group({**self.defaults, **param_group})
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            require_trainable(self.param_groups[-1]["params"])
        except InvalidParameterError:
            del self.param_groups[before:]
            raise
        self._stepper.forget()
        if self._capture is not None and not self._capture.closed:
            self._capture.attach()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters whose ``.grad`` is None are left alone.

        Args:
            closure: Computes the loss and its gradients anew, called with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            InvalidParameterError: a gradient is sparse, or parameters with gradients are on several devices.
            EvaluationModeError: parameters are their averages, see :meth:`eval`.
        """
        if self._evaluation.is_on:
            raise EvaluationModeError(
                "step() was called after eval(), while parameters are their averages; call train() before the forward "
                "pass of a training step"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._move()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients and drop the factors that were captured with them."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._capture.clear()

    @torch.no_grad()
    def eval(self) -> None:
        """Set parameters to their averages, which have less of the last batches' noise, until :meth:`train` is called.

        A loop that never calls it trains as well; it evaluates, and saves, parameters as they are in training. Called
        before an evaluation, and before the trained model is saved, it is what a learning rate that decays would be
        good for. Where steps are not averaged parameters stay as they are. Models and optimizers that are saved
        together must be saved in the same of the two modes. Averages are exact while lr stays; just after it has risen
        many times, as at a warm restart, they are no use.

        Example:
            >>> model = nn.Linear(8, 1)
            >>> optimizer = GMNOptimizer(model)
            >>> for _ in range(3):
            ...     optimizer.zero_grad()
            ...     model(torch.randn(32, 8)).square().mean().backward()
            ...     optimizer.step()
            >>> trained = model.weight.detach().clone()
            >>> optimizer.eval()
            >>> torch.equal(model.weight, trained)
            False
            >>> optimizer.train()
            >>> torch.equal(model.weight, trained)
            True

        Reference:
            Defazio et al. (2024), "The road less scheduled", arXiv 2405.15682.
        """
        if not self._evaluation.is_on:
            found = find_averages(self.param_groups, self.state, self._stepper.step_size)
            warn_of_unknown_averages(self._rule, self.state)
            self._evaluation.enter(found, self.state)

    @torch.no_grad()
    def train(self) -> None:
        """Set parameters to what they were before :meth:`eval`, bit for bit; elements that were changed since stay."""
        if self._evaluation.is_on:
            self._evaluation.leave(self.state)

    def close(self) -> None:
        """Remove every hook from the model. Later steps take the nominal term alone."""
        if self._capture is not None:
            self._capture.close()
            self._capture.clear()

    def __enter__(self) -> "GMNOptimizer":
        """Return the optimizer; leaving the block closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove every hook."""
        self.close()

    def summary(self, spaces: bool = False) -> Summary:
        """Return a table with a row for each parameter: its shape, the kind of layer, who updates it, and why.

        Under a nominal term with bases the reason says what each parameter's basis is made from.

        Args:
            spaces: Whether to list the neuron spaces too, as far as forward passes have shown them.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
            >>> print(GMNOptimizer(model, weights=None, nominal="adam").summary())
            parameter | shape  | layer     | updated by | because
            --------- | ------ | --------- | ---------- | ----------------------------
            0.weight  | (3, 2) | Linear    | adam       | the rule has no learned term
            0.bias    | (3,)   | Linear    | adam       | the rule has no learned term
            1.weight  | (3,)   | LayerNorm | adam       | the rule has no learned term
            1.bias    | (3,)   | LayerNorm | adam       | the rule has no learned term
        """
        return self._routing().summary(self.param_groups, spaces)

    def stats(self) -> StepReport:
        """Return what happened so far: steps, guarded and skipped ones, and the newest step of every parameter.

        Steps between two looks at the factors are measured from the first call on.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = GMNOptimizer(model, weights=None, nominal="adam", lr=0.01)
            >>> model(torch.ones(4, 2)).sum().backward()
            >>> optimizer.step()
            >>> round(optimizer.stats().parameters["weight"].update_rms, 4)
            0.01
        """
        return self._log.describe(self._routing().served_share(self.param_groups))

    def memory_usage(self) -> MemoryUsage:
        """Return the bytes that the optimizer holds now, by what they are for.

        Memory of views counts in full, and once: a batch that is a slice of a data set counts as the data set.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = GMNOptimizer(model, weights=None, nominal="momentum")
            >>> model(torch.ones(4, 2)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.memory_usage().state  # one average for each of three parameters, and the number of the step
            16
        """
        factors = [] if self._capture is None else self._capture.kept_factors()
        return MemoryUsage(count_bytes(factors), count_bytes(self.state), count_bytes(self._rule.parameters()))

    # ------------------------------------------------------------------ state, copies

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned; the given dict stays as it is.

        Raises:
            WeightsError: the state was made with other weights, or by another optimizer.
        """
        final: list[dict[str, Any]] = []  # what pre-hooks of the user made of the given dict

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            require_same_weights(self.param_groups[0]["weights"], given["param_groups"])
            final.append(given)

        def restore(_: torch.optim.Optimizer) -> None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            restore_precision(self.state, parameters, final[0])

        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: the base's parts, the model and the rule. Hooks and flat tensors are made anew."""
        made_anew = {"_capture", "_stepper", "_evaluation", "step"}  # schedulers put a wrapped step on the instance
        state = {key: value for key, value in self.__dict__.items() if key not in made_anew}
        dropped = [
            key
            for key in state
            if "hooks" in key or key in ("_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured")
        ]
        is_closed = self._capture is not None and self._capture.closed
        return {"_is_closed": is_closed, **{key: value for key, value in state.items() if key not in dropped}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, whole (of a copy) or in parts (of ``load_state_dict``)."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch puts it into the defaults of every copy
                    group.setdefault(key, value)
        if "_model" in state:
            self._capture, self._stepper, self._evaluation = None, Stepper(self._rule), EvaluationMode({})
            is_closed = self.__dict__.pop("_is_closed", False)
            once_whole(self._model, self._attach_and_close if is_closed else self._attach)
        self._stepper.forget()
        self._evaluation.read(self.state)

    # ------------------------------------------------------------------ the step without its closure

    @torch._disable_dynamo  # inside compiled code it would be traced for seconds, and its caches passed over
    def _move(self) -> None:
        """Verify the factors, update every parameter with a usable gradient, and drop the factors."""
        require_one_device(self.param_groups)
        if self._capture is not None and not self._capture.closed:
            require_one_process()
        with nullcontext() if self._capture is None else self._capture.steady():
            self._update()
        if self._capture is not None:
            self._capture.forget()
            self._capture.enabled = self._stepper.reads_factors

    def _update(self) -> None:
        """Verify the factors, and update every parameter with a usable gradient."""
        verdicts = self._verify()
        names = name_parameters(self._model, self.param_groups)
        active = find_active(names, self.param_groups, self._places, self._log)
        if active:
            self._warn_of_misses(active)
            self._stepper.step(active, self._capture, verdicts, self.state, self._log)

    def _attach(self) -> None:
        """Hook the model if the rule looks at factors."""
        if self._rule.reads_factors:
            self._capture = GradientCapture(self._model, rows=self._rows, seed=self._seed)

    def _attach_and_close(self) -> None:
        """Become like the closed optimizer that this one is a copy of."""
        self._attach()
        self.close()

    def _verify(self) -> dict[str, Verification]:
        """Return the verdict on each captured layer."""
        if self._capture is None or self._capture.closed:
            self._places = find_places(self._capture, {})
            return {}
        if self._capture.enabled:
            self._verdicts = self._capture.verify()
            self._places = find_places(self._capture, self._verdicts)
        return self._verdicts

    def _warn_of_misses(self, active: Sequence[ActiveParameter]) -> None:
        """Warn once of layers that take part in this step, and whose gradient their factors do not explain."""
        if self._rule.config.needs_factors and self._capture is not None and not self._capture.closed:
            taking_part = [{"params": [each.parameter for each in active]}]
            warn_of_misses(self._verdicts, self._warned, self._capture, taking_part)

    def _routing(self) -> Routing:
        """Return who serves which parameter now."""
        states = {id(p): self.state[p] for p in parameters_in(self.param_groups) if p in self.state}
        sizes = {key: entries["basis_size"] for key, entries in states.items() if "basis_size" in entries}
        return Routing(self._model, self._rule.config, self._capture, self._verdicts, sizes)
