"""A new network takes one file and no other edit: the one in docs/adding-a-network.md, as it stands there."""

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
    """A folder that is looked into like models/zoo, for one test."""
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
    found = re.search(rf"`models/zoo/{file}`:\n\n```python\n(.*?)```", DOC, flags=re.DOTALL)
    assert found
    return found[1]


def test_one_file_is_all_that_a_network_takes(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.reports.results.write_plots", lambda *a, **k: None)
    (zoo / "thumbnail.py").write_text(code_of("thumbnail.py"), encoding="utf-8")
    assert "thumbnail" in list_models()
    assert create_model("thumbnail", num_classes=3)
    data = color_folder(tmp_path / "colours", train=6, valid=3)
    code, _, err = finetune(
        "train", "--data-dir", data, "--backbone", "thumbnail", "--epochs", 2, "--output-dir", tmp_path / "run"
    )
    assert (code, err) == (0, "")
    bundle = open_bundle(tmp_path / "run" / "bundle")
    pixels, wanted, tolerance = bundle.golden()
    given = OpenVINOEngine(bundle.path / "model.onnx", outputs=["probabilities"], threads=1).run(pixels)[0]
    assert np.abs(given - wanted).max() <= tolerance
    code, said, _ = finetune("models", "show", "thumbnail")
    assert code == 0
    assert "floor((32 + 2 * 1 - 3) / 2) + 1 = 16" in said


def test_a_name_that_is_taken_is_refused_at_import(zoo: Path) -> None:
    (zoo / "again.py").write_text(code_of("thumbnail.py").replace('name="thumbnail"', 'name="vgg16"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'vgg16' is registered already, by models\.zoo\.vgg; choose another"):
        list_models()


def test_the_guide_names_every_field_of_a_spec() -> None:
    from dataclasses import fields

    from models.networks.spec import ModelSpec

    rows = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", DOC, flags=re.MULTILINE))))
    assert rows == {field.name for field in fields(ModelSpec)}
