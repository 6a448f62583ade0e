"""The command line: ``gmn-optim list``, ``show``, ``meta-train``, ``validate``, ``export``, ``verify``, ``compare``."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from gmn_optim.cli_cards import describe_card, list_table
from gmn_optim.cli_export import add_export, add_verify
from gmn_optim.cli_meta_train import add_meta_train, add_validate
from gmn_optim.comparison.command import add_compare
from gmn_optim.errors import GMNError, InvalidArgumentError
from gmn_optim.weights import list_weights, load_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a mismatch that ``verify`` finds, 2 for an error."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (GMNError, OSError) as error:
        sys.stderr.write(f"gmn-optim: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("gmn-optim: interrupted; the same command goes on from there\n")
        return 130


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
    add_export(commands)
    add_verify(commands)
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


def _list(options: argparse.Namespace) -> None:
    """Print the shipped weights."""
    names = list_weights(options.pattern)
    if not names:
        raise InvalidArgumentError(
            f"no shipped weights match {options.pattern!r}; known are {', '.join(list_weights())}"
        )
    _print(list_table([load_weights(name).card for name in names]))


def _show(options: argparse.Namespace) -> None:
    """Print one card."""
    card = load_weights(options.name).card
    _print(card.to_json().rstrip() if options.json else describe_card(card))


def _print(text: str) -> None:
    """Write lines to the standard output."""
    sys.stdout.write(text + "\n")
