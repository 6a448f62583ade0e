"""The update rule: its nominal term before meta-training, never far from it after, and the same however it is run."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neuron_sets import NeuronSets, gather_neurons
from gmn_optim.neurons import LayerSpec, NeuronSpaces, chain_spaces
from gmn_optim.nn import GradMetaNetConfig, LayerFeatures
from gmn_optim.rule import Layout, RuleConfig, Segment, UpdateRule, build_chunks, layout
from gmn_optim.rule.features import TIME_SCALES
from gmn_optim.rule.update import ChunkUpdate
from gmn_optim.streams import infer_spaces
from gmn_optim.testing import assert_untrained_is_nominal, permute_neurons, permute_parameters, random_permutations
from gmn_optim.weight_order import WeightOrder
from tests import tables

# Fewer rows than there are data points, so that rows are chosen.
ARMS = {name: replace(config, data_points=4) for name, config in tables.ARMS.items()}
ARMS["no neuron numbers"] = replace(
    ARMS["slots"], gradmetanet=GradMetaNetConfig(width=6, neuron_numbers=False, reduction="sum")
)
LEARNED = [arm for arm, config in ARMS.items() if config.body is not None]
IN_EIGENBASIS = [arm for arm, config in ARMS.items() if config.in_eigenbasis]
ELEMENTWISE = [arm for arm in LEARNED if arm not in IN_EIGENBASIS]
WIDTHS = [3, 4, 2]
SPACES = chain_spaces(WIDTHS)


def make_rule(config: RuleConfig, seed: int = 0) -> UpdateRule:
    """Return a rule whose meta-parameters are random, the zero-initialised ones too."""
    torch.manual_seed(seed)
    rule = UpdateRule(config).double()
    for name, parameter in rule.named_parameters():
        if name.endswith(".raw") or name.startswith("schedule"):
            nn.init.normal_(parameter, std=0.01)  # these enter an exponential, ten times as large
        elif name.startswith("body.output"):
            nn.init.normal_(parameter, std=0.3)
    return rule


class Problem(NamedTuple):
    """Parameters and a few steps' factors of a plain MLP, with a tensor that belongs to no layer."""

    parameters: dict[str, Tensor]
    factors: list[dict[str, DecomposedGradient]]
    extra: list[Tensor]

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Return all gradients of a step by name."""
        found = {"extra": self.extra[step]}
        for name, factor in self.factors[step].items():
            found[f"{name}.weight"], found[f"{name}.bias"] = factor.sum_of_outer_products(), factor.sum_of_backprops()
        return found


def make_problem(steps: int = 3, scale: float = 1.0) -> Problem:
    """Return a random problem whose backprops, and so gradients, have a scale."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    sides = list(zip(WIDTHS[1:], WIDTHS[:-1], strict=True))
    parameters = {"extra": draw(5)}
    for k, (fan_out, fan_in) in enumerate(sides):
        parameters |= {f"{k}.weight": draw(fan_out, fan_in), f"{k}.bias": draw(fan_out)}
    factors = [
        {str(k): DecomposedGradient(draw(6, 1, i), scale * draw(6, 1, o)) for k, (o, i) in enumerate(sides)}
        for _ in range(steps)
    ]
    return Problem(parameters, factors, [scale * draw(5) for _ in range(steps)])


def lay_out(config: RuleConfig, spaces: NeuronSpaces = SPACES) -> Layout:
    """Return the layout of a problem: without factors only the extra tensor is left to the nominal term."""
    learned = [
        Segment(f"{ports.name}.{role}", shape, ports.name, role)
        for ports in spaces.layers
        for role, shape in (
            ("weight", (spaces.widths[ports.output_space], spaces.widths[ports.input_space])),
            ("bias", (spaces.widths[ports.output_space],)),
        )
    ]
    extra = [Segment("extra", (5,))]
    if config.gradmetanet is None:
        return Layout(tuple(build_chunks(learned + extra, True)), spaces)
    return Layout((*build_chunks(learned, True), *build_chunks(extra, False)), spaces)


