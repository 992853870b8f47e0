"""Two models on the same photos: who fixed what, who broke what, and whether the difference is more than chance."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify, request

from service.context import gallery
from service.db.filter import CHANGES, Filter
from service.db.model_comparison import ModelComparison, compare_models
from service.db.query import ModelRecord, get_model
from service.gallery.grid import render_gallery, retrain_command, serve_both_command
from service.gallery.sidebar import grid_url
from service.http.errors import Problem
from service.web.layout import problem_page

SIGNIFICANCE_LEVEL = 0.05

bp = Blueprint("compare", __name__)
json_bp = Blueprint("compare_json", __name__)  # whose problems are JSON too


@bp.get("/compare")
def page() -> Response:
    """a is the older of the two and b the newer, where they are not named."""
    models, a, b, outcome = _compared()
    grids = {}
    if a:
        grids = {change: grid_url(Filter(model=b.version, baseline=a.version, change=change)) for change in CHANGES}
    return render_gallery(
        "gallery/compare.html",
        models=models,
        a=a,
        b=b,
        outcome=outcome,
        grids=grids,
        summary=_in_words(a, b, outcome),
        right={"a": outcome.both_correct + outcome.broke, "b": outcome.both_correct + outcome.fixed} if outcome else {},
        served=gallery().active_version,
        train="" if a else retrain_command(),
        serve_both="" if a else serve_both_command(),
    )


@json_bp.get("/compare.json")
def as_json() -> Response:
    _, a, b, outcome = _compared()
    if a is None or outcome is None:
        raise Problem("not_found", "There are fewer than two models to compare; name bundles in EVALUATIONS, or train another.")
    answer = jsonify(
        a=a.version,
        b=b.version,
        fixed=outcome.fixed,
        broke=outcome.broke,
        both_correct=outcome.both_correct,
        both_incorrect=outcome.both_incorrect,
        excluded=outcome.excluded,
        label_conflicts=outcome.label_conflicts,
        unlabeled=outcome.unlabeled,
        only_a=outcome.only_a,
        only_b=outcome.only_b,
        p_value=outcome.p_value,
        summary=_in_words(a, b, outcome),
    )
    answer.headers["Cache-Control"] = "no-cache"
    return answer


@bp.errorhandler(Problem)
def say(problem: Problem) -> Response:
    return problem_page(problem)


def _compared() -> tuple[list[ModelRecord], ModelRecord | None, ModelRecord, ModelComparison | None]:
    for name in request.args:
        if name not in ("a", "b"):
            raise Problem("bad_parameter", f"The parameter {name!r} is not known here; there are a and b, versions of models.")
    shown = gallery()
    with shown.database.read() as connection:
        models = shown.models(connection)
        b = get_model(connection, request.args.get("b") or shown.active_version or "")
        others = [model for model in models if model.version != b.version and model.classes == b.classes]
        named = request.args.get("a")
        a = get_model(connection, named) if named else next(iter(others), None)
        return models, a, b, compare_models(connection, a, b) if a else None


def _in_words(a: ModelRecord | None, b: ModelRecord, outcome: ModelComparison | None) -> str:
    """What McNemar's exact test says of the photos on which the two differ."""
    if a is None or outcome is None:
        return "There is one model only; name another bundle in EVALUATIONS, or train with the reviews and serve the new one."
    if not outcome.common:
        return "The two models have no labelled photos in common, so that there is nothing to compare."
    changed = outcome.fixed + outcome.broke
    if not changed:
        return f"Both have the same {outcome.common:,} photos right and wrong: there is no difference between them."
    better, most = (b, outcome.fixed) if outcome.fixed >= outcome.broke else (a, outcome.broke)
    split = f"Of {changed:,} photos on which they differ, {better.version} has {most:,} right and the other {changed - most:,}"
    p = f"p = {outcome.p_value:.2g}, McNemar's exact test"
    if outcome.p_value < SIGNIFICANCE_LEVEL:
        return f"{split}: more than chance would explain ({p})."
    return f"{split}: no more than chance would explain ({p})."
