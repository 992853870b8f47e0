"""Every recipe in docs/recipes is valid, names its target accuracy and trains on a small substitute of its dataset."""

from __future__ import annotations

import contextlib
import json
import re
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from finetune.config import from_mapping, read_yaml
from models.artifacts.bundle import open_bundle
from tests.helpers.dataset_server import mirror
from tests.helpers.small_networks import WIDE, made_small
from tests.helpers.tiny_network import finetune
from tools import course_report

pytestmark = pytest.mark.slow

__all__ = ["mirror"]

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
FIGURES = {
    "cifar10-lenet": "62%",
    "cifar10-vgg": "84.77%",
    "fashion-mnist-cnn-selu": "91.8%",
    "fashion-mnist-cnn-separable": "84.4%",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_trains(file: Path, data: Path, mirror: ThreadingHTTPServer, tmp_path: Path) -> None:
    recipe = from_mapping(read_yaml(file))
    assert recipe.dataset is not None
    with made_small(recipe.backbone, small_images=False) if recipe.backbone in WIDE else contextlib.nullcontext():
        command = ("train", "--config", file, "--epochs", 1, "--output-dir", tmp_path / "run")
        code, out, _ = finetune(*command, "--data-dir", data / recipe.dataset)
    assert code == 0
    assert re.search(r"^training +\d+ epochs? of [\d,]+ photos in [\d,.]+ s, including validation$", out, flags=re.MULTILINE)
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    overridden = {"epochs", "output_dir", "dataset", "data_dir"}
    assert {key: used[key] for key in read_yaml(file) if key not in overridden} == {
        key: value for key, value in read_yaml(file).items() if key not in overridden
    }
    metrics = json.loads((tmp_path / "run" / "test" / "metrics.json").read_text())
    assert metrics["photos"] == 20
    recorded = course_report.read_run(tmp_path / "run")
    assert (recorded["photos"], recorded["accuracy"], recorded["epochs"]) == (20, metrics["accuracy"], 1)
    assert recorded["images_per_second"] > 0
    assert "data_dir" not in recorded["config"]
    assert open_bundle(tmp_path / "run" / "bundle").permute_pixels == recipe.permute_pixels


@pytest.mark.parametrize(("name", "figure"), FIGURES.items())
def test_the_target_figure_is_in_the_file_and_in_the_table(name: str, figure: str) -> None:
    assert f"figure to meet: {figure}" in (FOLDER / f"{name}.yaml").read_text()
    (row,) = (line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| [{name}]"))
    assert figure in row


def test_the_table_lists_exactly_the_recipes() -> None:
    linked = re.findall(r"^\| \[([\w-]+)\]\(([\w-]+)\.yaml\)", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert linked
    assert all(name == target for name, target in linked)
    assert sorted(name for name, _ in linked) == sorted(file.stem for file in RECIPES)


def test_recipes_have_different_output_directories() -> None:
    folders = [read_yaml(file)["output_dir"] for file in RECIPES]
    assert len(set(folders)) == len(folders)


def test_a_misspelled_key_is_rejected_with_a_suggestion(tmp_path: Path) -> None:
    text = RECIPES[0].read_text().replace("epochs:", "epoch:")
    (tmp_path / "recipe.yaml").write_text(text)
    code, _, err = finetune("train", "--config", tmp_path / "recipe.yaml")
    assert code == 2
    assert "Unknown setting 'epoch'. Did you mean 'epochs'?" in err
