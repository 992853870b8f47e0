"""The tensors of the Open Inference Protocol, as JSON or behind it as bytes: what goes in, and what comes out."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.preprocess import Preprocessing
from models.runtime.openvino_engine import Pixels
from service.http.errors import Problem
from service.http.request_body import OTHER_VALUES, parse_json
from service.http.text_validation import describe
from service.http.uploads import VALUES_PER_IMAGE, check_image_count
from service.settings import Settings

DATATYPES = {"images": "BYTES", "pixels": "UINT8"}
OUTPUTS = ("probabilities", "label")
JSON_HINT = "Send fewer images, or the tensor as bytes (binary_tensor_data)."
LENGTH = struct.Struct("<I")  # before each element of BYTES


@dataclass(frozen=True)
class InputTensor:
    """One input: its elements as text (``base64`` in JSON) or bytes for BYTES, or pixels (N, H, W, C) uint8."""

    name: str
    elements: list[str] | list[bytes] | None = None
    pixels: Pixels | None = None


@dataclass(frozen=True)
class RequestedOutput:
    """One output that is asked for; with ``classes`` the highest so many, as text."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferenceRequest:
    """A request, read."""

    id: str | None
    input: InputTensor
    outputs: list[RequestedOutput]


def parse_request(body: bytes, json_bytes: int | None, settings: Settings, preprocessing: Preprocessing) -> InferenceRequest:
    """Take a request apart; ``json_bytes`` is the length of its JSON where tensors follow as bytes. Raises Problem."""
    end = len(body) if json_bytes is None else json_bytes
    if not 0 <= end <= len(body):
        raise tensor_problem(f"Inference-Header-Content-Length is {end} and the body has {len(body)} bytes.")
    max_values, max_containers = _json_limits(settings, preprocessing)
    document: Any = parse_json(body[:end], max_values=max_values, max_containers=max_containers, hint=JSON_HINT)
    if not isinstance(document, dict):
        raise Problem("bad_json", "The JSON is not an object.")
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise tensor_problem("One input is wanted: either `images`, BYTES, or `pixels`, UINT8.")
    given = document.get("id")
    if not isinstance(given, (str, type(None))):
        raise tensor_problem("The request's `id` is no text.")
    return InferenceRequest(given, _read_input(inputs[0], body[end:], settings), _read_outputs(document))


