"""What the tests share: caches of their own, little folders of drawn photos, and weights that nobody has to download."""

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

from finetune.data.synthetic.dataset import CLASSES, draw_image
from service.db.connection import Database
from tests.helpers.databases import Postgres, run_postgres
from tests.helpers.system_packages import skip_without

if TYPE_CHECKING:
    from playwright.sync_api import Browser

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks here are small; threads on busy cores wait for each other

PhotoFolder = Callable[..., Path]
RandomWeights = Callable[[str], dict[str, Any]]
NewDatabase = Callable[[str], contextlib.AbstractContextManager[str]]


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills a person's caches. A test sets its own with ``monkeypatch.setenv``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("share")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch-home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _patient_databases() -> Iterator[None]:
    """Who waits for a lock or a connection waits for as long as it takes on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.db.connection.DEFAULT_TIMEOUT_S", 300.0)
        yield


@pytest.fixture(scope="session")
def photo_folder() -> PhotoFolder:
    """``photo_folder(path)`` draws a data folder there, every picture another, and gives the path back."""

    def make(
        root: Path,
        *,
        train: int = 4,
        valid: int = 2,
        classes: Sequence[str] = CLASSES,
        valid_name: str = "valid",
        seed: int = 0,
    ) -> Path:
        """``train`` and ``valid`` count the photos of each class; ``valid=0`` makes no folder for them."""
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
    """``random_weights(name)`` gives a state dict with random numbers for a network, the same ones every time."""
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
    """A state dict of VGG16 with random numbers: 550 MB, so it is made once and only where a test asks for it."""
    import torch

    from models.networks.registry import create_model

    with torch.device("meta"):
        empty = create_model("vgg16").state_dict()
    numbers = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in empty.items():
        bound = (6 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.0  # He's: signals neither grow nor fade
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
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The network ``tiny`` trained on painted photos of three classes, to be served.

    ``path`` is the whole bundle and ``head`` the one that holds only what was trained, which the service cannot merge, as
    it does not know the network; ``photos`` is the folder of the validation photos, and ``predictions`` the table of what
    training gave them, whose photos are relative to ``data``.
    """
    from tests.helpers import tiny_network

    root = tmp_path_factory.mktemp("tiny-bundle")
    data = tiny_network.color_folder(root / "data", train=12, valid=6, classes=("blue", "red", "green"))
    with tiny_network.registered():
        weights = tiny_network.save_weights(root / "tiny.pth")
        flags = ("--data-dir", data, "--backbone", "tiny", "--weights", weights, "--output-dir", root / "run")
        for words in (
            ("train", *flags, "--export", "head"),
            ("merge", root / "run" / "bundle", root / "whole", "--weights", weights),
        ):
            code, _, message = tiny_network.finetune(*words)
            assert code == 0, message
    return SimpleNamespace(
        path=root / "whole",
        head=root / "run" / "bundle",
        data=data,
        photos=data / "valid",
        predictions=root / "run" / "predictions.csv",
    )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, started once for all tests that look at pages; each opens contexts of its own (``browsing.visitor``)."""
    from tests.helpers.browser import CHROMIUM, run_browser

    if CHROMIUM is None:
        skip_without("chromium")
    with run_browser() as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for the tests that ask for one."""
    with run_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the tables and nothing in them, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    Database(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session")
def new_database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path
) -> NewDatabase:
    """``with new_database("sqlite") as url`` (or "postgresql") gives a review database at the newest revision."""

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
    """The URL of a review database of the test's own, at the newest revision: the test runs on SQLite and on PostgreSQL."""
    with new_database(request.param) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A review database of the test's own, open."""
    opened = Database(database_url)
    yield opened
    opened.close()
