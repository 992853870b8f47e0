"""Where did the model look? Computed when somebody asks, by a second engine that gives way to the first one.

The class-activation map is exact for networks that average their last feature map and weigh it linearly
(``service.explain.cam``); for all others a patch is moved over the photo (``service.explain.occlusion``), as that needs
nothing but answers. Score-CAM (Wang et al. 2020) needs as many answers as the last map has channels, hundreds, and was left
out for it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.artifacts.bundle import GRAPH, Bundle
from models.artifacts.paths import compiled_dir
from models.runtime.openvino_engine import OpenVINOEngine, Pixels
from service.explain.cam import LinearHead
from service.explain.occlusion import FORWARD_PASSES, blur, occlusion_map
from service.http.errors import Problem
from service.images.worker_pool import WorkerPool

CACHE_SIZE = 1024
OUTPUTS = ("probabilities", "embedding", "feature_map")
CAM, OCCLUSION = "class-activation map", "occlusion"

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where a photo speaks for the class ``label``.

    ``evidence`` (h, w) is signed: for a class-activation map what each place adds to the class's score, whose mean it is but
    for the bias; for occlusion the fall of the class's log-odds when the place is covered.
    """

    method: str
    label: str
    evidence: Floats
    forward_passes: int

    @property
    def is_empty(self) -> bool:
        """Whether nothing in the photo speaks for the class."""
        return not bool((self.evidence > 0).any())

    @property
    def description(self) -> str:
        """What the picture shows, and how it was made, in words."""
        if self.is_empty:
            return f"No place of the photo speaks for {self.label!r} rather than for the other classes ({self.method})."
        if self.method == CAM:
            return (
                f"The brighter a place, the more it adds to the score of {self.label!r}. The map is exact for this network: "
                "together its places give the score, but for a constant (class-activation map, Zhou et al. 2016)."
            )
        return (
            f"The brighter a place, the less probable {self.label!r} became when a patch of it was blurred. It is an "
            f"approximation from {self.forward_passes} answers (occlusion, Zeiler and Fergus 2014)."
        )

    def heatmap(self, side_px: int) -> Floats:
        """(side_px, side_px) from 0 to 1 over the crop that the model saw: what speaks for the class.

        1 is the strongest place of the photo, whether it speaks for the class or against it. So a class that has little for
        it stays dark, instead of having its little shown as large.
        """
        strongest = float(np.abs(self.evidence).max()) or 1.0
        share = np.maximum(self.evidence, 0) / np.float32(strongest)
        return np.asarray(Image.fromarray(share).resize((side_px, side_px), Image.Resampling.BILINEAR))


class Explainer:
    """Explain one bundle's answers, one at a time; the last REMEMBERED are kept.

    The engine is made at the first question, and its memory given back ``idle_timeout_s`` after the last one. ``max_queued``
    may wait, each ``timeout_s`` at most.
    """

    def __init__(self, bundle: Bundle, *, max_queued: int = 8, timeout_s: float = 30.0, idle_timeout_s: float = 300.0) -> None:
        self.bundle = bundle
        self._engine: OpenVINOEngine | None = None
        self._head: LinearHead | None = None
        self._kept: OrderedDict[tuple[str, str], Explanation] = OrderedDict()
        self._lock = threading.Lock()
        self._crew = WorkerPool(
            "explanation",
            threads=1,
            max_queued=max_queued,
            timeout_s=timeout_s,
            idle_timeout_s=idle_timeout_s,
            on_idle=self._give_back,
        )

    def explain(self, sha256: str, label: str, load_pixels: Callable[[], Pixels]) -> Explanation:
        """Where the photo of that sha256 speaks for the class ``label``; ``pixels`` gives its crop where it has to be computed.

        Raises what ``pixels`` raises, and Problem: for no such class ("bad_parameter"), where too many wait ("overloaded") or
        it takes too long ("deadline_exceeded").
        """
        if label not in self.bundle.classes:
            known = ", ".join(self.bundle.classes[:10])
            raise Problem("bad_parameter", f"class is {label[:40]!r}; this model's classes are {known}.")
        key = (sha256, label)
        return self._find(key) or self._crew.run(
            key, lambda: self._find(key) or self._keep(key, self._explain(load_pixels(), label))
        )

    def close(self) -> None:
        """Finish what is being computed, and end the thread."""
        self._crew.close()

    def _explain(self, pixels: Pixels, label: str) -> Explanation:
        engine = self._compiled()
        index = self.bundle.classes.index(label)
        # The places of a map are not those of the photo where its pixels change places before they come to the network.
        if self._head and self.bundle.permute_pixels is None:
            probabilities, embedding, feature_map = (rows[0] for rows in engine.run(pixels[None]))
            if feature_map.ndim == 3:
                evidence = self._head.score_map(probabilities, embedding, feature_map, index)
                if evidence is not None:
                    return Explanation(CAM, label, evidence, 1)
        evidence = occlusion_map(lambda photos: engine.run(photos)[0], pixels, index, fill=blur(pixels))
        return Explanation(OCCLUSION, label, evidence, FORWARD_PASSES)

    def _compiled(self) -> OpenVINOEngine:
        """Only the crew's thread comes here, so that OpenVINO's own threads, its children, have its low priority."""
        if self._engine is None:
            self._head = LinearHead.from_bundle(self.bundle)
            self._engine = OpenVINOEngine(
                self.bundle.path / GRAPH, outputs=OUTPUTS, threads=1, batch_sizes=(1,), cache_dir=compiled_dir()
            )
        return self._engine

    def _give_back(self) -> None:
        self._engine = self._head = None

    def _find(self, key: tuple[str, str]) -> Explanation | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: tuple[str, str], made: Explanation) -> Explanation:
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > CACHE_SIZE:
                self._kept.popitem(last=False)
        return made
