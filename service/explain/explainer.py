"""Explain predictions by heat maps, on request, with an engine of low priority.

Class-activation maps are exact for networks that average their last feature map and have a linear head
(``service.explain.cam``). For all others a patch is moved over the image (``service.explain.occlusion``), which needs
predictions alone. Score-CAM (Wang et al. 2020) is left out, as it needs hundreds of forward passes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.artifacts.bundle import GRAPH, Bundle
from models.artifacts.paths import compiled_dir
from models.errors import list_names
from models.runtime.openvino_engine import OpenVINOEngine, Pixels
from service.explain.cam import LinearHead
from service.explain.occlusion import FORWARD_PASSES, blur, occlusion_map
from service.http.errors import Problem
from service.images.worker_pool import PoolFullError, PoolTimeoutError, WorkerPool

CACHE_SIZE = 1024
OUTPUTS = ("probabilities", "embedding", "feature_map")
CAM, OCCLUSION = "class-activation map", "occlusion"

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Explanation:
    """The regions of an image that support the class ``label``.

    ``evidence`` (h, w) is signed. For a class-activation map it is the contribution of each position to the score of the
    class, whose mean it is up to the bias. For occlusion it is the fall of the class's log-odds if the position is covered.
    """

    method: str
    label: str
    evidence: Floats
    forward_passes: int

    @property
    def is_empty(self) -> bool:
        """Whether no region supports the class."""
        return not bool((self.evidence > 0).any())

    @property
    def description(self) -> str:
        """The meaning of the heat map and the method, in words."""
        if self.is_empty:
            return f"No region supports {self.label!r} over the other classes ({self.method})."
        if self.method == CAM:
            return (
                f"Brighter areas contribute more to the {self.label!r} score. Exact for this network: the map sums to the "
                "score, up to a constant (class-activation map, Zhou et al. 2016)."
            )
        return (
            f"Brighter areas lower the probability of {self.label!r} more when they are blurred. An approximation from "
            f"{self.forward_passes} predictions (occlusion, Zeiler and Fergus 2014)."
        )

    def heatmap(self, side_px: int) -> Floats:
        """Scale the supporting evidence to (side_px, side_px), from 0 to 1.

        1 is the strongest evidence in the image, for or against the class. A class with little support therefore stays dark.
        """
        strongest = float(np.abs(self.evidence).max()) or 1.0
        relative = np.maximum(self.evidence, 0) / np.float32(strongest)
        return np.asarray(Image.fromarray(relative).resize((side_px, side_px), Image.Resampling.BILINEAR))


class Explainer:
    """Explain the predictions of one bundle, one at a time, and cache the last CACHE_SIZE explanations."""

    def __init__(self, bundle: Bundle, *, max_queued: int = 8, timeout_s: float = 30.0, idle_timeout_s: float = 300.0) -> None:
        """Create an explainer. Its engine is compiled for the first explanation.

        Args:
            bundle: The bundle.
            max_queued: The number of explanations that may wait.
            timeout_s: How long a caller waits.
            idle_timeout_s: How long after the last explanation the engine is released.
        """
        self.bundle = bundle
        self._engine: OpenVINOEngine | None = None
        self._head: LinearHead | None = None
        self._cache: OrderedDict[tuple[str, str], Explanation] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = WorkerPool("explanation", threads=1, max_queued=max_queued, timeout_s=timeout_s)
        self._idle_timeout_s = idle_timeout_s
        self._idle_timer: threading.Timer | None = None

    def explain(self, sha256: str, label: str, load_pixels: Callable[[], Pixels]) -> Explanation:
        """Find the regions of an image that support a class.

        Args:
            sha256: The image.
            label: The class.
            load_pixels: Returns the model's input (H, W, C) if the explanation is not cached.

        Raises:
            Problem: The model has no such class ("bad_parameter").
            PoolFullError: Too many explanations are waiting.
            PoolTimeoutError: The explanation took too long.
        """
        if label not in self.bundle.classes:
            known = list_names(self.bundle.classes)
            raise Problem("bad_parameter", f"Invalid `class`: {label[:40]!r}. The classes of the model are {known}.")
        key = (sha256, label)
        return self._find(key) or self._pool.run(
            key, lambda: self._find(key) or self._save(key, self._compute(load_pixels(), label))
        )

    def close(self) -> None:
        """Finish the running explanation and release the engine."""
        if self._idle_timer:
            self._idle_timer.cancel()
        self._pool.close()
        self._release()

    def _compute(self, pixels: Pixels, label: str) -> Explanation:
        if self._idle_timer:
            self._idle_timer.cancel()
        try:
            engine = self._compiled()
            index = self.bundle.classes.index(label)
            # Positions of a feature map are not those of the image if the pixels are shuffled before the network.
            if self._head and self.bundle.permute_pixels is None:
                probabilities, embedding, feature_map = (rows[0] for rows in engine.run(pixels[None]))
                if feature_map.ndim == 3:
                    evidence = self._head.score_map(probabilities, embedding, feature_map, index)
                    if evidence is not None:
                        return Explanation(CAM, label, evidence, 1)
            evidence = occlusion_map(lambda images: engine.run(images)[0], pixels, index, fill=blur(pixels))
            return Explanation(OCCLUSION, label, evidence, FORWARD_PASSES)
        finally:
            self._idle_timer = threading.Timer(self._idle_timeout_s, self._release_in_pool)
            self._idle_timer.daemon = True
            self._idle_timer.start()

    def _compiled(self) -> OpenVINOEngine:
        """Compile the engine in the pool's thread, so that the threads of OpenVINO inherit its low priority."""
        if self._engine is None:
            self._head = LinearHead.from_bundle(self.bundle)
            self._engine = OpenVINOEngine(
                self.bundle.path / GRAPH, outputs=OUTPUTS, threads=1, batch_sizes=(1,), cache_dir=compiled_dir()
            )
        return self._engine

    def _release_in_pool(self) -> None:
        """Release the engine when no explanation runs. If some are waiting, the last of them starts the timer again."""
        with contextlib.suppress(PoolFullError, PoolTimeoutError):
            self._pool.run(("release",), self._release)

    def _release(self) -> None:
        self._engine = self._head = None

    def _find(self, key: tuple[str, str]) -> Explanation | None:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _save(self, key: tuple[str, str], explanation: Explanation) -> Explanation:
        with self._lock:
            self._cache[key] = explanation
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        return explanation