class Step(NamedTuple):
    """All tensors' steps of one call, by name."""

    taken: dict[str, Tensor]
    nominal: dict[str, Tensor]
    guarded: dict[str, bool]


def collect(places: Layout, updates: Sequence[ChunkUpdate]) -> Step:
    """Return updates by the names of their tensors."""
    step = Step({}, {}, {})
    for chunk, update in zip(places.chunks, updates, strict=True):
        step.taken.update(chunk.unflatten(update.step))
        step.nominal.update(chunk.unflatten(update.nominal))
        step.guarded.update(zip((s.name for s in chunk.segments), update.guarded.tolist(), strict=True))
    return step


def neurons_of(rule: UpdateRule, problem: Problem, step: int) -> NeuronSets | None:
    """Return what a rule with a GradMetaNet reads."""
    if not rule.config.reads_neurons:
        return None
    return gather_neurons(problem.factors[step], SPACES, rule.config.data_points)


def factors_of(rule: UpdateRule, problem: Problem, step: int) -> dict[str, DecomposedGradient] | None:
    """Return the factors that a rule with a body in the eigenbasis reads."""
    return problem.factors[step] if rule.config.in_eigenbasis else None


def run(rule: UpdateRule, problem: Problem) -> Iterator[Step]:
    """Take all steps of a problem with parameters that stay where they are."""
    places = lay_out(rule.config)
    parameters = tuple(chunk.flatten(problem.parameters) for chunk in places.chunks)
    state = rule.init_state(places, parameters[0])
    for number in range(len(problem.factors)):
        gradients = tuple(chunk.flatten(problem.gradients(number)) for chunk in places.chunks)
        arguments = parameters, gradients, state, places, neurons_of(rule, problem, number)
        updates, state = rule(*arguments, factors=factors_of(rule, problem, number))
        yield collect(places, updates)


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10, atol: float = 1e-13
) -> None:
    """Compare tensors by name."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------- the nominal term


@pytest.mark.parametrize("arm", ARMS)
def test_an_untrained_rule_is_its_nominal_term(arm: str) -> None:
    assert_untrained_is_nominal(ARMS[arm])


@pytest.mark.parametrize("arm", ELEMENTWISE)
def test_a_trained_rule_is_not_and_says_what_the_nominal_term_would_have_done(arm: str) -> None:
    rule = make_rule(ARMS[arm])
    plain = UpdateRule(replace(ARMS[arm], body=None, gradmetanet=None)).double()
    plain.load_state_dict({name: value for name, value in rule.state_dict().items() if name in plain.state_dict()})
    places = lay_out(rule.config)
    state = plain.init_state(places, torch.zeros((), dtype=torch.float64))
    for number, step in enumerate(run(rule, make_problem())):
        gradients = tuple(chunk.flatten(make_problem().gradients(number)) for chunk in places.chunks)
        updates, state = plain(gradients, gradients, state, places)
        assert_same(step.nominal, collect(places, updates).taken)
        assert not any(step.guarded.values())
        learned = [name for name in step.taken if not torch.equal(step.taken[name], step.nominal[name])]
        assert set(step.taken) - set(learned) == (set() if rule.config.gradmetanet is None else {"extra"})


def test_a_momentum_of_its_own_takes_the_place_of_the_meta_learned_one() -> None:
    rule, problem = make_rule(ARMS["momentum"]), make_problem()
    places = lay_out(rule.config)
    gradients = tuple(chunk.flatten(problem.gradients(0)) for chunk in places.chunks)
    momenta = [torch.tensor(0.5, dtype=torch.float64)] * len(places.chunks)
    updates, _ = rule(gradients, gradients, rule.init_state(places, gradients[0]), places, momenta=momenta)
    torch.testing.assert_close(updates[0].step, 0.5 * rule.alpha() * gradients[0])


# ---------------------------------------------------------------------- scale, symmetry, purity


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("arm", [arm for arm in ELEMENTWISE if not ARMS[arm].gated])
def test_the_learned_step_does_not_see_the_scale_of_the_gradients(arm: str, scale: float) -> None:
    rule = make_rule(replace(ARMS[arm], nominal="momentum")).requires_grad_(False)  # Adam's epsilon has a scale
    for found, expected in zip(run(rule, make_problem(scale=scale)), run(rule, make_problem()), strict=True):
        learned, wanted = (
            {name: step.taken[name] - step.nominal[name] for name in step.taken} for step in (found, expected)
        )
        # the difference of nearly equal numbers loses what the nominal step is larger by
        tolerance = 1e-15 * max(float(each.abs().max()) for each in found.nominal.values()) + 1e-8
        assert_same(learned, wanted, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("arm", IN_EIGENBASIS)
def test_steps_in_the_eigenbasis_do_not_see_the_scale_of_the_gradients(arm: str, scale: float) -> None:
    rule = make_rule(ARMS[arm]).requires_grad_(False)
    rule.nominal.epsilon.raw.fill_(-4.0)  # epsilon has a scale
    for found, expected in zip(run(rule, make_problem(scale=scale)), run(rule, make_problem()), strict=True):
        assert_same(found.taken, expected.taken, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("arm", ["slots", "moments", "gated", "scheduled", "no neuron numbers", *IN_EIGENBASIS])
def test_permuted_hidden_neurons_have_permuted_steps(arm: str) -> None:
    rule, problem = make_rule(ARMS[arm]), make_problem()
    order = random_permutations(SPACES, torch.Generator().manual_seed(3))

    def permuted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = [LayerFeatures(tensors[f"{k}.weight"], tensors[f"{k}.bias"]) for k in range(len(SPACES.layers))]
        moved = permute_parameters(layers, SPACES, order)
        named = {f"{k}.{role}": getattr(each, role) for k, each in enumerate(moved) for role in each._fields}
        return {"extra": tensors["extra"], **named}

    factors = [
        {
            ports.name: DecomposedGradient(
                step[ports.name].activations[..., order[ports.input_space]],
                step[ports.name].backprops[..., order[ports.output_space]],
            )
            for ports in SPACES.layers
        }
        for step in problem.factors
    ]
    twin = Problem(permuted(problem.parameters), factors, problem.extra)
    moved_sets = gather_neurons(factors[0], SPACES, 4).factors
    assert torch.equal(
        moved_sets, permute_neurons(gather_neurons(problem.factors[0], SPACES, 4).factors, SPACES, order)
    )
    for found, expected in zip(run(rule, twin), run(rule, problem), strict=True):
        assert_same(found.taken, permuted(expected.taken))


@pytest.mark.parametrize("arm", ["slots", "moments", *IN_EIGENBASIS])
def test_the_order_of_data_points_does_not_change_a_step(arm: str) -> None:
    rule, problem = make_rule(ARMS[arm]), make_problem()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    factors = [
        {name: DecomposedGradient(*(factor[order] for factor in gradient)) for name, gradient in step.items()}
        for step in problem.factors
    ]
    for found, expected in zip(run(rule, problem._replace(factors=factors)), run(rule, problem), strict=True):
        assert_same(found.taken, expected.taken)


@pytest.mark.parametrize("arm", ["slots", "moments"])
def test_factors_matter_to_the_learned_step(arm: str) -> None:
    rule, problem = make_rule(ARMS[arm]), make_problem(steps=1)
    zeroed = {name: DecomposedGradient(*map(torch.zeros_like, pair)) for name, pair in problem.factors[0].items()}
    places = lay_out(rule.config)
    parameters, gradients = (
        tuple(chunk.flatten(tensors) for chunk in places.chunks)
        for tensors in (problem.parameters, problem.gradients(0))
    )
    state = rule.init_state(places, parameters[0])
    steps = [
        rule(parameters, gradients, state, places, gather_neurons(factors, SPACES, 4))[0][0].step
        for factors in (problem.factors[0], zeroed)
    ]
    assert not torch.allclose(*steps)


@pytest.mark.parametrize("arm", ARMS)
def test_a_call_changes_none_of_its_arguments(arm: str) -> None:
    rule, problem = make_rule(ARMS[arm]), make_problem()
    places, neurons = lay_out(rule.config), neurons_of(rule, problem, 0)
    parameters, gradients = (
        tuple(chunk.flatten(tensors) for chunk in places.chunks)
        for tensors in (problem.parameters, problem.gradients(0))
    )
    _, state = rule(parameters, gradients, rule.init_state(places, parameters[0]), places, neurons)
    arguments = torch.utils._pytree.tree_leaves((parameters, gradients, state, neurons))
    before = [each.clone() for each in arguments if isinstance(each, Tensor)]
    results = [rule(parameters, gradients, state, places, neurons) for _ in range(2)]
    assert all(map(torch.equal, (each for each in arguments if isinstance(each, Tensor)), before))
    leaves = [torch.utils._pytree.tree_leaves(each) for each in results]
    assert all(map(torch.equal, *([leaf for leaf in each if isinstance(leaf, Tensor)] for each in leaves)))


@pytest.mark.parametrize("arm", ARMS)
def test_a_state_counts_its_steps_and_keeps_its_form(arm: str) -> None:
    rule, problem = make_rule(ARMS[arm]), make_problem()
    places = lay_out(rule.config)
    parameters = tuple(chunk.flatten(problem.parameters) for chunk in places.chunks)
    start = rule.init_state(places, parameters[0])
    state = start
    for _ in range(3):
        _, state = rule(parameters, parameters, state, places, neurons_of(rule, problem, 0))
    assert state.step.item() == 3.0 and all(chunk.step.item() == 3.0 for chunk in state.chunks)
    forms = [[(t.shape, t.dtype) for t in torch.utils._pytree.tree_leaves(each)] for each in (start, state)]
    assert forms[0] == forms[1]


# ---------------------------------------------------------------------- chunks, vmap, derivatives


@pytest.mark.parametrize("limit", [1, 15, 20])
@pytest.mark.parametrize("arm", ARMS)
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, arm: str, limit: int) -> None:
    rule, problem = make_rule(ARMS[arm]), make_problem()
    expected = list(run(rule, problem))
    whole = len(lay_out(rule.config).chunks)
    monkeypatch.setattr(layout, "CHUNK_SIZE", limit)
    assert len(lay_out(rule.config).chunks) > whole
    for found, wanted in zip(run(rule, problem), expected, strict=True):
        assert_same(found.taken, wanted.taken, rtol=1e-9)
        assert found.guarded == wanted.guarded


class LargeTensor(NamedTuple):
    """One parameter and the form of its layer."""

    spec: LayerSpec
    shape: tuple[int, ...]
    role: str
    order: WeightOrder | None = None


LARGE = {
    "weight": LargeTensor(LayerSpec(5, 7), (7, 5), "weight"),
    "kernel": LargeTensor(LayerSpec(6, 7), (7, 2, 3), "weight"),
    "grouped": LargeTensor(LayerSpec(6, 8, groups=2), (8, 3), "weight"),
    "inputs first": LargeTensor(LayerSpec(5, 7), (5, 7), "weight", WeightOrder((5, 7), (1, 0))),
    "transposed": LargeTensor(LayerSpec(4, 6), (4, 3, 2), "weight", WeightOrder((1, 4, 3, 2), (0, 2, 3, 1))),
    "transposed and grouped": LargeTensor(
        LayerSpec(4, 12, groups=2), (4, 3, 2), "weight", WeightOrder((2, 2, 3, 2), (0, 2, 3, 1))
    ),
    "table": LargeTensor(LayerSpec(1, 4, structure="table", rows=9), (9, 4), "table"),
    "scale": LargeTensor(LayerSpec(23, 23, structure="diagonal"), (23,), "scale"),
    "bias": LargeTensor(LayerSpec(3, 23), (23,), "bias"),
}


def steps_of(rule: UpdateRule, tensor: LargeTensor) -> list[Tensor]:
    """Return three steps of a tensor that has a chunk of its own."""
    spaces = infer_spaces({"0": tensor.spec}, {})
    places = Layout(tuple(build_chunks([Segment("w", tensor.shape, "0", tensor.role, tensor.order)], True)), spaces)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    parameter, steps = places.chunks[0].flatten({"w": draw(*tensor.shape)}), []
    state = rule.init_state(places, parameter)
    for _ in range(3):
        neurons = NeuronSets(draw(4, spaces.size, 2), draw(spaces.size, 4).square())
        arguments = (parameter,), (draw(len(parameter)),), state, places
        (update,), state = rule(*arguments, neurons if rule.config.gradmetanet else None)
        steps.append(update.step)
    return steps


@pytest.mark.parametrize("limit", [4, 20])
@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("arm", ["momentum+ds", "slots", "gated"])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, arm: str, kind: str, limit: int) -> None:
    rule = make_rule(ARMS[arm])
    expected = steps_of(rule, LARGE[kind])
    monkeypatch.setattr(layout, "TILE_SIZE", limit)
    for found, wanted in zip(steps_of(rule, LARGE[kind]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("arm", ARMS)
def test_it_maps_over_stacked_meta_parameters(arm: str) -> None:
    rules, problem = [make_rule(ARMS[arm], seed) for seed in range(3)], make_problem()
    places = lay_out(ARMS[arm])
    parameters = tuple(chunk.flatten(problem.parameters) for chunk in places.chunks)
    gradients = [tuple(chunk.flatten(problem.gradients(k)) for chunk in places.chunks) for k in range(3)]

    def train(rule: UpdateRule, meta: dict[str, Tensor]) -> tuple[Tensor, ...]:
        state, current = rule.init_state(places, parameters[0]), parameters
        for k, gradient in enumerate(gradients):
            arguments = (current, gradient, state, places, neurons_of(rule, problem, k))
            updates, state = functional_call(rule, meta, arguments, {"factors": factors_of(rule, problem, k)})
            current = tuple(p - update.step for p, update in zip(current, updates, strict=True))
        return current

    stacked, _ = stack_module_state(rules)
    found = vmap(lambda meta: train(rules[0], meta))(stacked)
    for k, rule in enumerate(rules):
        for one, other in zip(found, train(rule, dict(rule.named_parameters())), strict=True):
            torch.testing.assert_close(one[k], other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("arm", ["momentum+ds", "slots", "gated", "scheduled"])
def test_gradients_of_meta_parameters_are_those_of_finite_differences(arm: str) -> None:
    rule, problem = make_rule(ARMS[arm]), make_problem(steps=2)
    names = [name for name, _ in rule.named_parameters()]

    def taken(*meta: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            twin = UpdateRule(rule.config).double()
        for name, value in zip(names, meta, strict=True):
            owner, _, slot = name.rpartition(".")
            module = twin.get_submodule(owner)
            del module._parameters[slot]
            setattr(module, slot, value)
        return torch.cat([step.flatten() for each in run(twin, problem) for step in each.taken.values()])

    meta = tuple(parameter.detach().clone().requires_grad_() for parameter in rule.parameters())
    assert torch.autograd.gradcheck(taken, meta, fast_mode=True)


@pytest.mark.parametrize("arm", ARMS)
def test_every_meta_parameter_matters(arm: str) -> None:
    rule = make_rule(ARMS[arm])
    sum(step.square().sum() for each in run(rule, make_problem()) for step in each.taken.values()).backward()
    # bases count as constants: there is no gradient through eigenvectors; and the model has the depth of the reference
    held = {"nominal.factor_decay.raw", "nominal.depth_power"}
    idle = {name for name, p in rule.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle <= held


@pytest.mark.parametrize("scale_head", [True, False])
@pytest.mark.parametrize(("kind", "is_scale"), [("scale", True), ("bias", False)])
def test_scales_are_read_by_a_head_of_their_own_where_the_rule_has_one(
    kind: str, is_scale: bool, scale_head: bool
) -> None:
    config = replace(ARMS["moments"], gradmetanet=GradMetaNetConfig(width=6, scale_head=scale_head))
    rule = make_rule(config)
    torch.stack(steps_of(rule, LARGE[kind])).square().sum().backward()
    product = rule.gradmetanet.product
    heads = {"to_bias": product.to_bias, "to_scale": product.to_scale, "to_weight": product.to_weight}
    used = {name for name, head in heads.items() if head is not None and head.weight.grad is not None}
    assert used == {"to_scale" if is_scale and scale_head else "to_bias"}
    assert heads[used.pop()].weight.grad.any()


@pytest.mark.parametrize("arm", ARMS)
def test_float32_gives_nearly_the_same_in_float32(arm: str) -> None:
    rule, problem = make_rule(ARMS[arm]), make_problem()
    places = lay_out(rule.config)

    def taken(dtype: torch.dtype) -> list[Tensor]:
        cast = rule.to(dtype)
        parameters, gradients = (
            tuple(chunk.flatten(tensors).to(dtype) for chunk in places.chunks)
            for tensors in (problem.parameters, problem.gradients(0))
        )
        factors = {name: DecomposedGradient(*(f.to(dtype) for f in pair)) for name, pair in problem.factors[0].items()}
        neurons = gather_neurons(factors, SPACES, 4) if rule.config.reads_neurons else None
        given = {"factors": factors if rule.config.in_eigenbasis else None}
        updates, _ = cast(parameters, gradients, rule.init_state(places, parameters[0]), places, neurons, **given)
        return [update.step for update in updates]

    expected = taken(torch.float64)
    for found, wanted in zip(taken(torch.float32), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- guard, gate, schedule


class FixedBody(nn.Module):
    """Says what it is told to, whatever its features."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("outputs", outputs)

    def forward(self, parameters: Tensor, time: Tensor, around: Sequence[Tensor]) -> Tensor:
        """Return the outputs (size, 1 or 2)."""
        return self.outputs


