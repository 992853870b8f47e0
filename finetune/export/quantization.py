"""Add a graph in int8 to a bundle, if validation images show that it is as accurate as the one in float32.

The equivalence test bounds the accuracy lost, from the images that only one of the two classifies correctly. A bound needs
images: if there are too few to show anything, nothing is quantized.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from finetune.io.progress import step
from finetune.io.threaded_map import batched
from finetune.metrics.calibration import apply_temperature, calibration_error
from finetune.metrics.equivalence import images_needed, max_accuracy_lost, paired_counts
from models.artifacts.bundle import INT8_GRAPH, golden_array
from models.artifacts.ood_score import OOD_SCORE
from models.artifacts.predictions import Predictions, cross_entropy
from models.networks.onnx_export import OUTPUTS
from models.runtime.openvino_engine import OpenVINOEngine, Pixels
from models.runtime.precision import MAX_CHANGED_LABELS, TIMED_IMAGES, measure_speedup
from models.runtime.processor import instruction_sets

NNCF_SCRIPT = Path(__file__).with_name("nncf_process.py")
CALIBRATION_IMAGES = 100
MAX_TEST_IMAGES = 2000
# For glibc: with VGG16, half of NNCF's time is spent on returning large arrays to the system and clearing new ones.
REUSE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
BATCH = 4
RESAMPLES = 1000
# Max difference of a probability from the golden outputs. A different rounding of one layer's outputs by one step, as on a
# processor with other instructions, changes a probability by about as much.
INT8_TOLERANCE = 0.05
LAYERS = {
    False: "all layers but the head",
    True: "all layers but the head, the first convolution and depthwise ones",
}
BOUND = "Upper bound of the one-sided 95% score interval of a paired difference (Tango 1998), on the validation photos."


@dataclass(frozen=True)
class QuantizationData:
    """The images to quantize a graph with and to test it on.

    Attributes:
        read_training: Reads training images, (N, H, W, C) uint8, whose activations determine the ranges of the layers.
        read_validation: Yields the pixels of the validation images in batches.
        labels: Their true classes, (N,).
        probabilities: Their evaluated probabilities, (N, classes).
        ood_scores: Their evaluated OOD scores, (N,), if any.
        groups: The number of each one's group, (N,), if any.
        fit_temperature: Fits the calibration temperature to log-probabilities (N, classes) of the validation images.
        max_accuracy_loss: The limit of the accuracy lost.
        predict_out_of_fold: Predicts the validation images from their embeddings (N, d) by heads that were fitted without them,
            if the exported head was fitted to them.
    """

    read_training: Callable[[], Pixels]
    read_validation: Callable[[], Iterator[Pixels]]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    ood_scores: NDArray[np.float32] | None
    groups: NDArray[np.int64] | None
    fit_temperature: Callable[[NDArray[np.float64]], float]
    max_accuracy_loss: float
    predict_out_of_fold: Callable[[NDArray[np.float32]], NDArray[np.float64]] | None = None

    @classmethod
    def of(
        cls,
        predictions: Predictions,
        *,
        read_training: Callable[[], Pixels],
        read_validation: Callable[[list[int]], Iterator[Pixels]],
        fit_temperature: Callable[[NDArray[np.float64], NDArray[np.int64]], float],
        max_accuracy_loss: float,
        predict_out_of_fold: Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]] | None = None,
        excluded: NDArray[np.int64] | tuple[()] = (),
    ) -> QuantizationData:
        """Select at most MAX_TEST_IMAGES evenly spaced validation images.

        Args:
            predictions: The evaluated predictions.
            read_training: See the attribute.
            read_validation: Yields the pixels (H, W, C) of the validation images in these rows of ``predictions``.
            fit_temperature: Fits the temperature to log-probabilities and labels.
            max_accuracy_loss: See the attribute.
            predict_out_of_fold: See the attribute. It takes the embeddings and the rows of the images in ``predictions``.
            excluded: Rows of ``predictions`` that are not selected.
        """
        candidates = np.setdiff1d(np.arange(len(predictions.labels)), excluded)
        rows = candidates[evenly_spaced(len(candidates), MAX_TEST_IMAGES)]
        labels, groups = predictions.labels[rows], predictions.group_numbers
        return cls(
            read_training,
            lambda: map(np.stack, batched(read_validation(rows.tolist()), BATCH)),
            labels=labels,
            probabilities=predictions.probabilities[rows],
            ood_scores=None if predictions.ood_scores is None else predictions.ood_scores[rows],
            groups=None if groups is None else groups[rows],
            fit_temperature=lambda log_probs: fit_temperature(log_probs, labels),
            max_accuracy_loss=max_accuracy_loss,
            predict_out_of_fold=predict_out_of_fold and (lambda embeddings: predict_out_of_fold(embeddings, rows)),
        )

    @property
    def independent_images(self) -> int:
        """The number of validation images; those of a group count as one."""
        return len(self.labels) if self.groups is None else len(np.unique(self.groups))


def evenly_spaced(count: int, max_count: int) -> NDArray[np.int64]:
    """Return the indices of at most ``max_count`` of ``count`` images, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(max_count, count)).round().astype(np.int64))


