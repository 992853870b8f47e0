"""The Python interface for notebooks and scripts: ``train``, ``evaluate``, ``load`` and ``Classifier.predict``.

The functions are the ones behind the commands, so both give the same results.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from finetune import config as settings
from finetune import pipeline
from finetune.batch_inference.predict import classify, open_engine
from finetune.data.image_files import ImageSearch, find_images
from finetune.data.label_source import locate_data
from finetune.data.review_source import read_review_file
from finetune.evaluation.cross_validation import cross_validate
from finetune.evaluation.evaluate import Evaluation, evaluate_bundle
from finetune.evaluation.options import require_compatible_options
from finetune.export.full_bundle import open_full_bundle
from finetune.training import run_directory
from models.artifacts.bundle import Bundle
from models.errors import ConfigError, ImageError, RunError, UserError
from models.runtime.openvino_engine import OpenVINOEngine

__all__ = ["Classifier", "Evaluation", "Prediction", "evaluate", "load", "train"]

ImageInput = str | Path | Image.Image
_COMMAND_OR_FLAG = re.compile(r"`[^`]*`|finetune [a-z]+ .*|--(?P<flag>[a-z]+(?:-[a-z]+)*)")


@contextlib.contextmanager
def _arguments_for_flags() -> Iterator[None]:
    """Name arguments instead of flags in error messages, except in commands."""

    def rename(match: re.Match[str]) -> str:
        flag = match["flag"]
        return match[0] if flag is None else "resume=True" if flag == "resume" else flag.replace("-", "_")

    try:
        yield
    except UserError as error:
        error.args = (_COMMAND_OR_FLAG.sub(rename, str(error)), *error.args[1:])
        raise


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        image: The image file, or the image that was passed.
        label: The most probable class, or None if the model abstains.
        confidence: The calibrated probability of the most probable class.
        probabilities: The calibrated probability of each class.
        in_distribution: Whether the image is like the training images; None if the model cannot say.
        ood_score: How unlike the training images it is; None if the model has no such score.
        because: Why the model abstains, in words; None if it does not. With ``abstain=False`` there is a label all the same.
        because_code: The same for programs: "unlike_training", "low_probability" or None.
    """

    image: Path | Image.Image
    label: str | None
    confidence: float
    probabilities: dict[str, float]
    in_distribution: bool | None = None
    ood_score: float | None = None
    because: str | None = None
    because_code: str | None = None


class Classifier:
    """A trained image classifier, opened by ``load`` or returned by ``train``."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self._bundle.path

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self._bundle.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the labels."""
        return self._bundle.classes

    @property
    def metrics(self) -> dict[str, Any]:
        """The validation metrics of the training run, with their 95% intervals."""
        return dict(self._bundle.manifest["metrics"])

    def predict(self, images: ImageInput | Iterable[ImageInput], *, abstain: bool = True, workers: int = 0) -> list[Prediction]:
        """Classify images.

        Args:
            images: Image files, folders of images and images in memory, or a single one of these.
            abstain: False to give every image its most probable class as its label. ``because`` remains.
            workers: Number of decoding threads. 0: one per CPU.

        Returns:
            One prediction per image, in order.

        Raises:
            ImageError: An image cannot be read.
            DataError: A file does not exist, or a folder contains no images.
        """
        given = [images] if isinstance(images, ImageInput) else list(images)
        listed: list[Path | Image.Image] = []
        for image in given:
            listed += [image] if isinstance(image, Image.Image) else find_images([Path(image)], ImageSearch())
        predictions, rule = [], self._bundle.decision_rule
        for result in classify(self._bundle, listed, workers=workers, engine=self._engine):
            if result.probabilities is None:
                raise ImageError(f"{result.image}: {result.error}")
            decision = rule.decide(self.classes, result.probabilities, result.ood_score, abstain=abstain)
            predictions.append(
                Prediction(
                    image=result.image,
                    label=decision.label,
                    confidence=float(result.probabilities.max()),
                    probabilities=dict(zip(self.classes, map(float, result.probabilities), strict=True)),
                    in_distribution=decision.in_distribution,
                    ood_score=result.ood_score,
                    because=decision.because,
                    because_code=decision.because_code,
                )
            )
        return predictions

    def __repr__(self) -> str:
        return f"Classifier({str(self.path)!r}, classes={list(self.classes)})"

    @cached_property
    def _engine(self) -> OpenVINOEngine:
        return open_engine(self._bundle)


def load(bundle: str | Path) -> Classifier:
    """Open a bundle.

    Raises:
        BundleError: The folder is not a bundle, or a file was modified.
    """
    return Classifier(open_full_bundle(Path(bundle)))


