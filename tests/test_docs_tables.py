"""The tables that are generated for the documentation: complete, without repetition, and without torch or Flask."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config import Config
from models.networks.spec import Recipe
from service.http.errors import PROBLEM_TYPES
from service.settings import Settings
from tools import docs_tables

ROOT = Path(__file__).resolve().parents[1]


def rendered(page: str) -> str:
    return docs_tables.on_page_markdown((ROOT / "docs" / page).read_text(encoding="utf-8"))


def rows(text: str, first_cell: str) -> list[list[str]]:
    """Return the cells of the table rows whose first cell matches a pattern."""
    lines = [line for line in text.splitlines() if re.match(rf"\| {first_cell} \|", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_service_setting_is_listed_once_with_its_default() -> None:
    table = rows(rendered("settings.md").split("\n## Training\n")[0], r"`[A-Z_0-9]+`")
    fields = dataclasses.fields(Settings)
    assert [row[0] for row in table] == [f"`{field.name.upper()}`" for field in fields]
    for (_, default, _, meaning), field in zip(table, fields, strict=True):
        assert meaning == field.metadata["help"].replace("|", "&#124;")
        if field.default is None or field.default == ():
            assert default == ""
        elif field.name == "bundle":
            assert ROOT / default.strip("`") == field.default
        else:
            text = default.strip("`")
            assert type(field.default)(int(text) if isinstance(field.default, bool) else text) == field.default


def test_every_training_setting_is_listed_once_with_its_default() -> None:
    table = rows(rendered("settings.md").split("\n## Training\n")[1], "`--[a-z0-9-]+`")
    fields = dataclasses.fields(Config)
    assert [row[0] for row in table] == [f"`--{field.name.replace('_', '-')}`" for field in fields]
    recipe = {field.name for field in dataclasses.fields(Recipe)}
    for (_, default, _, _), field in zip(table, fields, strict=True):
        assert default.startswith("recipe (VGG16: ") == (field.name in recipe)


def test_every_error_code_is_listed_once_with_its_status() -> None:
    table = [row for row in rows(rendered("serving.md"), "`[a-z0-9_]+`") if row[1].isdigit()]
    assert len(table) == len(PROBLEM_TYPES)
    assert {code.strip("`"): (int(status), *texts) for code, status, *texts in table} == PROBLEM_TYPES


def test_every_subpackage_is_listed_once_with_its_summary() -> None:
    table = rows(rendered("architecture.md"), "`[a-z_]+/[a-z_]+`")
    listed = [row[0].strip("`") for row in table]
    files = [file for package in docs_tables.PACKAGES for file in (ROOT / package).glob("*/__init__.py")]
    assert sorted(listed) == sorted(file.parent.relative_to(ROOT).as_posix() for file in files)
    assert all(len(row) == 2 and row[1] for row in table)


@pytest.mark.parametrize("page", ["settings.md", "serving.md", "architecture.md"])
def test_every_marker_is_replaced(page: str) -> None:
    source = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert "<!-- table: " in source
    assert "<!-- table: " not in rendered(page)


def test_the_tables_are_made_without_torch_and_flask() -> None:
    program = "import sys; sys.modules['torch'] = sys.modules['flask'] = None; from tools import docs_tables as d; "
    program += "assert all(make().count('\\n') > 5 for make in d.TABLES.values())"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
