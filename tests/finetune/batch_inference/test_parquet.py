"""``finetune predict --output``: every photo once, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from finetune.batch_inference.predict import classify, iter_images
from models.artifacts.bundle import open_bundle
from tests.helpers.server import poll
from tests.helpers.tiny_network import finetune

ROOT = Path(__file__).resolve().parents[3]


def score(*words: object, code: int = 0) -> str:
    got, out, err = finetune("predict", *words)
    assert got == code, err
    return err if code else out


def rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


@pytest.fixture
def photos(tiny_bundle: SimpleNamespace, tmp_path: Path) -> Path:
    """36 photos in two levels of folders, one that is none, and files that are no photos by their names."""
    folder = tmp_path / "photos"
    shutil.copytree(tiny_bundle.data / "train", folder)
    (folder / "blue" / "broken.jpg").write_bytes(b"no photo")
    (folder / "notes.txt").touch()
    (folder / ".hidden").mkdir()
    shutil.copy(next((folder / "red").iterdir()), folder / ".hidden" / "red.jpg")
    return folder


def test_scores_are_what_predict_prints(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    said = score("--bundle", tiny_bundle.path, "--output", out, "--images-per-file", 10, photos)
    assert "37 photos scored" in said
    assert "1 of them could not be read" in said
    assert f"{out} is complete." in said
    table = rows(out)
    assert list(table[0]) == ["photo", "label", "confidence", "p_blue", "p_green", "p_red", "error"]
    paths = sorted(photos.glob("[a-z]*/*.jpg"))
    assert [row["photo"] for row in table] == [str(path) for path in paths]
    bundle = open_bundle(tiny_bundle.path)
    for row, answer in zip(table, classify(bundle, paths), strict=True):
        if answer.probabilities is None:
            assert row["error"] == answer.error
            assert [row[name] for name in ("label", "confidence", "p_blue")] == [None] * 3
            continue
        assert row["error"] is None
        assert row["label"] == bundle.classes[int(answer.probabilities.argmax())]
        wanted = dict(zip(bundle.classes, answer.probabilities.tolist(), strict=True))
        assert {name: row[f"p_{name}"] for name in bundle.classes} == pytest.approx(wanted, abs=1e-6)
        assert row["confidence"] == max(row[f"p_{name}"] for name in bundle.classes)
    assert sorted(path.name for path in out.iterdir()) == [
        "_SUCCESS",
        "_settings.json",
        *(f"part-{i:08d}.parquet" for i in range(4)),
    ]


def test_a_list_gives_the_same_rows_from_a_file_and_from_standard_input(
    tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    named = [*sorted(map(str, photos.glob("[a-z]*/*.jpg"))), str(photos / "gone.jpg")]
    (tmp_path / "list.txt").write_text("\n".join(named) + "\n\n")
    score("--bundle", tiny_bundle.path, "--output", tmp_path / "a", "--list", tmp_path / "list.txt")
    table = rows(tmp_path / "a")
    assert [row["photo"] for row in table] == named
    assert table[-1]["error"] == "No such file or directory"
    words = [
        sys.executable,
        "-m",
        "finetune",
        "predict",
        "--bundle",
        tiny_bundle.path,
        "--output",
        tmp_path / "b",
        "--list",
        "-",
    ]
    with (tmp_path / "list.txt").open("rb") as lines:
        subprocess.run([str(word) for word in words], stdin=lines, check=True, capture_output=True, env=environment())
    assert rows(tmp_path / "b") == table


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | more


def test_killed_it_goes_on_and_no_photo_is_lost_or_twice(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    """Killed after some of them; then by two processes, which share what is left."""
    out = tmp_path / "scores.parquet"
    for i in range(400):
        os.link(photos / "red" / "red.000.jpg", photos / "red" / f"again.{i:04d}.jpg")
    words = ["predict", "--bundle", tiny_bundle.path, "--output", out, "--images-per-file", 2, photos]
    some = [*map(str, words[:-1]), "--list", "-"]  # the others are never named, so that it cannot be done before it is killed
    with subprocess.Popen([sys.executable, "-m", "finetune", *some], env=environment(), stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.writelines(os.fsencode(photo) + b"\n" for photo in islice(iter_images([photos], None), 200))
        process.stdin.flush()
        poll(lambda: process.poll() is not None or len(parts(out)) >= 5, every_s=0.002)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in parts(out)}
    assert 5 <= len(before) <= 100
    assert not (out / "_SUCCESS").exists()
    (out / ".part-00000100.parquet.x.part").write_bytes(b"half")

    both = [
        subprocess.Popen(
            [sys.executable, "-m", "finetune", *map(str, words)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"),
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    table = rows(out)
    assert sorted(row["photo"] for row in table) == sorted(map(str, photos.glob("[a-z]*/*.jpg")))
    assert [row["photo"] for row in table if row["error"]] == [str(photos / "blue" / "broken.jpg")]
    assert (out / "_SUCCESS").read_text() == '{"photos": 437, "parts": 219}\n'
    assert not list(out.glob(".*"))
    assert "0 photos scored" in score(*words[1:])


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def test_under_torchrun_each_process_scores_its_share(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    words = ["predict", "--bundle", tiny_bundle.path, "--output", tmp_path / "out", "--images-per-file", 8, photos]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "finetune", *words]
    done = subprocess.run([str(word) for word in run], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2: 21 photos scored" in done.stdout
    assert "process 2 of 2: 16 photos scored" in done.stdout
    assert len(rows(tmp_path / "out")) == 37


def test_it_needs_no_torch(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    words = ["predict", "--bundle", str(tiny_bundle.path), "--output", str(tmp_path / "out"), str(photos)]
    program = f"import sys; sys.modules['torch'] = None; from finetune.__main__ import main; sys.exit(main({words!r}))"
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True, capture_output=True)
    assert len(rows(tmp_path / "out")) == 37


def test_what_would_mix_two_things_is_refused(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--bundle", tiny_bundle.path, "--output", out)
    score(*words, "--images-per-file", 10, photos)
    assert "was begun with the images per file 10, not 4096" in score(*words, photos, code=2)
    shutil.copy(photos / "red" / "red.000.jpg", photos / "blue" / "another.jpg")
    assert "begun with another list of photos" in score(*words, "--images-per-file", 10, photos, code=2)
    assert "begun with another list of photos" in score(*words, "--images-per-file", 10, photos / "blue", code=2)
    assert "is not empty and holds no scores" in score("--bundle", tiny_bundle.path, "--output", photos, photos, code=2)
    (tmp_path / "empty").mkdir()
    assert "There are no photos" in score("--bundle", tiny_bundle.path, "--output", tmp_path / "x", tmp_path / "empty", code=2)


def test_what_cannot_be_meant_is_refused(
    tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--bundle", tiny_bundle.path, "--output", tmp_path / "out")
    assert "name the one or the other" in score(*words, code=2)
    assert "There is no list" in score(*words, "--list", tmp_path / "no.txt", code=2)
    assert "There is no photo or folder" in score(*words, tmp_path / "no", code=2)
    assert "need --output" in score("--bundle", tiny_bundle.path, "--list", tmp_path / "no.txt", code=2)
    assert "--images-per-file is 0" in score(*words, "--images-per-file", 0, photos, code=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Only one process can read standard input" in score(*words, "--list", "-", code=2)
    assert "need --output" in score("--bundle", tiny_bundle.path, photos, code=2)


def test_failing_storage_stops_it_and_does_not_become_rows(
    tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def stale(path: Path) -> bytes:
        if path.name == "red.003.jpg":
            raise OSError(116, "Stale file handle")
        return read(path)

    words = ("--bundle", tiny_bundle.path, "--output", tmp_path / "out", "--images-per-file", 4, photos)
    monkeypatch.setattr(Path, "read_bytes", stale)
    assert "cannot be read (Stale file handle); mend the storage" in score(*words, code=2)
    there = len(parts(tmp_path / "out"))
    assert 0 < there < 10
    monkeypatch.undo()
    assert f"{4 * there} were there already" in score(*words)
    assert len(rows(tmp_path / "out")) == 37
