"""The pages about the course agree with the networks and with the recorded runs."""

from __future__ import annotations

import re

import pytest

from finetune.config import Config, read_yaml
from models.networks.registry import get_spec
from tools import course_report

NETWORKS = {name.removeprefix("layers of ") for name in course_report.TABLES if name.startswith("layers of ")}


@pytest.mark.parametrize("page", course_report.PAGES, ids=lambda page: page.stem)
def test_a_page_is_up_to_date(page: object) -> None:
    """If this fails, run ``python tools/course_report.py pages``."""
    text = page.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    assert course_report.filled(text) == text
    markers = re.findall(r"<!-- course: ([^>]+) -->", text)
    assert len(markers) == len(set(markers)) == text.count("<!-- end -->") > 0


def test_an_outdated_table_is_replaced() -> None:
    text = "before\n<!-- course: costs -->\nold\n<!-- end -->\nafter\n"
    filled = course_report.filled(text)
    assert filled == course_report.filled(filled)
    assert "old" not in filled
    assert filled.startswith("before\n<!-- course: costs -->\n\n| Year |")
    assert filled.endswith("|\n\n<!-- end -->\nafter\n")


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_rows_of_a_layer_table_add_up_to_the_network(network: str) -> None:
    cost = get_spec(network).cost
    assert cost is not None
    text = course_report.TABLES[f"layers of {network}"]()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]
    parameters, macs = ([int(row[column].replace(",", "") or 0) for row in rows] for column in (3, 4))
    assert rows[-1][0] == "total"
    assert sum(parameters[:-1]) == parameters[-1] == cost.parameters
    assert sum(macs[:-1]) == macs[-1] == cost.macs


def test_the_worked_example_counts_as_by_hand() -> None:
    """5 * 5 * 3 * 256 weights against 5 * 5 * 3 + 3 * 256, each used at 8 * 8 positions."""
    standard, separable = course_report.worked_example().splitlines()[2:]
    assert standard == "| standard | 5 · 5 · 3 · 256 = 19,200 | 8 · 8 · 19,200 = 1,228,800 |"
    assert separable.endswith("| 5 · 5 · 1 · 3 + 1 · 1 · 3 · 256 = 843 | 8 · 8 · 843 = 53,952 |")


def test_recorded_runs_used_the_settings_of_their_recipes() -> None:
    files = {file.stem: file for file in course_report.recipe_files()}
    results = course_report.read_results()
    assert results.keys() <= files.keys()
    for name, result in results.items():
        recipe = {key: value for key, value in read_yaml(files[name]).items() if key != "output_dir"}
        assert {key: result["config"][key] for key in recipe} == recipe, name
        defaults = Config().as_dict()
        assert all(result["config"][key] == defaults[key] for key in ("seed", "augment", "unfreeze") if key not in recipe)
        assert result["accuracy"]["low"] < result["accuracy"]["value"] < result["accuracy"]["high"]
        assert result["photos"] == 10_000
