"""The networks that a training can start from, as a table."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch

from models.registry import create_model, get_spec, list_models
from models.spec import ModelSpec


def describe(spec: ModelSpec) -> dict[str, Any]:
    """What is known about a network, its parameters counted on its own architecture, without any weights."""
    with torch.device("meta"):
        net = create_model(spec.name)
    weights = spec.weights
    return {
        "name": spec.name,
        "title": spec.title,
        "year": spec.year,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "input_px": spec.preprocessing.input_px,
        "head": spec.head,
        "weights": (weights.package or weights.url) if weights else None,
        "licence": weights.licence if weights else None,
        "paper": spec.paper,
        "recipe": dataclasses.asdict(spec.recipe),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """``finetune models``: print the table."""
    rows = [describe(get_spec(name)) for name in list_models()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'name':<20} {'year':>4} {'parameters':>12} {'input':>6}  {'weights':<32} licence of the weights")
    for row in sorted(rows, key=lambda row: (row["year"], row["name"])):
        weights = (row["weights"] or "none").rsplit("/", 1)[-1]
        size = f"{row['parameters']:>12,} {row['input_px']:>3} px"
        print(f"{row['name']:<20} {row['year']:>4} {size}  {weights:<32} {row['licence'] or ''}")
    return 0
