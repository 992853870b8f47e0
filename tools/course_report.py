"""Write the measured figures and the layer tables into the pages about the course.

    python tools/course_report.py collect runs      # read the finished runs of the recipes in runs/
    python tools/course_report.py pages             # write the tables of docs/recipes/README.md and docs/history.md

``collect`` copies the figures of each finished run (its test metrics, history and manifest) to docs/recipes/results.json, and
draws its learning curves and first-layer filters next to it. Recipes that are not among the runs keep what is recorded.
``pages`` replaces the text between ``<!-- course: NAME -->`` and ``<!-- end -->``. A test checks that the pages are up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.config import read_yaml  # noqa: E402
from finetune.introspection.feature_maps import draw_filters  # noqa: E402
from finetune.reports.plots import plot_learning_curves, report_style  # noqa: E402
from finetune.training.run_directory import BUNDLE, CONFIG, HISTORY, read_history  # noqa: E402
from models.artifacts.atomic_io import atomic_write_text  # noqa: E402
from models.artifacts.bundle import Bundle, open_bundle  # noqa: E402
from models.networks.classifier import load_classifier  # noqa: E402
from models.networks.flops import build_on_meta, count_parameters, input_shape  # noqa: E402
from models.networks.hooks import forward_hooks  # noqa: E402
from models.networks.registry import get_spec  # noqa: E402
from models.runtime.processor import processor_name  # noqa: E402

RECIPES = ROOT / "docs" / "recipes"
RESULTS = RECIPES / "results.json"
PICTURES = RECIPES / "pictures"
PAGES = (RECIPES / "README.md", ROOT / "docs" / "history.md")
NOT_RUN = "not run yet"
HIDDEN_LAYERS = (nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.Dropout, nn.Flatten, nn.Identity, nn.LogSoftmax)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("runs", type=Path, help="folder with the run directories, named as in the recipes")
    collecting.add_argument("--note", default="", help="remark on the conditions of these runs")
    commands.add_parser("pages")
    args = parser.parse_args()
    if args.command == "collect":
        collect(args.runs, note=args.note)
    for page in PAGES:
        atomic_write_text(page, filled(page.read_text(encoding="utf-8")))


# Figures of the runs


def collect(runs: Path, *, note: str) -> None:
    """Record the figures of each finished run of a recipe, and draw its pictures."""
    results = read_results()
    for file in recipe_files():
        run = runs / Path(read_yaml(file)["output_dir"]).name
        if (run / BUNDLE).is_dir() and (run / "test" / "metrics.json").is_file():
            results[file.stem] = read_run(run) | ({"note": note} if note else {})
            draw(run, file.stem)
            print(f"{file.stem}: {results[file.stem]['accuracy']['value']:.2%}")
    text = json.dumps({file.stem: results[file.stem] for file in recipe_files() if file.stem in results}, indent=2)
    atomic_write_text(RESULTS, text + "\n")


def read_run(run: Path) -> dict[str, Any]:
    """Return the figures of a finished run: those of its test metrics, its history and its manifest."""
    metrics = json.loads((run / "test" / "metrics.json").read_text(encoding="utf-8"))
    bundle = open_bundle(run / BUNDLE)
    provenance = bundle.manifest["provenance"]
    history = read_history(run / HISTORY)
    seconds = sum(row["seconds"] for row in history)
    photos = sum(provenance["dataset"]["photos"]["train"].values())
    return {
        "photos": metrics["photos"],
        "accuracy": metrics["accuracy"],
        "log_loss": metrics["log_loss"],
        "epochs": len(history),
        "best_epoch": provenance["best_epoch"],
        "minutes": round(seconds / 60, 1),
        "images_per_second": round(photos * len(history) / seconds),
        "processor": processor(),
        "config": {key: value for key, value in read_yaml(run / CONFIG).items() if key not in ("data_dir", "output_dir")},
        "dataset_sha256": provenance["dataset"]["sha256"],
        "git_commit": provenance["git_commit"],
    }


def processor() -> str:
    """Return the name of this machine's processor and its number of CPUs."""
    clean = re.sub(r"\((?:R|TM)\)", "", processor_name())
    return f"{' '.join(clean.split())}, {os.cpu_count()} CPUs"


