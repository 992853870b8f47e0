from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.config import Config
from models.artifacts import bundle as module
from models.artifacts.bundle import (
    GOLDEN,
    GRAPH,
    MANIFEST,
    MODEL_CARD,
    Bundle,
    check_golden,
    open_bundle,
    preprocessing_fields,
    write_bundle,
)
from models.errors import BundleError, ConfigError
from models.preprocess import Preprocessing

ROOT = Path(__file__).resolve().parents[3]
PREPROCESSING = Preprocessing(interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)
FIELDS: dict[str, Any] = {
    "kind": "full", "name": "pets", "backbone": "vgg16", "classes": ["cats", "Hündchen"], "temperature": 1.25,
    **preprocessing_fields(PREPROCESSING), "golden": {"tolerance": 1e-3},
}  # fmt: skip
GOLDEN_ROWS = np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32)
FILES = [GRAPH, GOLDEN, MODEL_CARD, "plots/roc.png"]


def write_files(folder: Path, *, graph: bytes = b"the graph") -> None:
    (folder / GRAPH).write_bytes(graph)
    (folder / MODEL_CARD).write_text("# Card\n")
    (folder / "plots").mkdir()
    (folder / "plots" / "roc.png").write_bytes(b"\x89PNG")
    np.savez_compressed(folder / GOLDEN, pixels=np.full((2, 8, 8, 3), 7, np.uint8), probabilities=GOLDEN_ROWS)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle", FIELDS, write_files=write_files)


