"""Shared fixtures: isolated caches, small folders of drawn photos, and random weights instead of downloaded ones."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

from finetune.data.synthetic.dataset import CLASSES, draw_image
from service.db.connection import Database
from tests.helpers.databases import Postgres, run_postgres
from tests.helpers.server import Server, poll, serve
from tests.helpers.system_packages import skip_without

if TYPE_CHECKING:
    from playwright.sync_api import Browser

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks here are small; threads on busy cores wait for each other

PhotoFolder = Callable[..., Path]
SharedFolder = Callable[[str, Callable[[Path], object]], Path]
SharedServer = Callable[..., Server]
RandomWeights = Callable[[str], dict[str, Any]]
NewDatabase = Callable[[str], contextlib.AbstractContextManager[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that the processes of xdist finish at about the same time."""
    marks = ("heavy", "slow")
    ranks = {item.path: len(marks) for item in items}
    for item in items:
        own = [rank for rank, mark in enumerate(marks) if item.get_closest_marker(mark)]
        ranks[item.path] = min([ranks[item.path], *own])
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture(scope="session", autouse=True)
def _isolated_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests out of the user's caches. A test sets other folders with ``monkeypatch.setenv``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("share")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch-home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _long_database_timeout() -> Iterator[None]:
    """Use a long timeout for locks and connections, because the machine may be busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.db.connection.DEFAULT_TIMEOUT_S", 300.0)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> SharedFolder:
    """Return ``get(name, make)``, which returns a folder that all processes of the test run share and must not change.

    The first process that needs the folder fills it with ``make(folder)``. The others wait for it.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, complete = root / "shared" / name, root / "shared" / f"{name}.complete"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(root / "shared" / f"{name}.lock"):
            if not complete.exists():
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def photo_folder() -> PhotoFolder:
    """Return a function that draws a data folder of different photos at a path and returns the path."""

    def make(
        root: Path,
        *,
        train: int = 4,
        valid: int = 2,
        classes: Sequence[str] = CLASSES,
        valid_name: str = "valid",
        seed: int = 0,
    ) -> Path:
        """Draw ``train`` and ``valid`` photos per class. With ``valid=0`` there is no validation folder."""
        for split, count in (("train", train), (valid_name, valid)):
            for (index, label), number in itertools.product(enumerate(classes), range(count)):
                path = root / split / label / f"{label}.{number:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                animal = label if label in CLASSES else CLASSES[index % len(CLASSES)]
                draw_image(animal, rng=random.Random(f"{seed}/{split}/{label}/{number}")).save(path, quality=88)
        return root

    return make


@pytest.fixture(scope="session")
def random_weights() -> RandomWeights:
    """Return a function that maps the name of a network to a reproducible random state dict."""
    import torch

    from models.networks.registry import create_model

    @functools.cache
    def make(name: str) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return dict(create_model(name).state_dict())

    return lambda name: {key: tensor.clone() for key, tensor in make(name).items()}


@pytest.fixture(scope="session")
def vgg16_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random state dict of VGG16: 550 MB, so it is created once, on first use."""
    import torch

    from models.networks.registry import create_model

    with torch.device("meta"):
        empty = create_model("vgg16").state_dict()
    numbers = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in empty.items():
        bound = (6 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.0  # He initialization
        state[name] = torch.empty(tensor.shape).uniform_(-bound, bound, generator=numbers)
    path = tmp_path_factory.mktemp("weights") / "vgg16-random.pth"
    torch.save(state, path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights for the network ``tiny``, which is registered while the module's tests run."""
    from tests.helpers import tiny_network

    with tiny_network.registered():
        yield tiny_network.save_weights(tmp_path_factory.mktemp("tiny") / "tiny.pth")


@pytest.fixture(scope="session")
def tiny_bundle(shared_folder: SharedFolder) -> SimpleNamespace:
    """The network ``tiny`` trained on painted photos of three classes.

    ``path`` is the merged bundle. ``head`` is the head-only bundle, which the service cannot merge because ``tiny`` is not
    registered there. ``photos`` is the folder of validation photos. ``predictions`` is the table of their predictions, with
    paths relative to ``data``.
    """

    def train(folder: Path) -> None:
        from tests.helpers import tiny_network

        data = tiny_network.color_folder(folder / "data", train=12, valid=6, classes=("blue", "red", "green"))
        with tiny_network.registered():
            weights = tiny_network.save_weights(folder / "tiny.pth")
            flags = ("--data-dir", data, "--backbone", "tiny", "--weights", weights, "--output-dir", folder / "run")
            for words in (
                ("train", *flags, "--export", "head"),
                ("merge", folder / "run" / "bundle", folder / "whole", "--weights", weights),
            ):
                code, _, message = tiny_network.finetune(*words)
                assert code == 0, message

    root = shared_folder("tiny-bundle", train)
    return SimpleNamespace(
        path=root / "whole",
        head=root / "run" / "bundle",
        data=root / "data",
        photos=root / "data" / "valid",
        predictions=root / "run" / "predictions.csv",
    )


@pytest.fixture(scope="module")
def shared_server(tiny_bundle: SimpleNamespace) -> Iterator[SharedServer]:
    """Return ``get(**settings)``, which starts a service with the tiny bundle, or returns the one with these settings.

    The tests of a module share it. They must not stop it or keep it busy, and compare its metrics with those before.
    """
    running: dict[tuple[tuple[str, object], ...], Server] = {}
    with contextlib.ExitStack() as stack:

        def get(**settings: object) -> Server:
            key = tuple(sorted(settings.items()))
            if key not in running:
                running[key] = stack.enter_context(serve(tiny_bundle.path, **settings))
            server = running[key]
            poll(lambda: server.metrics()["classifier_in_flight_images"] == 0)  # an earlier test may not await its requests
            return server

        yield get


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, shared by all tests. Each opens its own contexts (``tests.helpers.browser.open_pages``)."""
    from tests.helpers.browser import CHROMIUM, run_browser

    if CHROMIUM is None:
        skip_without("chromium")
    with run_browser() as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server, started on first use."""
    with run_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with empty tables, as a template to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    Database(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session")
def new_database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path
) -> NewDatabase:
    """Return a context manager that yields the URL of an empty, migrated database, given "sqlite" or "postgresql"."""

    @contextlib.contextmanager
    def make(kind: str) -> Iterator[str]:
        if kind == "sqlite":
            path = tmp_path_factory.mktemp("database") / "reviews.db"
            shutil.copyfile(migrated_sqlite, path)
            yield f"sqlite:///{path}"
            return
        server: Postgres = request.getfixturevalue("postgres")
        url = server.create()
        yield url
        server.drop(url)

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, new_database: NewDatabase) -> Iterator[str]:
    """The URL of an empty, migrated database. The test runs on SQLite and on PostgreSQL."""
    with new_database(request.param) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An open, empty review database. Writers of a test wait for each other however busy the machine is."""
    opened = Database(database_url, timeout_s=300)
    yield opened
    opened.close()
