"""GMNOptimizer: a learned optimizer in Adam's place."""

import copy
import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.capture import GradientCapture, LayerFlow
from gmn_optim.capture.adapters import require_adapter
from gmn_optim.capture.verification import Verification
from gmn_optim.errors import (
    CaptureWarning,
    InvalidArgumentError,
    InvalidParameterError,
    ModelExpectedError,
    WeightsError,
)
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neurons import NeuronSets, NeuronSpaces, gather_neurons, infer_spaces
from gmn_optim.packing import overwrite_state, pack_state
from gmn_optim.report import MeasuredChunk, StepReport, Summary, SummaryRow, describe_steps, measure_chunk
from gmn_optim.rule import Chunk, Layout, RuleConfig, RuleState, Segment, UpdateRule, build_chunks
from gmn_optim.weights import Weights, load_weights

Params = Iterable[Any]


class _Active(NamedTuple):
    """A parameter that takes part in a step: its group, itself, and the layer and role that serve it."""

    name: str
    group: dict[str, Any]
    parameter: Tensor
    layer: str | None
    role: str


class _Runtime(NamedTuple):
    """What stays as it is while the same parameters take part in the steps."""

    key: tuple[dict[str, LayerFlow], list[tuple[object, ...]]]
    layout: Layout
    state: RuleState
    rule: UpdateRule
    views: list[Tensor]


