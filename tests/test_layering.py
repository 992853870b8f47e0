"""The packages and their subpackages import each other in one direction only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "finetune", "service")
FORBIDDEN = {"models": {"finetune", "service"}, "finetune": {"service"}, "service": {"finetune"}}
# Lowest layer first: a module may import its own and earlier lines.
LAYERS = {
    "models": (
        "errors preprocess missing_pixels image_structure heif_structure",
        "artifacts",
        "networks zoo",
        "runtime",
        "__init__",
    ),
    "finetune": (
        "config presets",
        "io",
        "compute",
        "data",
        "features",
        "training",
        "metrics",
        "reports",
        "export",
        "batch_inference",
        "evaluation",
        "tuning",
        "pipeline",
        "compare introspection",
        "api",
        "cli",
        "__main__ __init__",
    ),
    "service": (
        "settings",
        "cpu_allocation telemetry context",
        "db",
        "reviews images",
        "http",
        "inference",
        "rollout explain",
        "api",
        "web",
        "gallery",
        "studio",
        "app",
        "healthcheck gunicorn",
        "__main__ __init__",
    ),
}
TYPES_ONLY = ("service.context",)  # names the types of all components, and imports them for the type checker alone
WITHOUT_TORCH = (
    "errors",
    "preprocess",
    "artifacts",
    "networks.spec",
    "runtime.allocator",
    "runtime.openvino_engine",
    "runtime.precision",
)


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def imports(file: Path, *, without_types: bool = False) -> Iterator[str]:
    """Yield the dotted names that a file imports anywhere; ``from a import b`` is ``a.b``.

    Args:
        file: The module.
        without_types: Ignore imports under ``if TYPE_CHECKING``.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if without_types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(package: str, dotted: str) -> int:
    """The position of the subpackage, or root module, that a dotted name belongs to."""
    subpackage = [*dotted.split("."), "__init__"][1]
    layers = [index for index, names in enumerate(LAYERS[package]) if subpackage in names.split()]
    return layers[0] if layers else len(LAYERS[package])


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    steps_up = {
        name: bad
        for name, file in modules(package).items()
        if (bad := {dotted.split(".")[0] for dotted in imports(file)} & FORBIDDEN[package])
    }
    assert steps_up == {}


@pytest.mark.parametrize("package", LAYERS)
def test_a_subpackage_imports_only_those_below_it(package: str) -> None:
    steps_up = sorted(
        f"{name} imports {dotted}"
        for name, file in modules(package).items()
        for dotted in imports(file, without_types=name in TYPES_ONLY)
        if dotted.split(".")[0] == package and layer_of(package, dotted) > layer_of(package, name)
    )
    assert steps_up == []


@pytest.mark.parametrize("package", LAYERS)
def test_every_subpackage_has_its_layer(package: str) -> None:
    subpackages = {name.split(".")[1] for name in modules(package)}
    assert subpackages == {name for names in LAYERS[package] for name in names.split()}


def test_a_server_imports_models_without_torch() -> None:
    artifacts = [f"artifacts.{file.stem}" for file in (ROOT / "models" / "artifacts").glob("[a-z]*.py")]
    names = ", ".join(f"models.{name}" for name in (*WITHOUT_TORCH, *artifacts))
    code = f"import sys, {names}; print(sorted({{'torch', 'torchvision', 'timm'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
