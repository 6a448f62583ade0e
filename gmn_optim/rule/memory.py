"""Factor memories: what the rule remembers of the decomposed gradients of earlier steps."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.constants import constant, constant_tensor
from gmn_optim.neuron_sets import NeuronSets
from gmn_optim.neurons import LayerPorts, NeuronSpaces
from gmn_optim.registry import Registry
from gmn_optim.rule.features import DECAYS, TINY, root, update_averages

factor_memories: Registry[type["AbstractFactorMemory"]] = Registry("factor memory")


class NeuronFeatures(NamedTuple):
    """What GradMetaNet reads: features over data points (r, n, c) and features of neurons (n, e) or None."""

    sets: Tensor
    neurons: Tensor | None


class AbstractFactorMemory(ABC):
    """A pure pair of an initial state and its update, with the features that GradMetaNet reads."""

    set_channels: int
    neuron_channels: int
    neuron_axis: int
    """Axis of the memory that neurons stand on; the next axis holds ``a``'s half, then ``g``'s."""

    @abstractmethod
    def init(self, spaces: NeuronSpaces, rows: int, like: Tensor) -> Tensor:
        """Return the empty memory of a network, with the dtype and device of ``like``."""

    @abstractmethod
    def update(
        self, memory: Tensor, sets: NeuronSets, spaces: NeuronSpaces, step: Tensor
    ) -> tuple[NeuronFeatures, Tensor]:
        """Return the features at step number ``step`` (1 at the first) and the new memory."""

    def of_layer(self, memory: Tensor, spaces: NeuronSpaces, ports: LayerPorts) -> dict[str, Tensor]:
        """Return views of what the memory holds of one layer: its activations and backprops, and what they borrowed."""
        views = {
            "memory_of_activations": self._half(memory, spaces.place(ports.input_space), 0),
            "memory_of_backprops": self._half(memory, spaces.place(ports.output_space), 1),
        }
        if spaces.spaces[ports.input_space].writer is None:
            views["memory_lent_backprops"] = self._half(memory, spaces.place(ports.input_space), 1)
        if spaces.spaces[ports.output_space].reader is None:
            views["memory_lent_activations"] = self._half(memory, spaces.place(ports.output_space), 0)
        return views

    def _half(self, memory: Tensor, place: slice, half: int) -> Tensor:
        """Return a view of the activations' half (0), or the backprops' (1), of the memory of some neurons."""
        part = memory.narrow(self.neuron_axis, place.start, place.stop - place.start)
        width = part.shape[self.neuron_axis + 1] // 2
        return part.narrow(self.neuron_axis + 1, half * width, width)


@factor_memories.register("slots")
class SlotMemory(AbstractFactorMemory):
    """Six moving averages of every row's factors (r, n, 2, 6): the paper's memory.

    A row is a quantile of the backprop norm, not a place in the batch, so the order and the size of the batch are
    free.
    """

    set_channels = 2 * (1 + len(DECAYS))
    neuron_channels = 0
    neuron_axis = 1

    def init(self, spaces: NeuronSpaces, rows: int, like: Tensor) -> Tensor:
        """Return zeros (r, n, 2, 6)."""
        return like.new_zeros(rows, spaces.size, 2, len(DECAYS))

    def update(
        self, memory: Tensor, sets: NeuronSets, spaces: NeuronSpaces, step: Tensor
    ) -> tuple[NeuronFeatures, Tensor]:
        """Return the factors and their averages (r, n, 14), and the new averages."""
        memory = update_averages(memory, sets.factors)
        stacked = torch.cat([sets.factors, memory.flatten(-2)], dim=-1)
        return NeuronFeatures(_scale_free(stacked, spaces), None), memory


@factor_memories.register("moments")
class MomentMemory(AbstractFactorMemory):
    """Moving averages of each neuron's means of a, a^2, g, g^2 over the batch (n, 4, 6).

    The current rows enter as sets; the averages as features of neurons: relative size, and mean against root mean
    square (signal against noise over the batch), of a and of g, now and for each of the six decays.
    """

    set_channels = 2
    neuron_channels = 4 * (1 + len(DECAYS))
    neuron_axis = 0

    def init(self, spaces: NeuronSpaces, rows: int, like: Tensor) -> Tensor:
        """Return zeros (n, 4, 6)."""
        return like.new_zeros(spaces.size, 4, len(DECAYS))

    def update(
        self, memory: Tensor, sets: NeuronSets, spaces: NeuronSpaces, step: Tensor
    ) -> tuple[NeuronFeatures, Tensor]:
        """Return the factors (r, n, 2) with the ratios of the moments (n, 28), and the new moments."""
        memory = update_averages(memory, sets.moments)
        decays = constant_tensor(DECAYS, memory.dtype, memory.device)
        corrected = memory / (1.0 - torch.pow(decays, step))
        means = torch.cat([sets.moments.unsqueeze(-1), corrected], dim=-1)
        first, roots = means[:, 0::2], root(means[:, 1::2])
        sizes = roots * _inverse_scale(roots.flatten(1), spaces).view_as(roots)
        neurons = torch.cat([sizes.flatten(1), (first / roots.clamp_min(TINY)).flatten(1)], dim=-1)
        return NeuronFeatures(_scale_free(sets.factors, spaces), neurons), memory


def _scale_free(features: Tensor, spaces: NeuronSpaces) -> Tensor:
    """Return features (r, n, c) divided by their root mean square over rows and over the neurons of each space."""
    return features * _inverse_scale(root((features * features).mean(0)), spaces)


def _inverse_scale(roots: Tensor, spaces: NeuronSpaces) -> Tensor:
    """Return 1 / (root mean square over each space) of values (n, c), at every neuron; 0 for a space of zeros."""
    averaging, numbers = _space_averaging(spaces, roots.dtype, roots.device)
    scale = root(averaging @ roots.square())
    return (1.0 / scale.clamp_min(TINY))[numbers]


@constant()
def _space_averaging(spaces: NeuronSpaces, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrix (spaces, n) that averages each space, and the number of each neuron's space (n)."""
    averaging = torch.block_diag(
        *(torch.full((1, max(width, 1)), 1.0 / max(width, 1), dtype=dtype)[:, :width] for width in spaces.widths)
    )
    numbers = torch.repeat_interleave(torch.arange(len(spaces.widths)), torch.tensor(spaces.widths))
    return averaging.to(device), numbers.to(device)