def _json_limits(settings: Settings, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the most values and the most lists and objects of a request: those of ``max_images`` images as nested lists."""
    rows = 1 + preprocessing.input_px
    lists = settings.max_images * (rows + preprocessing.input_px**2)
    other = OTHER_VALUES + settings.max_images * VALUES_PER_IMAGE
    pixels = settings.max_images * preprocessing.input_px**2 * preprocessing.channels
    return other + lists + pixels, other + lists


def tensor_problem(detail: str) -> Problem:
    return Problem("bad_tensor", detail)


def _read_input(given: dict[str, Any], rest: bytes, settings: Settings) -> InputTensor:
    name, shape = given.get("name"), given.get("shape")
    if not isinstance(name, str) or name not in DATATYPES:
        raise tensor_problem(f"The input is called {describe(name)}; there are {' and '.join(DATATYPES)}.")
    if given.get("datatype") != DATATYPES[name]:
        raise tensor_problem(f"The datatype of {name} is {describe(given.get('datatype'))}; {DATATYPES[name]} is wanted.")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise tensor_problem(f"The shape of {name} is no list of whole numbers.")
    if len(shape) == (1 if name == "images" else 4):
        check_image_count(shape[0], settings)  # before each of a million empty ones is looked at
    size = _parameters(given).get("binary_data_size")
    if size != (len(rest) if rest or size is not None else None):
        raise tensor_problem(f"binary_data_size of {name} is {describe(size)} and {len(rest)} bytes follow the JSON.")
    data = rest if size is not None else given.get("data")
    return _photos(shape, data) if name == "images" else _pixels(shape, data)


def _photos(shape: list[int], data: Any) -> InputTensor:
    if len(shape) != 1:
        raise tensor_problem(f"The shape of images is {shape[:8]}; [N] is wanted.")
    if not isinstance(data, (bytes, list)):
        raise tensor_problem("images has neither `data`, a list, nor binary_data_size.")
    elements = _split(data, shape[0]) if isinstance(data, bytes) else _flat(data)
    if len(elements) != shape[0]:
        raise tensor_problem(f"The shape of images is {shape} and {len(elements)} elements came.")
    if not all(isinstance(element, (bytes, str)) for element in elements):
        raise tensor_problem("In JSON each of photos is text: the photo's bytes in base64.")
    return InputTensor("images", elements=elements)


def _pixels(shape: list[int], data: Any) -> InputTensor:
    if len(shape) != 4:
        raise tensor_problem(f"The shape of pixels is {shape[:8]}; [N, H, W, C] is wanted.")
    if isinstance(data, bytes):
        values = np.frombuffer(data, np.uint8)
    else:
        rows = _flat(data) if isinstance(data, list) else [None]
        if not all(type(value) is int and 0 <= value <= 255 for value in rows):
            raise tensor_problem("pixels has no `data` of whole numbers from 0 to 255, and no binary_data_size.")
        values = np.array(rows, np.uint8)
    if len(values) != shape[0] * shape[1] * shape[2] * shape[3]:
        raise tensor_problem(f"The shape of pixels is {shape} and {len(values)} values came.")
    return InputTensor("pixels", pixels=values.reshape(shape))


def _flat(data: list[Any]) -> list[Any]:
    """A tensor's elements, in the order of its last axis first, whether it came nested or flat."""
    while data and all(isinstance(row, list) for row in data):
        data = [value for row in data for value in row]
    return data


def _split(data: bytes, most: int) -> list[bytes]:
    """The elements of BYTES, but no more than one over ``most``: before each stands its length."""
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) <= most:
        if len(data) - at < LENGTH.size:
            raise tensor_problem("images breaks off inside of an element's length.")
        (size,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size
        if size > len(data) - at:
            raise tensor_problem(f"An element of photos has {size} bytes by its length, and {len(data) - at} came.")
        elements.append(data[at : at + size])
        at += size
    return elements


def _read_outputs(document: dict[str, Any]) -> list[RequestedOutput]:
    binary = _parameters(document).get("binary_data_output", False) is True
    given = document.get("outputs")
    if given is None or given == []:
        return [RequestedOutput("probabilities", binary), RequestedOutput("label", binary)]
    if not isinstance(given, list) or not all(isinstance(row, dict) for row in given):
        raise tensor_problem("`outputs` is no list of objects.")
    if len(given) > len(OUTPUTS):
        raise tensor_problem(f"`outputs` has {len(given):,} entries; there are {' and '.join(OUTPUTS)}, each at most once.")
    asked: list[RequestedOutput] = []
    for row in given:
        name, parameters = row.get("name"), _parameters(row)
        if name not in OUTPUTS:
            raise tensor_problem(f"The output {describe(name)} is wanted; there are probabilities and label.")
        if any(name == other.name for other in asked):
            raise tensor_problem(f"The output {name} is requested twice; request it once.")
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0 or (classes and name != "probabilities"):
            raise tensor_problem("`classification` is a whole number, and of probabilities only.")
        asked.append(RequestedOutput(name, parameters.get("binary_data", binary) is True, classes))
    return asked


def _parameters(row: dict[str, Any]) -> dict[str, Any]:
    """What is said with a request or a tensor. Raises Problem for memory that is to be shared, which is not done here."""
    parameters = row.get("parameters", {})
    if not isinstance(parameters, dict):
        raise tensor_problem("`parameters` is no object.")
    if shared := next((name for name in parameters if name.startswith("shared_memory")), None):
        raise tensor_problem(f"{shared[:40]} is not offered here; send the tensor itself.")
    return parameters


def encode_response(head: dict[str, Any], outputs: Iterable[tuple[RequestedOutput, NDArray[Any]]]) -> tuple[bytes, int | None]:
    """``head`` with the tensors, float32 or of text: the body, and its JSON's length where bytes follow it."""
    rows, tail = [], b""
    for asked, values in outputs:
        datatype = "BYTES" if values.dtype == object else "FP32"
        row: dict[str, Any] = {"name": asked.name, "datatype": datatype, "shape": list(values.shape)}
        if asked.binary:
            data = _joined(values) if datatype == "BYTES" else values.astype("<f4").tobytes()
            row["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            row["data"] = values.ravel().tolist()
        rows.append(row)
    text = json.dumps(head | {"outputs": rows}).encode()
    return text + tail, len(text) if any("data" not in row for row in rows) else None


def _joined(values: NDArray[Any]) -> bytes:
    elements = [value.encode() for value in values.ravel()]
    return b"".join(LENGTH.pack(len(element)) + element for element in elements)
