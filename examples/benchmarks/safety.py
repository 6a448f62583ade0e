"""Trainings out of the ordinary: an optimizer must never be a disaster where its nominal term and Adam are none.

    python examples/benchmarks/safety.py --weights default --out safety
    python examples/benchmarks/safety.py --nominal kronecker_schedule_free --out safety-nominal

Each scenario changes one thing about an ordinary training of a classifier. The optimizer, its nominal term alone and
Adam train from the same initial parameters on the same batches; of Adam's step sizes the one with the lowest final
validation loss counts, in each scenario anew. Losses are of the test set, means over the seeds; infinity stands for
what is not finite. The verdict is ``ok`` if everything stayed finite and the final loss is at most 1.05 times that of
the nominal term alone (with ``--nominal``: of Adam). A second table says how much parameters differ after 100 steps
if the loss is multiplied by a constant, beside what rounding errors alone make of them. ``--out`` gets both as
Markdown, the curves as JSON and as a picture; a stopped run goes on where it was.
"""

import argparse
import copy
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gmn_optim import GMNOptimizer
from gmn_optim.comparison.own_arms import nominal_rule
from gmn_optim.comparison.training import load_initial_parameters
from gmn_optim.report import format_table
from gmn_optim.tasks import tasks
from gmn_optim.tasks.base import Batch
from gmn_optim.tasks.supervised import Examples, SplitExamples, SupervisedTask, Variation, redraw_labels
from gmn_optim.weights import load_weights

ADAM_LRS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)
TOLERANCE = 1.05
"""Times the reference's final loss, up to which a final loss is well."""

POINTS = 20
"""Measurements of the loss in an ordinary training."""

LOSS_FACTORS, SCALED_STEPS = (1e6, 1e-6), 100
ROUNDING = 8
"""Units of the last place by which a loss is changed, to see what rounding errors alone make of a training."""

SMOKE = ["--steps", "20", "--seeds", "1", "--only", "ordinary", "labels permuted halfway"]


@dataclass(frozen=True)
class Scenario:
    """What is out of the ordinary about a training.

    Attributes:
        name: In tables.
        length: Steps, as a multiple of those of an ordinary training.
        batch_size: Data points of a batch; None for the task's own.
        label_noise: Share of training labels that are drawn anew.
        input_scale: Factor on the inputs, held-out ones too.
        weight_scale: Factor on all initial parameters.
        last_layer_zero: Whether the last layer starts at zero.
        shift: What is permuted halfway through an ordinary training, ``labels`` or ``inputs``, held-out ones too.
        constant: Share of an ordinary training at whose beginning the loss is constant, so that gradients are zero.
        broken: Whether the inputs of one batch are not numbers.
        repeated: Whether every batch is one example over and over.
        examples: Training examples that there are; None for all.
    """

    name: str
    length: float = 1.0
    batch_size: int | None = None
    label_noise: float = 0.0
    input_scale: float = 1.0
    weight_scale: float = 1.0
    last_layer_zero: bool = False
    shift: str = ""
    constant: float = 0.0
    broken: bool = False
    repeated: bool = False
    examples: int | None = None


SCENARIOS = (
    Scenario("ordinary"),
    Scenario("ten times as long", length=10.0),
    *(Scenario(f"batch size {size:,}", batch_size=size) for size in (1, 4, 16, 256, 1024, 4096)),
    *(Scenario(f"label noise {share:.0%}", label_noise=share) for share in (0.2, 0.5)),
    *(Scenario(f"inputs x {factor:g}", input_scale=factor) for factor in (1000.0, 0.001)),
    *(Scenario(f"initial parameters x {factor:g}", weight_scale=factor) for factor in (5.0, 0.1)),
    Scenario("last layer zero", last_layer_zero=True),
    *(Scenario(f"{what} permuted halfway", length=0.7, shift=what) for what in ("labels", "inputs")),
    Scenario("constant loss at first", constant=0.05),
    Scenario("one batch not finite", broken=True),
    Scenario("one example fills each batch", repeated=True),
    *(Scenario(f"{number:,} training examples", examples=number) for number in (4_000, 1_000, 250)),
)