def draw(run: Path, name: str) -> None:
    """Draw the learning curves and the first-layer filters of a run."""
    PICTURES.mkdir(exist_ok=True)
    bundle: Bundle = open_bundle(run / BUNDLE)
    with report_style():
        plot_learning_curves(read_history(run / HISTORY), PICTURES / f"{name}-curves.png")
        draw_filters(load_classifier(bundle), PICTURES / f"{name}-filters.png", name=name)


def read_results() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return results


def recipe_files() -> list[Path]:
    return sorted(RECIPES.glob("*.yaml"))


def results_table() -> str:
    """List the figure of the notes and ours for each recipe."""
    head = (
        "Recipe",
        "Notes",
        "Accuracy on the test images (95% interval)",
        "Epochs (best)",
        "Minutes",
        "Images per second",
    )
    results = read_results()
    rows = []
    for file in recipe_files():
        notes = re.search(r"figure to meet: ([\d.]+%)", file.read_text(encoding="utf-8"))
        row = [f"`{file.stem}`", notes[1] if notes else ""]
        result = results.get(file.stem)
        if result is None:
            continue
        rows.append(
            (
                *row,
                interval(result["accuracy"]),
                f"{result['epochs']} ({result['best_epoch']})",
                f"{result['minutes']:.1f}",
                f"{result['images_per_second']:,}",
            )
        )
    return table(head, rows)


def curves() -> str:
    """Show the learning curves of each recipe that was run."""
    shown = [name for name in read_results() if (PICTURES / f"{name}-curves.png").is_file()]
    return "\n\n".join(f"`{name}`\n\n![Learning curves of {name}](pictures/{name}-curves.png)" for name in shown) or NOT_RUN


def interval(value: Mapping[str, float]) -> str:
    return f"{value['value']:.2%} ({100 * value['low']:.2f} to {value['high']:.2%})"


def figure(recipe: str) -> Callable[[], str]:
    """Return a function that quotes the figure of a recipe in a sentence."""

    def text() -> str:
        result = read_results().get(recipe)
        if result is None:
            return ""
        return (
            f"Our figure: {interval(result['accuracy'])} of the {result['photos']:,} test images after epoch "
            f"{result['best_epoch']} of {result['epochs']} (`docs/recipes/{recipe}.yaml`)."
        )

    return text


def filters(recipe: str) -> Callable[[], str]:
    """Return a function that shows the first-layer filters of a recipe's run."""

    def text() -> str:
        if not (PICTURES / f"{recipe}-filters.png").is_file():
            return ""
        return f"![Filters of the first layer after training, {recipe}](recipes/pictures/{recipe}-filters.png)"

    return text


# Layers and costs


@dataclass(frozen=True)
class LayerRow:
    """One row of a layer table. ``output`` is the shape (C, h, w) or (units,)."""

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    macs: int


def layer_rows(network: str, depth: int) -> list[LayerRow]:
    """Return the layers of a network in execution order for one image, without activations.

    Args:
        network: The registered name.
        depth: Nesting depth of the rows. A block at this depth is one row.
    """
    spec = get_spec(network)
    net = build_on_meta(spec)
    blocks = dict(_blocks(net, "", depth))
    leaves = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    macs: dict[str, int] = dict.fromkeys(blocks, 0)
    outputs: dict[str, tuple[int, ...]] = {}

    def record(name: str, layer_input: Tensor, output: Tensor) -> None:
        if name in blocks:
            outputs[name] = tuple(output.shape[1:])
        if name in leaves:
            owner = next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)
            if owner is not None:
                macs[owner] += output[0].numel() * net.get_submodule(name).get_parameter("weight")[0].numel()

    with torch.no_grad(), forward_hooks(net, {**blocks, **dict.fromkeys(leaves)}, record):
        net(torch.zeros(1, *input_shape(spec), device="meta"))
    return [
        LayerRow(name, _kind(blocks[name]), output, count_parameters(blocks[name]), macs[name])
        for name, output in outputs.items()
    ]


