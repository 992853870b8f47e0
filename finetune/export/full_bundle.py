"""Merge a head-only bundle with its pretrained weights into a full bundle. Requires torch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

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
    check_golden,
    check_golden_ood_scores,
    open_bundle,
    write_bundle,
)
from models.artifacts.ood_score import OOD_FILE, OOD_SCORES_FILE, OODParameters
from models.artifacts.paths import merged_dir
from models.artifacts.similarity import SIMILARITY_FILES
from models.errors import BundleError
from models.runtime.openvino_engine import OpenVINOEngine


def merge_bundle(bundle: Bundle, out: Path, *, weights: Path | None = None) -> Bundle:
    """Write the full bundle to ``out`` after checking its golden outputs.

    Args:
        bundle: The bundle without the pretrained weights. Its graph is kept if it has one.
        out: The folder of the full bundle.
        weights: File of the pretrained weights, if they are not found automatically.

    Raises:
        WeightsError: The pretrained weights are not available.
        BundleError: The head was trained with other weights or another preprocessing.
    """
    from models.networks.classifier import build_classifier
    from models.networks.onnx_export import export_serving_graph
    from models.networks.registry import get_spec
    from models.networks.weights import load_weights, read_tensors, write_tensors

    spec = get_spec(bundle.backbone)
    if spec.preprocessing != bundle.preprocessing:
        raise BundleError(
            f"The bundle {bundle.path} uses another preprocessing than {spec.name} in this version. Train it again."
        )
    base = load_weights(spec, file=weights)
    if base.sha256 != bundle.manifest["base"]["sha256"]:
        raise BundleError(
            f"The bundle {bundle.path} was trained on weights with sha256 {bundle.manifest['base']['sha256'][:12]}..., and "
            f"{base.origin} has {base.sha256[:12]}.... Pass the correct file with --weights."
        )
    classifier = build_classifier(
        spec,
        num_classes=len(bundle.classes),
        base=base.tensors,
        permute_pixels=bundle.permute_pixels,
        normalize_embedding=bundle.normalizes_embedding,
    )
    classifier.net.load_state_dict(read_tensors(bundle.path / HEAD), strict=False)

    ood = OODParameters.read(bundle.path / OOD_FILE) if bundle.has_ood_score else None

    def write_files(folder: Path) -> None:
        if GRAPH in bundle.manifest["files"]:
            shutil.copyfile(bundle.path / GRAPH, folder / GRAPH)
        else:
            temperature = float(bundle.manifest["temperature"])
            export_serving_graph(classifier, spec, temperature=temperature, path=folder / GRAPH, ood=ood)
        engine = OpenVINOEngine(folder / GRAPH, outputs=bundle.engine_outputs)
        check_golden(bundle, lambda pixels: engine.run(pixels)[0])
        if ood:
            check_golden_ood_scores(bundle, engine.run(bundle.golden()[0])[1])
        if bundle.has_int8:
            shutil.copyfile(bundle.path / INT8_GRAPH, folder / INT8_GRAPH)
            quantized = OpenVINOEngine(folder / INT8_GRAPH, outputs=bundle.engine_outputs, precision="int8")
            tolerance = float(bundle.manifest["int8"]["tolerance"])
            check_golden(bundle, lambda pixels: quantized.run(pixels)[0], tolerance=tolerance, golden=bundle.golden("int8"))
        write_tensors(folder / WEIGHTS, classifier.net.state_dict())
        for name in {GOLDEN, PREDICTIONS, MODEL_CARD, OOD_FILE, OOD_SCORES_FILE, HELD_OUT, *SIMILARITY_FILES} & set(
            bundle.manifest["files"]
        ):
            shutil.copyfile(bundle.path / name, folder / name)

    manifest = {key: value for key, value in bundle.manifest.items() if key not in ("format", "files", "sha256")}
    return write_bundle(out, {**manifest, "kind": "full", "merged_from": bundle.version}, write_files=write_files)


def open_full_bundle(path: Path, *, weights: Path | None = None, needs_weights: bool = False) -> Bundle:
    """Open a bundle that has a graph. A head-only bundle is merged once, into the cache folder.

    Args:
        path: The bundle's folder.
        weights: File of the pretrained weights, if they are not found automatically.
        needs_weights: Merge a bundle without all weights, too.
    """
    bundle = open_bundle(path)
    if not (bundle.lacks_weights if needs_weights else bundle.is_head_only):
        return bundle
    merged = merged_dir(bundle)
    try:
        return open_bundle(merged)
    except BundleError:
        print(f"Merging {path} with its pretrained weights. Full bundle: {merged}", file=sys.stderr)
        return merge_bundle(bundle, merged, weights=weights)