@dataclass(frozen=True)
class Arm:
    """An optimizer.

    Attributes:
        name: In tables.
        identity: What tells it from others in the record.
        make: Makes it for a model.
    """

    name: str
    identity: str
    make: Callable[[nn.Module], torch.optim.Optimizer]


class Run(NamedTuple):
    """One training.

    Attributes:
        validation: Loss at steps 0, every, 2 every, ...; infinite where it is not finite.
        test: Likewise.
        finite: Whether all of these losses, and the parameters at the end, were finite.
        guarded: Steps whose learned part was replaced, over all parameters.
        skipped: Steps left out for a gradient that was not finite, over all parameters.
    """

    validation: list[float]
    test: list[float]
    finite: bool
    guarded: int
    skipped: int


# ---------------------------------------------------------------------- data


def make_task(name: str, scenario: Scenario) -> SupervisedTask:
    """Return the task with what the scenario changes about its data and initial parameters."""
    task = tasks[name]()
    task.batch_size = scenario.batch_size or task.batch_size
    task.variation = Variation(scenario.weight_scale, scenario.input_scale)
    if scenario.label_noise:
        inputs, labels = task.data.train
        noisy = redraw_labels(labels, int(labels.max()) + 1, scenario.label_noise)
        task.data = task.data._replace(train=Examples(inputs, noisy))
    if scenario.examples is not None:
        task.data = task.data._replace(train=Examples(*(part[: scenario.examples] for part in task.data.train)))
    return task


def permuted(task: SupervisedTask, what: str) -> SupervisedTask:
    """Return the task with its classes, or the elements of its inputs, permuted."""
    inputs, labels = task.data.train
    count = int(labels.max()) + 1 if what == "labels" else inputs.shape[-1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    other = copy.copy(task)
    other.data = SplitExamples(
        *(Examples(x, order[y]) if what == "labels" else Examples(x[..., order], y) for x, y in task.data)
    )
    return other


def load_start(task: SupervisedTask, scenario: Scenario, generator: torch.Generator) -> None:
    """Draw the initial parameters into the task's network."""
    load_initial_parameters(task, generator)
    if scenario.last_layer_zero:
        with torch.no_grad():
            for parameter in list(task.module.children())[-1].parameters():
                parameter.zero_()


# ---------------------------------------------------------------------- one training


class Training:
    """A training in an ordinary PyTorch loop.

    Args:
        task: Name of the task.
        arm: Who trains.
        scenario: What is out of the ordinary.
        seed: Of initial parameters and batches.
        usual: Steps of an ordinary training.
    """

    def __init__(self, task: str, arm: Arm, scenario: Scenario, seed: int, usual: int) -> None:
        self.task, self.scenario, self.usual = make_task(task, scenario), scenario, usual
        self.model, self._generator = self.task.module, torch.Generator().manual_seed(seed)
        load_start(self.task, scenario, self._generator)
        self.optimizer = arm.make(self.model)

    def step(self, number: int) -> None:
        """Take the step of a number, 0 the first."""
        if self.scenario.shift and number == self.usual // 2:
            self.task = permuted(self.task, self.scenario.shift)
        inputs, labels = self._batch(number)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(inputs), labels)
        if number < self.scenario.constant * self.usual:
            loss = loss * 0.0
        loss.backward()
        self.optimizer.step()

    def _batch(self, number: int) -> Batch:
        """Return the batch of a step."""
        inputs, labels = self.task.sample_batch(self._generator)
        if self.scenario.repeated:
            inputs, labels = (part[:1].expand_as(part).clone() for part in (inputs, labels))
        if self.scenario.broken and number == self.usual // 3:
            inputs = inputs * math.nan
        return inputs, labels

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Return the losses on validation and test data, infinity for what is not finite."""
        found = []
        for split in ("validation", "test"):
            inputs, labels = self.task.held_out(split)
            loss = nn.functional.cross_entropy(self.model(inputs), labels).item()
            found.append(loss if math.isfinite(loss) else math.inf)
        return found[0], found[1]


def train(task: str, arm: Arm, scenario: Scenario, seed: int, usual: int) -> Run:
    """Train once."""
    training = Training(task, arm, scenario, seed, usual)
    losses = [training.measure()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of skipped gradients, which the table counts
        for number in range(round(scenario.length * usual)):
            training.step(number)
            if (number + 1) % (usual // POINTS) == 0:
                losses.append(training.measure())
    validation, test = (list(curve) for curve in zip(*losses, strict=True))
    finite = all(map(math.isfinite, validation + test)) and all_finite(training.model.parameters())
    return Run(validation, test, finite, *count_exceptions(training.optimizer))


def all_finite(values: Iterable[Tensor]) -> bool:
    """Return whether all elements are finite."""
    return all(bool(value.isfinite().all()) for value in values)


def count_exceptions(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Return guarded and skipped steps, over all parameters."""
    if not isinstance(optimizer, GMNOptimizer):
        return 0, 0
    stats = optimizer.stats()
    return stats.guarded, stats.skipped


