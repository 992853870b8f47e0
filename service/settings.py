"""What an operator can set: one table, defaults, then environment variables. Wrong values are refused at the start."""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
from models.artifacts.bundle import MANIFEST
from models.artifacts.evaluation import EVALUATION
from models.errors import ConfigError

SHIPPED_BUNDLE = Path(models.__file__).parent / "shipped" / "dogs-vs-cats"
MIB = 1 << 20
RENAMED = {  # variables of earlier versions; one that is set stops the server, even where another program may have meant it
    "QUEUE": "MAX_IN_FLIGHT",
    "GRACE_S": "SHUTDOWN_TIMEOUT_S",
    "PROXIES": "TRUSTED_PROXIES",
    "AGREEMENT": "MIN_AGREEMENT",
    "COMPARE_PHOTOS": "SHADOW_SAMPLES",
    "KEEP_PREDICTIONS": "SAVE_PREDICTIONS",
    "KEEP_PHOTOS": "MAX_SAVED",
    "KEEP_DAYS": "RETENTION_DAYS",
    "BUNDLES": "BUNDLE_ROOT",
    "DATA": "DATA_DIR",
    "MAX_BATCH": "MAX_BATCH_SIZE",
    "MAX_WAIT_MS": "BATCH_TIMEOUT_MS",
    "MAX_PHOTOS": "MAX_IMAGES",
    "THUMBNAILS_MB": "THUMBNAIL_CACHE_MB",
}


