"""Options of the command line that describe an update rule."""

import argparse
from typing import Any

from gmn_optim.rule import RuleConfig

ARMS = {
    "nominal": None,
    "ds": "ds",
    "ds+gmn": "ds",
    "eigenbasis": "eigenbasis",
    "eigenbasis+gmn": "eigenbasis",
    "controller": "controller",
}
"""The body of each arm; those that end so have a GradMetaNet."""


def add_rule_options(group: Any) -> None:
    """Add the options that describe an update rule."""
    default = RuleConfig()
    group.add_argument(
        "--arm", choices=tuple(ARMS), default="ds+gmn", help="nominal term alone, learned body, with GradMetaNet"
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
    group.add_argument(
        "--follow-every",
        type=int,
        default=default.follow_every,
        help="steps between two looks of a nominal term with bases at the factors",
    )
    group.add_argument(
        "--largest-element",
        type=float,
        default=default.largest_element,
        help="bound of the elements of steps that preconditioners make, 0 for none",
    )
    group.add_argument("--setpoint", type=float, default=default.setpoint, help="what a controller starts from")
    group.add_argument(
        "--largest-pace", type=float, default=default.largest_pace, help="logarithm of a controller's largest factor"
    )
    group.add_argument(
        "--annealing", type=float, default=default.annealing, help="steps in which a controller's bound falls by log 2"
    )
    group.add_argument(
        "--concentration",
        type=float,
        default=default.concentration,
        help="how much that bound falls where gradients are made of few data points",
    )
    group.add_argument(
        "--epochs", type=float, default=default.epochs, help="times through the data in which that bound falls by log 2"
    )
    group.add_argument("--beta", type=float, default=default.beta, help="initial weight of the learned term")


def read_rule_options(options: argparse.Namespace) -> RuleConfig:
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
        body=ARMS[options.arm],
        gradmetanet=gradmetanet if options.arm.endswith("+gmn") else None,
        memory=options.memory,
        data_points=options.data_points,
        width=options.width,
        depth=options.depth,
        gated=options.gated,
        scheduled=options.scheduled,
        decay=options.decay,
        alpha=options.alpha,
        beta=options.beta,
        follow_every=options.follow_every,
        largest_element=options.largest_element,
        setpoint=options.setpoint,
        largest_pace=options.largest_pace,
        annealing=options.annealing,
        concentration=options.concentration,
        epochs=options.epochs,
    )
