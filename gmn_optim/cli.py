"""The command line: ``gmn-optim list``, ``show``, ``meta-train``, ``validate``, ``export`` and ``compare``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gmn_optim.cli_meta_train import add_meta_train, add_validate
from gmn_optim.comparison.command import add_compare
from gmn_optim.errors import GMNError, InvalidArgumentError
from gmn_optim.report import format_table
from gmn_optim.rule import RuleConfig
from gmn_optim.weights import WeightsCard, list_weights, load_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 with one clear line on the error stream."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (GMNError, OSError) as error:
        sys.stderr.write(f"gmn-optim: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("gmn-optim: interrupted; the same command goes on from there\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="gmn-optim", description="Learned optimizers: weights, meta-training, comparison."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_list(commands)
    _add_show(commands)
    add_meta_train(commands)
    add_validate(commands)
    _add_export(commands)
    add_compare(commands)
    return parser


def _add_list(commands: Any) -> None:
    """Add ``list``."""
    command = commands.add_parser("list", help="list the weights that ship with the package")
    command.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, such as '*-gmn'")
    command.set_defaults(run=_list)


def _add_show(commands: Any) -> None:
    """Add ``show``."""
    command = commands.add_parser("show", help="show the card of weights")
    command.add_argument("name", help="a name from 'list', 'default', or the path of a .safetensors file")
    command.add_argument("--json", action="store_true", help="print the whole card as JSON")
    command.set_defaults(run=_show)


def _add_export(commands: Any) -> None:
    """Add ``export``."""
    command = commands.add_parser(
        "export",
        help="turn a meta-training run into a weights file with its card",
        description="Choose the best checkpoint on the validation set, measure it on the test set against tuned Adam "
        "and its own nominal term, and write the weights and their card.",
    )
    command.add_argument("folder", type=Path, help="folder of a meta-training run")
    command.add_argument("name", help="name of the weights")
    command.add_argument("--out", type=Path, default=Path("."), help="where to write")
    command.add_argument("--description", default="", help="one sentence for the card")
    command.add_argument("--alias", action="append", default=[], help="a further name, such as 'default'")
    command.add_argument("--limit", action="append", default=[], help="a known limit, one sentence")
    command.add_argument("--commit", default="", help="revision that the run was made with")
    command.add_argument("--step", type=int, help="outer step; by default the best on the validation set")
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    command.set_defaults(run=_export)


def _list(options: argparse.Namespace) -> None:
    """Print the shipped weights."""
    rows = [("name", "arm", "task", "steps vs tuned Adam", "best loss", "aliases")]
    for name in list_weights(options.pattern):
        card = load_weights(name).card
        rule = card.results.get("rule", {})
        factor = rule.get("factor")
        rows.append(
            (
                name,
                RuleConfig.from_dict(card.rule).arm,
                card.task,
                f"{factor:.2f}x fewer" if factor else "-",
                f"{rule['best_loss']:.4f}" if "best_loss" in rule else "-",
                ", ".join(card.aliases),
            )
        )
    if len(rows) == 1:
        raise InvalidArgumentError(
            f"no shipped weights match {options.pattern!r}; known are {', '.join(list_weights())}"
        )
    _print(format_table(rows))


def _show(options: argparse.Namespace) -> None:
    """Print one card."""
    card = load_weights(options.name).card
    _print(card.to_json().rstrip() if options.json else _describe(card))


def _describe(card: WeightsCard) -> str:
    """Return a card as lines for a person."""
    lines = [card.name, card.description, ""]
    facts = {
        "rule": RuleConfig.from_dict(card.rule).arm,
        "task": f"{card.task}, {card.horizon} inner steps",
        "meta-training": f"{card.training.get('chosen_step', '?')} outer steps, {card.seconds / 60:.0f} minutes",
        "licence": card.licence,
        "aliases": ", ".join(card.aliases) or "none",
        "sha256": card.sha256,
    }
    lines += [f"{key:<14} {value}" for key, value in facts.items()]
    if card.results:
        lines += ["", results_table(card.results)]
    return "\n".join([*lines, "", *(f"Limit: {limit}" for limit in card.limits)]).rstrip()


def results_table(results: dict[str, Any]) -> str:
    """Return a card's figures as a Markdown table."""
    rows = [("optimizer", "best test loss", f"steps to {results['target']:.4f}", "fewer steps than tuned Adam")]
    names = {"adam": f"Adam, lr {results['adam']['lr']:g}", "rule": "this rule"}
    if results["nominal"]["name"] != "adam":
        names["nominal"] = f"{results['nominal']['name']} alone, lr {results['nominal']['lr']:g}"
    for key in [key for key in ("adam", "nominal", "rule") if key in names]:
        figures = results[key]
        steps, factor = figures["steps_to_target"], figures["factor"]
        rows.append(
            (
                names[key],
                f"{figures['best_loss']:.4f}",
                str(steps or "not reached"),
                f"{factor:.2f}x" if factor else "-",
            )
        )
    return format_table(rows)


def _export(options: argparse.Namespace) -> None:
    """Write weights and card of a run."""
    from gmn_optim.metatrain.runs import export_run

    weights = export_run(
        options.folder,
        options.name,
        options.out,
        description=options.description,
        aliases=tuple(options.alias),
        limits=tuple(options.limit),
        commit=options.commit,
        step=options.step,
        progress=not options.quiet,
    )
    _print(results_table(json.loads(json.dumps(weights.card.results))))


def _print(text: str) -> None:
    """Write lines to the standard output."""
    sys.stdout.write(text + "\n")
