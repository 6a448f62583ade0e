"""Randomness that any process can derive anew: a generator for every purpose and place in a run."""

import numpy as np
import torch

PURPOSES = ("task", "horizon", "start", "batches", "perturbations")


def derive_generator(seed: int, purpose: str, *place: int) -> torch.Generator:
    """Return the generator of a purpose at a place, the same in every process that asks.

    Args:
        seed: Of the run.
        purpose: One of :data:`PURPOSES`; generators of different purposes have nothing in common.
        place: Numbers that say where, such as slot and draw; always as many for one purpose.

    Reference:
        O'Neill (2015), "Developing a seed_seq alternative", whose hash numpy's ``SeedSequence`` computes.

    Example:
        >>> first, again = (derive_generator(0, "task", 3, 1) for _ in range(2))
        >>> torch.equal(torch.rand(2, generator=first), torch.rand(2, generator=again))
        True
    """
    words = np.random.SeedSequence([seed, PURPOSES.index(purpose), *place]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))