# ---------------------------------------------------------------------- the factor of the loss


def trained_parameters(task: str, arm: Arm, factor: float, dtype: torch.dtype, steps: int) -> list[Tensor]:
    """Return the parameters after some steps on a loss that is multiplied by a constant."""
    problem, generator = make_task(task, SCENARIOS[0]), torch.Generator().manual_seed(1)
    load_start(problem, SCENARIOS[0], generator)
    model = problem.module.to(dtype)
    optimizer = arm.make(model)
    for _ in range(steps):
        inputs, labels = problem.sample_batch(generator)
        optimizer.zero_grad()
        (factor * nn.functional.cross_entropy(model(inputs.to(dtype)), labels)).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def loss_scale_rows(task: str, arms: Sequence[Arm], steps: int) -> list[tuple[str, ...]]:
    """Return the table of the largest relative difference of a parameter tensor, over tensors."""
    rows = [("optimizer", "numbers", *(f"loss x {factor:g}" for factor in LOSS_FACTORS), "rounding alone")]
    for arm in arms:
        for dtype in (torch.float64, torch.float32):
            factors = (1.0, *LOSS_FACTORS, 1 + ROUNDING * torch.finfo(dtype).eps)
            usual, *others = (trained_parameters(task, arm, factor, dtype, steps) for factor in factors)
            cells = (f"{largest_difference(usual, other):.1e}" for other in others)
            rows.append((arm.name, str(dtype).removeprefix("torch."), *cells))
    return rows