def rejected(reason: str) -> dict[str, Any]:
    """Build the manifest's field for a bundle without a graph in int8."""
    return {"file": None, "reason": reason}


class NNCFProcess:
    """The process that quantizes graphs. Leaving the context ends it and deletes its ``folder``.

    It can be started ahead, because its imports take seconds.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="finetune-")
        self.folder = Path(self._folder.name)
        self._output = self.folder / "output.txt"

    def __enter__(self) -> NNCFProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
        self._folder.cleanup()

    def start(self) -> None:
        """Start the process, unless it runs."""
        if self._process:
            return
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(NNCF_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, **REUSE_MEMORY},
            )

    def quantize(self, graph: Path, pixels: Path, out: Path, *, careful: bool) -> None:
        """Start to quantize a graph, and do not wait. The arguments are those of ``nncf_process.quantize``."""
        self.start()
        assert self._process
        assert self._process.stdin
        job = {"graph": str(graph), "pixels": str(pixels), "out": str(out), "careful": careful}
        with contextlib.suppress(BrokenPipeError):  # ``wait`` then returns why the process ended
            print(json.dumps(job), file=self._process.stdin, flush=True)

    def wait(self) -> str | None:
        """Wait for the graph. Returns why it could not be quantized, or None."""
        assert self._process
        assert self._process.stdout
        if line := self._process.stdout.readline():
            problem: str | None = json.loads(line)["problem"]
        else:
            lines = self._output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            problem = lines[-1] if lines else f"it ended with {self._process.wait()}"
        return problem and f"NNCF could not quantize the graph: {problem}"


class Quantization:
    """The quantization of a graph, which runs while the caller continues.

    If the graph with all layers in int8 fails its test, one in which the most sensitive layers stay in float32 is tried.

    Args:
        data: The images.
        process: Quantizes the graph.
    """

    def __init__(self, data: QuantizationData, process: NNCFProcess) -> None:
        self._data, self._process = data, process
        self._pixels, self._quantized = (process.folder / name for name in ("pixels.npy", INT8_GRAPH))

    @property
    def _too_few(self) -> str | None:
        """Why the validation images cannot show anything, if so."""
        limit, count = self._data.max_accuracy_loss, self._data.independent_images
        if (needed := images_needed(limit)) <= count:
            return None
        return (
            f"{count:,} validation photos cannot show that the loss of accuracy is at most {points(limit)}; "
            f"at least {needed:,} are needed"
        )

    def start(self, graph: Path) -> None:
        """Start to quantize the serving graph in float32, if there are enough images to test the result."""
        if self._too_few:
            return
        np.save(self._pixels, self._data.read_training())
        self._process.quantize(graph, self._pixels, self._quantized, careful=False)

    def finish(
        self,
        graph: Path,
        *,
        temperature: float,
        max_ood_score: float | None = None,
        before_timing: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Wait for the graph in int8, test it, and write it to the folder of ``graph`` if it passes.

        Args:
            graph: The serving graph in float32.
            temperature: Its calibration temperature.
            max_ood_score: The limit of the OOD score, if the graph has one. An image that changes sides counts as a changed
                label.
            before_timing: Called before the speed is measured, to end what would disturb it.

        Returns:
            The manifest's field. Its ``file`` is None if no graph passed, and ``reason`` says why.
        """
        if self._too_few:
            return rejected(self._too_few)
        started, data = time.perf_counter(), self._data
        for careful in (False, True):
            with step(f"Quantizing {LAYERS[careful]} to int8"):
                if careful:
                    self._process.quantize(graph, self._pixels, self._quantized, careful=True)
                problem = self._process.wait()
            if problem:
                return rejected(problem)
            with step(f"Testing it on {min(len(data.labels), MAX_TEST_IMAGES):,} validation photos"):
                measured = _test(self._quantized, data, temperature=temperature, max_ood_score=max_ood_score)
            reason = _rejection(measured)
            if reason is None:
                break
        training = np.load(self._pixels)
        measured |= {"calibration_images": len(training), "layers": LAYERS[careful]}
        if reason is None:
            _calibrate(self._quantized, graph.with_name(INT8_GRAPH), temperature / measured["temperature"])
            before_timing()
            speedup = measure_speedup(graph, graph.with_name(INT8_GRAPH), "int8", training[:TIMED_IMAGES])
            measured |= {"speedup": speedup, "instruction_sets": list(instruction_sets())}
        seconds = round(time.perf_counter() - started, 1)
        return {"file": None if reason else INT8_GRAPH, "reason": reason, **measured, "seconds": seconds}


