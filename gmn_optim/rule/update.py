"""The update rule: one pure function that both ``GMNOptimizer.step`` and the vmapped inner loop call."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neuron_sets import NeuronSets
from gmn_optim.nn.gradmetanet import GradMetaNet
from gmn_optim.nn.product import FeatureRun
from gmn_optim.rule.basis import Basis
from gmn_optim.rule.body import bodies
from gmn_optim.rule.config import RuleConfig
from gmn_optim.rule.eigenbasis_steps import EigenbasisSteps
from gmn_optim.rule.falling_bound import FallingBound
from gmn_optim.rule.features import (
    DECAYS,
    TIME_SCALES,
    channel_scales,
    join_channels,
    parameter_features,
    time_features,
    update_averages,
)
from gmn_optim.rule.layout import ROLES, Chunk, Layout, Tile
from gmn_optim.rule.memory import factor_memories
from gmn_optim.rule.nominal import Buffers, ChunkInputs, Surroundings, nominal_terms
from gmn_optim.rule.scalars import SPEED, LogScalar
from gmn_optim.rule.training_constants import TrainingConstants

SIZE_FLOOR = 0.1
"""Added to a tensor's root mean square before the guard compares a step with it: biases start at zero."""


class ChunkState(NamedTuple):
    """What the rule remembers of a chunk.

    Attributes:
        step: Steps taken ().
        averages: Six moving averages of the gradient (size, 6); (size, 0) where no learned term reads them.
        nominal: Buffers of the nominal term, each (size).
    """

    step: Tensor
    averages: Tensor
    nominal: tuple[Tensor, ...]


class RuleState(NamedTuple):
    """What the rule remembers of a model.

    Attributes:
        chunks: One state per chunk.
        memory: The factor memory (0 without).
        step: Its step count ().
        bases: The nominal term's bases, one for each of the layout's matrices; empty for an elementwise term.
    """

    chunks: tuple[ChunkState, ...]
    memory: Tensor
    step: Tensor
    bases: tuple[Basis, ...] = ()


class ChunkUpdate(NamedTuple):
    """One chunk's step.

    Attributes:
        direction: What to subtract from the parameters at lr 1, up to the step size (size).
        nominal_direction: The same of the nominal term alone; of a body in the eigenbasis, which changes steps before
            they are averaged, the same direction.
        guarded: Per segment, whether the learned step was replaced by the nominal one (segments).
        step_size: What directions are to be multiplied by (), None for one.
    """

    direction: Tensor
    nominal_direction: Tensor
    guarded: Tensor
    step_size: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """Return what to subtract from the parameters at lr 1 (size)."""
        return self.direction if self.step_size is None else self.step_size * self.direction

    @property
    def nominal(self) -> Tensor:
        """Return what the nominal term alone would have subtracted (size)."""
        return self.nominal_direction if self.step_size is None else self.step_size * self.nominal_direction


