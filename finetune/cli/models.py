"""``finetune models``: list the available networks, or show one layer by layer."""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import cache
from typing import Any

from models.errors import ConfigError, did_you_mean
from models.networks.flops import get_cost
from models.networks.registry import get_spec, list_models

LIBRARY = "timm:NAME is any network of timm, such as timm:convnext_tiny. `finetune models show NAME` lists a network's layers."


@cache
def describe(name: str) -> dict[str, Any]:
    """Return the facts about a network. Costs that its spec does not record are counted on the meta device, without weights."""
    spec = get_spec(name)
    cost, weights = get_cost(spec), spec.weights
    return {
        "name": spec.name,
        "title": spec.title,
        "year": spec.year,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "input_px": spec.preprocessing.input_px,
        "channels": spec.preprocessing.channels,
        "head": spec.head,
        "cam_layer": spec.cam_layer,
        "weights": weights.location if weights else None,
        "license": weights.license if weights else None,
        "paper": spec.paper,
        "recipe": dataclasses.asdict(spec.recipe),
    }


HEADER = f"{'name':<20} {'year':>4} {'parameters':>12} {'MACs':>8} {'input':>10}  {'weights':<34} weights license"


def line(row: dict[str, Any]) -> str:
    """Format one row of the table."""
    weights = (row["weights"] or "none, trained from scratch").rsplit("/", 1)[-1]
    size = f"{row['channels']} x {row['input_px']:>3} px"
    counts = f"{row['parameters']:>12,} {short(row['macs']):>8} {size:>10}"
    return f"{row['name']:<20} {row['year'] or '':>4} {counts}  {weights:<34} {row['license'] or ''}".rstrip()


def short(count: int) -> str:
    """Format a count with a unit prefix: 15,470,264,320 -> ``15.5 G``."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {prefix}" if count < 100 * size else f"{count / size:.0f} {prefix}"
    return str(count)


def show_all(*, as_json: bool) -> None:
    """Print the table, oldest network first, each row as soon as its costs are counted."""
    names = sorted(list_models(), key=lambda name: (get_spec(name).year or 0, name))
    if as_json:
        print(json.dumps([describe(name) for name in names], indent=2))
        return
    print(HEADER)
    for name in names:
        print(line(describe(name)), flush=True)
    print(f"\n{LIBRARY}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", nargs="?", metavar="show", help="with NAME: show one network's layers and the arithmetic of its convolutions"
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="network name from the table, or timm:NAME")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune models`` (print the table) or ``finetune models show NAME`` (print one network)."""
    if args.action is None:
        show_all(as_json=args.json)
        return 0
    if args.action != "show" or args.name is None:
        words = " ".join(filter(None, (args.action, args.name)))
        hint = did_you_mean(args.action, ["show"]) if args.action != "show" else ""
        raise ConfigError(f"Use `finetune models` or `finetune models show NAME` (got {words!r}).{hint}")
    from finetune.introspection import summary

    facts = describe(args.name)
    if args.json:
        print(json.dumps({**facts, **summary.as_dict(args.name)}, indent=2))
    else:
        counts = f"{facts['parameters']:,} parameters, {facts['macs']:,} MACs per image"
        print(summary.format_network(args.name, counts=counts))
    return 0