@_arguments_for_flags()
def train(
    data_dir: str | Path | None = None,
    *,
    labels: str | Path | None = None,
    backbone: str | None = None,
    resume: bool = False,
    **config: Any,
) -> Classifier:
    """Train a classifier on a folder of labeled images or a table of labels, as ``finetune train`` does.

    Prints its progress and writes a run directory.

    Args:
        data_dir: Folder with ``train/CLASS/`` and ``valid/CLASS/``, or with ``CLASS/`` only. With ``labels``, the folder that
            the paths in the table are relative to. None: the table's folder.
        labels: Table of the labels: .csv, .tsv, .parquet or .jsonl with the columns image, label and optionally split, group
            and others.
        backbone: The pretrained network. None: vgg16, or that of the run to resume.
        resume: Continue the interrupted run in ``output_dir``, with its saved settings. A finished run is only opened.
        config: Any other setting of ``finetune.config.Config``, such as ``epochs`` or ``output_dir``. To resume, only settings
            that do not affect the weights can differ from the saved ones.

    Returns:
        The trained classifier.

    Raises:
        UserError: For every error that the user can fix (settings, data, weights, storage).
    """
    if resume and config.get("output_dir") is None:
        raise RunError("resume=True requires the run directory. Pass output_dir.")
    named = {"data_dir": data_dir, "labels": labels, "backbone": backbone}
    explicit = {**{name: value for name, value in named.items() if value is not None}, **config}
    if data_dir is None and labels is None and not resume and "dataset" not in config:
        raise ConfigError("No data. Pass data_dir or labels.")
    values = {name: str(value) if isinstance(value, Path) else value for name, value in explicit.items()}
    full_config = run_directory.resumed_config(values) if resume else settings.from_mapping(values)
    return load(pipeline.train(full_config, resume=resume).path)


@_arguments_for_flags()
def evaluate(
    classifier: Classifier | str | Path,
    data_dir: str | Path | None = None,
    *,
    labels: str | Path | None = None,
    split: str | None = None,
    folds: int | None = None,
    weights: str | Path | None = None,
    reviews: str | Path | None = None,
    neither: Sequence[str | Path] = (),
    output_dir: str | Path | None = None,
    workers: int = 0,
    cache_dir: str | Path | None = None,
) -> Evaluation:
    """Evaluate a classifier on labeled images, as ``finetune evaluate`` does.

    Args:
        classifier: The classifier, or the folder of its bundle.
        data_dir: The folder of labeled images. None: the folder of ``labels``.
        labels: Table of the labels, with paths relative to ``data_dir``.
        split: The subfolder of ``data_dir``, or the split of the table, to evaluate. None: valid, or all images of a table
            without splits.
        folds: Cross-validate on training and validation images with this number of folds, instead of evaluating ``split``.
        weights: With ``folds``: file of the pretrained weights, if they are not found automatically.
        reviews: File of reviewed labels from the gallery (reviews.csv), applied before the evaluation, or before the training
            of the folds.
        neither: Folders of images of none of the classes, to measure how many are recognized.
        output_dir: A new or empty folder for the results. None: evaluations/BUNDLE-DATA-SPLIT.
        workers: Number of decoding threads. 0: one per CPU.
        cache_dir: Folder of the cached fingerprints and features. None: ~/.cache/finetune.

    Returns:
        The metrics and predictions, which are also written to ``output_dir``.

    Raises:
        ConfigError: The options cannot be combined.
        BundleError: The bundle cannot be opened, or cannot be cross-validated.
        DataError: The dataset does not match the bundle, or none of its images can be read.
    """
    require_compatible_options(split=split, folds=folds, weights=weights, neither=neither)
    bundle = classifier.path if isinstance(classifier, Classifier) else Path(classifier)
    out = Path(output_dir) if output_dir else None
    cache = Path(cache_dir) if cache_dir else None
    folder, table = locate_data(Path(data_dir) if data_dir else None, str(labels) if labels else None)
    review_table = read_review_file(Path(reviews)) if reviews else None
    if folds is None:
        return evaluate_bundle(
            bundle,
            folder,
            label_table=table,
            split=split,
            out=out,
            reviews=review_table,
            neither=[Path(other) for other in neither],
            workers=workers,
            cache_dir=cache,
        )
    return cross_validate(
        bundle,
        folder,
        label_table=table,
        folds=folds,
        out=out,
        weights=Path(weights) if weights else None,
        reviews=review_table,
        workers=workers,
        cache_dir=cache,
    )
