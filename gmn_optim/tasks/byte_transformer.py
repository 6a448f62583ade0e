"""A small causal transformer that predicts the next symbol of a text."""

import math

import torch
from torch import Tensor, nn

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.tasks.base import AbstractTask, Batch, Parameters, Split
from gmn_optim.tasks.layer_init import default_parameters
from gmn_optim.tasks.supervised import CLASSIFIER_FLOOR, Variation

HELD_OUT_SHARE = 0.05
"""Of a text, the end: once for validation, once for test."""


class CausalSelfAttention(nn.Module):
    """Attention of each symbol to those before it, of linear layers for queries, keys, values and the output.

    Example:
        >>> CausalSelfAttention(8, 2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return features like the inputs (b, t, width)."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        # torch's fused attention has no batching rule for vmap
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        return self.output((weights @ value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention, then an MLP four times as wide, each behind a LayerNorm and beside a residual stream.

    Example:
        >>> TransformerBlock(8, 2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), CausalSelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features like the inputs (b, t, width)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


class ByteTransformer(nn.Module):
    """Embeddings of symbols and places, blocks, a LayerNorm, and logits.

    Example:
        >>> ByteTransformer(49, 16, 2, 1, 8)(torch.zeros(3, 8, dtype=torch.int64)).shape
        torch.Size([3, 8, 49])
    """

    def __init__(self, symbols: int, width: int, heads: int, blocks: int, context: int) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits (b, t, symbols) of the symbols that follow (b, t)."""
        # a place for every data point, so that each has a gradient of its own
        places = torch.arange(symbols.shape[1], device=symbols.device).expand(symbols.shape)
        return self.head(self.norm(self.blocks(self.symbol(symbols) + self.place(places))))


class ByteTransformerTask(AbstractTask):
    """A pre-LayerNorm transformer on a text, cross-entropy of the next symbol; a data point is a window of the text.

    Args:
        text: Numbers of symbols (n,) uint8; the last tenth is held out.
        symbols: How many symbols there are.
        width: Of the residual stream.
        heads: Of each attention; divides the width.
        blocks: Number of blocks.
        context: Symbols of a window.
        batch_size: Windows of a batch.
        horizon: Steps of a full training.
        variation: Changes of scale.

    Raises:
        InvalidArgumentError: the heads do not divide the width, or the text is too short.

    Reference:
        Vaswani et al. (2017), "Attention Is All You Need", arXiv 1706.03762; LayerNorm first as in Xiong et al. (2020),
        "On Layer Normalization in the Transformer Architecture", arXiv 2002.04745.

    Example:
        >>> from gmn_optim.tasks.datasets import load_text
        >>> task = ByteTransformerTask(load_text("austen"), width=16, batch_size=4)
        >>> [tuple(part.shape) for part in task.sample_batch(torch.Generator(), (3,))]
        [(3, 4, 32), (3, 4, 32)]
    """

    def __init__(
        self,
        text: Tensor,
        symbols: int = 49,
        width: int = 32,
        heads: int = 2,
        blocks: int = 1,
        context: int = 32,
        batch_size: int = 16,
        horizon: int = 1_000,
        variation: Variation | None = None,
    ) -> None:
        held = int(len(text) * HELD_OUT_SHARE)
        if width % heads or held <= context:
            raise InvalidArgumentError(
                f"{heads} heads, width {width}, {len(text)} symbols and context {context}; expected heads that divide "
                f"the width, and a text of more than {int(context / HELD_OUT_SHARE)} symbols"
            )
        self.module = ByteTransformer(symbols, width, heads, blocks, context)
        self.variation = variation or Variation()
        self.batch_size, self.horizon, self.context = batch_size, horizon, context
        self.loss_limit = 1.3 * math.log(symbols) * self.variation.limit_factor
        self.loss_floor = CLASSIFIER_FLOOR * math.log(symbols)
        parts = text.split([len(text) - 2 * held, held, held])
        self._parts = dict(zip(("train", "validation", "test"), parts, strict=True))
        self.name = f"transformer-{blocks}x{width}-h{heads}-c{context}-b{batch_size}{self.variation.suffix}"

    def init_parameters(self, generator: torch.Generator) -> Parameters:
        """Return parameters drawn as torch's layers do."""
        return default_parameters(self.module, generator, self.variation.parameter_scale)

    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Batch:
        """Return symbols (*shape, b, context) and those that follow each, from random places of the text."""
        starts = (*shape, self.batch_size)
        chosen = torch.randint(len(self._parts["train"]) - self.context, starts, generator=generator)
        return self._windows(self._parts["train"], chosen)

    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Return the mean cross-entropy ()."""
        symbols, following = batch
        logits = torch.func.functional_call(self.module, parameters, (symbols,))
        return nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())

    def held_out(self, split: Split) -> Batch:
        """Return the windows of a held-out part of the text, at most a thousand, one behind the other."""
        part = self._parts[split]
        starts = torch.arange(0, len(part) - self.context, self.context)[:1_000]
        return self._windows(part, starts)

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        """Return windows that begin at places (...), and the same shifted by one (..., context)."""
        windows = text[starts.unsqueeze(-1) + torch.arange(self.context + 1)].long()
        return windows[..., :-1], windows[..., 1:]
