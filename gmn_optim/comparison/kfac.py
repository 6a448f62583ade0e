"""K-FAC on captured factors: the Fisher matrix of a layer as a Kronecker product, inverted factor by factor."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.capture import GradientCapture
from gmn_optim.errors import InvalidArgumentError
from gmn_optim.gradients import DecomposedGradient

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class KroneckerFactors(NamedTuple):
    """The two factors of a layer's Fisher matrix, A of its inputs (i, i) and G of its outputs (o, o).

    Example:
        >>> factors = KroneckerFactors(torch.eye(2), 4 * torch.eye(1))
        >>> [each.diagonal().tolist() for each in factors.damped(0.04)]
        [[1.100000023841858, 1.100000023841858], [4.400000095367432]]
    """

    inputs: Tensor
    outputs: Tensor

    def mixed_with(self, newer: "KroneckerFactors", decay: float) -> "KroneckerFactors":
        """Return the moving average of these factors after newer ones."""
        return KroneckerFactors(*(old.lerp(new, 1 - decay) for old, new in zip(self, newer, strict=True)))

    def damped(self, damping: float) -> "KroneckerFactors":
        """Return factors whose product is about the Fisher matrix plus ``damping`` on its diagonal.

        The root of the damping is shared by the mean eigenvalues of the two (Martens and Grosse 2015, section 6.3).
        """
        means = [max(factor.diagonal().mean().item(), 1e-30) for factor in self]
        balance = (means[0] / means[1]) ** 0.5
        added = (damping**0.5 * balance, damping**0.5 / balance)
        return KroneckerFactors(
            *(
                factor + much * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
                for factor, much in zip(self, added, strict=True)
            )
        )

    def inverted(self) -> "KroneckerFactors":
        """Return both inverses."""
        return KroneckerFactors(*(torch.cholesky_inverse(torch.linalg.cholesky(factor)) for factor in self))


def kronecker_factors(gradient: DecomposedGradient, has_bias: bool) -> KroneckerFactors:
    """Return one batch's factors: A = mean over b and p of ``a a^T``, G = b times the sum over b and p of ``g g^T``.

    A bias is a weight on an input of one, the last. Backprops of a mean loss carry 1/b, which the b in G undoes.

    Args:
        gradient: Activations (b, p, i) and backprops (b, p, o).
        has_bias: Whether to add that input.

    Reference:
        Martens and Grosse (2015), arXiv 1503.05671; Grosse and Martens (2016), arXiv 1602.01407, for positions.

    Example:
        >>> gradient = DecomposedGradient(torch.ones(2, 1, 1), torch.full((2, 1, 1), 0.5))
        >>> factors = kronecker_factors(gradient, has_bias=True)
        >>> factors.inputs.tolist(), factors.outputs.tolist()
        ([[1.0, 1.0], [1.0, 1.0]], [[1.0]])
    """
    activations, backprops = gradient.activations.flatten(0, 1), gradient.backprops.flatten(0, 1)
    activations = activations.to(backprops.dtype)
    if has_bias:
        activations = torch.cat([activations, activations.new_ones(len(activations), 1)], dim=1)
    outputs = len(gradient.backprops) * backprops.mT @ backprops
    return KroneckerFactors(activations.mT @ activations / len(activations), outputs)


class KFAC(torch.optim.Optimizer):
    """SGD with momentum on the gradient that is preconditioned by the inverse of a Kronecker-factored Fisher matrix.

    Linear layers and ungrouped convolutions are preconditioned; every other parameter (norms, embeddings) gets Adam's
    step at ``rest_lr``. The Fisher matrix is the empirical one, from the labels of the data: one backward pass a step.

    Args:
        model: What is trained.
        lr: Step size.
        damping: Added to the diagonal of the Fisher matrix.
        momentum: Decay of the sum of preconditioned gradients.
        decay: Of the moving averages of the factors.
        every: Steps between two inversions.
        kl_clip: Bound on ``lr^2`` times the product of gradient and preconditioned gradient; None for no bound.
        rest_lr: Step size of the other parameters.

    Raises:
        InvalidArgumentError: a number makes no sense.

    Reference:
        Martens and Grosse (2015), "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", arXiv
        1503.05671; the bound on the step is that of Ba et al. (2017), "Distributed second-order optimization".

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 1)
        >>> optimizer = KFAC(model, lr=0.1)
        >>> loss = model(torch.ones(4, 3)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> bool(model(torch.ones(4, 3)).square().mean() < loss)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.03,
        *,
        damping: float = 0.01,
        momentum: float = 0.9,
        decay: float = 0.95,
        every: int = 10,
        kl_clip: float | None = 1e-3,
        rest_lr: float = 1e-3,
    ) -> None:
        if lr < 0 or damping <= 0 or every < 1 or not 0 <= decay < 1:
            raise InvalidArgumentError(
                f"lr={lr}, damping={damping}, every={every}, decay={decay}; expected lr of at least 0, positive "
                "damping, at least one step between inversions, and a decay within [0, 1)"
            )
        self._capture = GradientCapture(model)
        self._layers = _preconditioned_layers(self._capture)
        own = [parameter for layer in self._layers.values() for parameter in _parameters_of(layer)]
        rest = [each for each in model.parameters() if not any(each is one for one in own)]
        self._rest = torch.optim.Adam(rest, lr=rest_lr) if rest else None
        self._factors: dict[str, KroneckerFactors] = {}
        self._inverses: dict[str, KroneckerFactors] = {}
        self._steps = 0
        self._decay, self._every, self._kl_clip = decay, every, kl_clip
        super().__init__(model.parameters(), {"lr": lr, "damping": damping, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; see ``torch.optim.Optimizer``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_factors()
        self._move(self.preconditioned())
        if self._rest is not None:
            self._rest.step()
        self._capture.forget()
        self._steps += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients and drop the factors that were captured with them."""
        super().zero_grad(set_to_none)
        self._capture.clear()

    def preconditioned(self) -> list[tuple[Tensor, Tensor]]:
        """Return (parameter, preconditioned gradient) for every preconditioned parameter with a gradient."""
        pairs = []
        for name, layer in self._layers.items():
            if layer.weight.grad is not None:
                matrix = _gradient_matrix(layer)
                if name in self._inverses:
                    matrix = self._inverses[name].outputs @ matrix @ self._inverses[name].inputs
                pairs += _split(layer, matrix)
        return pairs

    def _update_factors(self) -> None:
        """Take the newest batch into the averages, and invert them when it is time or a layer is new."""
        gradients = self._capture.gradients()
        for name in self._layers.keys() & gradients.keys():
            newer = kronecker_factors(gradients[name], self._layers[name].bias is not None)
            self._factors[name] = self._factors[name].mixed_with(newer, self._decay) if name in self._factors else newer
        damping = self.param_groups[0]["damping"]
        for name, factors in self._factors.items():
            if self._steps % self._every == 0 or name not in self._inverses:
                self._inverses[name] = factors.damped(damping).inverted()

    def _move(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Step along the momentum of the bounded directions."""
        group = self.param_groups[0]
        scale = self._bound(pairs, group["lr"])
        for parameter, direction in pairs:
            buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            buffer.mul_(group["momentum"]).add_(direction, alpha=scale)
            parameter.sub_(buffer, alpha=group["lr"])

    def _bound(self, pairs: list[tuple[Tensor, Tensor]], lr: float) -> float:
        """Return by how much directions are scaled so that the step changes the model by at most ``kl_clip``."""
        if self._kl_clip is None or not pairs:
            return 1.0
        change = lr**2 * sum(float((direction * parameter.grad).sum()) for parameter, direction in pairs)
        return min(1.0, (self._kl_clip / change) ** 0.5) if change > 0 else 1.0


def _preconditioned_layers(capture: GradientCapture) -> dict[str, nn.Module]:
    """Return by name the linear layers and ungrouped convolutions that no other kind of layer shares a weight with."""
    weights = [getattr(module, "weight", None) for module in capture.layers.values()]
    return {
        name: module
        for name, module in capture.layers.items()
        if isinstance(module, nn.Linear) or (isinstance(module, _CONVOLUTIONS) and module.groups == 1)
        if sum(weight is module.weight for weight in weights) == 1 and _is_served(capture, module)
    }


def _is_served(capture: GradientCapture, layer: nn.Module) -> bool:
    """Return whether the factors give the gradients of all parameters of a layer."""
    return all(capture.layer_of(parameter) is not None for parameter in _parameters_of(layer))


def _parameters_of(layer: nn.Module) -> list[Tensor]:
    """Return weight and bias."""
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def _gradient_matrix(layer: nn.Module) -> Tensor:
    """Return the gradient (o, i), the bias as the last input."""
    weight = layer.weight.grad.flatten(1)
    return weight if layer.bias is None else torch.cat([weight, layer.bias.grad[:, None]], dim=1)


def _split(layer: nn.Module, matrix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias with their parts of a matrix (o, i)."""
    if layer.bias is None:
        return [(layer.weight, matrix.view_as(layer.weight))]
    return [(layer.weight, matrix[:, :-1].reshape(layer.weight.shape)), (layer.bias, matrix[:, -1])]
