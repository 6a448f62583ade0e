"""Clipping, gradient scalers and mixed precision between ``backward()`` and ``step()``."""

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import CaptureWarning, GMNOptimizer
from tests.cases import assert_same, loss_of, snapshot, train
from tests.integrations.checks import Loop, assert_served, assert_unserved, falls, train_copy_nominally


def clipping_by_value(bound: float, batches: list[Tensor]) -> Loop:
    """Return a loop that cuts off elements of the gradients."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            nn.utils.clip_grad_value_(model.parameters(), bound)
            optimizer.step()
            losses.append(loss.item())
        return losses

    return loop


def test_a_bound_on_values_that_nothing_reaches_changes_nothing(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    optimizer = GMNOptimizer(model)
    clipping_by_value(100.0, batches)(model, optimizer)
    train(twin, GMNOptimizer(twin), batches)
    assert_same(model, twin)
    assert_served(optimizer, len(batches))


def test_values_cut_off_are_said_once_and_left_to_the_nominal_term(make_model, batches) -> None:
    model = make_model()
    loop = clipping_by_value(1e-3, batches * 3)
    nominal, optimizer = train_copy_nominally(model, loop), GMNOptimizer(model)
    with pytest.warns(CaptureWarning, match="changed unevenly") as caught:
        losses = loop(model, optimizer)
    assert len(caught) == 1 and falls(losses)
    assert_unserved(optimizer, snapshot(model), "changed unevenly")
    assert_same(model, nominal, rtol=1e-5, atol=1e-6)


def mixed(dtype: torch.dtype, scale: float, batches: list[Tensor], broken: int = -1) -> Loop:
    """Return the loop of torch's documentation of mixed precision, with clipping; one loss may be infinite."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        scaler, losses = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000), []
        for number, batch in enumerate(batches):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype):
                loss = loss_of(model, batch)
            scaler.scale(loss * (float("inf") if number == broken else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses

    return loop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_with_a_scaler_and_clipping_trains_with_factors(make_model, batches, dtype) -> None:
    model = make_model()
    optimizer = GMNOptimizer(model)
    assert falls(mixed(dtype, 2.0**10, batches * 3)(model, optimizer))
    assert_served(optimizer, 36)


def test_the_scale_of_a_scaler_is_immaterial_in_mixed_precision(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    optimizer = GMNOptimizer(model)
    mixed(torch.bfloat16, 2.0**10, batches)(model, optimizer)
    mixed(torch.bfloat16, 1.0, batches)(twin, GMNOptimizer(twin))
    assert_same(model, twin, rtol=1e-4, atol=1e-5)
    assert_served(optimizer, len(batches))


def test_a_step_with_infinite_gradients_is_skipped_as_if_its_batch_were_not_there(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    optimizer = GMNOptimizer(model)
    mixed(torch.bfloat16, 2.0**10, batches, broken=4)(model, optimizer)
    mixed(torch.bfloat16, 2.0**10, batches[:4] + batches[5:])(twin, GMNOptimizer(twin))
    assert_same(model, twin, rtol=1e-4, atol=1e-5)
    assert_served(optimizer, len(batches) - 1)


def test_noise_added_to_gradients_is_said_and_left_to_the_nominal_term(make_model, batches) -> None:
    torch.manual_seed(0)
    model = make_model()
    optimizer = GMNOptimizer(model)
    with pytest.warns(CaptureWarning, match="changed unevenly"):
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            for parameter in model.parameters():
                parameter.grad.add_(torch.randn(parameter.shape), alpha=0.5)
            optimizer.step()
    assert_unserved(optimizer, snapshot(model), "changed unevenly")
