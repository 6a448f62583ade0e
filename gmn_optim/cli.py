"""The command line: ``gmn-optim list``, ``show``, ``meta-train`` and ``export``."""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gmn_optim.errors import GMNError, InvalidArgumentError
from gmn_optim.report import format_table
from gmn_optim.rule import RuleConfig
from gmn_optim.weights import WeightsCard, list_weights, load_weights

ARMS = ("nominal", "ds", "ds+gmn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 with one clear line on the error stream."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (GMNError, OSError) as error:
        sys.stderr.write(f"gmn-optim: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("gmn-optim: interrupted; the same command goes on from the newest checkpoint\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="gmn-optim", description="Learned optimizers: weights and meta-training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_list(commands)
    _add_show(commands)
    _add_meta_train(commands)
    _add_export(commands)
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


def _add_meta_train(commands: Any) -> None:
    """Add ``meta-train``."""
    command = commands.add_parser(
        "meta-train",
        help="meta-train an update rule",
        description="Meta-train an update rule. A run that was stopped goes on, bit for bit, by the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--task", default="fashion-mnist-mlp", help="name of a task")
    command.add_argument("--folder", type=Path, required=True, help="where checkpoints and the log go")
    _add_rule(command.add_argument_group("rule"))
    _add_trainer(command.add_argument_group("training"))
    command.add_argument("--until", type=int, help="stop at this outer step, to go on later")
    command.add_argument("--compile", action="store_true", help="fuse the inner step; needs a C++ compiler")
    command.add_argument("--threads", type=int, help="processor threads")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_meta_train)


def _add_rule(group: Any) -> None:
    """Add the options that describe an update rule."""
    default = RuleConfig()
    group.add_argument(
        "--arm", choices=ARMS, default="ds+gmn", help="nominal term alone, learned body, with GradMetaNet"
    )
    group.add_argument("--nominal", default=default.nominal, help="nominal term")
    group.add_argument("--memory", default=default.memory, help="factor memory")
    group.add_argument("--data-points", type=int, default=default.data_points, help="rows that GradMetaNet reads")
    group.add_argument("--width", type=int, default=default.width, help="hidden width of the body")
    group.add_argument("--depth", type=int, default=default.depth, help="hidden layers of the body")
    group.add_argument("--gmn-width", type=int, default=16, help="width of GradMetaNet")
    group.add_argument("--gmn-set-layers", type=int, default=2, help="layers before the pooling over data points")
    group.add_argument("--gmn-neuron-layers", type=int, default=1, help="layers after it")
    group.add_argument("--no-neuron-numbers", action="store_true", help="fixed neurons carry no number of their own")
    group.add_argument("--gated", action="store_true", help="the body also scales the nominal term")
    group.add_argument("--scheduled", action="store_true", help="the step size follows a meta-learned schedule")
    group.add_argument("--decay", type=float, default=default.decay, help="initial decay of that schedule")
    group.add_argument("--alpha", type=float, help="initial step size")
    group.add_argument("--beta", type=float, default=default.beta, help="initial weight of the learned term")


def _add_trainer(group: Any) -> None:
    """Add an option for every setting of the trainer that is a number or a name."""
    from gmn_optim.metatrain import TrainerConfig

    meanings = _documented(TrainerConfig)
    for setting in fields(TrainerConfig):
        kind = {"int | None": int}.get(str(setting.type), setting.type)
        if kind in (int, float, str):
            name = "--" + setting.name.replace("_", "-")
            group.add_argument(name, type=kind, default=setting.default, help=meanings[setting.name])


def _documented(described: type) -> dict[str, str]:
    """Return what the docstring of a class says of each attribute, in one line for argparse."""
    attributes = inspect.cleandoc(described.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in found}


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


def _meta_train(options: argparse.Namespace) -> None:
    """Meta-train, or go on with a run."""
    import torch

    from gmn_optim.metatrain import MetaTrainer, TrainerConfig
    from gmn_optim.metatrain.runs import build_unroll, describe_run

    if options.threads is not None:
        if options.threads < 1:
            raise InvalidArgumentError(f"--threads is {options.threads}; expected at least 1")
        torch.set_num_threads(options.threads)
    chosen = {f.name: getattr(options, f.name) for f in fields(TrainerConfig) if hasattr(options, f.name)}
    config = TrainerConfig(**chosen)
    rule = _rule_config(options)
    unroll = build_unroll(options.task, rule, seed=config.seed, compiled=options.compile)
    trainer = MetaTrainer(unroll, config, options.folder, describe_run(options.task, rule))
    trainer.run(options.until, progress=not options.quiet)


def _rule_config(options: argparse.Namespace) -> RuleConfig:
    """Return the rule that the options describe."""
    from gmn_optim.nn import GradMetaNetConfig

    gradmetanet = GradMetaNetConfig(
        width=options.gmn_width,
        set_layers=options.gmn_set_layers,
        neuron_layers=options.gmn_neuron_layers,
        neuron_numbers=not options.no_neuron_numbers,
    )
    return RuleConfig(
        nominal=options.nominal,
        body=None if options.arm == "nominal" else "ds",
        gradmetanet=gradmetanet if options.arm == "ds+gmn" else None,
        memory=options.memory,
        data_points=options.data_points,
        width=options.width,
        depth=options.depth,
        gated=options.gated,
        scheduled=options.scheduled,
        decay=options.decay,
        alpha=options.alpha,
        beta=options.beta,
    )


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
