"""Parse and encode the tensors of the Open Inference Protocol: as JSON, or as bytes behind the JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.preprocess import Preprocessing
from models.runtime.openvino_engine import Pixels
from service.http.errors import Problem
from service.http.request_body import OTHER_VALUES, parse_json
from service.http.request_images import VALUES_PER_IMAGE, check_image_count
from service.http.text_validation import describe
from service.settings import Settings

DATATYPES = {"images": "BYTES", "pixels": "UINT8"}
REASON_OUTPUT = "because_code"
OUTPUTS = ("probabilities", "label", REASON_OUTPUT)
OOD_OUTPUT = "ood_score"  # only for models with an OOD score
JSON_HINT = "Send a request of the Open Inference Protocol, as described in /docs."
SIZE_HINT = "Send fewer images, or the tensor as bytes (binary_tensor_data)."
FORMER_NAMES = {"photos": "images"}
LENGTH = struct.Struct("<I")  # precedes each element of a BYTES tensor


@dataclass(frozen=True)
class InputTensor:
    """The input: ``elements`` of a BYTES tensor, as base64 if it came in JSON, or ``pixels`` (N, H, W, C) uint8."""

    name: str
    elements: list[str] | list[bytes] | None = None
    pixels: Pixels | None = None


@dataclass(frozen=True)
class RequestedOutput:
    """An output of the response. With ``classes`` it is the text of that many top classes."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferenceRequest:
    """A parsed request."""

    id: str | None
    input: InputTensor
    outputs: list[RequestedOutput]


def parse_request(
    body: bytes,
    json_bytes: int | None,
    settings: Settings,
    preprocessing: Preprocessing,
    *,
    output_names: Sequence[str] = OUTPUTS,
) -> InferenceRequest:
    """Parse the body of an inference request.

    Args:
        body: JSON, possibly followed by a tensor as bytes.
        json_bytes: The length of the JSON. None: the complete body.
        settings: The limits.
        preprocessing: The input of the network, which bounds the number of JSON values.
        output_names: The outputs of the model.

    Raises:
        Problem: The body is no valid request, or exceeds a limit.
    """
    end = len(body) if json_bytes is None else json_bytes
    if not 0 <= end <= len(body):
        raise tensor_problem(f"Inference-Header-Content-Length is {end}, but the body has {len(body)} bytes.")
    max_values, max_containers = _json_limits(settings, preprocessing)
    document: Any = parse_json(
        body[:end], max_values=max_values, max_containers=max_containers, hint=JSON_HINT, size_hint=SIZE_HINT
    )
    if not isinstance(document, dict):
        raise Problem("bad_json", "The JSON is not an object.")
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise tensor_problem("`inputs` must contain one tensor: `images` (BYTES) or `pixels` (UINT8).")
    request_id = document.get("id")
    if not isinstance(request_id, (str, type(None))):
        raise tensor_problem(f"`id` must be a string (got {describe(request_id)}).")
    return InferenceRequest(request_id, _parse_input(inputs[0], body[end:], settings), _parse_outputs(document, output_names))


