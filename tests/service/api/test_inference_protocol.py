"""The Open Inference Protocol, used over HTTP by its common client, tritonclient."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from models.artifacts.bundle import open_bundle
from tests.helpers.server import LONG_TIMEOUTS, RESPONSE_TIMEOUT_S, START_TIMEOUT_S, Response, Server, serve

pytestmark = pytest.mark.slow

SIDE = 32


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace) -> Iterator[Server]:
    with serve(tiny_bundle.path, max_images=4, max_body_mb=1) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(
        f"127.0.0.1:{server.port}", connection_timeout=RESPONSE_TIMEOUT_S, network_timeout=RESPONSE_TIMEOUT_S
    ) as client:
        yield client


@pytest.fixture(scope="module")
def name(tiny_bundle: SimpleNamespace) -> str:
    return open_bundle(tiny_bundle.path).name


@pytest.fixture(scope="module")
def photos(tiny_bundle: SimpleNamespace) -> list[bytes]:
    """Return one image of each class, in the order of the classes."""
    return [(tiny_bundle.photos / label / f"{label[:4]}.000.jpg").read_bytes() for label in ("blue", "green", "red")]


def test_the_ood_score_is_an_output(client: Any, name: str, photos: list[bytes], tiny_bundle: SimpleNamespace) -> None:
    metadata = client.get_model_metadata(name)
    assert {"name": "ood_score", "datatype": "FP32", "shape": [-1]} in metadata["outputs"]
    limit = open_bundle(tiny_bundle.path).decision_rule.max_ood_score
    assert metadata["parameters"] == {"max_ood_score": limit}
    black = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    unlike = client.infer(name, [pixels_input(black)])
    assert unlike.as_numpy("ood_score") > limit
    assert unlike.as_numpy("because_code").tolist() == [b"unlike_training"]
    result = client.infer(name, [images_input(photos)], outputs=[triton.InferRequestedOutput("ood_score")])
    assert result.as_numpy("ood_score").shape == (3,)
    assert (result.as_numpy("ood_score") <= limit).all()
    assert result.as_numpy("probabilities") is None


def images_input(photos: list[bytes], *, binary: bool = True) -> Any:
    elements = photos if binary else [base64.b64encode(photo) for photo in photos]
    made = triton.InferInput("images", [len(photos)], "BYTES")
    return made.set_data_from_numpy(np.array(elements, dtype=object), binary_data=binary)


def pixels_input(pixels: Any, *, binary: bool = True) -> Any:
    made = triton.InferInput("pixels", list(pixels.shape), "UINT8")
    return made.set_data_from_numpy(pixels, binary_data=binary)


def predicted(server: Server, photo: bytes) -> dict[str, Any]:
    return dict(server.post(photo).json()["predictions"][0])


def test_server_and_model_describe_themselves(server: Server, client: Any, name: str, tiny_bundle: SimpleNamespace) -> None:
    version = open_bundle(tiny_bundle.path).version
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(name)
    assert client.is_model_ready(name, version)
    assert not client.is_model_ready("another")
    assert not client.is_model_ready(name, "1")
    about = client.get_server_metadata()
    assert set(about) == {"name", "version", "extensions"}
    assert about["extensions"] == ["binary_tensor_data", "classification"]
    for described in (client.get_model_metadata(name), client.get_model_metadata(name, version)):
        assert (described["name"], described["versions"]) == (name, [version])
        assert described["inputs"] == [
            {"name": "images", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]},
        ]
        assert described["outputs"] == [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "because_code", "datatype": "BYTES", "shape": [-1]},
            {"name": "ood_score", "datatype": "FP32", "shape": [-1]},
        ]
    assert server.get("/v2/health/live").json() == {"live": True}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_images_get_the_predictions_of_predict(
    server: Server, client: Any, name: str, photos: list[bytes], binary_in: bool, binary_out: bool | None
) -> None:
    outputs = None
    if binary_out is not None:
        outputs = [triton.InferRequestedOutput(output, binary_data=binary_out) for output in ("label", "probabilities")]
    result = client.infer(name, [images_input(photos, binary=binary_in)], outputs=outputs, request_id="mine")
    response = result.get_response()
    assert (response["model_name"], response["id"]) == (name, "mine")
    assert response["model_version"] == server.get("/models").json()["models"][0]["version"]
    values = result.as_numpy("probabilities")
    assert (values.dtype, values.shape) == (np.float32, (3, 3))
    for row, photo in zip(values, photos, strict=True):
        assert row == pytest.approx(list(predicted(server, photo)["probabilities"].values()), abs=1e-5)
    labels = [label.decode() if isinstance(label, bytes) else label for label in result.as_numpy("label")]
    assert labels == ["blue", "green", "red"]
    if outputs is None:
        assert result.as_numpy("because_code").tolist() == [b"", b"", b""]


@pytest.mark.parametrize("binary", [True, False])
def test_pixels_get_the_golden_outputs(client: Any, name: str, tiny_bundle: SimpleNamespace, binary: bool) -> None:
    bundle = open_bundle(tiny_bundle.path)
    pixels, expected, _ = bundle.golden()
    result = client.infer(name, [pixels_input(pixels[:4], binary=binary)], model_version=bundle.version)
    assert result.as_numpy("probabilities") == pytest.approx(expected[:4], abs=0.1)  # in bfloat16, where that is used
    (top,) = client.infer(
        name, [pixels_input(pixels[:1])], outputs=[triton.InferRequestedOutput("probabilities", class_count=2)]
    ).as_numpy("probabilities")
    best = np.argsort(-expected[0])[:2]
    found = [text.decode().split(":") for text in top]
    assert [(int(index), label) for _, index, label in found] == [(index, bundle.classes[index]) for index in best]
    assert float(found[0][0]) == pytest.approx(expected[0][best[0]], abs=0.1)


def test_one_bad_image_fails_the_request(server: Server, client: Any, name: str, photos: list[bytes]) -> None:
    before = server.metrics()
    with pytest.raises(InferenceServerException, match=r"Image 2 of 3: .*not a supported image"):
        client.infer(name, [images_input([photos[0], b"no photo", photos[2]])])
    after = server.metrics()
    assert after['http_problems_total{code="not_an_image"}'] == before.get('http_problems_total{code="not_an_image"}', 0) + 1
    assert after.get('classifier_predictions_total{label="red"}', 0) == before.get(
        'classifier_predictions_total{label="red"}', 0
    )
    assert after["classifier_in_flight_images"] == 0


def test_an_invalid_request_is_rejected_with_the_reason(client: Any, name: str, photos: list[bytes]) -> None:
    for model, version, tensor, words in (
        ("another", "", images_input(photos), "Model not found: another. The active model is "),
        (name, "7", images_input(photos), f"Model not found: {name}, version 7."),
        (name, "", images_input(photos * 2), "Too many images: 6 images, the limit is 4."),
        (name, "", images_input([b""]), "The file is empty."),
        (name, "", images_input([]), "is empty"),
        (
            name,
            "",
            pixels_input(np.zeros((1, 8, 8, 3), np.uint8)),
            r"Expected pixels of shape \[32, 32, 3\] per image, got \[8, 8, 3\]",
        ),
        (name, "", pixels_input(np.zeros((8, 8, 3), np.uint8)), r"must be \[N, H, W, C\] \(got \[8, 8, 3\]\)"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            client.infer(model, [tensor], model_version=version)
    with pytest.raises(InferenceServerException, match="`inputs` must contain one tensor"):
        client.infer(name, [images_input(photos), pixels_input(np.zeros((3, SIDE, SIDE, 3), np.uint8))])
    with pytest.raises(
        InferenceServerException,
        match=r"Unknown output 'embedding'\. Valid outputs: probabilities, label, because_code, ood_score\.",
    ):
        client.infer(name, [images_input(photos)], outputs=[triton.InferRequestedOutput("embedding")])
    with pytest.raises(InferenceServerException, match="compressed"):
        client.infer(name, [images_input(photos)], request_compression_algorithm="gzip")


def infer(server: Server, name: str, body: bytes, **headers: str) -> Response:
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    return server.post(body, "application/json", path=f"/v2/models/{name}/infer", headers=sent)


@pytest.mark.parametrize(
    "given",
    [
        5, [], {}, {"inputs": 5}, {"inputs": []}, {"inputs": [5]}, {"inputs": [{}]}, {"id": 5},
        {"name": "images"}, {"name": []}, {"datatype": "FP32"}, {"datatype": {}}, {"shape": "1"}, {"shape": [1.0]},
        {"shape": [-1]}, {"shape": [True]}, {"shape": []}, {"shape": [2]}, {"shape": [1, 2]}, {"shape": [0, 1]},
        {"shape": [1, 1, 1]}, {"shape": [2, 1]}, {"shape": [5, 1]},
        {"shape": [1 << 40]},
        {"data": None}, {"data": 5}, {"data": [5]}, {"data": [None]}, {"data": [[["eA=="], 5]]}, {"data": ["?"]},
        {"data": {"a": 1}},
        {"parameters": 5}, {"parameters": {"binary_data_size": 1}}, {"parameters": {"binary_data_size": "a"}},
        {"parameters": {"binary_data_size": 0}},
        {"parameters": {"shared_memory_region": "x"}},
        {"outputs": 5}, {"outputs": [5]}, {"outputs": [{}]}, {"outputs": [{"name": "label"}] * 2},
        {"outputs": [{"name": "label"}, {"name": "probabilities"}, {"name": "label"}]},
        {"outputs": [{"name": "label", "parameters": {"classification": 2}}]},
        {"outputs": [{"name": "probabilities", "parameters": {"classification": -1}}]},
        {"name": "pixels", "datatype": "UINT8", "shape": [4, 0, 0, 3], "data": []},
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 256]},
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, "a"]},
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, True]},
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 1 << 80]},
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3]},
    ],
)  # fmt: skip
def test_an_invalid_request_is_rejected_in_the_format_of_the_protocol(server: Server, name: str, given: Any) -> None:
    valid = {"name": "images", "datatype": "BYTES", "shape": [1], "data": ["eA=="]}
    if isinstance(given, dict) and not given.keys() & {"inputs"}:
        apart = {key: value for key, value in given.items() if key in ("id", "outputs")}
        given = (
            apart | {"inputs": [valid | {key: value for key, value in given.items() if key not in apart}]} if given else given
        )
    reply = infer(server, name, json.dumps(given).encode())
    assert 400 <= reply.status < 500
    assert reply.json().keys() == {"error"}


@pytest.mark.parametrize("members", [{"parameters": None}, {"id": None, "outputs": None}, {}])
@pytest.mark.parametrize("shape", [[1], [1, 1]])
def test_null_members_and_a_batch_dimension_are_accepted(
    server: Server, name: str, photos: list[bytes], members: dict[str, None], shape: list[int]
) -> None:
    encoded = base64.b64encode(photos[0]).decode()
    for data in ([encoded], [[encoded]]):
        tensor = {"name": "images", "datatype": "BYTES", "shape": shape, "data": data, "parameters": None}
        output = {"name": "label", "parameters": None}
        reply = infer(server, name, json.dumps({"inputs": [tensor], "outputs": [output]} | members).encode())
        assert reply.status == 200, reply.text
        assert [row["data"] for row in reply.json()["outputs"] if row["name"] == "label"] == [["blue"]]


def test_the_former_name_of_the_input_is_accepted(server: Server, name: str, photos: list[bytes]) -> None:
    tensor = {"name": "photos", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(photos[0]).decode()]}
    reply = infer(server, name, json.dumps({"inputs": [tensor]}).encode())
    assert (reply.status, reply.json()["outputs"][1]["data"]) == (200, ["blue"])


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "Invalid JSON (Expecting value: line 1 column 1 (char 0)). Send a request of the Open Inference Protocol, as"),
        (b"[" * 900_000, "The JSON has 900,000 lists and objects, the limit is "),
        (
            b'{"inputs":[{"name":"images","datatype":"BYTES","shape":[1],"data":["eA=="],"parameters":{"binary_data_size":0}}]}',
            "images has both `data` and binary_data_size. Send one of them.",
        ),
    ],
)
def test_a_request_of_another_form_is_explained(server: Server, name: str, body: bytes, error: str) -> None:
    reply = infer(server, name, body)
    assert reply.status in (400, 413)
    assert reply.json()["error"].startswith(error)


def test_truncated_binary_tensors_are_rejected(server: Server, name: str) -> None:
    def send(tail: bytes, shape: int = 1, size: int | None = None, header: str | None = None) -> Response:
        tensor = {
            "name": "images",
            "datatype": "BYTES",
            "shape": [shape],
            "parameters": {"binary_data_size": size or len(tail)},
        }
        text = json.dumps({"inputs": [tensor]}).encode()
        return infer(server, name, text + tail, Inference_Header_Content_Length=header or str(len(text)))

    for tail in (b"abc", struct.pack("<I", 5) + b"abc", struct.pack("<I", 1) + b"ab", struct.pack("<I", 0) * 100_000):
        assert send(tail).status == 400
    for header in ("-1", "x", "999999", "5"):
        assert send(struct.pack("<I", 1) + b"a", header=header).status == 400
    assert send(struct.pack("<I", 1) + b"a", size=9).status == 400


def test_an_unknown_path_is_reported_in_the_format_of_the_protocol(server: Server, name: str) -> None:
    for path in ("/v2/nowhere", f"/v2/models/{name}/versions/x/nowhere", "/v2/repository/index"):
        assert (server.get(path).status, server.get(path).json().keys()) == (404, {"error"})
    assert server.get(f"/v2/models/{name}/infer").status == 405


def test_a_key_and_free_capacity_are_required_as_for_predict(tiny_bundle: SimpleNamespace, photos: list[bytes]) -> None:
    from service import create_app
    from service.context import services_of
    from service.settings import Settings

    app = create_app(Settings(bundle=tiny_bundle.path, api_keys=("sesame",), max_in_flight=1, max_images=1, **LONG_TIMEOUTS))
    served = services_of(app).model_manager
    name = served.wait(START_TIMEOUT_S).bundle.name
    body = {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(photos[0]).decode()]}]}
    client = app.test_client()

    def send(**headers: str) -> Any:
        sent = {key.replace("_", "-"): value for key, value in headers.items()}
        return client.post(f"/v2/models/{name}/infer", json=body, headers=sent)

    assert send(Authorization="Bearer sesame").get_json()["outputs"][1]["data"] == ["blue"]
    assert (send().status_code, "error" in send().get_json()) == (401, True)
    assert client.get(f"/v2/models/{name}").status_code == 200
    services_of(app).admission.acquire()
    answer = send(Authorization="Bearer sesame")
    assert (answer.status_code, answer.headers["Retry-After"], answer.get_json().keys()) == (503, "1", {"error"})
    served.close()
