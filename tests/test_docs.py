"""The README and the pages in docs/ name only commands, flags, settings and files that exist."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from finetune.__main__ import COMMANDS, main
from service.http.errors import PROBLEM_TYPES
from service.settings import Settings
from service.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
# The changelog is not among them: it names what no longer exists.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TORCHRUN_FLAGS = {"--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port"}
DOCKER_FLAGS = {"--read-only", "--tmpfs", "--stop-timeout", "--user"}
BENCHMARK_FLAGS = {"--photos", "--rounds", "--peers"}
OTHER_VARIABLES = {"PATH", "ARGS", "JOBS", "RUN", "DATA", "PIP_ARGS", "TORCH_HOME", "GLOO_SOCKET_IFNAME", "RANK", "WORLD_SIZE"}
OTHER_VARIABLES |= {"REVIEWS_KEY"}
NOT_VARIABLES = {"COPY", "SCRATCH_RECIPE"}
EXAMPLE_FILES = {"models/zoo/thumbnail.py"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_blocks(text: str) -> list[str]:
    """Return the contents of the fenced blocks, without the indentation of tabs."""
    return [block for _, block in re.findall(r"^( *)```\w*\n(.*?)^\1```", text, flags=re.MULTILINE | re.DOTALL)]


def code(text: str) -> list[str]:
    """Return everything that is set as code: blocks, and inline code outside of them."""
    blocks = code_blocks(text)
    prose = re.sub(r"^( *)```\w*\n.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    return blocks + [" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", prose)]


@cache
def flags_of(command: str) -> frozenset[str]:
    """Return the flags that ``finetune COMMAND --help`` lists."""
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
        main([command, "--help"])
    return frozenset(re.findall(r"--[a-z][a-z-]+", output.getvalue()))


def test_the_readme_is_short_and_states_its_license_and_commands_early() -> None:
    assert len(README.splitlines()) <= 200
    top = "\n".join(README.splitlines()[:30])
    for text in ("[MIT license](LICENSE)", "](docs/images/gallery.png)", "make demo", "make finetune"):
        assert text in top


def test_every_command_has_a_row_in_the_readme() -> None:
    rows = re.findall(r"^\| `finetune (\w+)`", README, flags=re.MULTILINE)
    assert sorted(rows) == sorted(COMMANDS)


@each_page
def test_every_make_target_exists(page: Path) -> None:
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = {*re.findall(r"^make ([\w-]+)", help_text, flags=re.MULTILINE), "help"}
    snippets = code(page.read_text(encoding="utf-8"))
    assert {target for text in snippets for target in re.findall(r"\bmake ([a-z][a-z-]*)", text)} <= targets


@each_page
def test_every_finetune_command_and_its_flags_exist(page: Path) -> None:
    for text in code(page.read_text(encoding="utf-8")):
        for line in text.replace("\\\n", " ").splitlines():
            for command, arguments in re.findall(r"(?<![\w/-])finetune (?!COMMAND)([a-z]+)([^|]*)", line.split("#")[0]):
                assert command in COMMANDS, line
                flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", arguments))
                assert flags <= flags_of(command), line


@each_page
def test_every_flag_exists(page: Path) -> None:
    known = TORCHRUN_FLAGS | DOCKER_FLAGS | BENCHMARK_FLAGS | set().union(*(flags_of(command) for command in COMMANDS))
    for text in code(page.read_text(encoding="utf-8")):
        if re.match(r"--[a-z]", text):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known, text


@each_page
def test_every_setting_exists(page: Path) -> None:
    """Inline code in capitals, with or without a value, is an environment variable."""
    known = {field.name.upper() for field in dataclasses.fields(Settings)} | OTHER_VARIABLES
    for text in code(page.read_text(encoding="utf-8")):
        if "\n" in text:
            continue
        for name in re.findall(r"^([A-Z][A-Z0-9]*_[A-Z0-9_]+|[A-Z]{4,})(?:=|$)", text):
            assert name in known | NOT_VARIABLES, text


@each_page
def test_every_file_exists(page: Path) -> None:
    """Links to files, and inline code that looks like a path of the project."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    folders = "deploy|docs|models|finetune|service|tests|tools|benchmarks"
    for path in (inline for inline in code(text) if re.fullmatch(rf"(?:{folders})/[\w./-]+", inline)):
        assert path in EXAMPLE_FILES or (ROOT / path).exists(), path


@each_page
def test_no_placeholder_is_left(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    assert "TODO" not in text


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert re.findall(r"^## \[(.*?)\] - \d{4}-\d\d-\d\d$", CHANGELOG, flags=re.MULTILINE)[0] == version


def test_the_changelog_maps_old_settings_to_existing_ones() -> None:
    table = CHANGELOG.split("### Renamed settings\n")[1].split("\n### ")[0]
    new = re.findall(r"^\| `[A-Z_]+`.*? \| `([A-Z_]+)` \|$", table, flags=re.MULTILINE)
    assert len(new) > 5
    assert set(new) <= {field.name.upper() for field in dataclasses.fields(Settings)}


def test_the_changelog_maps_old_error_codes_to_existing_ones() -> None:
    rows = re.findall(r"^\| Error codes, .*? \| .*? \| (.*?) \|$", CHANGELOG, flags=re.MULTILINE)
    assert rows
    assert {code for row in rows for code in re.findall(r"`(\w+)`", row)} <= set(PROBLEM_TYPES)


def test_the_changelog_maps_old_metrics_to_existing_ones() -> None:
    table = CHANGELOG.split("### Renamed metrics\n")[1].split("\n### ")[0]
    families = [line.split()[2] for line in Metrics().render().decode().splitlines() if line.startswith("# TYPE ")]
    new = re.findall(r"^\| `dvc_\w+`.*? \| `(\w+)`.* \|$", table, flags=re.MULTILINE)
    assert new
    assert set(new) <= set(families)


def test_the_changelog_maps_old_commands_to_existing_ones() -> None:
    table = CHANGELOG.split("### Renamed commands and flags\n")[1].split("\n### ")[0]
    new = re.findall(r"\| `finetune (\w+)( --[a-z-]+)?` \|$", table, flags=re.MULTILINE)
    assert new
    for command, flag in new:
        assert command in COMMANDS
        assert not flag or flag.strip() in flags_of(command)
