import pytest
import torch

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.frozen import trainable_mask

META = {"alpha.raw": torch.zeros(()), "body.weight": torch.zeros(2), "body.bias": torch.zeros(1)}


def test_patterns_are_of_whole_names():
    assert trainable_mask(META, ["*.raw", "body.b*"]).tolist() == [0.0, 1.0, 1.0, 0.0]
    assert trainable_mask(META, []).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("frozen", "message"), [(["alpha"], "alpha.*fit no meta-param.*body.weight"), (["*"], "nothing")]
)
def test_patterns_that_make_no_sense_are_refused(frozen, message):
    with pytest.raises(InvalidArgumentError, match=message):
        trainable_mask(META, frozen)