def _setting(default: Any, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Settings:
    """Every setting; its environment variable is its name in capitals. None is worked out from the machine (``plan.py``)."""

    bundle: Path = _setting(SHIPPED_BUNDLE, "the bundle to serve: the folder that `finetune train` exported")
    bundle_root: Path | None = _setting(
        None, "folder below which POST /admin/bundle may open a bundle (default: the one that holds `BUNDLE`)"
    )
    bundle_poll_s: float = _setting(
        1.0, "where `BUNDLE` is a link, how often to look whether it leads elsewhere; 0 never does", least=0, most=3600
    )
    shadow_samples: int = _setting(
        64, "last answered photos, as the model saw them, held in memory to compare a new bundle on", least=0, most=10_000
    )
    min_agreement: float = _setting(0.9, "share of them to which a new bundle must give the same label", least=0, most=1)
    data_dir: Path | None = _setting(
        None, "the folder of labelled photos that the gallery shows, as it was evaluated; it is only read"
    )
    thumbnail_cache_mb: int = _setting(
        512, "thumbnails kept on disk, in MiB, under the cache; 0 keeps a few in memory", least=0, most=1_000_000
    )
    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    port: int = _setting(8000, "port to listen on; 0 takes a free one", least=0, most=65535)
    web_concurrency: int = _setting(1, "worker processes; each holds its own copy of the model", least=1, most=64)
    threads: int | None = _setting(
        None,
        "threads of each worker that run predictions, `MAX_IN_FLIGHT` of them at most (default: `MAX_IN_FLIGHT` + 16)",
        least=2,
        most=1024,
    )
    page_threads: int | None = _setting(
        None, "threads of each worker that run everything else (default: a quarter of `THREADS`)", least=1, most=1024
    )
    page_queue: int = _setting(
        100,
        "requests for pages that may wait for a thread, and as many for health and metrics; beyond them 503",
        least=0,
        most=10_000,
    )
    gunicorn_worker: str = _setting(
        "tuned", "tuned, or stock: gunicorn's own threads, without protection from slow clients", one_of=("tuned", "stock")
    )
    cpus: int | None = _setting(None, "processors to plan for (default: those of the container's quota)", least=1, most=1024)
    engine: str = _setting(
        "auto", "openvino, torch (for GPUs), or auto: torch where there is a GPU", one_of=("auto", "openvino", "torch")
    )
    precision: str = _setting(
        "auto",
        "fp32, bf16, or auto: bf16 where the bundle measured it and the processor has it",
        one_of=("auto", "fp32", "bf16"),
    )
    streams: int | None = _setting(None, "batches computed at once (default: the processors of a worker)", least=1, most=256)
    max_batch_size: int = _setting(4, "photos computed in one go at most", least=1, most=256)
    batch_timeout_ms: float = _setting(
        4.0, "how long a batch waits for photos that are being decoded; never for others", least=0, most=1000
    )
    max_in_flight: int = _setting(
        64, "photos in the house at once, `MAX_IMAGES` or more; beyond them 503", least=1, most=10_000
    )
    deadline_ms: int = _setting(10_000, "after this an answer is not worth its computing: 504", least=10, most=600_000)
    body_timeout_s: float = _setting(15.0, "how long a request's body may take to arrive", least=0.1, most=600)
    head_timeout_s: float = _setting(15.0, "how long a request's head may take to arrive", least=0.1, most=600)
    first_byte_timeout_s: float = _setting(
        5.0, "how long a new connection may stay without a request's first byte", least=0.1, most=600
    )
    send_timeout_s: float = _setting(
        30.0, "how long a client may take for the next 16 KiB of its response before the connection is cut", least=0.1, most=600
    )
    max_connections: int = _setting(
        4096,
        "open connections of each worker, and no more than there may be open files; beyond them the longest idle is closed",
        least=16,
        most=1_000_000,
    )
    max_buffered_mb: float = _setting(
        256.0,
        "received bytes of incomplete requests of each worker, in MiB, and as many of unsent responses;"
        " beyond them the oldest is cut",
        least=0.001,
        most=1_000_000,
    )
    max_body_mb: float = _setting(20.0, "largest request body in MiB: 413", least=0.001, most=1024)
    max_images: int = _setting(16, "most photos in one request: 413", least=1, most=10_000)
    max_megapixels: float = _setting(
        50.0, "largest photo, width times height in millions, checked before it is decoded: 413", least=0.01, most=85
    )
    max_jpeg_scans: int = _setting(
        100, "most scans in one JPEG, which an ordinary one has 1 to 13 of: 422", least=1, most=10_000
    )
    max_image_segments: int = _setting(
        50_000, "most JPEG segments, PNG chunks, GIF blocks or TIFF strips in one photo: 422", least=100, most=10_000_000
    )
    decode_timeout_s: float = _setting(
        5.0, "how long decoding a large or unusual photo may take, in a process of its own: 422", least=0.1, most=600
    )
    shutdown_timeout_s: int = _setting(30, "how long a stopping server finishes what it accepted", least=1, most=3600)
    keepalive_s: int = _setting(
        75, "how long an idle connection is kept; longer than the proxy in front keeps it", least=1, most=3600
    )
    api_keys: tuple[str, ...] = _setting((), "keys for /predict, with commas, each NAME:KEY or KEY; empty lets everybody in")
    admin_keys: tuple[str, ...] = _setting((), "keys for /admin, with commas, each NAME:KEY or KEY; empty lets nobody in")
    allowed_hosts: tuple[str, ...] = _setting(
        (),
        "host names in URLs of this server, comma-separated, `.name` with its subdomains; others get 400 (default: localhost"
        " if `HOST` is a loopback address and `TRUSTED_PROXIES` is 0, else any name)",
    )
    cors_origins: tuple[str, ...] = _setting((), "origins whose pages may call /predict, with commas; * for all")
    trusted_proxies: int = _setting(0, "reverse proxies in front whose X-Forwarded-* headers are believed", least=0, most=10)
    database_url: str | None = _setting(
        None,
        "where reviews are kept: sqlite:///FILE or postgresql://USER@HOST/NAME (default: ~/.local/share/finetune/reviews.db)",
    )
    evaluations: tuple[Path, ...] = _setting(
        (), "more bundles and evaluations that the gallery shows beside the served bundle's own, with commas"
    )
    save_predictions: bool = _setting(False, "1 keeps the photos that are sent to /predict, for the gallery; 0 keeps none")
    max_saved: int = _setting(10_000, "how many of them at most; those nobody reviewed go first", least=1, most=10_000_000)
    retention_days: float = _setting(30.0, "for how many days at most", least=0.01, most=3650)
    log_level: str = _setting("info", "debug, info, warning or error", one_of=("debug", "info", "warning", "error"))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the environment; an empty variable counts as unset. Raises ConfigError for a wrong value or an old name."""
        for old, new in RENAMED.items():
            if environ.get(old, "").strip():
                raise ConfigError(f"{old} is now {new}; rename it in the environment.")
        types_of = typing.get_type_hints(cls)
        given = {
            row.name: _parse(row, types_of[row.name], environ[row.name.upper()].strip())
            for row in dataclasses.fields(cls)
            if environ.get(row.name.upper(), "").strip()
        }
        settings = cls(**given)
        _check_keys("API_KEYS", environ, settings.api_keys)
        _check_keys("ADMIN_KEYS", environ, settings.admin_keys)
        if settings.data_dir is not None and not settings.data_dir.is_dir():
            raise ConfigError(
                f"DATA_DIR is {str(settings.data_dir)!r}, which is no folder; name the folder of photos that was evaluated."
            )
        for path in settings.evaluations:
            if not any((path / name).is_file() for name in (MANIFEST, EVALUATION)):
                raise ConfigError(
                    f"EVALUATIONS names {str(path)!r}, which is neither a bundle nor a folder that `finetune evaluate` wrote."
                )
        if settings.max_buffered_mb < settings.max_body_mb:
            raise ConfigError(
                f"MAX_BUFFERED_MB is {settings.max_buffered_mb:g} and MAX_BODY_MB {settings.max_body_mb:g}:"
                " a full body would never fit; raise MAX_BUFFERED_MB or lower MAX_BODY_MB."
            )
        if settings.max_images > settings.max_in_flight:
            raise ConfigError(
                f"MAX_IMAGES is {settings.max_images} and MAX_IN_FLIGHT is {settings.max_in_flight}: a full request never fits;"
                " raise MAX_IN_FLIGHT or lower MAX_IMAGES."
            )
        return settings

    @property
    def resolved_bundle_root(self) -> Path:
        """Where bundles may lie that come by HTTP, without links."""
        return (self.bundle_root or self.bundle.absolute().parent).resolve()

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * MIB)

    @property
    def max_pixels(self) -> int:
        return int(self.max_megapixels * 1e6)


@functools.cache
def process_settings() -> Settings:
    """Read the settings of this process once.

    gunicorn's parent process does it, so that a worker that replaces another does not fail because a folder has gone since.
    """
    return Settings.from_environment()


def _parse(row: dataclasses.Field[Any], wanted: Any, text: str) -> Any:
    name, limits = row.name.upper(), row.metadata
    kind = next((t for t in typing.get_args(wanted) if t is not types.NoneType), wanted) if _is_optional(wanted) else wanted
    if kind is Path:
        return Path(text).expanduser()
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)[0]
        return tuple(of(word.strip()) for word in text.split(",") if word.strip())
    if kind is bool:
        if text not in ("0", "1"):
            raise ConfigError(f"{name} is {text!r}; it can be 0 or 1.")
        return text == "1"
    if kind is str:
        if "one_of" in limits and text not in limits["one_of"]:
            raise ConfigError(f"{name} is {text!r}; it can be {', '.join(limits['one_of'])}.")
        return text
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be {'a whole number' if kind is int else 'a number'}.") from None
    if not limits["least"] <= value <= limits["most"]:
        raise ConfigError(f"{name} is {text}; it must be from {limits['least']} to {limits['most']}.")
    return value


def _check_keys(name: str, environ: Mapping[str, str], keys: tuple[str, ...]) -> None:
    """A key that is empty, as where a variable inside API_KEYS was, would let everybody in."""
    text = environ.get(name, "")
    words = [row.rpartition(":")[2] for row in keys]
    if (text.strip() and not keys) or not all(word.isascii() and word.isprintable() and word.strip() for word in words):
        raise ConfigError(f"{name} has a key that is empty or not plain ASCII; write NAME:KEY or KEY, with commas between.")


def _is_optional(wanted: Any) -> bool:
    return types.NoneType in typing.get_args(wanted)