def change(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(file.read_text(encoding="utf-8"))
    edit(manifest)
    file.write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")


# Writing and opening


def test_written_bundle_can_be_opened(bundle: Bundle) -> None:
    opened = open_bundle(bundle.path)
    assert opened == bundle
    assert (opened.name, opened.backbone, opened.classes) == ("pets", "vgg16", ("cats", "Hündchen"))
    assert opened.preprocessing == PREPROCESSING
    assert opened.manifest["preprocessing_sha256"] == PREPROCESSING.sha256()
    assert set(opened.manifest["files"]) == set(FILES)
    assert not opened.is_head_only
    assert sorted(p.name for p in bundle.path.parent.iterdir()) == ["bundle"]


def test_version_depends_on_files_and_manifest(tmp_path: Path, bundle: Bundle) -> None:
    same = write_bundle(tmp_path / "same", FIELDS, write_files=lambda folder: copy_files(bundle, folder))
    other_file = write_bundle(
        tmp_path / "other", FIELDS, write_files=lambda folder: write_files(folder, graph=b"another graph")
    )
    other_fields = write_bundle(
        tmp_path / "fields", FIELDS | {"temperature": 1.3}, write_files=lambda folder: copy_files(bundle, folder)
    )
    assert len(bundle.version) == 12
    assert same.version == bundle.version
    assert len({bundle.version, other_file.version, other_fields.version}) == 3


def copy_files(bundle: Bundle, folder: Path) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((bundle.path / name).read_bytes())


@pytest.fixture
def private_umask() -> Iterator[None]:
    old = os.umask(0o077)
    yield
    os.umask(old)


@pytest.mark.usefixtures("private_umask")
def test_bundle_is_readable_by_other_users(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", FIELDS, write_files=write_files).path
    modes = {p.relative_to(path).as_posix(): p.stat().st_mode & 0o777 for p in (path, *path.rglob("*"))}
    folders = {".", "plots"}
    assert modes == {name: 0o755 if name in folders else 0o644 for name in (*FILES, MANIFEST, *folders)}


def test_older_bundle_is_replaced_completely(bundle: Bundle) -> None:
    def smaller(folder: Path) -> None:
        (folder / GRAPH).write_bytes(b"new")

    new = write_bundle(bundle.path, FIELDS | {"name": "new"}, write_files=smaller)
    assert open_bundle(bundle.path) == new
    assert sorted(p.name for p in bundle.path.iterdir()) == [MANIFEST, GRAPH]
    assert [p.name for p in bundle.path.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [RuntimeError("full"), KeyboardInterrupt()])
def test_write_error_keeps_the_older_bundle_and_removes_temporary_files(bundle: Bundle, error: BaseException) -> None:
    def broken(folder: Path) -> None:
        (folder / GRAPH).write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        write_bundle(bundle.path, FIELDS, write_files=broken)
    assert open_bundle(bundle.path) == bundle
    assert [p.name for p in bundle.path.parent.iterdir()] == ["bundle"]


def test_kill_while_writing_keeps_the_older_bundle(bundle: Bundle) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from models.artifacts.bundle import write_bundle\n"
        "def write_files(folder):\n"
        "    (folder / 'model.onnx').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_bundle(Path(sys.argv[1]), {'name': 'new'}, write_files=write_files)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(bundle.path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert open_bundle(bundle.path) == bundle
    again = write_bundle(bundle.path, FIELDS | {"name": "again"}, write_files=write_files)
    assert open_bundle(bundle.path) == again


def test_older_bundle_is_restored_if_the_rename_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        if target == bundle.path:
            raise PermissionError(13, "permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(PermissionError):
        write_bundle(bundle.path, FIELDS | {"name": "new"}, write_files=write_files)
    monkeypatch.undo()
    assert open_bundle(bundle.path) == bundle
    assert [p.name for p in bundle.path.parent.iterdir()] == ["bundle"]


# Verification


@pytest.mark.parametrize("name", FILES)
def test_file_with_one_changed_byte_is_rejected_by_name(bundle: Bundle, name: str) -> None:
    file = bundle.path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} was changed or damaged"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("name", FILES)
def test_longer_or_missing_file_is_rejected_by_name(bundle: Bundle, name: str) -> None:
    file = bundle.path / name
    with file.open("ab") as end:
        end.write(b"\0")
    with pytest.raises(BundleError, match=rf"{name} was changed or damaged"):
        open_bundle(bundle.path)
    file.unlink()
    with pytest.raises(BundleError, match=rf"lacks {name}, which its manifest lists"):
        open_bundle(bundle.path)


def test_only_requested_files_are_verified(bundle: Bundle) -> None:
    (bundle.path / MODEL_CARD).write_text("# Another card\n")
    assert open_bundle(bundle.path, files=[GRAPH]) == bundle
    assert open_bundle(bundle.path, files=[]) == bundle
    with pytest.raises(BundleError, match=r"has no head\.safetensors"):
        open_bundle(bundle.path, files=["head.safetensors"])


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "reordered classes": lambda manifest: manifest["classes"].reverse(),
    "renamed class": lambda manifest: manifest["classes"].__setitem__(0, "dogs"),
    "different mean": lambda manifest: manifest["preprocessing"].update(mean=[0.485, 0.456, 0.406]),
    "different size": lambda manifest: manifest["preprocessing"].update(resize_px=224),
    "different temperature": lambda manifest: manifest.update(temperature=1.0),
    "different sha256 of a file": lambda manifest: manifest["files"][GRAPH].update(sha256="0" * 64),
    "removed file": lambda manifest: manifest["files"].pop(GRAPH),
    "removed sha256": lambda manifest: manifest.pop("sha256"),
    "additional field": lambda manifest: manifest.update(note="x"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_manifest_is_rejected(bundle: Bundle, edit: str) -> None:
    change(bundle.path / MANIFEST, EDITS[edit])
    with pytest.raises(BundleError, match=r"manifest\.json was changed after it was written"):
        open_bundle(bundle.path)


def test_every_manifest_byte_except_whitespace_is_verified(bundle: Bundle) -> None:
    file = bundle.path / MANIFEST
    content = file.read_bytes()
    undetected = []
    for i in range(len(content)):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            open_bundle(bundle.path, files=[])
        except BundleError:
            continue
        undetected.append(content[i : i + 1])
    assert set(undetected) <= {b" ", b"\n"}


def test_newer_format_is_rejected_with_upgrade_advice(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    newer = write_bundle(bundle.path, FIELDS, write_files=write_files)
    monkeypatch.undo()
    with pytest.raises(BundleError, match=r"has format 2, but this version supports formats up to 1\. Upgrade this program\.$"):
        open_bundle(newer.path)


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_path_without_a_manifest_is_rejected(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=rf"{name} is not a bundle: it has no manifest\.json\. Use a folder"):
        open_bundle(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"name": "x"}', '{"format": "one"}', "\ufeff{}", "\0"])
def test_unreadable_manifest_is_rejected(bundle: Bundle, text: str) -> None:
    (bundle.path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("name", ["../secret", "plots/../../secret", "/etc/hostname"])
@pytest.mark.parametrize("files", [None, [GRAPH]])
def test_manifest_listing_a_file_outside_the_bundle_is_rejected(bundle: Bundle, name: str, files: list[str] | None) -> None:
    (bundle.path.parent / "secret").write_bytes(b"the graph")

    def point_outside(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"][GRAPH]
        manifest["sha256"] = module.manifest_sha256(manifest)

    change(bundle.path / MANIFEST, point_outside)
    with pytest.raises(BundleError, match=rf"'{name}', which is outside the bundle"):
        open_bundle(bundle.path, files=files)


@pytest.mark.parametrize("name", ["", ".", "..", "../../escape", "a/b", "/tmp/x", ".hidden", "a\0b", "a\nb", "a\\b", "x" * 201])
def test_a_name_outside_the_bundle_is_rejected(bundle: Bundle, name: str) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["name"] = name
        manifest["sha256"] = module.manifest_sha256(manifest)

    change(bundle.path / MANIFEST, rename)
    for files in (None, []):
        with pytest.raises(BundleError, match=r"manifest\.json has the name .*, which (is empty|contains|has more)"):
            open_bundle(bundle.path, files=files)
    with pytest.raises(ConfigError, match=r"--name is .*, which"):
        Config(data_dir=bundle.path, name=name)


@pytest.mark.parametrize("name", ["pets", "Katzen & Hunde", "v1.2", "猫"])
def test_an_ordinary_name_is_accepted(bundle: Bundle, name: str) -> None:
    assert open_bundle(write_bundle(bundle.path, FIELDS | {"name": name}, write_files=write_files).path).name == name
    assert Config(data_dir=bundle.path, name=name).name == name


# The card and links


def test_the_card_is_the_exported_one(bundle: Bundle, tmp_path: Path) -> None:
    card = bundle.path / MODEL_CARD
    assert bundle.model_card() == "# Card\n"
    card.write_text("# Fake\n")  # of the same size
    with pytest.raises(BundleError, match=r"README\.md was changed or damaged"):
        bundle.model_card()
    card.unlink()
    with pytest.raises(BundleError, match=r"lacks README\.md"):
        bundle.model_card()
    (tmp_path / "outside").write_text("# Card\n")  # even of the same content
    card.symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=r"README\.md is a link that leads out of the bundle"):
        bundle.model_card()
    for target in ("/dev/zero", "/etc/passwd", "nothing"):
        card.unlink()
        card.symlink_to(target)
        with pytest.raises(BundleError, match=r"README\.md"):
            open_bundle(bundle.path, files=[MODEL_CARD])
    card.unlink()
    (bundle.path / "real").write_text("# Card\n")
    card.symlink_to("real")  # as where a volume is mounted
    assert bundle.model_card() == "# Card\n"


def test_a_bundle_without_a_card_has_none(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bare", FIELDS, write_files=lambda folder: (folder / GRAPH).write_bytes(b"x") and None)
    (bundle.path / MODEL_CARD).write_text("put there later")
    assert bundle.model_card() is None


# Golden outputs


def engine_returning(rows: NDArray[np.float32]) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert pixels.shape == (2, 8, 8, 3)
        assert (pixels == 7).all()
        return rows

    return run


def test_outputs_within_the_tolerance_are_accepted(bundle: Bundle) -> None:
    assert check_golden(bundle, engine_returning(GOLDEN_ROWS)) == 0
    assert check_golden(bundle, engine_returning(GOLDEN_ROWS + np.float32(5e-4))) == pytest.approx(5e-4, rel=1e-3)
    coarse = engine_returning(GOLDEN_ROWS + np.float32(0.01))
    assert check_golden(bundle, coarse, tolerance=0.02) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("error", [0.002, -0.3, np.nan])
def test_outputs_outside_the_tolerance_are_rejected(bundle: Bundle, error: float) -> None:
    rows = GOLDEN_ROWS.copy()
    rows[1, 0] += error
    with pytest.raises(BundleError, match="does not reproduce its golden outputs"):
        check_golden(bundle, engine_returning(rows))


def test_stricter_tolerance_overrides_the_bundles_own(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"max difference 0\.0005, tolerance 1e-05\."):
        check_golden(bundle, engine_returning(GOLDEN_ROWS + np.float32(5e-4)), tolerance=1e-5)