class GMNOptimizer(torch.optim.Optimizer):
    """A learned optimizer: a pretrained GradMetaNet reads each data point's gradient and joins a learned update rule.

    Hooks on the model capture every data point's activations and backprops in the ordinary forward and backward
    passes. Parameters with no such factors get the rule's nominal term; :meth:`summary` says who gets what, and why.

    Args:
        model: The module that is trained. Its parameters alone are not enough.
        params: What to train, as any torch optimizer takes it: parameters, named parameters, or groups. None for all.
        weights: Name, alias or path of weights, weights from :func:`load_weights`, or None for a nominal term alone.
        lr: Multiplies the learned step; 1.0 is as meta-trained. Every LR scheduler works on it. With ``weights=None``
            it is the ordinary step size of the nominal term. None for 1.0, or the nominal term's own default.
        weight_decay: Decoupled; each step shrinks parameters by the share ``lr * alpha * weight_decay``, where alpha is
            the meta-learned step size, so values mean what they mean for AdamW.
        maximize: Whether to climb instead of descend.
        momentum: Decay of the nominal term's average of gradients, in place of the meta-learned one; schedulers that
            cycle momentum set it. None leaves it as meta-trained.
        nominal: Name of the nominal term, only with ``weights=None``.
        rows: The most rows (data points times positions) whose factors are kept for a layer between backward and step;
            None for all.
        seed: Of the random probe that checks factors against gradients. No other randomness is used.

    Raises:
        ModelExpectedError: ``model`` is not a module.
        InvalidParameterError: a parameter is complex, sparse or not floating, or none belongs to the model.
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
        nominal: str = "adam",
        rows: int | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelExpectedError(_explain_model(model))
        self._rule, identity = _choose_rule(weights, nominal)
        if lr is None:
            lr = 1.0 if weights is not None else self._rule.nominal.default_alpha
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "momentum": momentum,
            "weights": identity,
        }
        self._model = model
        self._capture: GradientCapture | None = None
        self._rows, self._seed = rows, seed
        self._forget()
        super().__init__(model.parameters() if params is None else params, defaults)
        own = {id(parameter) for parameter in model.parameters()}
        if not any(id(parameter) in own for group in self.param_groups for parameter in group["params"]):
            raise InvalidParameterError(
                "none of the parameters belongs to the model; give GMNOptimizer the model whose parameters they are"
            )
        self._attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own lr, weight decay and so on; see ``torch.optim.Optimizer``.

        Raises:
            InvalidParameterError: a parameter is complex, sparse or not floating.
            InvalidArgumentError: a value of the group makes no sense.
        """
        _validate_group({**self.defaults, **param_group})
        before = len(self.param_groups)
        super().add_param_group(param_group)
        faults = [fault for p in self.param_groups[-1]["params"] for fault in _parameter_faults(p, "parameter")]
        if faults:
            del self.param_groups[before:]
            raise InvalidParameterError("; ".join(faults[:3]) + " cannot be trained here: leave them out of params")
        self._runtime = None
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
            InvalidParameterError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        verdicts = self._verify()
        active = self._active(verdicts)
        if active:
            self._update(active, verdicts)
        if self._capture is not None:
            self._capture.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients and drop the factors that were captured with them."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._capture.clear()

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

    def summary(self) -> Summary:
        """Return a table with a row for each parameter: its shape, the kind of layer, who updates it, and why.

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
        kinds = _layer_kinds(self._model)
        rows = []
        for group in self.param_groups:
            for parameter in group["params"]:
                name = self._names()[id(parameter)]
                learned, reason = self._who(parameter, kinds.get(id(parameter)))
                who = self._rule.config.arm if learned else self._rule.config.nominal
                kind = kinds.get(id(parameter), "(outside the model)")
                rows.append(SummaryRow(name, tuple(parameter.shape), kind, who, reason))
        return Summary(tuple(rows))

    def stats(self) -> StepReport:
        """Return what happened so far: steps, guarded and skipped ones, and the newest step of every parameter.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = GMNOptimizer(model, weights=None, nominal="adam", lr=0.01)
            >>> model(torch.ones(4, 2)).sum().backward()
            >>> optimizer.step()
            >>> round(optimizer.stats().parameters["weight"].update_rms, 4)
            0.01
        """
        return describe_steps(self._steps, self._skipped, self._guarded, self._measured, self._served_share())

    # ------------------------------------------------------------------ state, copies

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned; the given dict stays as it is.

        Raises:
            WeightsError: the state was made with other weights.
        """
        final: list[dict[str, Any]] = []  # what pre-hooks of the user made of the given dict

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            self._require_same_weights(given)
            final.append(given)

        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._restore_precision(final[0]), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _require_same_weights(self, state_dict: Mapping[str, Any]) -> None:
        """Raise if a state was made with other weights."""
        wanted = self.param_groups[0]["weights"]
        for group in state_dict["param_groups"]:
            if group.get("weights", wanted) != wanted:
                raise WeightsError(
                    f"the state was made with weights {group['weights']!r}, this optimizer has {wanted!r}; make it "
                    "with the same weights, or start without the state"
                )

    def _restore_precision(self, state_dict: Mapping[str, Any]) -> None:
        """Undo the cast to the parameter's dtype, which would round, and share no memory with the given dict."""
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(own, saved, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                entry = self.state[parameter].get(key)
                if isinstance(value, Tensor) and isinstance(entry, Tensor) and value.shape == entry.shape:
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: the base's parts, the model and the rule. Hooks and flat tensors are made anew."""
        made_anew = {"_capture", "_runtime", "_converted", "step"}  # schedulers put a wrapped step on the instance
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
        self._runtime = None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch puts it into the defaults of every copy
                    group.setdefault(key, value)
        if "_model" in state:
            self._capture, self._converted = None, {}
            self._attach()
            if self.__dict__.pop("_is_closed", False):
                self.close()

    # ------------------------------------------------------------------ one step

    def _forget(self) -> None:
        """Set the counters and caches of an optimizer that has not taken a step."""
        self._runtime: _Runtime | None = None
        self._converted: dict[tuple[torch.dtype, torch.device], UpdateRule] = {}
        self._steps = 0
        self._skipped: Counter[str] = Counter()
        self._guarded: dict[str, Tensor] = {}
        self._measured: list[MeasuredChunk] = []
        self._reasons: dict[str, str] = {}
        self._warned: set[str] = set()

    def _attach(self) -> None:
        """Hook the model if the rule looks at factors."""
        if self._rule.config.gradmetanet is not None:
            self._capture = GradientCapture(self._model, rows=self._rows, seed=self._seed)

    def _verify(self) -> dict[str, Verification]:
        """Return the verdict on each captured layer, and warn once of those whose gradient is not explained."""
        if self._capture is None or self._capture.closed:
            return {}
        verdicts = self._capture.verify()
        self._reasons = {name: "" if v.explained else v.reason for name, v in verdicts.items()}
        missed = {name: reason for name, reason in self._reasons.items() if reason and name not in self._warned}
        self._warned.update(missed)
        if missed:
            listed = "; ".join(f"layer {name!r}: {reason}" for name, reason in missed.items())
            warnings.warn(
                f"no factors explain the gradient of {listed}. The nominal term alone updates it. To silence: "
                "warnings.filterwarnings('ignore', category=gmn_optim.errors.CaptureWarning).",
                CaptureWarning,
                stacklevel=4,
            )
        return verdicts

    def _active(self, verdicts: Mapping[str, Verification]) -> list[_Active]:
        """Return the parameters with a usable gradient; raise on sparse ones, count those that are not finite."""
        names = self._names()
        found = [
            (names[id(parameter)], group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.numel()
        ]
        sparse = [name for name, _, parameter in found if parameter.grad.layout != torch.strided]
        if sparse:
            raise InvalidParameterError(
                f"gradients of {', '.join(sparse)} are sparse; make their layers with sparse=False"
            )
        finite = _all_finite([parameter.grad for _, _, parameter in found])
        served = self._served(verdicts)
        active = []
        for (name, group, parameter), usable in zip(found, finite, strict=True):
            if usable:
                active.append(_Active(name, group, parameter, *served.get(id(parameter), (None, "other"))))
            else:
                self._skip(name)
        return active

    def _skip(self, name: str) -> None:
        """Count a parameter left alone because its gradient is not finite, with a warning at its first time."""
        self._skipped[name] += 1
        if self._skipped[name] == 1:
            warnings.warn(f"the gradient of {name!r} is not finite; the parameter is left as it is", stacklevel=5)

    def _served(self, verdicts: Mapping[str, Verification]) -> dict[int, tuple[str, str]]:
        """Return, for each parameter whose factors are there and right, its layer and role."""
        served: dict[int, tuple[str, str]] = {}
        if self._capture is None:
            return served
        for name, parameters in self._capture.served_parameters().items():
            if name in verdicts and verdicts[name].explained:
                served.update({id(parameter): (name, role) for role, parameter in parameters.items()})
        return served

    def _update(self, active: list[_Active], verdicts: Mapping[str, Verification]) -> None:
        """Compute the update of all active parameters, then change parameters and state."""
        runtime = self._prepare(active)
        tensors = {each.name: each.parameter for each in active}
        gradients = {
            each.name: -each.parameter.grad if each.group["maximize"] else each.parameter.grad for each in active
        }
        like = runtime.state.step
        flat_parameters = tuple(chunk.flatten(tensors).to(like) for chunk in runtime.layout.chunks)
        flat_gradients = tuple(chunk.flatten(gradients).to(like) for chunk in runtime.layout.chunks)
        groups = {each.name: each.group for each in active}
        momenta = [_momentum(groups[chunk.segments[0].name], like) for chunk in runtime.layout.chunks]
        neurons = self._neurons(runtime, verdicts, groups)
        updates, state = runtime.rule(flat_parameters, flat_gradients, runtime.state, runtime.layout, neurons, momenta)
        measured = []
        for chunk, update, gradient in zip(runtime.layout.chunks, updates, flat_gradients, strict=True):
            for name, step in chunk.unflatten(update.step).items():
                self._apply(tensors[name], step, groups[name], runtime.rule)
            self._count(chunk, update.guarded)
            lrs = [groups[segment.name]["lr"] for segment in chunk.segments]
            measured.append(measure_chunk(chunk, update, gradient, lrs))
        self._measured = measured
        overwrite_state(runtime.state, state)
        self._steps += 1

    def _apply(self, parameter: Tensor, step: Tensor, group: Mapping[str, Any], rule: UpdateRule) -> None:
        """Change one parameter."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(step).reshape(())
        if group["weight_decay"]:
            parameter.mul_(1 - lr * rule.alpha() * group["weight_decay"])
        if isinstance(lr, Tensor):
            parameter.sub_((step * lr).to(parameter.dtype))
        else:
            parameter.sub_(step.to(parameter.dtype), alpha=lr)

    def _count(self, chunk: Chunk, guarded: Tensor) -> None:
        """Add up guarded steps without waiting for the device."""
        if chunk.learned:
            for number, segment in enumerate(chunk.segments):
                count = guarded[number].long()
                self._guarded[segment.name] = (
                    self._guarded[segment.name] + count if segment.name in self._guarded else count
                )

    def _prepare(self, active: list[_Active]) -> _Runtime:
        """Return layout, flat state and rule of these parameters; those of the step before if nothing changed."""
        flows = {} if self._capture is None else self._capture.flows()
        key = (
            flows,
            [(e.name, e.layer, e.role, e.parameter.dtype, _chunk_group(e.group, self.param_groups)) for e in active],
        )
        if self._runtime is not None and self._runtime.key == key and self._shows(self._runtime, active):
            return self._runtime
        doubles = any(each.parameter.dtype == torch.float64 for each in active)
        like = torch.zeros((), dtype=torch.float64 if doubles else torch.float32, device=active[0].parameter.device)
        layout = Layout(tuple(self._chunks(active)), self._spaces(active, flows))
        state = {each.name: self.state[each.parameter] for each in active}
        rule = self._converted_rule(like)
        packed = pack_state(rule, layout, state, like)
        self._runtime = _Runtime(key, layout, packed, rule, self._entries(active))
        return self._runtime

    def _entries(self, active: list[_Active]) -> list[Tensor]:
        """Return all entries of the state of these parameters."""
        return [value for each in active for value in self.state[each.parameter].values()]

    def _shows(self, runtime: _Runtime, active: list[_Active]) -> bool:
        """Return whether the state still holds the views of the flat tensors, not what a user put there."""
        entries = self._entries(active)
        return len(entries) == len(runtime.views) and all(map(operator.is_, entries, runtime.views))

    def _chunks(self, active: list[_Active]) -> list[Chunk]:
        """Return chunks of parameters with the same steps taken, learned or not, momentum of their own or not."""
        needs_factors = self._rule.config.gradmetanet is not None
        bundles: dict[tuple[Any, ...], list[Segment]] = {}
        for each in active:
            learned = self._rule.config.body is not None and (each.layer is not None or not needs_factors)
            segment = Segment(each.name, tuple(each.parameter.shape), each.layer, each.role if learned else "other")
            taken = float(self.state[each.parameter].get("step", 0.0))
            bundles.setdefault((learned, taken, _chunk_group(each.group, self.param_groups)), []).append(segment)
        return [chunk for (learned, _, _), segments in bundles.items() for chunk in build_chunks(segments, learned)]

    def _spaces(self, active: list[_Active], flows: Mapping[str, LayerFlow]) -> NeuronSpaces | None:
        """Return the neuron spaces of the layers that take part."""
        layers = dict.fromkeys(each.layer for each in active if each.layer is not None)
        if self._capture is None or not layers:
            return None
        modules = self._capture.layers
        widths = {
            name: require_adapter(modules[name], name).widths(modules[name]) for name in modules if name in layers
        }
        return infer_spaces(widths, flows)

    def _neurons(
        self, runtime: _Runtime, verdicts: Mapping[str, Verification], groups: Mapping[str, Mapping[str, Any]]
    ) -> NeuronSets | None:
        """Return the features of the neurons from the captured factors, on the scale of the gradients."""
        if self._capture is None or runtime.layout.spaces is None:
            return None
        captured = self._capture.gradients()
        signs = {
            segment.layer: -1.0 if groups[segment.name]["maximize"] else 1.0
            for chunk in runtime.layout.chunks
            for segment in chunk.segments
        }
        like = runtime.state.step
        scaled = {}
        for ports in runtime.layout.spaces.layers:
            activations, backprops = captured[ports.name]
            scale = verdicts[ports.name].scale * signs[ports.name]
            scaled[ports.name] = DecomposedGradient(activations.to(like), backprops.to(like) * scale)
        return gather_neurons(scaled, runtime.layout.spaces, self._rule.config.data_points)

    def _converted_rule(self, like: Tensor) -> UpdateRule:
        """Return the rule with the dtype and device of a computation."""
        key = (like.dtype, like.device)
        if key not in self._converted:
            self._converted[key] = copy.deepcopy(self._rule).to(like).requires_grad_(False)
        return self._converted[key]

    # ------------------------------------------------------------------ reports

    def _names(self) -> dict[int, str]:
        """Return the name of every parameter that is trained."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                names.setdefault(id(parameter), f"group {number} parameter {place}")
        return names

    def _who(self, parameter: Tensor, kind: str | None) -> tuple[bool, str]:
        """Return whether the learned term serves a parameter, and why or why not."""
        if self._rule.config.body is None:
            return False, "the rule has no learned term"
        if self._rule.config.gradmetanet is None:
            return True, "the rule needs no factors"
        if not parameter.requires_grad:
            return False, "frozen"
        if self._capture is None or self._capture.closed:
            return False, "the optimizer is closed"
        layer = self._capture.layer_of(parameter)
        if layer is None:
            return False, f"no adapter serves {kind}" if kind else "not a parameter of the model"
        if layer not in self._reasons:
            return True, "its layer is hooked; no step yet"
        return not self._reasons[layer], self._reasons[layer] or "its factors explain its gradient"

    def _served_share(self) -> float:
        """Return the share of trained elements that the learned term serves."""
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        kinds = _layer_kinds(self._model)
        served = sum(p.numel() for p in every if self._who(p, kinds.get(id(p)))[0])
        return served / max(sum(p.numel() for p in every), 1)


def _choose_rule(weights: str | Path | Weights | UpdateRule | None, nominal: str) -> tuple[UpdateRule, str]:
    """Return the rule and the identity that a saved state must match."""
    if weights is None:
        return UpdateRule(RuleConfig(nominal=nominal, body=None, alpha=1.0)).requires_grad_(False), nominal
    if isinstance(weights, UpdateRule):
        return weights, f"{weights.config.arm} (not from a file)"
    if not isinstance(weights, Weights):
        if not isinstance(weights, str | Path):
            raise InvalidArgumentError(f"weights is {weights!r}; expected a name, a path, loaded weights or None")
        weights = load_weights(weights)
    return weights.rule, weights.identity


def _validate_group(group: Mapping[str, Any]) -> None:
    """Raise if a hyper-parameter makes no sense."""
    lr, momentum = group["lr"], group["momentum"]
    faults = []
    if isinstance(lr, Tensor) and lr.numel() != 1:
        faults.append(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif not 0.0 <= float(lr) < math.inf:
        faults.append(f"Invalid learning rate: {lr}")
    if not 0.0 <= group["weight_decay"] < math.inf:
        faults.append(f"Invalid weight_decay value: {group['weight_decay']}")
    if momentum is not None and not 0.0 <= momentum < 1.0:
        faults.append(f"Invalid momentum value: {momentum}; expected None or a decay within [0, 1)")
    if faults:
        raise InvalidArgumentError("; ".join(faults))


def _parameter_faults(parameter: Tensor, name: str) -> list[str]:
    """Return why a parameter cannot be trained, if it cannot."""
    what = f"{name} of shape {tuple(parameter.shape)}"
    if parameter.is_complex():
        return [f"{what} is complex ({parameter.dtype})"]
    if parameter.layout != torch.strided:
        return [f"{what} is sparse ({parameter.layout})"]
    if not parameter.is_floating_point():
        return [f"{what} is not floating point ({parameter.dtype})"]
    return []


def _momentum(group: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """Return a group's momentum as a tensor, or None."""
    momentum = group["momentum"]
    return None if momentum is None else torch.as_tensor(momentum, dtype=like.dtype, device=like.device)


def _chunk_group(group: Mapping[str, Any], groups: list[dict[str, Any]]) -> int | None:
    """Return the number of a group with a momentum of its own, which shares no chunk with others, else None."""
    if group["momentum"] is None:
        return None
    return next(number for number, each in enumerate(groups) if each is group)


def _all_finite(gradients: list[Tensor]) -> list[bool]:
    """Return whether each gradient is finite, with one transfer to the host."""
    if not gradients:
        return []
    norms = torch._foreach_norm(gradients, float("inf"))
    return torch.stack([norm.isfinite().to(norms[0].device) for norm in norms]).tolist()


def _layer_kinds(model: nn.Module) -> dict[int, str]:
    """Return the class name of the module that owns each parameter."""
    return {
        id(parameter): type(module).__name__
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    }


def _explain_model(given: object) -> str:
    """Say what to write instead of what was given."""
    return (
        f"GMNOptimizer needs the model itself, got {type(given).__name__}: parameters alone do not show each data "
        "point's gradient. Write GMNOptimizer(model) instead of GMNOptimizer(model.parameters())."
    )
