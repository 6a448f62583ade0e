"""The commands ``export`` and ``verify``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmn_optim.cli_cards import results_table
from gmn_optim.errors import InvalidArgumentError
from gmn_optim.report import format_table
from gmn_optim.weights import load_weights

if TYPE_CHECKING:
    from gmn_optim.metatrain.verification import Recomputed


def add_export(commands: Any) -> None:
    """Add ``export``."""
    command = commands.add_parser(
        "export",
        help="turn a meta-training run into a weights file with its card",
        description="Choose the best checkpoint on validation data and write the weights and their card. A run on a "
        "task is measured on the test set against tuned Adam and its own nominal term; one over a family must have "
        "been measured by 'validate' before, and its card records what others need to check the run.",
    )
    command.add_argument("folder", type=Path, help="folder of a meta-training run")
    command.add_argument("name", help="name of the weights")
    command.add_argument("--out", type=Path, default=Path("."), help="where to write")
    command.add_argument("--description", default="", help="one sentence for the card")
    command.add_argument("--alias", action="append", default=[], help="a further name, such as 'default'")
    command.add_argument("--limit", action="append", default=[], help="a known limit, one sentence")
    command.add_argument("--commit", default="", help="revision that the run was made with")
    command.add_argument("--share", type=float, default=1.0, help="of the learned term, of a run over a family")
    command.add_argument("--step", type=int, help="outer step; by default the best on validation data")
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    command.set_defaults(run=_export)


def add_verify(commands: Any) -> None:
    """Add ``verify``."""
    command = commands.add_parser(
        "verify",
        help="compute anew what the card of weights recorded",
        description="Replay the recorded inner training and, if asked to, the first outer steps of meta-training. Exit "
        "status 1 tells that something is off by more than a relative 0.001, which is allowed since other machines and "
        "numbers of threads round differently; outer steps after the third are shown and not judged.",
    )
    command.add_argument("name", help="a name from 'list', 'default', or the path of a .safetensors file")
    command.add_argument("--outer-steps", type=int, default=0, help="outer steps of meta-training to run anew")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_verify)


def _export(options: argparse.Namespace) -> None:
    """Write weights and card of a run."""
    from gmn_optim.metatrain.export_run import export_run

    weights = export_run(
        options.folder,
        options.name,
        options.out,
        description=options.description,
        aliases=tuple(options.alias),
        limits=tuple(options.limit),
        commit=options.commit,
        step=options.step,
        share=options.share,
        progress=not options.quiet,
    )
    sys.stdout.write(results_table(weights.card.results) + "\n")


def _verify(options: argparse.Namespace) -> int:
    """Print what matches and return the exit status."""
    from gmn_optim.metatrain.verification import verify_outer_steps, verify_replay

    if options.outer_steps < 0:
        raise InvalidArgumentError(f"--outer-steps is {options.outer_steps}; expected 0 or more")
    weights = load_weights(options.name)
    rows = verify_replay(weights)
    if options.outer_steps:
        rows += verify_outer_steps(weights.card, options.outer_steps, not options.quiet)
    good = all(row.matches for row in rows)
    verdict = "matches its card" if good else "does NOT match its card"
    sys.stdout.write(f"{_verification_table(rows)}\n\n{weights.identity} {verdict}.\n")
    return 0 if good else 1


def _verification_table(rows: Sequence["Recomputed"]) -> str:
    """Return a line for each kind of number: how many were compared, and the one that is furthest off."""
    lines = [("number", "compared", "largest deviation", "at step", "recorded", "found", "verdict")]
    for what, judged in dict.fromkeys((row.what, row.judged) for row in rows):
        own = [row for row in rows if (row.what, row.judged) == (what, judged)]
        worst = max(own, key=lambda row: row.deviation)
        verdict = ("ok" if worst.matches else "MISMATCH") if judged else "not judged"
        shown = [_show(worst.recorded), _show(worst.found)]
        lines.append((what, str(len(own)), f"{worst.deviation:.1e}", str(worst.step), *shown, verdict))
    return format_table(lines)


def _show(value: float | None) -> str:
    """Return a number with six digits."""
    return "not finite" if value is None else f"{value:.6g}"
