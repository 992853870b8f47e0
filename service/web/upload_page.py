"""The upload page, with and without JavaScript, and the page of the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flask import Blueprint, Request, Response, g, render_template, request, url_for

from models.artifacts.bundle import read_small_file
from models.artifacts.decision_rule import UNLIKE_TRAINING
from models.errors import BundleError
from models.preprocess import HAS_HEIF, IMAGE_FORMATS_TEXT
from models.runtime.openvino_engine import Pixels
from service.api.predict import Prediction, classify, gallery_url
from service.context import services
from service.http import REJECTION
from service.http.errors import Problem
from service.http.request_images import Upload, read_uploads
from service.http.security import authenticate
from service.inference.batcher import InferenceResult
from service.inference.model_manager import LoadedModel
from service.inference.predictor import ranked_probabilities
from service.web.layout import current_model, problem_page, render_markdown

log = logging.getLogger("service.web.upload_page")
ACCEPTED_TYPES = "image/jpeg,image/png,image/webp,image/avif,image/gif,image/bmp,image/tiff,.ppm,.pgm" + (
    ",image/heic,image/heif,.heic,.heif" if HAS_HEIF else ""  # without these a phone sends a JPEG of its HEIC photos
)
NO_FILE_SELECTED = "Choose at least one photo, then press Classify."
MAX_BARS = 10  # the others are folded
MAX_NAMED_CLASSES = 6

SAMPLE = "sample.jpg"  # Chelsea by Stefan van der Walt (CC0), from scikit-image
SAMPLE_CLASSES = {"cat", "cats"}  # the sample is offered by models that know one of these
PLOTS = {
    "learning_curves": "Learning curves",
    "more_photos": "What more training photos would bring",
    "reliability": "Reliability",
    "confusion_matrix": "Confusion matrix",
    "thresholds": "Thresholds",
}

bp = Blueprint("page", __name__)


@dataclass(frozen=True)
class ResultCard:
    """The result of one photo, or the ``error`` that prevented it. ``page`` is its address in the gallery, if it is saved."""

    name: str
    error: str | None = None
    label: str = ""
    abstained: str | None = None  # why there is no label
    confidence: float = 0.0
    bars: tuple[tuple[str, float], ...] = ()  # (class, probability), highest first
    crop: Pixels | None = None
    size: str = ""
    notes: tuple[str, ...] = ()
    page: str | None = None


@bp.get("/")
def home() -> Response:
    return _render_home(current_model())


@bp.post("/")
def classify_form() -> Response:
    """Classify the photos of the form without JavaScript. With JavaScript the page uses /predict."""
    model, predictions = classify(_read_photos(request))
    cards = [_card(model, prediction, number) for number, prediction in enumerate(predictions, 1)]
    response = _render_home(model, cards)
    response.headers["Cache-Control"] = "no-store"
    return response


@bp.get("/model")
def model() -> Response:
    active = current_model()
    text = active.card
    files = active.bundle.manifest["files"]
    plots = {name: title for name, title in PLOTS.items() if _plot_file(name) in files}
    return _page(render_template("model.html", active=active, card=text and render_markdown(text), plots=plots))


@bp.get("/model/plots/<name>.png")
def plot(name: str) -> Response:
    """Return a plot of the active bundle. Only the plots that the page shows and the manifest lists have an address."""
    bundle = current_model().bundle
    files = bundle.manifest["files"]
    file = _plot_file(name)
    if name not in PLOTS or file not in files:
        raise Problem("not_found", f"The bundle {bundle.name} has no plot {name!r}. /model shows the plots that it has.")
    try:
        data = read_small_file(bundle.path, file, files)
    except BundleError:
        raise Problem("not_found", f"The plot {name!r} was changed after the bundle was exported.") from None
    response = Response(data, mimetype="image/png")
    response.headers["Cache-Control"] = "no-cache"
    response.set_etag(files[file]["sha256"])
    return response.make_conditional(request)  # type: ignore[return-value]


@bp.errorhandler(Problem)
def handle_problem(problem: Problem) -> Response:
    """Show a problem of the complete request on the page that sent it."""
    if request.method == "POST":
        if problem.code == "no_image":
            problem = Problem(problem.code, NO_FILE_SELECTED)
        return problem_page(problem, "home.html", cards=[], **_form_context())
    return problem_page(problem)


@bp.errorhandler(Exception)
def handle_unexpected(error: Exception) -> Response:
    log.exception("unhandled exception", extra={"request_id": g.request_id})
    return handle_problem(Problem("internal_error", f"Give the administrator this request ID: {g.request_id}."))


def _render_home(model: LoadedModel, cards: list[ResultCard] | None = None) -> Response:
    classes = model.bundle.classes
    sample = url_for("static", filename=SAMPLE) if SAMPLE_CLASSES & {name.lower() for name in classes} else None
    neither = None if model.rule.max_ood_score is None else none_of(classes)
    context = {"classes": classes, "neither": neither, "sample_url": sample, "cards": cards or []}
    return _page(render_template("home.html", **context, **_form_context()))


def _plot_file(name: str) -> str:
    return f"plots/{name}.png"


def _page(text: str) -> Response:
    return Response(text, headers={"Cache-Control": "no-cache"}, mimetype="text/html")


def _form_context() -> dict[str, object]:
    settings = services().settings
    return {"settings": settings, "accept": ACCEPTED_TYPES, "formats": IMAGE_FORMATS_TEXT, "max_bars": MAX_BARS}


def _read_photos(request: Request) -> list[Upload]:
    """Read the photos of the form.

    Raises:
        Problem: The server is at capacity, the body is not a form, or its field ``key`` is not a valid key.
    """
    if rejection := request.environ.get(REJECTION):
        raise rejection
    settings = services().settings
    if request.mimetype != "multipart/form-data":
        raise Problem("unsupported_media_type", "This page accepts its own form only. Send photos to POST /predict instead.")
    form = read_uploads(request, settings)
    key = form.fields.get("key", "").strip()
    try:
        g.key_name = authenticate(key, settings)
    except Problem as problem:
        detail = "Unknown API key." if key else "Enter your API key below."
        raise Problem(problem.code, detail, headers=problem.headers) from None
    return form.images


def _card(model: LoadedModel, prediction: Prediction, number: int) -> ResultCard:
    name = Path(prediction.upload.name or f"Photo {number}").name
    if prediction.problem:
        return ResultCard(name, prediction.problem.detail)
    assert prediction.result is not None
    result: InferenceResult = prediction.result
    bars = tuple(ranked_probabilities(model, result, len(model.bundle.classes)).items())
    label, confidence = bars[0]
    image = result.image
    size = f"{image.format}, {image.width_px:,} \u00d7 {image.height_px:,} pixels"
    page = gallery_url(model, prediction)
    decision = model.decide(result)
    abstained = None
    if decision.label is None:
        is_unlike = decision.because_code == UNLIKE_TRAINING
        abstained = none_of(model.bundle.classes) if is_unlike else f"No label: {decision.because}."
    return ResultCard(name, None, label, abstained, confidence, bars, image.pixels, size, image.notes, page)


def none_of(classes: Sequence[str]) -> str:
    """Return the sentence for a photo that is unlike the training photos. Names are isolated, as some read right to left."""
    names = [f"\u2068{name}\u2069" for name in classes]
    if len(classes) > MAX_NAMED_CLASSES:
        what = f"None of the {len(classes):,} classes"
    elif len(classes) == 2:
        what = f"Neither {names[0]} nor {names[1]}"
    else:
        what = f"None of {', '.join(names[:-1])} and {names[-1]}"
    return f"{what}, as far as this model can tell."
