"""What the commands print: versions, progress, next commands, and errors that only show during a run."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune import pipeline
from finetune.__main__ import COMMANDS, main
from finetune.cli.train import next_commands
from finetune.config import Config
from finetune.data.audit import audit_folder
from finetune.pipeline import default_name
from finetune.training import run_directory
from finetune.training.data_loaders import CachedBatches, UncachedBatches
from models.artifacts.bundle import Bundle, name_problem, open_bundle
from models.runtime.openvino_engine import OpenVINOEngine
from tests.helpers.tiny_network import color_folder, finetune, registered

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "models" / "shipped" / "dogs-vs-cats"
TRAINING_LIBRARIES = {"matplotlib", "onnx", "sklearn", "timm", "torch", "torchvision"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("data") / "colours", train=4, valid=2)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "finetune")
def test_every_command_prints_the_version(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--version"])
    assert capsys.readouterr().out == "finetune 0.2.0\n"


def test_an_incomplete_network_name_suggests_the_shortest_name_that_begins_with_it() -> None:
    code, _, err = finetune("train", "--backbone", "efficientnet")
    assert code == 2
    assert "Did you mean 'efficientnet_b0'?" in err or "Did you mean 'efficientnet_lite0'?" in err


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\nfrom finetune.__main__ import main\nsys.exit(main(['merge', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", program, str(SHIPPED), str(tmp_path / "full")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "finetune: The package torch is not installed. Install the packages for training, in a checkout with: "
        "pip install -e '.[finetune]'\n"
    )


def test_commands_without_training_start_without_its_libraries(data: Path, tmp_path: Path) -> None:
    commands = [
        ["synthesize", str(tmp_path / "drawn"), "--train", "2", "--valid", "2"],
        ["audit", str(data), "--cache-dir", str(tmp_path / "cache")],
        ["predict", "--bundle", str(SHIPPED), str(data / "valid")],
    ]
    program = (
        f"import sys\nfrom finetune.__main__ import main\ncodes = [main(command) for command in {commands!r}]\n"
        f"print(codes, sorted({TRAINING_LIBRARIES} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[0, 0, 0] []"


def test_names_that_are_not_utf8_are_escaped_in_print(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    shutil.copytree(data, folder)
    (folder / "train" / "blue" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no image")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "finetune", "audit", str(folder), "--cache-dir", str(tmp_path / "cache")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert "train/blue/caf\\udce9.jpg" in result.stdout


def test_control_characters_in_names_are_escaped(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pets\r"
    shutil.copytree(data, folder)
    for name in ("two\nlines.jpg", "red \x1b[31m.jpg", "turned \u202egpj.jpg", "family \U0001f469\u200d\U0001f467.jpg"):
        (folder / "train" / "blue" / name).write_bytes(b"no image")
    code, out, err = finetune("audit", folder, "--cache-dir", tmp_path / "cache")
    assert (code, err) == (1, "")
    assert {line.strip().partition(".jpg")[0] for line in out.splitlines() if "supported image" in line} == {
        "train/blue/two\\nlines",
        "train/blue/red \\x1b[31m",
        "train/blue/turned \\u202egpj",
        "train/blue/family \U0001f469\u200d\U0001f467",
    }
    shutil.rmtree(folder / "train")
    code, _, err = finetune("audit", folder, "--cache-dir", tmp_path / "cache")
    assert (code, err) == (
        2,
        f"finetune: {tmp_path}/pets\\r has a folder valid but no folder train. Rename the folder of the training photos to "
        "train.\n",
    )


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("pets", "pets-tiny"),
        (".pets", "pets-tiny"),
        ("two\nlines", "two-lines-tiny"),
        ("back\\slash", "back-slash-tiny"),
        (os.fsdecode(b"caf\xe9"), "caf--tiny"),
        ("x" * 255, "x" * 195 + "-tiny"),
        ("é" * 127, "é" * 97 + "-tiny"),
    ],
)
def test_the_default_name_of_a_bundle_is_valid_for_any_folder(tmp_path: Path, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir()
    found = default_name(Config(data_dir=tmp_path / folder, backbone="tiny"))
    assert found == name
    assert name_problem(found) is None


def test_training_on_names_that_are_not_utf8(tmp_path: Path, tiny_weights: Path) -> None:
    folder = color_folder(tmp_path / "pets", train=4, valid=2)
    odd = os.fsdecode(b"caf\xe9")
    for split in ("train", "valid"):
        (folder / split / "red" / "red.001.jpg").rename(folder / split / "red" / f"{odd}.jpg")
    (folder / "train" / "red" / f"{odd} damaged.jpg").write_bytes(b"no image")
    folder = folder.rename(tmp_path / odd)
    out = tmp_path / "run"
    code, _, err = finetune(
        "train", "--data-dir", folder, "--backbone", "tiny", "--weights", tiny_weights, "--epochs", 1,
        "--output-dir", out, "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert open_bundle(out / "bundle").name == "caf--tiny"
    assert list(json.loads((out / "audit.json").read_text(encoding="utf-8"))["damaged"]) == [f"train/red/{odd} damaged.jpg"]
    assert b"valid/red/caf\xe9.jpg" in (out / "predictions.csv").read_bytes()
    assert run_directory.read_config(out)["data_dir"] == str(folder)
    assert finetune("train", "--resume", "--output-dir", out)[0] == 0


def test_training_reports_each_step_and_ends_with_the_next_commands(data: Path, tmp_path: Path, tiny_weights: Path) -> None:
    out = tmp_path / "my run"
    code, printed, err = finetune(
        "train", "--data-dir", data, "--backbone", "tiny", "--weights", tiny_weights, "--epochs", 2,
        "--output-dir", out, "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    assert (code, err) == (0, "")
    steps = (
        "Loading PyTorch and other libraries ...",
        f"Training Tiny on {data}",
        "Loading the pretrained weights ...",
        "Building the network ...",
        "Features are computed once per photo",
        "Inspecting 12 photos and computing missing features ...",
        "Compiling the frozen layers ...",
        "epoch 1 of 2: train loss",
        "epoch 2 of 2: train loss",
        "Predicting the validation photos with the best epoch ...",
        "Exporting the serving graph ...",
        "Computing the metrics ...",
        "Drawing the plots ...",
        "Comparing the serving graph with the trained network on 4 photos ...",
        "Best epoch: ",
        "training     2 epochs of 8 photos in ",
    )
    positions = [printed.find(step) for step in steps]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert printed.splitlines()[-3:] == [
        "Next:",
        f"  finetune evaluate '{out}/bundle' --data-dir {data} --folds 5",
        f"  DATA_DIR={data} serve-classifier '{out}/bundle'",
    ]


def test_the_next_evaluation_uses_a_test_folder_if_there_is_one(tmp_path: Path) -> None:
    bundle = open_bundle(SHIPPED)
    for name in ("train", "valid", "test"):
        (tmp_path / name).mkdir()
    assert next_commands(bundle, tmp_path)[0].endswith(f"--data-dir {tmp_path} --split test")
    (tmp_path / "valid").rmdir()  # test is then the validation folder
    assert next_commands(bundle, tmp_path)[0].endswith(f"--data-dir {tmp_path} --folds 5")


@pytest.mark.parametrize("augment", [(), ("--augment",)], ids=["cached features", "uncached"])
def test_features_and_compiled_layers_are_freed_before_the_export(
    data: Path, tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, augment: tuple[str, ...]
) -> None:
    existing: list[type] = []
    export = pipeline.export_bundle

    def count_then_export(*args: Any, **options: Any) -> Bundle:
        gc.collect()
        kinds = (CachedBatches, UncachedBatches, OpenVINOEngine)
        existing.extend(type(item) for item in gc.get_objects() if type(item) in kinds)  # isinstance() would call proxies
        return export(*args, **options)

    gc.collect()
    monkeypatch.setattr(pipeline, "export_bundle", count_then_export)
    flags = ("--data-dir", data, "--backbone", "tiny", "--weights", tiny_weights, "--epochs", 1, *augment)
    code, _, err = finetune("train", *flags, "--output-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    assert (code, err) == (0, "")
    assert existing == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, "can no longer be read (No such file or directory). Put it back."),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "has changed since it was inspected. Restore it."),
    ],
    ids=["moved away", "cut short"],
)
def test_a_photo_that_changes_during_training_is_named(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, change: object, reason: str
) -> None:
    folder, out = color_folder(tmp_path / "pets", train=4, valid=2), tmp_path / "run"
    photo, original = folder / "train" / "red" / "red.002.jpg", tmp_path / "original"
    shutil.copy(photo, original)
    save = run_directory.save_checkpoint

    def save_then_change(*args: object, **kwargs: object) -> None:
        save(*args, **kwargs)  # type: ignore[arg-type]
        if photo.exists():
            change(photo)  # type: ignore[operator]

    monkeypatch.setattr(run_directory, "save_checkpoint", save_then_change)
    flags = ("--data-dir", folder, "--backbone", "tiny", "--weights", tiny_weights, "--epochs", 3, "--augment")
    code, _, err = finetune("train", *flags, "--output-dir", out, "--cache-dir", tmp_path / "cache")
    resume = f"finetune train --resume --output-dir {out}"
    assert (code, err) == (2, f"finetune: {photo} {reason} Then resume with: {resume}\n")
    monkeypatch.undo()
    with registered():
        shutil.copy(original, photo)
        assert finetune(*resume.split()[1:])[0] == 0


def test_batches_of_one_photo_are_rejected_for_networks_with_batchnorm(data: Path, tmp_path: Path) -> None:
    code, _, err = finetune(
        "train", "--data-dir", data, "--backbone", "vgg_cifar", "--batch-size", 1, "--output-dir", tmp_path / "run"
    )
    assert code == 2
    assert "This network has BatchNorm layers to train, which need at least 2 photos per batch (got --batch-size 1" in err


def test_counts_of_many_classes_are_a_table(tmp_path: Path) -> None:
    classes = [f"a long name of a class, number {i}" for i in range(5)]
    folder = color_folder(tmp_path / "pets", train=2, valid=1, classes=classes)
    lines = audit_folder(folder, cache_dir=tmp_path / "cache", quiet=True).text().splitlines()
    assert lines[1:4] == [
        f"  {'class':<32}  train  valid",
        "  a long name of a class, number 0      2      1",
        "  a long name of a class, number 1      2      1",
    ]
