"""What a training step costs with GMNOptimizer, against the same step with Adam, side by side in one run.

    python examples/benchmarks/step_cost.py

Each model is trained on random data with both optimizers in turn, so that a drift of the machine meets both. Ratios
are medians over rounds of whole steps: forward pass, backward pass, ``step()``; of the first steps, each of which looks
at the factors, and of steps between two looks. Memory is what the optimizer keeps between backward pass and step
(captured factors), its state, and the meta-model's weights, in copies of the parameters.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from gmn_optim import GMNOptimizer
from gmn_optim.report import format_table


class Block(nn.Module):
    """A pre-norm transformer block (b, t, d)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.keys, self.values, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, stream: Tensor) -> Tensor:
        """Return the stream with what attention and MLP add."""
        read = self.norm_attention(stream)
        q, k, v = (
            each(read).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.queries, self.keys, self.values)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        stream = stream + self.out(mixed.transpose(1, 2).flatten(2))
        return stream + self.mlp(self.norm_mlp(stream))


class GPT(nn.Module):
    """A decoder on tokens (b, t)."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, True) for _ in range(blocks)), nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (b, t, vocabulary)."""
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.head(self.blocks(self.tokens(tokens) + self.places(places)))


class ViT(nn.Module):
    """A classifier of images (b, 3, 32, 32)."""

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads, False) for _ in range(blocks)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, 10)."""
        return self.head(self.blocks(self.patches(images).flatten(2).mT + self.places).mean(1))


def cnn() -> nn.Module:
    """Return a classifier of images (b, 1, 28, 28) with about 100,000 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        *(nn.Linear(1024, 40), nn.ReLU(), nn.Linear(40, 10)),
    )


class Case(NamedTuple):
    """A model and a batch of inputs and labels for it."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def images(batch: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    return torch.randn(batch, *shape), torch.randint(0, 10, (batch,))


def text(batch: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return random tokens, and those that follow them."""
    tokens = torch.randint(0, vocabulary, (batch, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


CASES = {
    "MLP 64-32-10, batch 128": Case(
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), lambda: images(128, 64)
    ),
    "CNN 28x28, batch 128": Case(cnn, lambda: images(128, 1, 28, 28)),
    "GPT, 8 x 128 tokens": Case(lambda: GPT(256, 128, 320, 5, 8), lambda: text(8, 128, 256)),
    "ViT 32x32, batch 32": Case(lambda: ViT(256, 4, 6), lambda: images(32, 3, 32, 32)),
}
SMALL = {
    "GPT, 2 x 8 tokens": Case(lambda: GPT(16, 8, 8, 2, 1), lambda: text(2, 8, 16)),
    "ViT 32x32, batch 2": Case(lambda: ViT(8, 2, 1), lambda: images(2, 3, 32, 32)),
}
GPT2_SMALL = {"GPT-2 small, 4 x 256 tokens": Case(lambda: GPT(50257, 256, 768, 12, 12), lambda: text(4, 256, 50257))}


class Training:
    """One model with one optimizer."""

    def __init__(self, case: Case, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model = case.model()
        self.optimizer = make(self.model)
        self.factors = 0

    def step(self, batch: tuple[Tensor, Tensor]) -> float:
        """Take one step and return its seconds."""
        inputs, labels = batch
        began = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.model(inputs)
        functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()
        self.optimizer.step()
        return time.perf_counter() - began

    def copies_kept(self, batch: tuple[Tensor, Tensor]) -> list[float]:
        """Return factors, state and meta-model in units of the parameters' size, measured before a step."""
        inputs, labels = batch
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(inputs).flatten(0, -2), labels.flatten()).backward()
        kept = self.optimizer.memory_usage()
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return [kept.factors / size, kept.state / size, kept.meta_model / size]


FIRST, BETWEEN = 2, 30
"""Steps before the measured first ones, and before those that are between two looks, of which there are four."""


def measure(name: str, case: Case, rounds: int, weights: str) -> tuple[str, ...]:
    """Return a row of the table."""
    adam = Training(case, lambda model: torch.optim.Adam(model.parameters(), 1e-4))
    ours = Training(case, lambda model: GMNOptimizer(model, weights=weights, lr=0.1))
    batch, rounds = case.batch(), min(rounds, 8)
    with tqdm(total=BETWEEN + min(rounds, 4), desc=name, leave=False) as bar:

        def steps(count: int) -> list[tuple[float, float]]:
            bar.update(count)
            return [(adam.step(batch), ours.step(batch)) for _ in range(count)]

        steps(FIRST)
        first = steps(rounds)
        kept = [f"{copies:.2f}" for copies in ours.copies_kept(batch)]
        steps(BETWEEN - FIRST - rounds)
        between = steps(min(rounds, 4))
    count = sum(parameter.numel() for parameter in adam.model.parameters())
    of_adam, of_ours = (1e3 * statistics.median(each) for each in zip(*first, strict=True))
    return (name, f"{count:,}", f"{of_adam:.1f} ms", f"{of_ours:.1f} ms", spread(first), spread(between), *kept)


def spread(times: Sequence[tuple[float, float]]) -> str:
    """Return the median ratio of pairs of times, and its range."""
    ratios = [mine / theirs for theirs, mine in times]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of the first steps, 8 at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", default="default")
    parser.add_argument("--gpt2", action="store_true", help="a model of the size of GPT-2 small too: needs 12 GB")
    parser.add_argument("--smoke", action="store_true", help="tiny models, to see whether it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = SMALL if options.smoke else {**CASES, **(GPT2_SMALL if options.gpt2 else {})}
    header = ("model", "parameters", "Adam", "GMNOptimizer", "ratio", "between looks", "factors", "state", "meta-model")
    rows = [measure(name, case, options.rounds, options.weights) for name, case in cases.items()]
    print(format_table([header, *rows]))


if __name__ == "__main__":
    main()
