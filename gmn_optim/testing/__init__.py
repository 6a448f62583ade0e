"""Assertions for tests of networks, layer adapters and rules of one's own.

Inputs are random, drawn from generators of their own; the global random state stays as it is. What fails, fails with
an ``AssertionError`` that tells how large the error is and where.
"""

from gmn_optim.testing.equivariance import Network as Network
from gmn_optim.testing.equivariance import Output as Output
from gmn_optim.testing.equivariance import assert_equivariant as assert_equivariant
from gmn_optim.testing.nominal import assert_untrained_is_nominal as assert_untrained_is_nominal
from gmn_optim.testing.permutations import Permutations as Permutations
from gmn_optim.testing.permutations import permute_neurons as permute_neurons
from gmn_optim.testing.permutations import permute_parameters as permute_parameters
from gmn_optim.testing.permutations import random_permutations as random_permutations
from gmn_optim.testing.recomposition import assert_recomposes as assert_recomposes
from gmn_optim.testing.tolerances import TOLERANCES as TOLERANCES