def _blocks(module: nn.Module, prefix: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, HIDDEN_LAYERS):
            continue
        if depth > 1 and any(True for _ in child.children()):
            yield from _blocks(child, f"{prefix}{name}.", depth - 1)
        else:
            yield f"{prefix}{name}", child


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv2d):
        kernel, stride = layer.kernel_size, layer.stride
        kind = "depthwise" if layer.groups == layer.in_channels > 1 else "pointwise" if kernel == (1, 1) else "convolution"
        return f"{kind} {kernel[0]} x {kernel[1]}" + (f", stride {stride[0]}" if stride[0] > 1 else "")
    if isinstance(layer, nn.Linear):
        return "fully connected"
    if isinstance(layer, nn.MaxPool2d):
        return f"max pooling {layer.kernel_size} x {layer.kernel_size}"
    if isinstance(layer, nn.AvgPool2d):
        return f"average pooling {layer.kernel_size} x {layer.kernel_size}"
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return "average pooling"
    names = {"BatchNorm2d": "BatchNorm", "Inception": "Inception module", "Sequential": "block"}
    return names.get(type(layer).__name__, type(layer).__name__)


def layers(network: str, depth: int) -> Callable[[], str]:
    """Return a function that renders the layer table of a network."""

    def text() -> str:
        rows = layer_rows(network, depth)
        cells = [
            (f"`{row.name}`", row.kind, " x ".join(map(str, row.output)), _count(row.parameters), _count(row.macs))
            for row in rows
        ]
        total = ("total", "", "", f"{sum(row.parameters for row in rows):,}", f"{sum(row.macs for row in rows):,}")
        return table(("Layer", "Kind", "Output", "Parameters", "Multiplications"), [*cells, total])

    return text


def _count(value: int) -> str:
    return f"{value:,}" if value else ""


def worked_example() -> str:
    """Compare a standard convolution with a depthwise separable one on a 12 x 12 px color image, layer by layer."""
    side, inputs, outputs, kernel = 12, 3, 256, 5
    output_px = side - kernel + 1
    standard = nn.Conv2d(inputs, outputs, kernel, bias=False)
    depthwise = nn.Conv2d(inputs, inputs, kernel, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    rows = []
    for name, convolutions in (("standard", [standard]), ("depthwise, then pointwise", [depthwise, pointwise])):
        parameters = sum(map(count_parameters, convolutions))
        macs = parameters * output_px**2
        formulas = " + ".join(_formula(layer) for layer in convolutions)
        rows.append((name, f"{formulas} = {parameters:,}", f"{output_px} · {output_px} · {parameters:,} = {macs:,}"))
    return table(("Convolution", "Parameters", "Multiplications"), rows)


def _formula(layer: nn.Conv2d) -> str:
    inputs = layer.in_channels // layer.groups
    return " · ".join(str(factor) for factor in (*layer.kernel_size, inputs, layer.out_channels))


def costs() -> str:
    """Compare the parameters and multiplications of the networks of the page, in the order of their years."""
    rows = []
    for name in ("mlp", "cnn_mnist", "lenet5", "alexnet_2012", "vgg16", "googlenet", "resnet50", "mobilenet_v1"):
        spec = get_spec(name)
        assert spec.cost
        px, channels = spec.preprocessing.input_px, spec.preprocessing.channels
        rows.append(
            (str(spec.year), spec.title, f"{channels} x {px} x {px}", f"{spec.cost.parameters:,}", f"{spec.cost.macs:,}")
        )
    return table(("Year", "Network", "Input", "Parameters", "Multiplications"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


TABLES: Mapping[str, Callable[[], str]] = {
    "results": results_table,
    "curves": curves,
    "costs": costs,
    "worked example": worked_example,
    **{
        f"layers of {name}": layers(name, depth)
        for name, depth in {
            "mlp": 1,
            "cnn_mnist": 1,
            "cnn_two_conv": 1,
            "lenet5": 1,
            "lenet_cifar": 1,
            "alexnet_2012": 1,
            "vgg16": 2,
            "vgg_cifar": 2,
            "googlenet": 1,
            "resnet50": 1,
            "cnn_selu": 3,
            "cnn_separable": 3,
            "mobilenet_v1": 1,
        }.items()
    },
    **{f"figure of {file.stem}": figure(file.stem) for file in recipe_files()},
    **{f"filters of {file.stem}": filters(file.stem) for file in recipe_files()},
}


def filled(text: str) -> str:
    """Return a page with the text between its markers replaced. Raises KeyError for an unknown name."""
    return re.sub(
        r"(<!-- course: ([^>]+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    main()
