"""The page where a person drops a photo and sees the answer, with JavaScript and without; and the model's card."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from flask import Blueprint, Request, Response, g, render_template, request

from models.preprocess import IMAGE_FORMATS_TEXT
from models.runtime.openvino_engine import Pixels
from service.api.predict import Prediction, classify
from service.context import services
from service.http import REJECTION
from service.http.errors import Problem
from service.http.security import authenticate
from service.http.uploads import Upload, read_uploads
from service.inference.batcher import InferenceResult
from service.inference.model_manager import LoadedModel
from service.inference.predictor import ranked_probabilities
from service.web.layout import current_model, problem_page
from service.web.markdown import render_markdown

log = logging.getLogger("service.web.upload_page")
ACCEPTED_TYPES = (
    "image/jpeg,image/png,image/webp,image/gif,image/bmp,image/tiff,.ppm,.pgm"  # no HEIC: phones send a JPEG instead
)
NO_FILE_SELECTED = "No photo was chosen; choose one or more and press Classify."
MAX_BARS = 10  # bars at once; the others are unfolded

bp = Blueprint("page", __name__)


@dataclass(frozen=True)
class ResultCard:
    """What is shown of one photo: the answer, or the sentence that says why there is none."""

    name: str
    error: str | None = None
    label: str = ""
    confidence: float = 0.0
    bars: tuple[tuple[str, float], ...] = ()  # class and probability, highest first
    crop: Pixels | None = None
    size: str = ""
    notes: tuple[str, ...] = ()


@bp.get("/")
def home() -> Response:
    return _answer_home(current_model())


@bp.post("/")
def classify_form() -> Response:
    """The form, for browsers that run no script; with one they send their photos to /predict."""
    model, predictions = classify(_admitted(request))
    cards = [_card(model, prediction, number) for number, prediction in enumerate(predictions, 1)]
    result = _answer_home(model, cards)
    result.headers["Cache-Control"] = "no-store"
    return result


@bp.get("/model")
def model() -> Response:
    served = current_model()
    text = served.card
    return _page(render_template("model.html", served=served, card=text and render_markdown(text)))


@bp.errorhandler(Problem)
def say(problem: Problem) -> Response:
    """A problem with the whole request, in words on the page that it came from."""
    if request.method == "POST":
        if problem.code == "no_image":
            problem = Problem(problem.code, NO_FILE_SELECTED)
        return problem_page(problem, "home.html", cards=[], **_form())
    return problem_page(problem)


@bp.errorhandler(Exception)
def say_unforeseen(error: Exception) -> Response:
    log.exception("unhandled exception", extra={"request_id": g.request_id})
    return say(Problem("internal_error", f"An error of the server's own was logged as {g.request_id}; tell its operator."))


def _answer_home(model: LoadedModel, cards: list[ResultCard] | None = None) -> Response:
    return _page(render_template("home.html", classes=model.bundle.classes, cards=cards or [], **_form()))


def _page(text: str) -> Response:
    return Response(text, headers={"Cache-Control": "no-cache"}, mimetype="text/html")


def _form() -> dict[str, object]:
    """What the form has to know of the settings."""
    settings = services().settings
    return {"settings": settings, "accept": ACCEPTED_TYPES, "formats": IMAGE_FORMATS_TEXT, "shown": MAX_BARS}


def _admitted(asked: Request) -> list[Upload]:
    """The photos, if they may be computed: there is room, it is a form, and its field ``key`` is a known key."""
    if refusal := asked.environ.get(REJECTION):
        raise refusal
    settings = services().settings
    if asked.mimetype != "multipart/form-data":
        raise Problem("unsupported_media_type", "The page takes its own form; send photos to POST /predict instead.")
    sent = read_uploads(asked, settings)
    key = sent.fields.get("key", "").strip()
    try:
        g.key_name = authenticate(key, settings)
    except Problem as problem:
        what = "That key is not one that is known here" if key else "A key is wanted here"
        raise Problem(problem.code, f"{what}; type yours into the field Key.", headers=problem.headers) from None
    return sent.images


def _card(model: LoadedModel, prediction: Prediction, number: int) -> ResultCard:
    name = Path(prediction.upload.name or f"Photo {number}").name
    if prediction.problem:
        return ResultCard(name, prediction.problem.detail)
    assert prediction.result is not None
    result: InferenceResult = prediction.result
    bars = tuple(ranked_probabilities(model, result, len(model.bundle.classes)).items())
    label, confidence = bars[0]
    seen = result.image
    size = f"{seen.format}, {seen.width_px:,} \u00d7 {seen.height_px:,} pixels"
    return ResultCard(name, None, label, confidence, bars, seen.pixels, size, seen.notes)
