"""assert_untrained_is_nominal fails a rule whose learned term does not start at zero."""

import pytest
import torch
from torch import nn

from gmn_optim.rule import RuleConfig
from gmn_optim.rule.body import PerParameterMLP, bodies
from gmn_optim.testing import assert_untrained_is_nominal


def test_a_body_that_does_not_start_at_zero_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Eager(PerParameterMLP):
        """Starts with an output that is not zero."""

        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            nn.init.ones_(self.output.bias)

    monkeypatch.setattr(bodies, "_entries", {**bodies._entries, "eager": Eager})
    with pytest.raises(
        AssertionError, match="step 0 of the untrained rule is not its nominal term's; relative errors: "
    ):
        assert_untrained_is_nominal(RuleConfig(body="eager"))


def test_the_global_random_state_stays_as_it_is() -> None:
    before = torch.get_rng_state()
    assert_untrained_is_nominal(RuleConfig())
    assert torch.equal(torch.get_rng_state(), before)
