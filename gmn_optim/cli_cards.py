"""How the command line shows cards of weights and figures of rules."""

from collections.abc import Mapping, Sequence
from typing import Any

from gmn_optim.report import format_table
from gmn_optim.rule import RuleConfig
from gmn_optim.weights import WeightsCard

FIGURES = (
    "fewer steps than nominal, tuned",
    "both untuned",
    "than Adam, tuned",
    "speed / nominal's, tuned",
    "final loss / nominal's",
)
"""Titles of what a rule for a family reached."""

KEYS = ("against_nominal", "untuned", "against_adam", "speed", "ratio")
"""What they are called in a card; one of an older version lacks the speed."""


def list_table(cards: Sequence[WeightsCard]) -> str:
    """Return a line for each card as a Markdown table."""
    rows = [("name", "arm", "meta-trained on", "steps vs tuned Adam", "best loss", "aliases")]
    for card in cards:
        rule = card.results.get("rule", {})
        factor = card.results.get("against_adam") if card.family else rule.get("factor")
        rows.append(
            (
                card.name,
                RuleConfig.from_dict(card.rule).arm,
                f"family {card.family}" if card.family else card.task,
                f"{factor:.2f}x fewer" if factor else "-",
                f"{rule['best_loss']:.4f}" if "best_loss" in rule else "-",
                ", ".join(card.aliases),
            )
        )
    return format_table(rows)


def describe_card(card: WeightsCard) -> str:
    """Return a card as lines for a person."""
    lines = [card.name, card.description, ""]
    inner = f"{card.horizon} inner steps"
    facts = {
        "rule": RuleConfig.from_dict(card.rule).arm,
        **({"family": f"{card.family}, at most {inner}"} if card.family else {"task": f"{card.task}, {inner}"}),
        "meta-training": f"{card.training.get('chosen_step', '?')} outer steps, {card.seconds / 60:.0f} minutes",
        "licence": card.licence,
        "aliases": ", ".join(card.aliases) or "none",
        "sha256": card.sha256,
    }
    lines += [f"{key:<14} {value}" for key, value in facts.items()]
    if card.results:
        lines += ["", results_table(card.results)]
    if command := card.reproduction.get("command"):
        lines += ["", f"Made by: {command}"]
    return "\n".join([*lines, "", *(f"Limit: {limit}" for limit in card.limits)]).rstrip()


def results_table(results: Mapping[str, Any]) -> str:
    """Return a card's figures as a Markdown table, those of a rule for a family by validation task."""
    if "tasks" in results:
        return f"Choice: {results['choice']}.\n{describe_protocol(results)}\n\n{family_table(results)}"
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


def describe_protocol(results: Mapping[str, Any]) -> str:
    """Return how the validation tasks were measured."""
    settings = results["settings"]
    most = "each task's horizon" if settings["horizon"] is None else f"at most {settings['horizon']} steps"
    seeds = f"{len(settings['seeds'])} seeds" if len(settings["seeds"]) > 1 else "1 seed"
    what = "loss of averages" if settings.get("averages") else "loss"
    return f"{settings['split'].capitalize()} {what} every {settings['every']} steps, {most}, {seeds}."


def family_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of :meth:`gmn_optim.metatrain.family_figures.FamilyEvaluation.to_dict` as a Markdown table."""
    rows = [("task", *FIGURES)]
    rows += [(name, *_show_figures([each.get(key) for key in KEYS])) for name, each in figures["tasks"].items()]
    together = _show_figures([figures.get(key) for key in (*KEYS[:-1], "worst_ratio")])
    return format_table([*rows, ("geometric mean; worst ratio", *together)])


def steps_table(found: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the summaries of outer steps as a Markdown table."""
    rows = [("outer step", *FIGURES[:-1], f"worst {FIGURES[-1]}")]
    keys = (*KEYS[:-1], "worst_ratio")
    rows += [(str(step), *_show_figures([each.get(key) for key in keys])) for step, each in found.items()]
    return format_table(rows)


def _show_figures(values: Sequence[float | None]) -> list[str]:
    """Return step reductions and, last, a ratio of losses in words."""
    *shown, ratio = ("-" if value is None else f"{value:.3f}" for value in values)
    return [*(factor if factor == "-" else f"{factor}x" for factor in shown), ratio]
