"""The comparison of two models on the same photos: which mistakes one fixed or broke, and whether that is significant."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from flask import Blueprint, Response, jsonify, request, url_for

from service.context import gallery
from service.db.facets import has_groups
from service.db.filter import CHANGES, Filter
from service.db.model_comparison import ModelComparison, compare_models
from service.db.query import get_model
from service.db.records import ModelRecord
from service.gallery.commands import find_bundle, retrain_command, serve_both_command
from service.gallery.grid import render_gallery
from service.gallery.sidebar import grid_url
from service.http.errors import Problem
from service.web.layout import current_model, pluralize, problem_page

SIGNIFICANCE_LEVEL = 0.05

bp = Blueprint("compare", __name__)
bp.register_error_handler(Problem, problem_page)
json_bp = Blueprint("compare_json", __name__)  # its problems are JSON


@dataclass(frozen=True)
class Comparison:
    """What the page and its JSON show. Without another model to compare, ``baseline`` and ``outcome`` are None.

    ``has_groups`` states whether the photos come in groups, for which the test does not allow.
    """

    models: list[ModelRecord]
    baseline: ModelRecord | None
    candidate: ModelRecord
    outcome: ModelComparison | None
    has_groups: bool = False

    @property
    def correct(self) -> dict[str, int]:
        """How many common photos each model has right."""
        if self.outcome is None:
            return {}
        both = self.outcome.both_correct
        return {"baseline": both + self.outcome.broke, "candidate": both + self.outcome.fixed}

    @property
    def summary(self) -> str:
        """The result in one or two sentences, with McNemar's exact test."""
        if self.baseline is None or self.outcome is None:
            return "Only one model is loaded. To compare, add a second one."
        if not self.outcome.common:
            return "The models have no labeled photos in common."
        fixed, broke = self.outcome.fixed, self.outcome.broke
        if not fixed + broke:
            return f"No difference: both models have the same {self.outcome.common:,} photos right and wrong."
        models = {"candidate": fixed, "baseline": broke}
        better, worse = sorted(models, key=lambda name: models[name], reverse=True)
        right = f"all {models[better]:,}" if not models[worse] else f"{models[better]:,}, the {worse} on {models[worse]:,}"
        split = f"The models disagree on {pluralize(fixed + broke, 'photo')}. The {better} is right on {right}."
        if fixed == broke:
            split = f"The models disagree on {pluralize(fixed + broke, 'photo')}. Each is right on {fixed:,}."
        significant = "Statistically" if self.outcome.p_value < SIGNIFICANCE_LEVEL else "Not statistically"
        independent = " The test counts the photos of a group as independent." if self.has_groups else ""
        return f"{split} {significant} significant (p = {self.outcome.p_value:.2g}, McNemar's exact test).{independent}"


@bp.get("/compare")
def page() -> Response:
    """Show the comparison of ``a``, the baseline, with ``b``, the candidate."""
    comparison = _compare()
    baseline, candidate = comparison.baseline, comparison.candidate
    active = current_model().bundle
    return render_gallery(
        "gallery/compare.html",
        comparison=comparison,
        baseline=baseline,
        candidate=candidate,
        outcome=comparison.outcome,
        correct=comparison.correct,
        grids={
            change: grid_url(Filter(model=candidate.version, baseline=baseline.version, change=change)) for change in CHANGES
        }
        if baseline
        else {},
        trained_on={model.version: _created(model.version)[:10] for model in comparison.models},
        swap=url_for("compare.page", a=candidate.version, b=baseline.version) if baseline else "",
        served=gallery().active_version,
        train="" if baseline else retrain_command(active, has_extra_data=False),
        serve_both="" if baseline else serve_both_command(active),
    )


@json_bp.get("/compare.json")
def as_json() -> Response:
    comparison = _compare()
    outcome = comparison.outcome
    if comparison.baseline is None or outcome is None:
        raise Problem("not_found", "Only one model is loaded. Set EVALUATIONS to another bundle, or train another.")
    response = jsonify(
        a=comparison.baseline.version,
        b=comparison.candidate.version,
        **asdict(outcome),
        p_value=outcome.p_value,
        summary=comparison.summary,
    )
    response.headers["Cache-Control"] = "no-cache"
    return response


def _compare() -> Comparison:
    """Compare the requested models. By default the active one and another, with the one trained earlier as the baseline."""
    for name in request.args:
        if name not in ("a", "b"):
            raise Problem("bad_parameter", f'Unknown parameter "{name}". Valid parameters: a, b (versions of models).')
    a, b = request.args.get("a"), request.args.get("b")
    with gallery().database.read() as connection:
        models = gallery().models(connection)
        candidate = get_model(connection, b or gallery().active_version or "")
        if a:
            baseline: ModelRecord | None = get_model(connection, a)
        else:
            others = (model for model in models if model.version != candidate.version and model.classes == candidate.classes)
            baseline = next(others, None)
        if baseline and not a and not b and _created(baseline.version) > _created(candidate.version):
            baseline, candidate = candidate, baseline
        if baseline is None:
            return Comparison(models, None, candidate, None)
        in_groups = has_groups(connection, baseline.id) or has_groups(connection, candidate.id)
        return Comparison(models, baseline, candidate, compare_models(connection, baseline, candidate), in_groups)


def _created(version: str) -> str:
    """Return when a model was trained, in ISO 8601, or an empty text if its bundle is not on this machine."""
    bundle = find_bundle(version)
    return str(bundle.manifest["provenance"]["created"]) if bundle else ""
