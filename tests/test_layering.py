from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"models": {"finetune", "service"}, "finetune": {"service"}, "service": {"finetune"}}
WITHOUT_TORCH = ("errors", "preprocess", "artifacts", "networks.spec", "runtime.openvino_engine", "runtime.precision")


def imported(file: Path) -> set[str]:
    """The top-level names of what a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_layer_imports_only_those_below_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): bad for file in files if (bad := imported(file) & FORBIDDEN[package])}
    assert wrong == {}


def test_what_a_server_imports_of_models_comes_without_torch() -> None:
    artifacts = [f"artifacts.{file.stem}" for file in (ROOT / "models" / "artifacts").glob("[a-z]*.py")]
    imports = ", ".join(f"models.{name}" for name in (*WITHOUT_TORCH, *artifacts))
    code = f"import sys, {imports}; print(sorted({{'torch', 'torchvision', 'timm'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
