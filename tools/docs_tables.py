"""Fill the tables of settings, error codes and packages into the documentation (an MkDocs hook).

MkDocs calls ``on_page_markdown`` for each page. A marker such as ``<!-- table: service settings -->`` is replaced by a table
that is made from the code, so that the documentation cannot disagree with it. Nothing here imports torch or Flask.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "finetune", "service")
sys.path.insert(0, str(ROOT))  # MkDocs may run without the project being installed

from finetune.config import Config  # noqa: E402
from models.networks.spec import Recipe  # noqa: E402
from service.http.errors import PROBLEM_TYPES  # noqa: E402
from service.settings import Settings  # noqa: E402


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every marker in the text of a page.

    Args:
        markdown: The page's source.

    Returns:
        The source with the tables filled in.
    """
    for name, make_table in TABLES.items():
        markdown = markdown.replace(f"<!-- table: {name} -->", make_table())
    return markdown


def service_settings() -> str:
    """List each environment variable of the service with its default, allowed values and meaning."""
    rows = []
    for field in dataclasses.fields(Settings):
        default = _relative(field.default)
        rows.append((f"`{field.name.upper()}`", _code(default), _allowed(field.metadata), field.metadata["help"]))
    return _table(("Variable", "Default", "Allowed", "Meaning"), rows)


def training_settings() -> str:
    """List each flag of ``finetune train`` with its default, allowed values and meaning."""
    recipe = {field.name: field.default for field in dataclasses.fields(Recipe)}
    rows = []
    for field in dataclasses.fields(Config):
        default = f"recipe (VGG16: {_code(recipe[field.name])})" if field.name in recipe else _code(field.default)
        flag = f"`--{field.name.replace('_', '-')}`"
        rows.append((flag, default, _allowed(field.metadata), field.metadata["help"]))
    return _table(("Flag", "Default", "Allowed", "Meaning"), rows)


def problem_codes() -> str:
    """List the stable code of each error response with its HTTP status, its title and what the client can do."""
    problems = sorted(PROBLEM_TYPES.items(), key=lambda row: row[1].status)
    rows = [(f"`{code}`", str(kind.status), kind.title, kind.advice) for code, kind in problems]
    return _table(("Code", "Status", "Title", "What to do"), rows)


def packages() -> str:
    """List each subpackage with the first line of its docstring."""
    rows = []
    for package in PACKAGES:
        for file in sorted((ROOT / package).glob("*/__init__.py")):
            summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]
            rows.append((f"`{package}/{file.parent.name}`", summary.replace("``", "`")))
    return _table(("Package", "Contents"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "service settings": service_settings,
    "training settings": training_settings,
    "problem codes": problem_codes,
    "packages": packages,
}


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in lines)


def _allowed(limits: Mapping[str, Any]) -> str:
    choices = limits.get("choices")
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    low = limits.get("low")
    high = limits.get("high")
    if low is None:
        return ""
    return f"{low:,} or more" if high is None else f"{low:,} to {high:,}"


def _code(default: Any) -> str:
    """Format a default; one that depends on the machine, and an empty list, are left blank."""
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return f"`{int(default)}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _relative(default: Any) -> Any:
    return default.relative_to(ROOT) if isinstance(default, Path) and default.is_absolute() else default