def add_int8_graph(
    graph: Path, data: QuantizationData, *, temperature: float, max_ood_score: float | None = None
) -> dict[str, Any]:
    """Quantize a graph, test it, and write it to the same folder if it passes. See ``Quantization``."""
    with NNCFProcess() as process:
        quantization = Quantization(data, process)
        quantization.start(graph)
        return quantization.finish(graph, temperature=temperature, max_ood_score=max_ood_score)


def golden_outputs(graph: Path, pixels: Pixels, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Compute the golden outputs of a graph in int8, by the name of their array."""
    results = OpenVINOEngine(graph, outputs=outputs, precision="int8", batch_sizes=(len(pixels),)).run(pixels)
    return {golden_array(name, "int8"): rows for name, rows in zip(outputs, results, strict=True)}


def points(fraction: float) -> str:
    """Format a difference of accuracies in percentage points."""
    return f"{100 * fraction:g} point{'' if fraction == 0.01 else 's'}"


def _test(quantized: Path, data: QuantizationData, *, temperature: float, max_ood_score: float | None) -> dict[str, Any]:
    """Run the validation images and compare the results with those evaluated in float32."""
    model = onnx.load(quantized)
    logits = _softmax(model).input[0]
    model.graph.output.append(onnx.ValueInfoProto(name=logits))
    outputs = [OUTPUTS[1] if data.predict_out_of_fold else logits, *([] if max_ood_score is None else [OOD_SCORE])]
    engine = OpenVINOEngine(model.SerializeToString(), outputs=outputs, precision="int8", batch_sizes=(BATCH,))
    del model
    batches = [engine.run(pixels) for pixels in data.read_validation()]
    output, *scores = (np.concatenate(rows) for rows in zip(*batches, strict=True))
    log_probs = data.predict_out_of_fold(output) if data.predict_out_of_fold else output.astype(np.float64) * temperature
    fitted = data.fit_temperature(log_probs)
    probabilities = {"fp32": data.probabilities, "int8": apply_temperature(log_probs, fitted)}
    changed = probabilities["int8"].argmax(axis=1) != probabilities["fp32"].argmax(axis=1)
    if max_ood_score is not None and data.ood_scores is not None:
        changed |= (scores[0] > max_ood_score) != (data.ood_scores > max_ood_score)
    correct = {name: values.argmax(axis=1) == data.labels for name, values in probabilities.items()}
    only_fp32, only_int8, total = paired_counts(correct["fp32"], correct["int8"], data.groups)
    difference = np.abs(probabilities["int8"] - probabilities["fp32"]).max(axis=1)
    return {
        "temperature": fitted,
        "images": len(data.labels),
        "changed_labels": int(changed.sum()),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "accuracy_lost": {
            "value": (only_fp32 - only_int8) / total,
            "high": max_accuracy_lost(only_fp32, only_int8, total),
            "limit": data.max_accuracy_loss,
            "only_fp32": only_fp32,
            "only_int8": only_int8,
            "method": BOUND,
        },
        "accuracy": {name: float(rows.mean()) for name, rows in correct.items()},
        "log_loss": {name: float(cross_entropy(data.labels, rows).mean()) for name, rows in probabilities.items()},
        "calibration_error": {
            name: calibration_error(rows.max(axis=1), correct[name], seed=0, resamples=RESAMPLES)
            for name, rows in probabilities.items()
        },
        "tolerance": INT8_TOLERANCE,
    }


def _rejection(measured: Mapping[str, Any]) -> str | None:
    """Return why a graph fails the test, or None."""
    lost, changed, count = measured["accuracy_lost"], measured["changed_labels"], measured["images"]
    if not lost["high"] <= lost["limit"]:
        return (
            f"up to {100 * lost['high']:.2f} points of accuracy may be lost, more than {points(lost['limit'])}: "
            f"{lost['only_fp32']} of {count:,} validation photos are classified correctly in float32 only, and "
            f"{lost['only_int8']} in int8 only"
        )
    if changed > MAX_CHANGED_LABELS * count:
        return f"{changed} of {count:,} labels changed, more than {100 * MAX_CHANGED_LABELS:g}%"
    return None


def _calibrate(quantized: Path, out: Path, factor: float) -> None:
    """Write a graph whose logits are multiplied by ``factor`` before softmax."""
    model = onnx.load(quantized)
    softmax = _softmax(model)
    index = list(model.graph.node).index(softmax)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), "int8_calibration"))
    scale = onnx.helper.make_node("Mul", [softmax.input[0], "int8_calibration"], ["int8_logits"], name="int8_calibration")
    softmax.input[0] = "int8_logits"
    model.graph.node.insert(index, scale)
    onnx.save(model, out)


def _softmax(model: onnx.ModelProto) -> onnx.NodeProto:
    """Return the node that computes the probabilities."""
    return next(node for node in model.graph.node if OUTPUTS[0] in node.output)
