from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import Mock

import matplotlib as mpl
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from finetune.reports import image_sheets, plots
from finetune.reports.figures import slugs, write_plots
from models import preprocess
from models.artifacts.predictions import Predictions

pytestmark = pytest.mark.slow

HISTORY = [
    {
        "epoch": epoch, "train_loss": 0.5 / epoch, "train_accuracy": 0.9, "valid_loss": 0.4 / epoch,
        "valid_accuracy": 0.95, "learning_rate": 1e-3, "seconds": 12.5,
    }
    for epoch in (1, 2, 3)
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw fewer pixels, for speed."""
    monkeypatch.setitem(plots.STYLE, "figure.dpi", 50)
    monkeypatch.setattr(image_sheets, "TILE_PX", 100)


def some_predictions(classes: tuple[str, ...], p_true: list[float], *, repeat: int = 1) -> Predictions:
    """Return predictions with these probabilities of the true class for each class. The next class gets the rest."""
    count = len(classes)
    labels = np.repeat(np.arange(count), len(p_true) * repeat)
    values = np.tile(np.repeat(p_true, repeat), count)
    probabilities = np.zeros((len(labels), count))
    probabilities[np.arange(len(labels)), (labels + 1) % count] = 1 - values
    probabilities[np.arange(len(labels)), labels] = values if count > 1 else 1.0
    names = tuple(f"valid/{label}/{i}.jpg" for i, label in enumerate(labels))
    return Predictions(classes, names, labels, probabilities, ("valid",) * len(names), ("0" * 64,) * len(names))


def save_photos(predictions: Predictions, data_dir: Path) -> None:
    for name in predictions.image_names:
        (data_dir / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "green").save(data_dir / name)


def plots_of(
    out_dir: Path,
    predictions: Predictions,
    data_dir: Path | None = None,
    *,
    history: list[dict[str, float]] | None = None,
    uncalibrated: NDArray[np.float64] | None = None,
) -> list[str]:
    """Write the plots, check that they are PNGs and the only files, and return their names."""
    written = write_plots(out_dir, predictions=predictions, data_dir=data_dir, history=history, uncalibrated=uncalibrated)
    assert sorted(written) == sorted(path for path in out_dir.rglob("*") if path.is_file())
    for path in written:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 150
    return [path.name for path in written]


def color_fraction(path: Path, color: tuple[int, int, int]) -> float:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    return float((np.abs(pixels - color).max(axis=2) <= 3).mean())


def test_all_plots_are_written(tmp_path: Path) -> None:
    predictions = some_predictions(("cats", "dogs"), [0.1, 0.55, 0.999])
    save_photos(predictions, tmp_path / "data")
    uncalibrated = np.full_like(predictions.probabilities, 0.5)
    names = plots_of(tmp_path / "out", predictions, tmp_path / "data", history=HISTORY, uncalibrated=uncalibrated)
    assert names == [
        "learning_curves.png", "confusion_matrix.png", "reliability.png", "thresholds.png",
        "confident_mistakes_cats.png", "least_certain_cats.png", "random_correct_cats.png",
        "confident_mistakes_dogs.png", "least_certain_dogs.png", "random_correct_dogs.png",
    ]  # fmt: skip


def test_without_history_and_photos_only_three_plots_are_written(tmp_path: Path) -> None:
    names = plots_of(tmp_path, some_predictions(("cats", "dogs"), [0.6]), history=[])
    assert names == ["confusion_matrix.png", "reliability.png", "thresholds.png"]


def test_what_more_photos_bring_has_a_plot_instead_of_the_epochs_of_a_logistic_head(tmp_path: Path) -> None:
    interval = {"value": 0.9, "low": 0.8, "high": 0.95}
    both = {"accuracy": interval, "log_loss": interval}
    curve = {"photos": [10, 20], "more_photos": 10, "gain": both, **{key: [value] * 2 for key, value in both.items()}}
    predictions = some_predictions(("cats", "dogs"), [0.6])
    written = write_plots(tmp_path, predictions=predictions, data_dir=None, history=[], uncalibrated=None, curve=curve)
    assert [path.name for path in written] == ["more_photos.png", "confusion_matrix.png", "reliability.png", "thresholds.png"]


def test_a_class_with_nothing_to_show_gets_no_sheet(tmp_path: Path) -> None:
    predictions = some_predictions(("cats", "dogs", "cows"), [0.9])
    selected = predictions.labels < 2
    fewer = Predictions(
        predictions.classes,
        predictions.image_names[:2],
        predictions.labels[selected],
        predictions.probabilities[selected],
        predictions.splits[:2],
        predictions.sha256s[:2],
    )
    names = plots_of(tmp_path / "out", fewer, tmp_path)
    expected = [f"{kind}_{name}.png" for name in ("cats", "dogs") for kind in ("least_certain", "random_correct")]
    assert names[3:] == expected


def test_each_sheet_selects_its_photos() -> None:
    predictions = some_predictions(("cats", "dogs"), [0.4, 0.01, 0.25, 0.9, 0.52, 0.7])
    assert image_sheets.confident_mistakes(predictions, 0).tolist() == [1, 2, 0]
    assert image_sheets.confident_mistakes(predictions, 1).tolist() == [7, 8, 6]
    assert image_sheets.least_certain(predictions, 0).tolist() == [4, 0, 5, 2, 3, 1]
    assert image_sheets.random_correct(predictions, 1, seed=0).tolist() == [9, 10, 11]


def test_random_samples_are_reproducible_and_limited_to_twelve() -> None:
    predictions = some_predictions(("cats", "dogs"), [0.8], repeat=60)
    drawn = [image_sheets.random_correct(predictions, 1, seed=seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 12
    assert min(drawn[0]) >= 60
    assert len(image_sheets.least_certain(predictions, 1)) == 12


def test_only_the_displayed_photos_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = some_predictions(("cats", "dogs"), [0.8], repeat=40)
    save_photos(predictions, tmp_path / "data")
    decode = Mock(wraps=preprocess.decode)
    monkeypatch.setattr(image_sheets, "decode", decode)
    plots_of(tmp_path / "out", predictions, tmp_path / "data")
    assert decode.call_count == 2 * 2 * 12


def test_missing_and_damaged_photos_are_gray_tiles(tmp_path: Path) -> None:
    predictions = some_predictions(("cats", "dogs"), [0.9, 0.9])
    save_photos(predictions, tmp_path / "data")
    missing, damaged, folder, intact = (tmp_path / "data" / photo for photo in predictions.image_names)
    missing.unlink()
    damaged.write_bytes(intact.read_bytes()[:200])
    folder.unlink()
    folder.mkdir()
    plots_of(tmp_path / "out", predictions, tmp_path / "data")
    green, gray = Image.new("RGB", (1, 1), "green").getpixel((0, 0)), (217, 217, 217)
    assert color_fraction(tmp_path / "out" / "random_correct_cats.png", green) == 0.0  # type: ignore[arg-type]
    assert color_fraction(tmp_path / "out" / "random_correct_dogs.png", green) > 0.1  # type: ignore[arg-type]
    both = [color_fraction(tmp_path / "out" / f"random_correct_{name}.png", gray) for name in ("cats", "dogs")]
    assert both[0] > both[1] + 0.05


def test_frame_colors_show_correct_and_incorrect(tmp_path: Path) -> None:
    predictions = some_predictions(("cats", "dogs"), [0.2, 0.9])
    plots_of(tmp_path / "out", predictions, tmp_path)
    blue, orange = (0, 0x72, 0xB2), (0xD5, 0x5E, 0)
    colors = {
        kind: [color_fraction(tmp_path / "out" / f"{kind}_cats.png", color) > 0.005 for color in (blue, orange)]
        for kind in ("confident_mistakes", "least_certain", "random_correct")
    }
    assert colors == {
        "confident_mistakes": [False, True], "least_certain": [True, True], "random_correct": [True, False],
    }  # fmt: skip


def test_beyond_twenty_classes_only_the_worst_twenty_have_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sheets, "image_sheet", lambda *arguments: arguments[-1])  # drawing 40 sheets is slow
    predictions = some_predictions(tuple(f"class{i}" for i in range(24)), [0.9])
    probabilities = predictions.probabilities.copy()
    probabilities[[21, 22, 23]] = probabilities[[21, 22, 23]][:, ::-1]
    mistaken = dataclasses.replace(predictions, probabilities=probabilities)
    written = write_plots(tmp_path, predictions=mistaken, data_dir=tmp_path, history=None, uncalibrated=None)
    shown = {path.stem.rsplit("_", 1)[1] for path in written if path.stem.startswith("least_certain")}
    assert shown == {f"class{i}" for i in [*range(17), 21, 22, 23]}


@pytest.mark.parametrize("count", [1, 3, 40])
def test_any_number_of_classes_is_plotted(tmp_path: Path, count: int) -> None:
    predictions = some_predictions(tuple(f"a rather long class name {i}" for i in range(count)), [0.4, 0.7])
    assert plots_of(tmp_path, predictions) == ["confusion_matrix.png", "reliability.png", "thresholds.png"]


def test_the_size_of_the_confusion_matrix_is_bounded(tmp_path: Path) -> None:
    counts = np.eye(300, dtype=np.int64)
    with plots.report_style():
        path = plots.plot_confusion_matrix(counts, [f"class {i}" for i in range(300)], tmp_path / "matrix.png")
    with Image.open(path) as image:
        assert max(image.size) < 1_800  # at 50 dots per inch


def test_the_size_of_the_threshold_plot_is_bounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(300, 0.05), 2000)
    with plots.report_style():
        classes = [f"class {i}" for i in range(300)]
        path = plots.plot_thresholds(rng.integers(300, size=2000), probabilities, classes, tmp_path / "thresholds.png")
    with Image.open(path) as image:
        assert max(image.size) < 1_800


@pytest.mark.parametrize("p_true", [[1.0], [0.99999, 1.0, 0.9999999], [0.0, 0.5, 0.97]])
def test_crowded_confidences_are_plotted(tmp_path: Path, p_true: list[float]) -> None:
    predictions = some_predictions(("cats", "dogs"), p_true, repeat=20)
    uncalibrated = predictions.probabilities[:, ::-1]
    names = plots_of(tmp_path, predictions, history=HISTORY[: len(p_true)], uncalibrated=uncalibrated)
    assert names == ["learning_curves.png", "confusion_matrix.png", "reliability.png", "thresholds.png"]


def test_class_names_in_any_script_are_drawn_without_warnings_and_stay_in_the_folder(tmp_path: Path) -> None:
    names = ("猫", "कुत्ता", "قط", "$5_{x$", "\udc80\x00\n", "../../up", "x" * 300, "", "🐈")
    plain = some_predictions(names, [0.2])
    image_names = tuple(f"valid/{name}.jpg" for name in names)
    odd = dataclasses.replace(plain, image_names=image_names)
    assert len(plots_of(tmp_path / "out", odd, tmp_path / "data")) == 3 + 2 * len(names)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_slugs_are_safe_readable_and_unique() -> None:
    assert slugs(["cats", "Golden Retriever", "猫"]) == ("cats", "Golden-Retriever", "猫")
    assert slugs(["a/b", "a b", "A-B", "a-b-2"]) == ("a-b", "a-b-2", "A-B-3", "a-b-2-2")
    assert slugs(["..", "", "/", "../../etc/passwd"]) == ("class", "class-2", "class-3", "etc-passwd")
    assert len(slugs(["x" * 300])[0].encode()) <= 160


def test_matplotlib_settings_are_restored_and_files_are_reproducible(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    predictions = some_predictions(("cats", "dogs"), [0.9])
    for out in ("one", "two"):
        plots_of(tmp_path / out, predictions, tmp_path)
    assert dict(mpl.rcParams) == before
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_invalid_predictions_are_rejected(tmp_path: Path) -> None:
    predictions = some_predictions(("cats", "dogs"), [0.9])
    with pytest.raises(ValueError, match="Expected labels of shape"):
        plots_of(tmp_path, predictions, uncalibrated=np.ones((1, 2)) / 2)
    empty = Predictions(("cats", "dogs"), (), np.zeros(0, dtype=np.int64), np.zeros((0, 2)), (), ())
    with pytest.raises(ValueError, match="Expected at least one photo"):
        plots_of(tmp_path, empty)
