"""``finetune predict --output``: every photo is scored exactly once, also after a kill and with several processes."""

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

from finetune.batch_inference import parquet
from finetune.batch_inference.predict import classify
from finetune.data.image_files import ImageSearch, read_image_file
from models.artifacts.bundle import open_bundle
from tests.helpers.server import poll
from tests.helpers.tiny_network import finetune

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


def score(*arguments: object, code: int = 0) -> str:
    exit_code, out, err = finetune("predict", *arguments)
    assert exit_code == code, err
    return err if code else out


def rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


@pytest.fixture
def photos(tiny_bundle: SimpleNamespace, tmp_path: Path) -> Path:
    """36 photos in nested folders, a damaged one, and files that are not photos by their names."""
    folder = tmp_path / "photos"
    shutil.copytree(tiny_bundle.data / "train", folder)
    (folder / "blue" / "broken.jpg").write_bytes(b"no photo")
    (folder / "notes.txt").touch()
    (folder / ".hidden").mkdir()
    shutil.copy(next((folder / "red").iterdir()), folder / ".hidden" / "red.jpg")
    return folder


def test_scores_match_classify(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    printed = score("--bundle", tiny_bundle.path, "--output", out, "--images-per-file", 10, photos)
    assert "37 photos scored" in printed
    assert "1 of them could not be read" in printed
    assert f"{out} is complete." in printed
    table = rows(out)
    assert list(table[0]) == [
        *("file", "label", "confidence", "p_blue", "p_green", "p_red"),
        *("in_distribution", "ood_score", "because", "because_code", "error"),
    ]
    paths = sorted(photos.glob("[a-z]*/*.jpg"))
    assert [row["file"] for row in table] == [str(path) for path in paths]
    bundle = open_bundle(tiny_bundle.path)
    for row, prediction in zip(table, classify(bundle, paths), strict=True):
        if prediction.probabilities is None:
            assert row["error"] == prediction.error
            assert [row[name] for name in ("label", "confidence", "p_blue")] == [None] * 3
            continue
        assert row["error"] is None
        decision = bundle.decision_rule.decide(bundle.classes, prediction.probabilities, prediction.ood_score)
        assert (row["label"], row["because"], row["because_code"]) == (decision.label, decision.because, decision.because_code)
        assert row["in_distribution"] == decision.in_distribution
        assert row["ood_score"] == pytest.approx(prediction.ood_score, abs=1e-4)
        expected = dict(zip(bundle.classes, prediction.probabilities.tolist(), strict=True))
        assert {name: row[f"p_{name}"] for name in bundle.classes} == pytest.approx(expected, abs=1e-6)
        assert row["confidence"] == max(row[f"p_{name}"] for name in bundle.classes)
    assert sorted(path.name for path in out.iterdir()) == [
        "_SUCCESS",
        "_settings.json",
        *(f"part-{i:08d}.parquet" for i in range(4)),
    ]


def test_a_list_can_be_a_file_or_standard_input(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    named = [*sorted(map(str, photos.glob("[a-z]*/*.jpg"))), str(photos / "gone.jpg")]
    (tmp_path / "list.txt").write_text("\n".join(named) + "\n\n")
    score("--bundle", tiny_bundle.path, "--output", tmp_path / "a", "--list", tmp_path / "list.txt")
    table = rows(tmp_path / "a")
    assert [row["file"] for row in table] == named
    assert table[-1]["error"] == "No such file or directory"
    command = [
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
        subprocess.run([str(word) for word in command], stdin=lines, check=True, capture_output=True, env=environment())
    assert rows(tmp_path / "b") == table


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | more


def test_a_killed_run_resumes_and_scores_every_photo_once(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    """Kill a run after some chunks, then resume with two processes."""
    out = tmp_path / "scores.parquet"
    for i in range(400):
        os.link(photos / "red" / "red.000.jpg", photos / "red" / f"again.{i:04d}.jpg")
    command = ["predict", "--bundle", tiny_bundle.path, "--output", out, "--images-per-file", 2, photos]
    some = [*map(str, command[:-1]), "--list", "-"]  # the other photos are never listed, so it cannot finish before the kill
    with subprocess.Popen([sys.executable, "-m", "finetune", *some], env=environment(), stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.writelines(os.fsencode(photo) + b"\n" for photo in islice(ImageSearch().walk([photos]), 200))
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
            [sys.executable, "-m", "finetune", *map(str, command)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"),
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    table = rows(out)
    assert sorted(row["file"] for row in table) == sorted(map(str, photos.glob("[a-z]*/*.jpg")))
    assert [row["file"] for row in table if row["error"]] == [str(photos / "blue" / "broken.jpg")]
    assert (out / "_SUCCESS").read_text() == '{"photos": 437, "parts": 219}\n'
    assert not list(out.glob(".*"))
    assert "0 photos scored" in score(*command[1:])


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def test_under_torchrun_each_process_scores_its_chunks(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    command = ["predict", "--bundle", tiny_bundle.path, "--output", tmp_path / "out", "--images-per-file", 8, photos]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "finetune", *command]
    done = subprocess.run([str(word) for word in run], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2: 21 photos scored" in done.stdout
    assert "process 2 of 2: 16 photos scored" in done.stdout
    assert len(rows(tmp_path / "out")) == 37


def test_torch_is_not_required(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    command = ["predict", "--bundle", str(tiny_bundle.path), "--output", str(tmp_path / "out"), str(photos)]
    program = f"import sys; sys.modules['torch'] = None; from finetune.__main__ import main; sys.exit(main({command!r}))"
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True, capture_output=True)
    assert len(rows(tmp_path / "out")) == 37


def test_other_settings_or_photos_are_rejected(tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--bundle", tiny_bundle.path, "--output", out)
    score(*flags, "--images-per-file", 10, photos)
    assert "was started with images per file 10, not 4096" in score(*flags, photos, code=2)
    shutil.copy(photos / "red" / "red.000.jpg", photos / "blue" / "another.jpg")
    assert "was started with another list of photos" in score(*flags, "--images-per-file", 10, photos, code=2)
    assert "was started with another list of photos" in score(*flags, "--images-per-file", 10, photos / "blue", code=2)
    (file, *_) = parts(out)
    table = pq.ParquetFile(file).read()
    renamed = table.rename_columns(["photo", *table.column_names[1:]])
    pq.write_table(renamed.replace_schema_metadata(table.schema.metadata), file)
    (photos / "blue" / "another.jpg").unlink()
    message = f"{out} was started by another version, which wrote other columns. Choose another --output."
    assert message in score(*flags, "--images-per-file", 10, photos, code=2)
    assert "is not empty and does not contain scores" in score("--bundle", tiny_bundle.path, "--output", photos, photos, code=2)
    (tmp_path / "empty").mkdir()
    assert "No photos found" in score("--bundle", tiny_bundle.path, "--output", tmp_path / "x", tmp_path / "empty", code=2)


def test_invalid_arguments_are_rejected(
    tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--bundle", tiny_bundle.path, "--output", tmp_path / "out")
    assert "requires either photos and folders, a --list or --labels" in score(*flags, code=2)
    assert "No such list" in score(*flags, "--list", tmp_path / "no.txt", code=2)
    assert "No such photo or folder" in score(*flags, tmp_path / "no", code=2)
    assert "require --output" in score("--bundle", tiny_bundle.path, "--list", tmp_path / "no.txt", code=2)
    assert "--images-per-file must be at least 1 (got 0)" in score(*flags, "--images-per-file", 0, photos, code=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Only one process can read standard input" in score(*flags, "--list", "-", code=2)
    assert "require --output" in score("--bundle", tiny_bundle.path, photos, code=2)


def test_a_storage_failure_stops_the_run_and_is_not_written_as_rows(
    tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> bytes:
        if path.name == "red.003.jpg":
            raise OSError(116, "Stale file handle")
        return read_image_file(path)

    flags = ("--bundle", tiny_bundle.path, "--output", tmp_path / "out", "--images-per-file", 4, photos)
    monkeypatch.setattr(parquet, "read_image_file", stale)
    assert "could not be read (Stale file handle). Fix the storage" in score(*flags, code=2)
    written = len(parts(tmp_path / "out"))
    assert 0 < written < 10
    monkeypatch.undo()
    assert f"{4 * written} already scored" in score(*flags)
    assert len(rows(tmp_path / "out")) == 37


def test_a_table_lists_the_photos_and_its_columns_follow_the_scores(
    tiny_bundle: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    table = photos / "labels.csv"
    table.write_text(
        "image,label,group,camera\nred/red.000.jpg,red,a,left\nblue/broken.jpg,blue,,\nblue/lost.jpg,blue,b,right\n",
        encoding="utf-8",
    )
    out = tmp_path / "scores.parquet"
    flags = ("--bundle", tiny_bundle.path, "--labels", table)
    assert "3 photos scored" in score(*flags, "--output", out)
    columns = ("file", "label", "true_label", "split", "group", "facet_camera", "error")
    assert [[row[name] for name in columns] for row in rows(out)] == [
        [str(photos / "blue/broken.jpg"), None, "blue", None, None, None, rows(out)[0]["error"]],
        [str(photos / "blue/lost.jpg"), None, "blue", None, "b", "right", "No such file or directory"],
        [str(photos / "red/red.000.jpg"), "red", "red", None, "a", "left", None],
    ]
    assert "3 already scored" in score(*flags, "--output", out)
    table.write_text(table.read_text(encoding="utf-8").replace("left", "top"), encoding="utf-8")
    assert "was started with labels " in score(*flags, "--output", out, code=2)
    code, printed, _ = finetune("predict", *flags, "--csv")
    assert code == 1
    assert [line.split(",")[0] for line in printed.splitlines()[1:]] == [row["file"] for row in rows(out)]
