"""The synthetic dataset: labels, variety, reproducibility and atomic output."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image

from finetune.cli import synthesize
from finetune.data.synthetic import dataset
from finetune.data.synthetic.dataset import CLASSES, draw_image, write_synthetic_dataset
from models.errors import DataError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "pets"
    write_synthetic_dataset(out, train=120, valid=40, seed=3)
    return out


def photos(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.jpg"))


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    synthesize.add_arguments(parser)
    return parser.parse_args(words)


def test_folders_have_the_requested_number_of_images(drawn: Path) -> None:
    counts = {f"{split}/{label}": len(photos(drawn / split / label)) for split in ("train", "valid") for label in CLASSES}
    assert counts == {"train/cats": 60, "train/dogs": 60, "valid/cats": 20, "valid/dogs": 20}
    assert (drawn / "train" / "cats" / "cat.0001.jpg").is_file()
    assert (drawn / "valid" / "dogs" / "dog.0020.jpg").is_file()


def test_images_are_color_jpegs_of_several_shapes(drawn: Path) -> None:
    sizes = []
    for path in photos(drawn):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            sizes.append(image.size)
    assert all(min(size) >= 200 and 239 < max(size) <= 520 for size in sizes)
    assert len({round(width / height, 1) for width, height in sizes}) >= 4


def test_the_readme_states_that_the_images_are_drawings(drawn: Path) -> None:
    text = (drawn / "README.txt").read_text(encoding="utf-8")
    assert "drawings" in text
    assert "`finetune synthesize`" in text
    assert "says nothing about photos" in text


def test_no_two_images_are_near_duplicates(drawn: Path) -> None:
    hashes = []
    for path in photos(drawn):
        with Image.open(path) as image:
            hashes.append(imagehash.phash(image).hash.ravel())
    bits = np.array(hashes, dtype=int)
    apart = bits @ (1 - bits).T
    apart += apart.T + 64 * np.eye(len(bits), dtype=int)
    assert apart.min() > 8


def test_the_average_color_does_not_reveal_the_class(drawn: Path) -> None:
    colors = {}
    for label in CLASSES:
        means = []
        for path in photos(drawn / "train" / label):
            with Image.open(path) as image:
                means.append(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
        colors[label] = np.array(means)
    between = np.abs(colors["cats"].mean(axis=0) - colors["dogs"].mean(axis=0))
    within = np.concatenate(list(colors.values())).std(axis=0)
    assert (between < 0.5 * within).all()


def test_a_larger_data_set_with_the_same_seed_contains_the_smaller_one(drawn: Path, tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path / "again", train=4, valid=2, seed=3)
    write_synthetic_dataset(tmp_path / "other", train=4, valid=2, seed=4)
    for path in photos(tmp_path / "again"):
        name = path.relative_to(tmp_path / "again")
        assert path.read_bytes() == (drawn / name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_a_single_image_can_be_drawn() -> None:
    first, second = (draw_image("dogs", rng=random.Random(5)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != draw_image("cats", rng=random.Random(5)).tobytes()


def test_an_unknown_class_gets_a_suggestion() -> None:
    with pytest.raises(DataError, match="Did you mean 'dogs'"):
        draw_image("dog", rng=random.Random(0))


def test_a_non_empty_folder_is_rejected_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty\. Choose another folder, or delete it"):
        write_synthetic_dataset(tmp_path, train=2, valid=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled_and_parents_are_created(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_synthetic_dataset(tmp_path / "empty", train=2, valid=2)
    write_synthetic_dataset(tmp_path / "a" / "b", train=2, valid=2)
    assert len(photos(tmp_path)) == 8


def test_an_existing_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "pets").write_text("a file")
    with pytest.raises(DataError, match="not a folder"):
        write_synthetic_dataset(tmp_path / "pets", train=2, valid=2)
    with pytest.raises(DataError, match="Could not write"):
        write_synthetic_dataset(tmp_path / "pets" / "below", train=2, valid=2)


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [(1, 2, r"--train .*\(got 1\)"), (2, 0, r"--valid .*\(got 0\)"), (-4, 2, r"--train .*\(got -4\)")],
)
def test_a_class_without_an_image_is_rejected(tmp_path: Path, train: int, valid: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_synthetic_dataset(tmp_path / "pets", train=train, valid=valid)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = 0

    def draw_two(label: str, *, rng: random.Random) -> Image.Image:
        nonlocal drawings
        drawings += 1
        if drawings > 2:
            raise KeyboardInterrupt
        return draw_image(label, rng=rng)

    monkeypatch.setattr(dataset, "draw_image", draw_two)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_dataset(tmp_path / "pets", train=4, valid=2)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_summary_and_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my pets"
    assert synthesize.run(parse(str(out), "--train", "6", "--valid", "4", "--seed", "1")) == 0
    printed = capsys.readouterr().out
    assert "6 training and 4 validation images" in printed
    assert "nothing about photos" in printed
    assert f"finetune train '{out}' --backbone efficientnet_lite0" in printed
    assert len(photos(out)) == 10


def test_the_command_draws_280_images_by_default() -> None:
    args = parse("pets")
    assert (args.out, args.train, args.valid, args.seed) == (Path("pets"), 200, 80, 0)
