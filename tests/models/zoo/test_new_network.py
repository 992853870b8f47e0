"""The example of docs/adding-a-network.md: a new network needs one file and no other edit."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import models.zoo
from models.artifacts.bundle import open_bundle
from models.networks import registry
from models.networks.registry import create_model, list_models
from models.runtime.openvino_engine import OpenVINOEngine
from tests.helpers.tiny_network import color_folder, finetune

DOC = (Path(__file__).resolve().parents[3] / "docs" / "adding-a-network.md").read_text(encoding="utf-8")


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An additional folder of ``models.zoo`` for one test."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    list_models()
    monkeypatch.setattr(models.zoo, "__path__", [*models.zoo.__path__, str(folder)])
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    importlib.invalidate_caches()
    registry._load.cache_clear()
    yield folder
    for file in folder.glob("*.py"):
        sys.modules.pop(f"models.zoo.{file.stem}", None)
    registry._load.cache_clear()


def code_of(file: str) -> str:
    match = re.search(rf"`models/zoo/{file}`:\n\n```python\n(.*?)```", DOC, flags=re.DOTALL)
    assert match
    return match[1]


def test_one_file_adds_a_network(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.reports.plot_process.PlotProcess.start", lambda *a, **k: None)
    (zoo / "thumbnail.py").write_text(code_of("thumbnail.py"), encoding="utf-8")
    assert "thumbnail" in list_models()
    assert create_model("thumbnail", num_classes=3)
    data = color_folder(tmp_path / "colours", train=6, valid=3)
    code, _, err = finetune(
        "train", "--data-dir", data, "--backbone", "thumbnail", "--epochs", 2, "--output-dir", tmp_path / "run"
    )
    assert (code, err) == (0, "")
    bundle = open_bundle(tmp_path / "run" / "bundle")
    pixels, expected, tolerance = bundle.golden()
    probabilities = OpenVINOEngine(bundle.path / "model.onnx", outputs=["probabilities"], threads=1).run(pixels)[0]
    assert np.abs(probabilities - expected).max() <= tolerance
    code, output, _ = finetune("models", "show", "thumbnail")
    assert code == 0
    assert "floor((32 + 2 * 1 - 3) / 2) + 1 = 16" in output


def test_registered_name_is_rejected_on_import(zoo: Path) -> None:
    (zoo / "again.py").write_text(code_of("thumbnail.py").replace('name="thumbnail"', 'name="vgg16"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'vgg16' is already registered by models\.zoo\.vgg\. Choose another"):
        list_models()


def test_guide_documents_every_field_of_a_spec() -> None:
    from dataclasses import fields

    from models.networks.spec import ModelSpec

    rows = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", DOC, flags=re.MULTILINE))))
    assert rows == {field.name for field in fields(ModelSpec)}
