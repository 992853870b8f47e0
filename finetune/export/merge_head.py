"""A head-only bundle and its base's pretrained weights make a whole bundle, once, where torch is installed."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from models.artifacts.bundle import (
    GOLDEN,
    GRAPH,
    HEAD,
    MODEL_CARD,
    PREDICTIONS,
    WEIGHTS,
    Bundle,
    check_golden,
    open_bundle,
    write_bundle,
)
from models.artifacts.paths import merged_dir
from models.artifacts.similarity import SIMILARITY_FILES
from models.errors import BundleError
from models.runtime.openvino_engine import OpenVINOEngine


def merge_bundle(bundle: Bundle, out: Path, *, weights: Path | None = None) -> Bundle:
    """Write the whole bundle to ``out``; it must give the golden answers that the head was exported with.

    Raises WeightsError where the base is not to be had, BundleError where it is not the one that the head was trained on.
    """
    from models.networks.classifier import build_classifier
    from models.networks.onnx_export import export_serving_graph
    from models.networks.registry import get_spec
    from models.networks.weights import load_weights, read_tensors, write_tensors

    spec = get_spec(bundle.backbone)
    if spec.preprocessing != bundle.preprocessing:
        raise BundleError(
            f"The bundle {bundle.path} was made for another preprocessing than this version's {spec.name}; train it again."
        )
    base = load_weights(spec, file=weights)
    if base.sha256 != bundle.manifest["base"]["sha256"]:
        raise BundleError(
            f"The bundle {bundle.path} was trained on weights with sha256 {bundle.manifest['base']['sha256'][:12]}..., and "
            f"{base.origin} has {base.sha256[:12]}...; give the right file with --weights."
        )
    classifier = build_classifier(
        spec, num_classes=len(bundle.classes), base=base.tensors, permute_pixels=bundle.permute_pixels
    )
    classifier.net.load_state_dict(read_tensors(bundle.path / HEAD), strict=False)

    def write_files(folder: Path) -> None:
        export_serving_graph(classifier, spec, temperature=float(bundle.manifest["temperature"]), path=folder / GRAPH)
        engine = OpenVINOEngine(folder / GRAPH, outputs=["probabilities"])
        check_golden(bundle, lambda pixels: engine.run(pixels)[0])
        write_tensors(folder / WEIGHTS, classifier.net.state_dict())
        older = [name for name in SIMILARITY_FILES if name not in bundle.manifest["files"]]
        for name in {GOLDEN, PREDICTIONS, MODEL_CARD, *SIMILARITY_FILES} - set(older):
            shutil.copyfile(bundle.path / name, folder / name)

    kept = {key: value for key, value in bundle.manifest.items() if key not in ("format", "files", "sha256")}
    return write_bundle(out, {**kept, "kind": "full", "merged_from": bundle.version}, write_files=write_files)


def open_full_bundle(path: Path, *, weights: Path | None = None) -> Bundle:
    """Open a bundle that can answer: itself if it is whole, else the merged one, which is kept under the cache folder."""
    bundle = open_bundle(path)
    if not bundle.is_head_only:
        return bundle
    kept = merged_dir(bundle)
    try:
        return open_bundle(kept)
    except BundleError:
        print(f"Merging {path} with its pretrained weights, once; the whole bundle is kept in {kept}", file=sys.stderr)
        return merge_bundle(bundle, kept, weights=weights)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle that holds only what was trained")
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="where the whole bundle goes (default: where the service looks for it)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="the base's weights, where they are not found by themselves"
    )


def run(args: argparse.Namespace) -> int:
    """``finetune merge``: write the whole bundle."""
    bundle = open_bundle(args.bundle)
    if not bundle.is_head_only:
        raise BundleError(f"The bundle {args.bundle} is whole already; use it as it is.")
    if args.out is None:
        merged = open_full_bundle(args.bundle, weights=args.weights)
    elif args.out.exists() and any(args.out.iterdir()):
        raise BundleError(f"{args.out} is not empty; name a new folder for the whole bundle.")
    else:
        merged = merge_bundle(bundle, args.out, weights=args.weights)
    print(f"bundle       {merged.path} (version {merged.version})")
    return 0