def largest_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the largest norm of a difference against that of the left tensor."""
    return max(((b - a).norm() / a.norm()).item() for a, b in zip(left, right, strict=True))


# ---------------------------------------------------------------------- the record


class Record:
    """Trainings by what they are of, a line of JSON for each."""

    def __init__(self, path: Path) -> None:
        self._path, self._runs = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole, end, _ = (path.read_text() if path.exists() else "").rpartition("\n")
        path.write_text(whole + end)  # a kill may have cut the last line short
        for line in whole.splitlines():
            entry = json.loads(line)
            name = json.dumps(entry.pop("key"))
            curves = [[math.inf if v is None else v for v in entry.pop(n)] for n in ("validation", "test")]
            self._runs[name] = Run(*curves, **entry)

    def find(self, key: dict[str, Any], make: Callable[[], Run]) -> Run:
        """Return the training of a key, made now and written down if there is none yet."""
        name = json.dumps(key)
        if name not in self._runs:
            self._runs[name] = run = make()
            curves = {n: [v if math.isfinite(v) else None for v in getattr(run, n)] for n in ("validation", "test")}
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, **run._asdict(), **curves}) + "\n")
        return self._runs[name]


# ---------------------------------------------------------------------- all trainings


class Result(NamedTuple):
    """The trainings of one arm in one scenario, one for each seed.

    Attributes:
        arm: Name of the arm.
        runs: The trainings.
    """

    arm: str
    runs: list[Run]

    @property
    def curve(self) -> list[float]:
        """Mean test loss at every measurement."""
        return mean_curve([run.test for run in self.runs])

    @property
    def finite(self) -> bool:
        """Whether everything was."""
        return all(run.finite for run in self.runs)

    @property
    def choice(self) -> float:
        """Mean final validation loss, by which Adam's step size is chosen."""
        return statistics.fmean(run.validation[-1] for run in self.runs)

    def lowest(self, shift_at: int) -> float:
        """Return the lowest point of the mean curve, after a shift if there was one."""
        return min(self.curve[shift_at:])


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean at every point."""
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


def run_all(arms: Sequence[Arm], grid: Sequence[Arm], chosen: Sequence[Scenario], options: Any) -> list[list[Result]]:
    """Return for each scenario the results of the arms, and last that of Adam at its best."""
    record, results = Record(options.out / "runs.jsonl"), []
    with tqdm(total=len(chosen) * (len(arms) + len(grid)) * options.seeds, desc="trainings") as bar:
        for scenario in chosen:
            found = [Result(arm.name, run_seeds(record, arm, scenario, options, bar)) for arm in (*arms, *grid)]
            results.append([*found[: len(arms)], min(found[len(arms) :], key=lambda each: each.choice)])
    return results


def run_seeds(record: Record, arm: Arm, scenario: Scenario, options: Any, bar: tqdm) -> list[Run]:
    """Return an arm's trainings in a scenario."""
    runs, settings = [], {"task": options.task, "usual": options.steps}
    for seed in range(1, options.seeds + 1):
        key = {"arm": arm.identity, "scenario": asdict(scenario), "seed": seed, **settings}
        where = (options.task, arm, scenario, seed, options.steps)
        runs.append(record.find(key, lambda where=where: train(*where)))
        bar.update()
    return runs


# ---------------------------------------------------------------------- what is reported


def table_rows(chosen: Sequence[Scenario], results: Sequence[Sequence[Result]]) -> list[tuple[str, ...]]:
    """Return the table; the best loss of a scenario with a shift is that of after the shift."""
    names = [result.arm for result in results[0][:-1]] + ["Adam, tuned"]
    columns = [f"{name}: final (best)" for name in names] + [f"against {name}" for name in names[1:]]
    rows = [("scenario", *columns, "Adam's lr", "finite", "guarded", "skipped", "verdict")]
    for scenario, found in zip(chosen, results, strict=True):
        start, rule, adam = POINTS // 2 + 1 if scenario.shift else 0, found[0], found[-1]
        finals = [each.curve[-1] for each in found]
        losses = [f"{final:.4f} ({each.lowest(start):.4f})" for final, each in zip(finals, found, strict=True)]
        ratios = [describe_ratio(finals[0], final) for final in finals[1:]]
        counts = [str(sum(getattr(run, name) for run in rule.runs)) for name in ("guarded", "skipped")]
        finite = "yes" if rule.finite else "no"
        well = rule.finite and finals[0] <= TOLERANCE * finals[1]
        cells = (*losses, *ratios, adam.arm, finite, *counts, "ok" if well else "worse")
        rows.append((scenario.name, *cells))
    return rows


def describe_ratio(loss: float, reference: float) -> str:
    """Return the ratio of two losses."""
    return f"{loss / reference:.3f}" if math.isfinite(reference) else "reference not finite"


