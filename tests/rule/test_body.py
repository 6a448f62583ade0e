"""The body is one MLP on concatenated inputs, zero before any meta-training."""

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.nn.product import FeatureRun
from gmn_optim.rule.body import AbstractBody, bodies
from gmn_optim.rule.features import TIME_SCALES


def draw(outputs: int = 2, depth: int = 3, head: bool = True) -> AbstractBody:
    """Return a body for nine channels; with a random head if so wished."""
    torch.manual_seed(0)
    body = bodies["ds"](9, outputs, 7, depth).double()
    if head:
        nn.init.normal_(body.output.weight)
        nn.init.normal_(body.output.bias)
    return body


def inputs() -> tuple[Tensor, Tensor, list[FeatureRun]]:
    """Return features of eleven parameters and time, and runs of what GradMetaNet says, one of them said four times."""
    generator = torch.Generator().manual_seed(1)
    parameters, time, around = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((11, 9), (len(TIME_SCALES),), (5, 7))
    )
    return parameters, time, [FeatureRun(around[:2], 4), FeatureRun(around[2:4]), FeatureRun(around[4:])]


def written_out(around: list[FeatureRun]) -> Tensor:
    """Return what GradMetaNet says of each parameter (11, 7)."""
    return torch.stack([row for run in around for _ in range(run.repeats) for row in run.features])


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("name", [name for name in bodies if issubclass(bodies[name], AbstractBody)])
def test_a_body_is_zero_before_meta_training(name: str, outputs: int) -> None:
    body = bodies[name](9, outputs, 7, 2).double()
    found = body(*inputs())
    assert found.shape == (11, outputs) and not found.any()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("with_around", [True, False])
def test_it_equals_the_mlp_on_concatenated_inputs(with_around: bool, depth: int) -> None:
    body = draw(depth=depth)
    parameters, time, around = inputs()
    own = written_out(around) if with_around else torch.zeros(11, 7, dtype=torch.float64)
    for element in range(11):
        first = torch.cat([body.from_parameters.weight, body.from_time.weight, torch.eye(7).double()], dim=1)
        hidden = (first @ torch.cat([parameters[element], time, own[element]]) + body.from_parameters.bias).relu()
        for layer in body.hidden:
            hidden = (layer.weight @ hidden + layer.bias).relu()
        expected = body.output.weight @ hidden + body.output.bias
        found = body(parameters, time, around if with_around else [])[element]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_parameters_without_neurons_follow_those_with_them() -> None:
    body = draw()
    parameters, time, around = inputs()
    found, without, full = (
        body(parameters, time, around[:1]),
        body(parameters, time, []),
        body(parameters, time, around),
    )
    torch.testing.assert_close(found[:8], full[:8], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[8:], without[8:], rtol=1e-12, atol=1e-12)


def test_each_parameter_stands_by_itself() -> None:
    body = draw()
    parameters, time, _ = inputs()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        body(parameters[order], time, []), body(parameters, time, [])[order], rtol=1e-12, atol=1e-12
    )


def test_inputs_stay_as_they_are() -> None:
    parameters, time, around = inputs()
    before = [parameters.clone(), time.clone(), *(run.features.clone() for run in around)]
    draw()(parameters, time, around)
    assert all(map(torch.equal, [parameters, time, *(run.features for run in around)], before))


def test_gradients_are_those_of_finite_differences() -> None:
    body, (parameters, time, around) = draw(depth=2), inputs()
    leaves = [each.requires_grad_() for each in (parameters, time, *(run.features for run in around))]

    def outputs(parameters: Tensor, time: Tensor, *features: Tensor) -> Tensor:
        runs = [run._replace(features=each) for run, each in zip(around, features, strict=True)]
        return body(parameters, time, runs)

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