def _json_limits(settings: Settings, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the most values, and the most lists and objects, that ``max_images`` images need as nested lists."""
    rows = 1 + preprocessing.input_px
    lists = settings.max_images * (rows + preprocessing.input_px**2)
    other = OTHER_VALUES + settings.max_images * VALUES_PER_IMAGE
    pixels = settings.max_images * preprocessing.input_px**2 * preprocessing.channels
    return other + lists + pixels, other + lists


def tensor_problem(detail: str) -> Problem:
    return Problem("bad_tensor", detail)


def _parse_input(tensor: dict[str, Any], binary: bytes, settings: Settings) -> InputTensor:
    name, shape = tensor.get("name"), tensor.get("shape")
    name = FORMER_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in DATATYPES:
        raise tensor_problem(f"Unknown input {describe(name)}. Valid inputs: {', '.join(DATATYPES)}.")
    if tensor.get("datatype") != DATATYPES[name]:
        raise tensor_problem(f"The datatype of {name} must be {DATATYPES[name]} (got {describe(tensor.get('datatype'))}).")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise tensor_problem(f"The shape of {name} must be a list of whole numbers.")
    if name == "images" and len(shape) == 2 and shape[1] == 1:
        shape = shape[:1]  # one element per image in a batch dimension, as clients of other servers send
    if len(shape) == (1 if name == "images" else 4):
        check_image_count(shape[0], settings)  # before a million empty elements are parsed
    size = _parameters(tensor).get("binary_data_size")
    if size != (len(binary) if binary or size is not None else None):
        raise tensor_problem(f"binary_data_size of {name} is {describe(size)}, but {len(binary)} bytes follow the JSON.")
    if size is not None and tensor.get("data") is not None:
        raise tensor_problem(f"{name} has both `data` and binary_data_size. Send one of them.")
    data = binary if size is not None else tensor.get("data")
    return _parse_images(shape, data) if name == "images" else _parse_pixels(shape, data)


def _parse_images(shape: list[int], data: Any) -> InputTensor:
    if len(shape) != 1:
        raise tensor_problem(f"The shape of images must be [N] or [N, 1] (got {shape[:8]}).")
    if not isinstance(data, (bytes, list)):
        raise tensor_problem("images must have a list `data`, or binary_data_size.")
    elements = _split(data, shape[0]) if isinstance(data, bytes) else _flatten(data)
    if len(elements) != shape[0]:
        raise tensor_problem(f"The shape of images is {shape}, but `data` has {len(elements)} elements.")
    if not all(isinstance(element, (bytes, str)) for element in elements):
        raise tensor_problem("In JSON, each element of images must be a base64 string.")
    return InputTensor("images", elements=elements)


def _parse_pixels(shape: list[int], data: Any) -> InputTensor:
    if len(shape) != 4:
        raise tensor_problem(f"The shape of pixels must be [N, H, W, C] (got {shape[:8]}).")
    if isinstance(data, bytes):
        values = np.frombuffer(data, np.uint8)
    else:
        rows = _flatten(data) if isinstance(data, list) else [None]
        if not set(map(type, rows)) <= {int} or (rows and not 0 <= min(rows) <= max(rows) <= 255):
            raise tensor_problem("pixels must have `data` of whole numbers from 0 to 255, or binary_data_size.")
        values = np.array(rows, np.uint8)
    if len(values) != shape[0] * shape[1] * shape[2] * shape[3]:
        raise tensor_problem(f"The shape of pixels is {shape}, but {len(values)} values were sent.")
    return InputTensor("pixels", pixels=values.reshape(shape))


def _flatten(data: list[Any]) -> list[Any]:
    """Return the elements of a flat or nested tensor in row-major order."""
    while data and set(map(type, data)) == {list}:
        data = list(chain.from_iterable(data))
    return data


def _split(data: bytes, max_elements: int) -> list[bytes]:
    """Split a BYTES tensor, in which each element follows its length. Stop at one element more than ``max_elements``."""
    elements: list[bytes] = []
    position = 0
    while position < len(data) and len(elements) <= max_elements:
        if len(data) - position < LENGTH.size:
            raise tensor_problem("images ends within the length of an element.")
        (size,) = LENGTH.unpack_from(data, position)
        position += LENGTH.size
        if size > len(data) - position:
            raise tensor_problem(f"An element of images has the length {size}, but only {len(data) - position} bytes follow.")
        elements.append(data[position : position + size])
        position += size
    return elements


def _parse_outputs(document: dict[str, Any], names: Sequence[str]) -> list[RequestedOutput]:
    binary = _parameters(document).get("binary_data_output", False) is True
    rows = document.get("outputs")
    if rows is None or rows == []:
        return [RequestedOutput(name, binary) for name in names]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise tensor_problem("`outputs` must be a list of objects.")
    if len(rows) > len(names):
        raise tensor_problem(f"`outputs` has {len(rows):,} entries. Request {', '.join(names)} at most once each.")
    outputs: list[RequestedOutput] = []
    for row in rows:
        name, parameters = row.get("name"), _parameters(row)
        if name not in names:
            raise tensor_problem(f"Unknown output {describe(name)}. Valid outputs: {', '.join(names)}.")
        if any(name == other.name for other in outputs):
            raise tensor_problem(f"The output {name} is requested twice. Request it once.")
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0 or (classes and name != "probabilities"):
            raise tensor_problem("`classification` must be a whole number, and is a parameter of probabilities only.")
        outputs.append(RequestedOutput(name, parameters.get("binary_data", binary) is True, classes))
    return outputs


def _parameters(row: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a request or a tensor. Null counts as absent, as for its other optional members."""
    parameters = row.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise tensor_problem("`parameters` must be an object.")
    if shared := next((name for name in parameters if name.startswith("shared_memory")), None):
        raise tensor_problem(f"{shared[:40]} is not supported. Send the tensor itself.")
    return parameters


def encode_response(
    members: dict[str, Any], outputs: Iterable[tuple[RequestedOutput, NDArray[Any]]]
) -> tuple[bytes, int | None]:
    """Encode a response.

    Args:
        members: The members of the JSON besides ``outputs``.
        outputs: Each output with its values, float32 or text (dtype object).

    Returns:
        The body, and the length of its JSON if tensors follow it as bytes.
    """
    rows, binary = [], b""
    for output, values in outputs:
        datatype = "BYTES" if values.dtype == object else "FP32"
        row: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": list(values.shape)}
        if output.binary:
            data = _join(values) if datatype == "BYTES" else values.astype("<f4").tobytes()
            row["parameters"] = {"binary_data_size": len(data)}
            binary += data
        else:
            row["data"] = values.ravel().tolist()
        rows.append(row)
    text = json.dumps(members | {"outputs": rows}).encode()
    return text + binary, len(text) if any("data" not in row for row in rows) else None


def _join(values: NDArray[Any]) -> bytes:
    elements = [value.encode() for value in values.ravel()]
    return b"".join(LENGTH.pack(len(element)) + element for element in elements)
