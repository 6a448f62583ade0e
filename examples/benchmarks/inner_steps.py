"""How fast meta-training trains: inner steps a second, 16 unrolls of the Fashion-MNIST task side by side.

    python examples/benchmarks/inner_steps.py

Each arm has a process of its own, as a meta-training run has, and the arms are timed in turn, several rounds, so that a
drift of the machine meets all of them; the median round is shown. DS+GMN has GradMetaNet width 16 on 32 of the 128 data
points and the paper's body, three hidden layers of 32.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
from tqdm import tqdm

from gmn_optim.metatrain import Unroll
from gmn_optim.nn import GradMetaNetConfig
from gmn_optim.report import format_table
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks import tasks

ARMS = {
    "momentum": RuleConfig(body=None),
    "momentum + DS": RuleConfig(),
    "momentum + DS + GMN, slots": RuleConfig(gradmetanet=GradMetaNetConfig(width=16), data_points=32),
    "momentum + DS + GMN, moments": RuleConfig(
        gradmetanet=GradMetaNetConfig(width=16), data_points=32, memory="moments"
    ),
}


class Case:
    """One arm, ready to run truncations of perturbed rules."""

    def __init__(self, config: RuleConfig, unrolls: int, steps: int, compiled: bool) -> None:
        self.unroll = Unroll(tasks["fashion-mnist-mlp"](), UpdateRule(config), compiled)
        generator = torch.Generator().manual_seed(0)
        self.state = self.unroll.start(generator, unrolls)
        self.batches = self.unroll.batches(generator, steps, unrolls)
        self.meta = {
            name: value + 0.01 * torch.randn((unrolls, *value.shape), generator=generator)
            for name, value in self.unroll.meta_parameters().items()
        }
        self.inner_steps = unrolls * steps

    @torch.no_grad()
    def rate(self) -> float:
        """Return inner steps a second over one truncation."""
        began = time.perf_counter()
        self.unroll.run(self.meta, self.state, self.batches)
        return self.inner_steps / (time.perf_counter() - began)


def serve(pipe: Connection, arm: str, unrolls: int, steps: int, threads: int, compiled: bool) -> None:
    """Time one truncation of one arm whenever asked for one, until told to stop."""
    torch.set_num_threads(threads)
    case = Case(ARMS[arm], unrolls, steps, compiled)
    case.rate()
    while pipe.recv():
        pipe.send(case.rate())


class TimedArm:
    """An arm in a process of its own."""

    def __init__(self, arm: str, compiled: bool, options: argparse.Namespace) -> None:
        self.name = f"{arm}{', compiled' if compiled else ''}"
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = (other, arm, options.unrolls, options.steps, options.threads, compiled)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        self.rate()

    def rate(self) -> float:
        """Return inner steps a second over one truncation."""
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(False)
        self.process.join()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unrolls", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50, help="inner steps of a truncation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="measure fused steps too (a minute for each arm at first)"
    )
    options = parser.parse_args(arguments)
    variants = [(name, compiled) for name in ARMS for compiled in ([False, True] if options.compile else [False])]
    arms = [TimedArm(name, compiled, options) for name, compiled in tqdm(variants, desc="preparing")]
    rates: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for arm in arms:
            rates[arm.name].append(arm.rate())
    for arm in arms:
        arm.close()
    rows = [("arm", "inner steps a second", "least", "most")]
    for name, values in rates.items():
        rows.append((name, *(f"{value:,.0f}" for value in (statistics.median(values), min(values), max(values)))))
    print(format_table(rows))


if __name__ == "__main__":
    main()
