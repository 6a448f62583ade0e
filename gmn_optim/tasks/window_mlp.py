"""MLPs on windows of a text, one input for each place and symbol: wide inputs, nearly all of them the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.tasks.base import Batch
from gmn_optim.tasks.byte_transformer import HELD_OUT_SHARE
from gmn_optim.tasks.mlp import build_mlp, dashed
from gmn_optim.tasks.supervised import Examples, Scaling, SplitExamples, SupervisedTask, Variation


class WindowMLPTask(SupervisedTask):
    """An MLP that tells the next symbol of a text from the symbols before it, cross-entropy loss.

    Args:
        text: Numbers of symbols (n,) uint8; the last tenth is held out.
        symbols: How many symbols there are.
        window: Symbols that it reads. Each is an input of its own at each place, scaled to mean 0 and variance 1 were
            all symbols as frequent.
        hidden: Widths of the hidden layers.
        batch_size: Data points of a batch.
        horizon: Steps of a full training.
        activation: ``relu``, ``tanh``, ``gelu`` or ``silu``.
        variation: Changes of scale and labels.

    Raises:
        InvalidArgumentError: the text is too short.

    Example:
        >>> from gmn_optim.tasks.datasets import load_text
        >>> task = WindowMLPTask(load_text("carroll"), window=4, batch_size=3)
        >>> [tuple(part.shape) for part in task.sample_batch(torch.Generator(), (2,))]
        [(2, 3, 196), (2, 3)]
        >>> task.name
        'window-4-mlp-128-relu-b3'
    """

    def __init__(
        self,
        text: Tensor,
        symbols: int = 49,
        window: int = 8,
        hidden: Sequence[int] = (128,),
        batch_size: int = 100,
        horizon: int = 1_000,
        activation: str = "relu",
        variation: Variation | None = None,
    ) -> None:
        held = int(len(text) * HELD_OUT_SHARE)
        if held <= window:
            least = int(window / HELD_OUT_SHARE)
            raise InvalidArgumentError(f"{len(text)} symbols; expected a text of more than {least} for its windows")
        self.symbols = symbols
        parts = text.split([len(text) - 2 * held, held, held])
        super().__init__(
            build_mlp((window * symbols, *hidden, symbols), activation),
            SplitExamples(*(_windows(part, window) for part in parts)),
            Scaling(torch.tensor(1 / symbols), torch.tensor((symbols - 1) ** 0.5 / symbols)),
            batch_size=batch_size,
            horizon=horizon,
            variation=variation,
        )
        self.name = f"window-{window}-mlp-{dashed(hidden)}-{activation}-b{batch_size}{self.variation.suffix}"

    def prepare(self, examples: Examples) -> Batch:
        """Return one input for each place and symbol (..., window symbols), and the symbols that follow."""
        inputs = torch.nn.functional.one_hot(examples.inputs.long(), self.symbols).flatten(-2)
        return super().prepare(Examples(inputs, examples.targets))


def _windows(text: Tensor, window: int) -> Examples:
    """Return all windows of a part of a text, and the symbol that follows each."""
    windows = text.unfold(0, window + 1, 1)
    return Examples(windows[:, :-1], windows[:, -1].long())