TWO = Layout(tuple(build_chunks([Segment("w", (2, 3)), Segment("b", (2,))], True)))


def step_with(outputs: Tensor, gradient: Tensor, parameters: Tensor | None = None, **options: object) -> Step:
    """Return one step on two tensors (2, 3) and (2) with a body that says ``outputs``."""
    rule = UpdateRule(RuleConfig(alpha=0.5, beta=0.5, **options)).double().requires_grad_(False)
    rule.body = FixedBody(outputs)
    given = torch.ones(8, dtype=torch.float64) if parameters is None else parameters
    return collect(TWO, rule((given,), (gradient,), rule.init_state(TWO, given), TWO)[0])


GRADIENT = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, 1e300, 10.0])
def test_a_bad_learned_step_gives_way_to_the_nominal_one_in_its_tensor_alone(bad: float) -> None:
    outputs = torch.full((8, 1), 0.1, dtype=torch.float64)
    outputs[7] = bad
    step = step_with(outputs, GRADIENT)
    assert step.guarded == {"w": False, "b": True}
    assert torch.equal(step.taken["b"], step.nominal["b"])
    torch.testing.assert_close(step.taken["w"], step.nominal["w"] + 0.5 * 0.5 * 0.1)


def test_a_bad_gate_gives_way_to_the_nominal_step() -> None:
    outputs = torch.zeros(8, 2, dtype=torch.float64)
    outputs[7, 1] = math.nan
    step = step_with(outputs, GRADIENT, gated=True)
    assert step.guarded == {"w": False, "b": True} and torch.equal(step.taken["b"], step.nominal["b"])