def to_json(chosen: Sequence[Scenario], results: Sequence[Sequence[Result]], scaled: Any) -> dict[str, Any]:
    """Return the mean test curves and the second table; None stands for what is not finite."""
    curves = {
        scenario.name: {each.arm: [v if math.isfinite(v) else None for v in each.curve] for each in found}
        for scenario, found in zip(chosen, results, strict=True)
    }
    return {"curves": curves, "loss_scale": scaled}


def draw(chosen: Sequence[Scenario], results: Sequence[Sequence[Result]], every: int, path: Path) -> None:
    """Draw the mean test curves, a panel for each scenario."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(chosen))
    shape = (math.ceil(len(chosen) / columns), columns)
    figure, axes = pyplot.subplots(*shape, figsize=(4 * shape[1], 2.8 * shape[0]), layout="constrained", squeeze=False)
    for panel, scenario, found in zip(axes.flat, chosen, results, strict=False):
        for each, color in zip(found, ("#c2410c", *["#2563eb"] * (len(found) - 2), "#777777"), strict=True):
            label = f"Adam, lr {each.arm}" if each is found[-1] else each.arm
            steps = range(0, every * len(each.curve), every)
            panel.plot(steps, each.curve, color=color, label=label, linewidth=1.3)
        panel.set(title=scenario.name, yscale="log")
        panel.legend(frameon=False, fontsize=7)
    for panel in axes.flat[len(chosen) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------- the command


def make_arms(weights: str, nominal: str | None) -> list[Arm]:
    """Return the optimizer and, if it has weights, its nominal term alone."""
    if nominal is not None:
        return [Arm(nominal, nominal, lambda model: GMNOptimizer(model, weights=None, nominal=nominal))]
    loaded = load_weights(weights)
    alone = nominal_rule(loaded.rule)
    return [
        Arm(Path(weights).stem, loaded.identity, lambda model: GMNOptimizer(model, weights=loaded)),
        Arm("nominal alone", f"nominal of {loaded.identity}", lambda model: GMNOptimizer(model, weights=alone)),
    ]


def make_adam_grid() -> list[Arm]:
    """Return Adam at each of its step sizes."""
    return [
        Arm(f"{lr:g}", f"adam {lr:g}", lambda model, lr=lr: torch.optim.Adam(model.parameters(), lr=lr))
        for lr in ADAM_LRS
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--weights", default="default", help="name or path of the weights")
    which.add_argument("--nominal", help="name of a nominal term, in place of weights")
    parser.add_argument("--task", default="fashion-mnist-mlp", help="a classification task of gmn_optim.tasks")
    parser.add_argument("--steps", type=int, default=1_000, help=f"of an ordinary training, a multiple of {POINTS}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="scenarios by name; all others are left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("safety"), help="folder of the tables, curves and picture")
    parser.add_argument("--smoke", action="store_true", help=f"a run of a second: {' '.join(SMOKE)}")
    options = parser.parse_args(arguments)
    if options.smoke:
        options = parser.parse_args(SMOKE, options)
    if options.steps % POINTS or options.steps <= 0:
        parser.error(f"--steps is {options.steps}; expected a multiple of {POINTS}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the scenarios."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    chosen = [each for each in SCENARIOS if options.only is None or each.name in options.only]
    arms = make_arms(options.weights, options.nominal)
    results = run_all(arms, make_adam_grid(), chosen, options)
    default = Arm("Adam, lr 0.001", "adam", lambda model: torch.optim.Adam(model.parameters()))
    scaled = loss_scale_rows(options.task, [*arms, default], min(SCALED_STEPS, options.steps))
    tables = "\n\n".join(map(format_table, (table_rows(chosen, results), scaled)))
    print(tables)
    (options.out / "safety.md").write_text(tables + "\n")
    (options.out / "safety.json").write_text(json.dumps(to_json(chosen, results, scaled), indent=1) + "\n")
    draw(chosen, results, options.steps // POINTS, options.out / "safety.png")


if __name__ == "__main__":
    main()
