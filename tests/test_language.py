"""Texts and names use the plain words of the field: the list of words that stay out, with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("models", "finetune", "service", "tests", "benchmarks", "tools", "deploy", "docs")
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "Dockerfile", "compose.yaml", "pyproject.toml", ".ci/run")
SUFFIXES = {".py", ".md", ".html", ".js", ".css", ".yml", ".yaml", ".toml", ".sh", ".ipynb"}

# A pattern of words -> what to write. Names in snake_case are searched as words, too.
BANNED = {
    r"anew": "again",
    r"anatomy": "summary",
    r"asked|asks|asking": "requested; requests",
    r"bake-off|contest|lineup": "compare, comparison",
    r"begun": "started",
    r"beside": "next to; with",
    r"by itself": "automatically",
    r"crew": "worker pool",
    r"doors?|doorstep": "admission; decoder; connection",
    r"everybody|nobody|somebody|whoever": "everyone; no one; a user",
    r"for ever": "forever; without end",
    r"heard|hears": "receives; is notified",
    r"house": "in flight; at capacity",
    r"lookalikes?|twins?": "similar images; near duplicates",
    r"mend|mends|mended|mending": "fix; correct",
    r"of which": "split the sentence",
    r"parting": "lingering close",
    r"per cent": "percent; %",
    r"said|saying": "message; reported",
    r"stash": "cache",
    r"surgery": "head replacement",
    r"tally": "counts",
    r"those that": "name them",
    r"told|tells": "is notified; reports",
    r"wanted|unwanted": "requested; expected; required",
    r"\d %(?!})": "no space before the percent sign",
}
# Where a word is right: file -> words. Everything else in the file is searched.
ALLOWED: dict[str, set[str]] = {
    "benchmarks/large_folder.py": {"2 %"},  # a remainder
    "finetune/data/synthetic/scenes.py": {"house"},  # it draws one
    "service/db/pagination.py": {"1 %"},  # a remainder
}


def text_files() -> Iterator[Path]:
    """The files whose text people read."""
    for folder in FOLDERS:
        yield from (file for file in sorted((ROOT / folder).rglob("*")) if file.suffix in SUFFIXES)
    yield from (ROOT / name for name in FILES)


def findings(file: Path) -> list[str]:
    """Each banned word of a file with its line and what to write."""
    name = file.relative_to(ROOT).as_posix()
    allowed = ALLOWED.get(name, set())
    return [
        f"{name}:{number}: {match.group()!r} (write: {better})"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for pattern, better in BANNED.items()
        for match in re.finditer(rf"(?<![a-zA-Z])(?:{pattern})(?![a-zA-Z])", line, re.IGNORECASE)
        if match.group().lower() not in allowed
    ]


def test_no_banned_word_is_left() -> None:
    found = [finding for file in text_files() if file.name != "test_language.py" for finding in findings(file)]
    assert not found, f"{len(found)} words:\n" + "\n".join(found)


@pytest.mark.parametrize("line", ["a key is wanted", "is_wanted = True", "99.25 % of them", "said again"])
def test_the_search_finds_a_banned_word(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(line, encoding="utf-8")
    assert len(findings(tmp_path / "page.md")) == 1
