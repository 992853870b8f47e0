"""Export a trained network as a bundle: weights, serving graph, golden outputs, parity check and model card."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from finetune.export.quantization import Quantization, golden_outputs, rejected
from finetune.io.progress import step
from finetune.reports.model_card import write_model_card
from finetune.reports.plot_process import PlotProcess
from finetune.reports.results import PLOTS
from models.artifacts.bundle import (
    GOLDEN,
    GRAPH,
    HEAD,
    HELD_OUT,
    INT8_GRAPH,
    MODEL_CARD,
    PREDICTIONS,
    WEIGHTS,
    Bundle,
    preprocessing_fields,
    write_bundle,
)
from models.artifacts.decision_rule import DecisionRule
from models.artifacts.ood_score import OOD_FILE, OOD_SCORE, OOD_SCORES_FILE, HeldOutOODScores, OODParameters
from models.artifacts.similarity import SIMILARITY_FILES
from models.errors import BundleError
from models.networks.classifier import Classifier
from models.networks.onnx_export import OUTPUTS, PIXELS
from models.networks.spec import ModelSpec
from models.networks.weights import write_tensors
from models.preprocess import Preprocessing
from models.runtime.openvino_engine import OpenVINOEngine, supports_bf16, time_output
from models.runtime.precision import measure_bf16

# Max difference of a probability. In float32 the engines differ only by rounding. In bfloat16 a feature has 8 significant bits:
# the head is trained on rounded features and served with exact ones.
PARITY_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}
GOLDEN_TOLERANCE = 1e-3
PARITY_IMAGES = 64
PLOTS_WITHOUT_IMAGES = {"learning_curves", "more_photos", "reliability", "confusion_matrix", "thresholds", "ood_scores"}
NUM_GOLDEN = 4
NOT_REQUESTED = "it was exported with --no-int8"
HEAD_ONLY = "it was exported with the trained layers only"


@dataclass(frozen=True)
class ParitySample:
    """Pixels (N, H, W, C) of real images, and from training their probabilities (N, classes) and OOD scores (N,), if any."""

    pixels: NDArray[np.uint8]
    probabilities: NDArray[np.float64]
    precision: str
    ood_scores: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class OODExport:
    """What a bundle contains of the OOD score: its parameters, the manifest's field, and scores to choose another limit."""

    parameters: OODParameters
    manifest: Mapping[str, Any]
    held_out: HeldOutOODScores


def export_bundle(
    path: Path,
    graph_file: Path,
    classifier: Classifier,
    spec: ModelSpec,
    *,
    temperature: float,
    training: Mapping[str, Any],
    trained_tensors: Mapping[str, Tensor],
    evaluation_dir: Path,
    parity: ParitySample,
    ood: OODExport | None = None,
    rule: DecisionRule | None = None,
    operating_points: Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
    contents: str = "full",
    plots: PlotProcess | None = None,
) -> Bundle:
    """Write a bundle after checking that its graph reproduces the probabilities and the OOD scores of training.

    Args:
        path: The folder of the new bundle.
        graph_file: The serving graph.
        classifier: The trained network.
        spec: The network's specification.
        temperature: The calibration temperature.
        training: The training entries of the manifest.
        trained_tensors: The tensors that training changed.
        evaluation_dir: The folder with predictions.csv, similarity files and plots to include.
        parity: The images for the parity check.
        ood: The OOD score, if there is one.
        rule: When the model abstains. None: never.
        operating_points: The manifest's field with the thresholds of the classes, if there are any. ``evaluation_dir`` then
            contains the predictions that they were selected from.
        quantization: The started quantization of the graph, or None for a bundle without a graph in int8. A head has none
            either.
        contents: ``full`` (all weights and the graph), ``graph`` (the graph and ``trained_tensors``) or ``head``
            (``trained_tensors`` only). Only a full bundle contains plots that show images, and a head no plots.
        plots: Draws the plots in ``evaluation_dir``. It must end before the speed of the graph is measured.

    Returns:
        The written bundle.

    Raises:
        BundleError: The graph's results differ from those of training. No bundle is written.
    """
    golden = golden_pixels(spec.preprocessing)
    rule = rule or DecisionRule()

    def write_files(folder: Path) -> None:
        graph = folder / GRAPH
        shutil.copyfile(graph_file, graph)
        with step(f"Comparing the serving graph with the trained network on {len(parity.pixels)} photos"):
            outputs = (OUTPUTS[0], OOD_SCORE) if ood else OUTPUTS[:1]
            engine = OpenVINOEngine(graph, outputs=outputs, batch_sizes=(NUM_GOLDEN,))  # small batches bound the memory
            manifest["parity"] = check_parity(engine, parity)
        check_finite(classifier, golden)
        arrays: dict[str, Any] = dict(zip(outputs, engine.run(golden), strict=True))
        del engine  # the next steps compile more
        wait_for_plots = plots.wait if plots else lambda: None
        if quantization and contents != "head":
            manifest["int8"] = quantization.finish(
                graph, temperature=temperature, max_ood_score=rule.max_ood_score, before_timing=wait_for_plots
            )
            if manifest["int8"]["file"]:
                arrays |= golden_outputs(folder / INT8_GRAPH, golden, outputs)
        wait_for_plots()  # the speed is measured from here on
        if ood:
            seconds = time_output(graph, OOD_SCORE, start="embedding", batch_size=NUM_GOLDEN)
            manifest["ood"] = {**ood.manifest, "microseconds": round(seconds * 1e6, 1)}
            ood.parameters.write(folder / OOD_FILE)
            ood.held_out.write(folder / OOD_SCORES_FILE)
        with step("Measuring its speed in bfloat16") if supports_bf16() else contextlib.nullcontext():
            manifest["bf16"] = measure_bf16(graph, parity.pixels, max_ood_score=rule.max_ood_score)
        np.savez_compressed(folder / GOLDEN, pixels=golden, **arrays)
        if contents == "head":
            graph.unlink()
        if contents != "full":
            write_tensors(folder / HEAD, trained_tensors)
        else:
            write_tensors(folder / WEIGHTS, classifier.net.state_dict())
        if contents != "head":
            for plot in sorted((evaluation_dir / PLOTS).glob("*.png")):
                if contents == "full" or plot.stem in PLOTS_WITHOUT_IMAGES:
                    (folder / PLOTS).mkdir(exist_ok=True)
                    shutil.copyfile(plot, folder / PLOTS / plot.name)
        for name in (PREDICTIONS, *SIMILARITY_FILES, *([HELD_OUT] if operating_points else [])):
            shutil.copyfile(evaluation_dir / name, folder / name)
        write_model_card(folder / MODEL_CARD, manifest)

    manifest = {
        "kind": contents,
        **training,
        **preprocessing_fields(spec.preprocessing),
        "head": spec.head,
        "cam_layer": spec.cam_layer,
        "temperature": temperature,
        "graph": graph_signature(spec, has_ood_score=ood is not None),
        "golden": {"tolerance": GOLDEN_TOLERANCE},
        "ood": None,
        "int8": rejected(NOT_REQUESTED if quantization is None else HEAD_ONLY),
        "decision": rule.as_dict(),
        "operating_points": None if operating_points is None else dict(operating_points),
    }
    return write_bundle(path, manifest, write_files=write_files)