class UpdateRule(nn.Module):
    """``theta <- theta - alpha (nominal + learned)``, its meta-parameters being the module's parameters.

    Before any meta-training the learned term is zero and the rule is its nominal term.

    Args:
        config: What the rule is made of.

    Reference:
        Gelberg et al. (2025), arXiv 2507.01649, section 7.2; Harrison et al. (2022), arXiv 2209.11208, for the
        nominal term.

    Example:
        >>> import torch
        >>> from gmn_optim.rule.layout import Chunk, Layout, Segment
        >>> layout = Layout((Chunk((Segment("w", (2,)),), learned=False),))
        >>> rule = UpdateRule(RuleConfig(nominal="momentum", body=None, alpha=1.0))
        >>> state = rule.init_state(layout)
        >>> (update,), state = rule((torch.zeros(2),), (torch.ones(2),), state, layout)
        >>> update.step
        tensor([0.1000, 0.1000], grad_fn=<MulBackward0>)
    """

    def __init__(self, config: RuleConfig) -> None:
        super().__init__()
        self.config = config
        self.nominal = nominal_terms[config.nominal]()
        self.alpha = LogScalar(config.alpha or self.nominal.default_alpha)
        if self.nominal.uses_factors:
            self.nominal.follow_every = config.follow_every if config.gradmetanet is None else 1
            self.nominal.largest_element = config.largest_element
        self.memory = factor_memories[config.memory]()
        if config.reads_neurons:
            # the network's last layer is the body's first, see PerParameterMLP
            sizes = replace(config.gradmetanet, out_channels=config.width)
            self.gradmetanet = GradMetaNet(self.memory.set_channels, self.memory.neuron_channels, sizes)
        if config.scheduled:
            self.schedule = _decaying_schedule(config.decay)
        if config.in_eigenbasis:
            self.body = bodies[config.body](config.width, config.gradmetanet, config.data_points, config.share)
            self.nominal.serve_body(self.body.buffers_per_parameter, self.body.memory_per_matrix)
            bound = FallingBound(config.largest_pace, config.annealing, config.concentration, config.epochs)
            self.body.set_up(config.setpoint, bound)
        elif config.body is not None:
            self.beta = LogScalar(config.beta)
            self.body = bodies[config.body](3 + len(DECAYS), 2 if config.gated else 1, config.width, config.depth)

    @property
    def reads_factors(self) -> bool:
        """Whether the rule looks at each data point's gradient."""
        return self.config.gradmetanet is not None or self.nominal.uses_factors

    def init_state(self, layout: Layout, like: Tensor | None = None) -> RuleState:
        """Return the state before the first step, with the dtype and device of ``like``."""
        like = torch.zeros(()) if like is None else like
        spaces = layout.spaces if self.config.reads_neurons else None
        memory = self.memory.init(spaces, self.config.data_points, like) if spaces else like.new_zeros(0)
        chunks = tuple(self.init_chunk(chunk, like) for chunk in layout.chunks)
        return RuleState(chunks, memory, like.new_zeros(()), self.nominal.init_bases(layout, like))

    def init_chunk(self, chunk: Chunk, like: Tensor) -> ChunkState:
        """Return a chunk's state before its first step."""
        averages = like.new_zeros(chunk.size, len(DECAYS) if self._learns(chunk) else 0)
        buffers = tuple(like.new_zeros(chunk.size) for _ in range(self.nominal.buffers_per_parameter))
        return ChunkState(like.new_zeros(()), averages, buffers)

    def forward(
        self,
        parameters: tuple[Tensor, ...],
        gradients: tuple[Tensor, ...],
        state: RuleState,
        layout: Layout,
        neurons: NeuronSets | None = None,
        momenta: Sequence[Tensor | None] = (),
        factors: Mapping[str, DecomposedGradient] | None = None,
        refresh: bool = True,
        follow: bool = True,
        sees: bool = True,
        age: int | None = None,
        constants: TrainingConstants | None = None,
    ) -> tuple[tuple[ChunkUpdate, ...], RuleState]:
        """Return each chunk's update and the new state.

        Args:
            parameters: Flat parameters of each chunk (size).
            gradients: Flat gradients of each chunk (size).
            state: As :meth:`init_state` or an earlier call returned it.
            layout: Which parameters stand where.
            neurons: Features of the model's neurons; needed iff the rule has a GradMetaNet and a chunk it serves.
            momenta: Per chunk, a decay of the nominal term's average of gradients in place of the meta-learned one.
            factors: Layer name to factors, of the layers whose gradient they explain; a nominal term may use them.
            refresh: Whether bases that are due are made anew. False saves their cost where a clock knows that none is
                due, see :class:`gmn_optim.rule.clock.RefreshClock`.
            follow: Whether a nominal term with bases, and a body in them, look at the factors at this step. Without it
                there need be none.
            sees: Whether the factors of this step are known. Without them second moments are followed, and what looks
                at factors holds.
            age: Which step of all bases this is, where a clock knows, which saves asking each of them. Not under vmap:
                with it, values may be looked at too.
            constants: What the earlier steps of this training found to stay; None to work it out.
        """
        embedding, memory = None, state.memory
        step = state.step + 1
        if self.config.reads_neurons and neurons is not None and layout.spaces is not None:
            features, memory = self.memory.update(memory, neurons, layout.spaces, step)
            embedding = self.gradmetanet.embed(features.sets, layout.spaces, features.neurons)
        inputs = [
            ChunkInputs(gradient, old.nominal, old.step + 1, momentum)
            for gradient, old, momentum in zip(
                gradients, state.chunks, momenta or [None] * len(layout.chunks), strict=True
            )
        ]
        constants = constants or TrainingConstants()
        change = self._learned_steps(layout, parameters, step, constants)
        known = {"sees": sees, "age": age, "constants": constants}
        around = Surroundings(layout, factors or {}, refresh, parameters, change, follow, **known)
        nominal, bases = self.nominal.directions(inputs, state.bases, around)
        if change is not None:
            results = self._scale_chunks(layout, state.chunks, inputs, nominal, change)
            return tuple(r[0] for r in results), RuleState(tuple(r[1] for r in results), memory, step, bases)
        each = zip(layout.chunks, parameters, gradients, state.chunks, nominal, strict=True)
        results = [
            self.update_chunk(chunk, parameter, gradient, chunk_state, layout, embedding, chunk_nominal)
            for chunk, parameter, gradient, chunk_state, chunk_nominal in each
        ]
        updates, states = tuple(update for update, _ in results), tuple(new for _, new in results)
        return updates, RuleState(states, memory, step, bases)

    def averages(self, parameters: tuple[Tensor, ...], state: RuleState, layout: Layout) -> tuple[Tensor, ...]:
        """Return the averages of each chunk's parameters (size), at lr 1; the parameters where steps are not averaged.

        Args:
            parameters: Flat parameters of each chunk (size).
            state: As a call returned it with these parameters.
            layout: Which parameters stand where.
        """
        shares = self.nominal.average_shares(layout, state.bases)
        if not shares:
            return parameters
        each = zip(parameters, state.chunks, shares, strict=True)
        return tuple(flat + self.step_size(own.step) * (1 - share) * own.nominal[0] for flat, own, share in each)

    def _learned_steps(
        self, layout: Layout, parameters: Sequence[Tensor], step: Tensor, constants: TrainingConstants
    ) -> EigenbasisSteps | None:
        """Return what changes the steps of matrices in their bases, where the body does."""
        if not self.config.in_eigenbasis:
            return None
        config = self.config
        alpha = self.step_size(step)
        limits = config.guard, SIZE_FLOOR, config.least_size
        return EigenbasisSteps(self.body, layout, parameters, alpha, *limits, constants)

    def _scale_chunks(
        self,
        layout: Layout,
        states: Sequence[ChunkState],
        inputs: Sequence[ChunkInputs],
        directions: Sequence[tuple[Tensor, Buffers]],
        change: EigenbasisSteps,
    ) -> list[tuple[ChunkUpdate, ChunkState]]:
        """Return each chunk's update and new state where the learned term is part of the direction already."""
        results = []
        each = zip(layout.chunks, states, inputs, directions, strict=True)
        for number, (chunk, state, (_, _, step, _), (direction, buffers)) in enumerate(each):
            guarded = change.guarded(number, chunk, direction)
            update = ChunkUpdate(direction, direction, guarded, self.step_size(step))
            results.append((update, ChunkState(step, state.averages, buffers)))
        return results

    def update_chunk(
        self,
        chunk: Chunk,
        parameters: Tensor,
        gradient: Tensor,
        state: ChunkState,
        layout: Layout,
        embedding: Tensor | None,
        nominal_term: tuple[Tensor, Buffers],
    ) -> tuple[ChunkUpdate, ChunkState]:
        """Return one chunk's update and new state.

        Args:
            chunk: The chunk.
            parameters: Its parameters (size).
            gradient: Their gradient (size).
            state: What is remembered of it.
            layout: Which parameters stand where.
            embedding: Of all neurons (n, width), or None.
            nominal_term: The nominal direction (size), and the nominal term's new buffers.
        """
        step = state.step + 1
        direction, buffers = nominal_term
        alpha = self.step_size(step)
        nominal = alpha * direction
        if not self._learns(chunk):
            guarded = torch.zeros(len(chunk.segments), dtype=torch.bool, device=nominal.device)
            return ChunkUpdate(nominal, nominal, guarded), ChunkState(step, state.averages, buffers)
        averages = update_averages(state.averages, gradient)
        channels = join_channels(chunk, (parameters, gradient, direction, averages))
        scales = channel_scales(chunk, channels)
        time = time_features(step)
        outputs = [
            self.body(
                parameter_features(chunk, channels, scales, tile), time, self._around(chunk, layout, embedding, tile)
            )
            for tile in chunk.tiles()
        ]
        learned = self._combine(outputs[0] if len(outputs) == 1 else torch.cat(outputs), direction) * alpha
        update = self._guard(chunk, nominal, learned, scales)
        return update, ChunkState(step, averages, buffers)

    def step_size(self, step: Tensor) -> Tensor:
        """Return alpha at a step (), 1 at the first, with its meta-learned schedule where the rule has one."""
        if not self.config.scheduled:
            return self.alpha()
        return self.alpha() * torch.exp(SPEED * self.schedule(time_features(step)).squeeze(-1))

    def _learns(self, chunk: Chunk) -> bool:
        """Return whether the learned term serves this chunk."""
        return chunk.learned and self.config.body is not None and not self.config.in_eigenbasis

    def _around(self, chunk: Chunk, layout: Layout, embedding: Tensor | None, tile: Tile) -> list[FeatureRun]:
        """Return what the product layer makes of the neurons on either side of each parameter of a tile."""
        if embedding is None or layout.spaces is None:
            return []
        layers = {role: chunk.layers_in_role(role) for role in ROLES}
        return self.gradmetanet.product.flat(embedding, layout.spaces, layers, tile.rows)

    def _combine(self, output: Tensor, direction: Tensor) -> Tensor:
        """Return what is added to the nominal direction (size), from the body's output (size, 1 or 2)."""
        learned = self.beta() * output[:, 0]
        if not self.config.gated:
            return learned
        # tanh bounds the gate to [1/e^2, e^2], so that one bad feature cannot undo the nominal term
        return learned + direction * torch.expm1(2.0 * torch.tanh(output[:, 1]))

    def _guard(self, chunk: Chunk, nominal: Tensor, learned: Tensor, scales: Tensor) -> ChunkUpdate:
        """Replace learned steps that are not finite or too large, and those of tensors with no gradient at all."""
        squares = learned.square()
        broken = ~squares.isfinite()
        # averages are products with zeros too, by which one tensor's NaN would reach its neighbours
        measured = torch.stack([squares.masked_fill(broken, 0.0), broken.to(squares.dtype)], dim=-1)
        mean_square, share_broken = chunk.mean_per_segment(measured).unbind(-1)
        fits = (share_broken == 0) & (mean_square.sqrt() <= self.config.guard * (scales[:, 0] + SIZE_FLOOR))
        takes = (fits & (scales[:, 1] > 0)).unsqueeze(-1)
        kept = torch.where(chunk.per_element(takes).squeeze(-1), learned, torch.zeros_like(learned))
        return ChunkUpdate(nominal + kept, nominal, ~fits)


def _decaying_schedule(decay: float) -> nn.Linear:
    """Return the map from time features to log(alpha) / 10 that decays over about a thousand steps, from 0 at first."""
    schedule = nn.Linear(len(TIME_SCALES), 1)
    nn.init.zeros_(schedule.weight)
    with torch.no_grad():
        schedule.weight[0, TIME_SCALES.index(1e3)] = -decay / SPEED
        schedule.bias.fill_(-decay * math.tanh(1.0) / SPEED)
    return schedule
