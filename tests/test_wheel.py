"""The wheel contains every file of the packages, and a service installed from it serves every page without PyTorch."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.helpers.server import RESPONSE_TIMEOUT_S, ROOT, START_TIMEOUT_S, poll, serve

pytestmark = pytest.mark.slow

PACKAGES = ("models", "finetune", "service")
TRAINING_ONLY = ("torch", "torchvision", "timm", "onnx", "scipy", "sklearn", "matplotlib", "pyarrow")
PAGES = (
    "/", "/model", "/docs", "/openapi.json", "/gallery", "/gallery/photos", "/gallery/correct", "/gallery/incorrect",
    "/compare", "/gallery/photos.json", "/gallery/reviews.csv", "/gallery/images/legend.png", "/models", "/metrics", "/v2",
)  # fmt: skip


def run(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=RESPONSE_TIMEOUT_S)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def files() -> list[str]:
    """The files of the project that are under version control, or about to be."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of these files alone, built as `pip wheel .` does, with the setuptools that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in files:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "compileall", "-q", folder / "source" / "service" / "db" / "migrations")  # as in a used checkout
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_contains_exactly_the_files_of_the_packages(files: list[str], wheel: Path) -> None:
    expected = {name for name in files if name.split("/")[0] in PACKAGES}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name for name in expected if not name.endswith(".py")}
    assert found == expected


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment with the wheel installed and without the packages of training."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # The dependencies without the project itself, because Python ignores .pth files in a folder that a .pth file adds.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "without_training.pth").write_text(f"import sys; sys.modules.update(dict.fromkeys({TRAINING_ONLY}))\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    where = run(python, "-c", "import service, models; print(service.__file__, models.__file__)", cwd=folder)
    assert all(Path(path).is_relative_to(site) for path in where.split())
    return python


def test_the_included_bundle_serves_without_the_packages_of_training(python: Path, tmp_path: Path) -> None:
    for name in TRAINING_ONLY:
        failed = subprocess.run([python, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True)
        assert "ModuleNotFoundError" in failed.stderr
    image = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(image, "JPEG")
    shipped = Path(run(python, "-c", "from service.settings import Settings; print(Settings().bundle)", cwd=tmp_path).strip())
    with serve(shipped, python=python, cwd=tmp_path, database_url=f"sqlite:///{tmp_path / 'reviews.db'}") as server:
        result = server.post(image.getvalue()).json()
        assert set(result["predictions"][0]["probabilities"]) == {"cats", "dogs"}
        poll(lambda: server.get("/gallery").status == 200, within_s=START_TIMEOUT_S)


def test_an_installed_service_shows_every_page(python: Path, tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    command = [python.with_name("serve-classifier"), tmp_path / "no-bundle", "--port", "0"]
    failed = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=RESPONSE_TIMEOUT_S)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert failed.stderr.startswith("service: ")
    assert "no-bundle" in failed.stderr
    static = [f"/static/{file.name}" for file in sorted((ROOT / "service" / "static").iterdir())]
    assert static
    environment = {"data_dir": tiny_bundle.data, "database_url": f"sqlite:///{tmp_path / 'reviews.db'}"}
    with serve(tiny_bundle.path, python=python, cwd=tmp_path, **environment) as server:
        poll(lambda: server.get("/gallery").status != 503, within_s=START_TIMEOUT_S)
        for path in (*PAGES, *static):
            assert server.get(path).status == 200, path
        row = server.get("/gallery/photos.json").json()["rows"][0]
        for path in (row["page"], row["thumbnail"]):
            assert server.get(path).status == 200, path
        for path in ("/nothing", "/gallery/photo", "/gallery/photos?model=none"):
            assert server.get(path).status == 404, path
