"""The command ``gmn-optim compare``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from gmn_optim.errors import InvalidArgumentError

DEFAULT_OUT = Path("comparison")


def add_compare(commands: Any) -> None:
    """Add ``compare`` to the commands of a parser."""
    command = commands.add_parser(
        "compare",
        help="compare optimizers on tasks",
        description="Tune optimizers on validation data, train them on other seeds, and compare them on test data with "
        "tuned Adam. A comparison that was stopped goes on by the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("task", nargs="*", metavar="TASK", help="names of tasks")
    command.add_argument("--arms", nargs="+", metavar="ARM", default=[], help="names of arms; by default all")
    command.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where lines, tables and pictures go")
    command.add_argument("--report", type=Path, metavar="DIR", help="only write the tables and pictures of DIR anew")
    command.add_argument(
        "--rivals", nargs="+", metavar="ARM", help="in a report, arms whose best all are compared with"
    )
    command.add_argument(
        "--medians", type=int, metavar="N", help="in a report, test curves are running medians of N measurements"
    )
    command.add_argument("--seeds", type=int, default=5, help="trainings of each arm on the test set")
    command.add_argument("--tuning-seeds", type=int, default=2, help="trainings at each point of a grid")
    command.add_argument("--steps", type=int, help="of a training; by default the task's horizon")
    command.add_argument("--every", type=int, default=20, help="steps between two measurements")
    command.add_argument("--examples", type=int, default=2_000, help="of a held-out set at most")
    command.add_argument("--rounds", type=int, default=5, help="of the timing against Adam; 0 for none")
    command.add_argument("--threads", type=int, default=1, help="processor threads of every arm")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> None:
    """Compare, or report on a folder, and write the tables to the standard output.

    Raises:
        InvalidArgumentError: neither a task nor a folder to report on was given, or what a report takes without one.
    """
    from gmn_optim.comparison import Protocol, arms, compare, report

    if options.report is not None:
        medians = 1 if options.medians is None else options.medians
        found = report(options.report, options.task, options.rivals, medians)
    elif options.rivals or options.medians is not None:
        raise InvalidArgumentError("--rivals and --medians are for a report; give '--report DIR' too")
    elif options.task:
        names = ("seeds", "tuning_seeds", "steps", "every", "examples", "rounds", "threads")
        protocol = Protocol(**{name: getattr(options, name) for name in names})
        chosen = options.arms or list(arms)
        found = compare(options.task, chosen, folder=options.out, protocol=protocol, progress=not options.quiet)
    else:
        raise InvalidArgumentError("no task was given; write 'gmn-optim compare TASK', or '--report DIR'")
    sys.stdout.write(f"{found}\n")