@pytest.mark.parametrize(("size", "guarded"), [(1.0999, False), (1.1001, True)])
def test_the_guard_compares_root_mean_squares_with_the_tensors_size_and_a_floor(size: float, guarded: bool) -> None:
    step = step_with(torch.full((8, 1), 4.0 * size, dtype=torch.float64), GRADIENT, guard=1.0)
    assert step.guarded == {"w": guarded, "b": guarded}


@pytest.mark.parametrize("guard", [0.5, 2.0])
def test_the_guard_is_proportional_to_its_setting(guard: float) -> None:
    for share, guarded in ((0.999, False), (1.001, True)):
        outputs = torch.full((8, 1), 4.0 * 1.1 * guard * share, dtype=torch.float64)
        assert step_with(outputs, GRADIENT, guard=guard).guarded == {"w": guarded, "b": guarded}


def test_parameters_at_zero_may_still_move() -> None:
    outputs = torch.full((8, 1), 4.0 * 0.099, dtype=torch.float64)
    step = step_with(outputs, GRADIENT, torch.zeros(8, dtype=torch.float64))
    assert not any(step.guarded.values()) and not torch.equal(step.taken["w"], step.nominal["w"])


def test_a_tensor_without_gradient_has_no_learned_step_and_is_not_called_guarded() -> None:
    gradient = torch.cat([GRADIENT[:6], torch.zeros(2, dtype=torch.float64)])
    step = step_with(torch.full((8, 1), 0.1, dtype=torch.float64), gradient)
    assert not step.taken["b"].any() and not any(step.guarded.values())
    assert not torch.equal(step.taken["w"], step.nominal["w"])