def graph_signature(spec: ModelSpec, *, has_ood_score: bool) -> dict[str, Any]:
    side, channels = spec.preprocessing.input_px, spec.preprocessing.channels
    score = {OOD_SCORE: "how unlike the training images, (N,) float32; higher is more unlike"} if has_ood_score else {}
    return {
        "file": GRAPH,
        "input": {
            "name": PIXELS,
            "type": "uint8",
            "shape": ["N", side, side, channels],
            "description": "pixels, not normalized",
        },
        "outputs": {
            "probabilities": "calibrated, (N, classes) float32",
            "embedding": f"input of the layer {spec.head}, (N, d) float32",
            "feature_map": f"output of the layer {spec.cam_layer}, (N, c, h, w) float32",
            **score,
        },
    }


def check_finite(classifier: Classifier, pixels: NDArray[np.uint8]) -> None:
    """Raise BundleError where the weights that are stored give NaN in torch: an engine's bounded activations can hide it."""
    device = next(classifier.parameters()).device
    with torch.inference_mode():
        log_probs = classifier(torch.from_numpy(pixels).to(device))
    if not torch.isfinite(log_probs).all():
        raise BundleError(
            "The network's probabilities are not finite numbers; no bundle was written. Train again with other weights or a "
            "lower learning rate."
        )


def check_parity(engine: OpenVINOEngine, parity: ParitySample) -> dict[str, Any]:
    """Compare the exported graph with training on real images. Raises BundleError if the results differ."""
    probabilities, *scores = engine.run(parity.pixels)
    difference = float(np.abs(probabilities - parity.probabilities).max())
    tolerance = PARITY_TOLERANCE[parity.precision]
    if not difference <= tolerance:
        raise BundleError(
            f"The probabilities of the exported graph differ from training by up to {difference:.2g} on "
            f"{len(parity.pixels)} photos (allowed: {tolerance:.2g}). No bundle was written. Train again with --precision fp32."
        )
    measured = {"images": len(parity.pixels), "max_difference": difference, "tolerance": tolerance}
    if parity.ood_scores is None:
        return measured
    ood_difference = float((np.abs(scores[0] - parity.ood_scores) / np.maximum(parity.ood_scores, 1)).max())
    if not ood_difference <= tolerance:
        raise BundleError(
            f"The OOD scores of the exported graph differ from training by up to {ood_difference:.2g} of their value on "
            f"{len(parity.pixels)} photos (allowed: {tolerance:.2g}). No bundle was written. Train again with --precision fp32."
        )
    return measured | {"max_ood_difference": ood_difference}


def golden_pixels(preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Draw four reproducible images of flat shapes, so that a bundle contains no photos: (4, input_px, input_px, channels)."""
    return np.stack([preprocessing.crop(_draw(random.Random(seed))) for seed in range(NUM_GOLDEN)])


def _draw(rng: random.Random) -> Image.Image:
    def color() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    image = Image.new("RGB", (320, 256), color())
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, w, h = rng.randrange(280), rng.randrange(220), rng.randrange(20, 160), rng.randrange(20, 120)
        rng.choice((pen.ellipse, pen.rectangle))((x, y, x + w, y + h), fill=color())
    return image