def test_a_tensor_that_loses_its_gradient_goes_on_with_momentum_alone() -> None:
    rule = make_rule(ARMS["momentum+ds"])
    parameters = torch.ones(8, dtype=torch.float64)
    _, state = rule((parameters,), (GRADIENT,), rule.init_state(TWO, parameters), TWO)
    (update,), _ = rule((parameters,), (torch.zeros_like(GRADIENT),), state, TWO)
    assert torch.equal(update.step, update.nominal) and update.step.any()


@pytest.mark.parametrize(
    ("gate", "factor"), [(1e6, math.exp(2)), (-1e6, math.exp(-2)), (0.0, 1.0), (0.3, math.exp(2 * math.tanh(0.3)))]
)
def test_a_gate_scales_the_nominal_step_within_bounds(gate: float, factor: float) -> None:
    outputs = torch.tensor([[0.0, gate]], dtype=torch.float64).expand(8, 2)
    step = step_with(outputs, GRADIENT, gated=True, guard=100.0)
    for name in ("w", "b"):
        torch.testing.assert_close(step.taken[name], factor * step.nominal[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [1, 10, 1000])
def test_a_schedule_multiplies_alpha_by_the_exponential_of_its_time_features(step: int) -> None:
    rule = make_rule(ARMS["scheduled"])
    time = [math.tanh(step / scale - 1.0) for scale in TIME_SCALES]
    weights, bias = rule.schedule.weight[0].tolist(), rule.schedule.bias.item()
    expected = rule.alpha().item() * math.exp(10.0 * (sum(w * t for w, t in zip(weights, time, strict=True)) + bias))
    found = rule.step_size(torch.tensor(float(step), dtype=torch.float64))
    assert found.shape == () and found.item() == pytest.approx(expected, rel=1e-12)


def test_without_a_schedule_alpha_is_constant() -> None:
    rule = make_rule(ARMS["momentum+ds"])
    assert rule.step_size(torch.tensor(1.0)) == rule.step_size(torch.tensor(1e5)) == rule.alpha()


@pytest.mark.parametrize(("nominal", "alpha"), [("momentum", 0.1), ("adam", 0.003)])
def test_alpha_starts_where_the_configuration_or_else_the_nominal_term_says(nominal: str, alpha: float) -> None:
    assert UpdateRule(RuleConfig(nominal=nominal)).double().alpha().item() == alpha
    assert UpdateRule(RuleConfig(nominal=nominal, alpha=0.7)).double().alpha().item() == 0.7


def test_a_schedule_starts_with_the_decay_that_is_asked_for() -> None:
    rule = UpdateRule(RuleConfig(scheduled=True, decay=1.5, alpha=0.02)).double()
    for step in (0.0, 300.0, 1000.0, 1e5):
        wanted = 0.02 * math.exp(-1.5 * (math.tanh(step / 1000 - 1) + math.tanh(1)))
        assert rule.step_size(torch.tensor(step, dtype=torch.float64)).item() == pytest.approx(wanted, rel=1e-6)


def test_a_decay_without_a_schedule_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="decay = 1.0 must be 0 unless the rule is scheduled"):
        RuleConfig(decay=1.0)
