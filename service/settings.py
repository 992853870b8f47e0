"""The settings of the service: defaults, overridden by environment variables, which are checked at the start."""

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
from models.artifacts.paths import default_data_dir
from models.errors import ConfigError

SHIPPED_BUNDLE = Path(models.__file__).parent / "shipped" / "dogs-vs-cats"
MIB = 1 << 20
RENAMED = {  # old name -> new name; a variable with an old name stops the server
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
    """Declare a setting. ``limits`` are ``low`` and ``high`` of a number, or the ``choices`` of a text."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Settings:
    """The settings. Each is read from the environment variable with its name in capitals."""

    bundle: Path = _setting(SHIPPED_BUNDLE, "bundle to serve: a folder that `finetune train` exported")
    bundle_root: Path | None = _setting(
        None, "folder whose bundles POST /admin/bundle may activate (default: the parent folder of `BUNDLE`)"
    )
    bundle_poll_s: float = _setting(
        1.0, "if `BUNDLE` is a symbolic link, how often to check whether its target changed; 0 disables it", low=0, high=3600
    )
    shadow_samples: int = _setting(
        64,
        "recent images kept in memory, as preprocessed pixels, to compare a new bundle with the current one",
        low=0,
        high=10_000,
    )
    min_agreement: float = _setting(
        0.9, "fraction of the recent images to which a new bundle must give the same label", low=0, high=1
    )
    data_dir: Path | None = _setting(None, "folder of labeled images for the gallery, as evaluated; it is never written to")
    thumbnail_cache_mb: int = _setting(
        512, "size in MiB of the thumbnail cache on disk; 0 caches a few thumbnails in memory", low=0, high=1_000_000
    )
    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 for all interfaces")
    port: int = _setting(8000, "port to listen on; 0 selects a free one", low=0, high=65535)
    web_concurrency: int = _setting(1, "worker processes; each has its own copy of the model", low=1, high=64)
    threads: int | None = _setting(
        None, "threads per worker; at most `MAX_IN_FLIGHT` of them predict (default: `MAX_IN_FLIGHT` + 16)", low=2, high=1024
    )
    page_threads: int | None = _setting(
        None,
        "additional threads per worker for requests other than predictions, and half as many for the images of pages "
        "(default: a quarter as many as `THREADS`)",
        low=1,
        high=1024,
    )
    page_queue: int = _setting(
        100,
        "requests for pages that may wait for a thread, and as many for health and metrics; further ones get 503",
        low=0,
        high=10_000,
    )
    gunicorn_worker: str = _setting(
        "tuned",
        "tuned, or stock for gunicorn's own threaded worker, which has no protection from slow clients",
        choices=("tuned", "stock"),
    )
    cpus: int | None = _setting(None, "CPUs to use (default: the container's quota)", low=1, high=1024)
    engine: str = _setting(
        "auto", "openvino, torch (for GPUs), or auto: torch if there is a GPU", choices=("auto", "openvino", "torch")
    )
    precision: str = _setting(
        "auto",
        "fp32, bf16, int8, or auto: the fastest one that this CPU supports and that was accurate enough when the bundle was "
        "exported",
        choices=("auto", "fp32", "bf16", "int8"),
    )
    streams: int | None = _setting(None, "batches computed at a time (default: the CPUs of a worker)", low=1, high=256)
    max_batch_size: int = _setting(4, "images per batch", low=1, high=256)
    batch_timeout_ms: float = _setting(
        4.0, "how long a partial batch waits for images that are being decoded", low=0, high=1000
    )
    max_in_flight: int = _setting(
        64, "images in flight, at least `MAX_IMAGES`; further requests get 503 with Retry-After", low=1, high=10_000
    )
    deadline_ms: int = _setting(10_000, "time limit for a request; a slower one gets 504", low=10, high=600_000)
    body_timeout_s: float = _setting(15.0, "time for a request's body to arrive", low=0.1, high=600)
    head_timeout_s: float = _setting(15.0, "time for a request's head to arrive", low=0.1, high=600)
    first_byte_timeout_s: float = _setting(5.0, "time for the first byte of a request on a new connection", low=0.1, high=600)
    send_timeout_s: float = _setting(30.0, "time for a client to receive the next 16 KiB of its response", low=0.1, high=600)
    max_connections: int = _setting(
        4096,
        "open connections per worker, limited by the number of open files; beyond it the longest idle one is closed",
        low=16,
        high=1_000_000,
    )
    max_buffered_mb: float = _setting(
        256.0,
        "MiB per worker of incomplete requests, and as many of unsent responses; beyond it the oldest connection is closed",
        low=0.001,
        high=1_000_000,
    )
    max_body_mb: float = _setting(20.0, "largest request body in MiB; larger ones get 413", low=0.001, high=1024)
    max_images: int = _setting(16, "images per request; more get 413", low=1, high=10_000)
    max_megapixels: float = _setting(
        50.0, "largest image, width times height in millions, checked before decoding; larger ones get 413", low=0.01, high=85
    )
    max_jpeg_scans: int = _setting(100, "scans in a JPEG (ordinary ones have 1 to 13); more get 422", low=1, high=10_000)
    max_image_segments: int = _setting(
        50_000,
        "JPEG segments, PNG chunks, GIF blocks, HEIC or AVIF boxes, or TIFF strips in an image; more get 422",
        low=100,
        high=10_000_000,
    )
    decode_timeout_s: float = _setting(
        5.0, "time to decode a large or unusual image in the decoder process; slower ones get 422", low=0.1, high=600
    )
    shutdown_timeout_s: int = _setting(30, "time for a stopping server to finish accepted requests", low=1, high=3600)
    keepalive_s: int = _setting(
        75, "how long an idle connection stays open; longer than the proxy in front keeps it", low=1, high=3600
    )
    api_keys: tuple[str, ...] = _setting(
        (),
        "keys for /predict, reviews and changes in the studio, comma-separated, each NAME:KEY or KEY; empty allows requests "
        "without a key",
    )
    admin_keys: tuple[str, ...] = _setting((), "keys for /admin, comma-separated, each NAME:KEY or KEY; empty disables /admin")
    allowed_hosts: tuple[str, ...] = _setting(
        (),
        "host names in URLs of this server, comma-separated, `.name` with its subdomains; others get 400 (default: localhost"
        " if `HOST` is a loopback address and `TRUSTED_PROXIES` is 0, else any name)",
    )
    cors_origins: tuple[str, ...] = _setting((), "origins whose pages may call /predict, comma-separated; * for all")
    trusted_proxies: int = _setting(
        0, "number of reverse proxies in front whose X-Forwarded-* headers are trusted", low=0, high=10
    )
    database_url: str | None = _setting(
        None,
        "review database: sqlite:///FILE or postgresql://USER@HOST/NAME (default: ~/.local/share/finetune/reviews.db)",
    )
    database_timeout_s: float = _setting(
        5.0, "time to wait for a database connection or lock; requests that exceed it get 503", low=0.1, high=600
    )
    evaluations: tuple[Path, ...] = _setting((), "further bundles and evaluations to show in the gallery, comma-separated")
    max_selected: int = _setting(
        5_000, "photos that one review in the gallery may change; a larger selection gets 413", low=1, high=1_000_000
    )
    save_predictions: bool = _setting(False, "1 saves the images sent to /predict for the gallery")
    max_saved: int = _setting(
        10_000, "number of images to save; the oldest unreviewed ones are deleted", low=1, high=10_000_000
    )
    max_saved_mb: float = _setting(
        4096.0, "MiB of saved images; the oldest unreviewed ones are deleted", low=1, high=10_000_000
    )
    save_queue_mb: float = _setting(
        64.0, "MiB per worker of images that wait to be saved; further ones are not saved", low=1, high=10_000
    )
    retention_days: float = _setting(30.0, "days to keep saved images", low=0.01, high=3650)
    studio: bool = _setting(False, "1 enables the studio at /studio: upload photos, train and put models live from the browser")
    studio_dir: Path | None = _setting(
        None, "folder of the studio's datasets, runs and uploads (default: ~/.local/share/finetune/studio)"
    )
    studio_max_dataset_mb: float = _setting(
        10_240.0, "MiB of one dataset in the studio, also unpacked from a zip", low=0.001, high=100_000_000
    )
    studio_max_photos: int = _setting(200_000, "photos in one dataset of the studio", low=1, high=100_000_000)
    studio_max_zip_mb: float = _setting(
        4096.0, "largest zip in MiB that may be uploaded to the studio", low=0.001, high=1_000_000
    )
    studio_min_free_mb: float = _setting(
        1024.0, "MiB of free disk space that uploads to the studio leave; further ones get 507", low=0, high=100_000_000
    )
    studio_audit_timeout_s: float = _setting(
        1800.0, "time for the audit of a dataset in the studio; a slower one is stopped", low=1, high=1_000_000
    )
    studio_max_running: int = _setting(1, "trainings of the studio that run at a time", low=1, high=64)
    studio_max_queued: int = _setting(20, "trainings of the studio that may wait; further ones get 429", low=0, high=10_000)
    studio_niceness: int = _setting(
        15, "niceness of a training, from 0 to 19; that of predictions is 10, and a higher one yields to them", low=0, high=19
    )
    studio_cpus: int | None = _setting(None, "CPUs that a training may use (default: all)", low=1, high=1024)
    studio_max_streams: int = _setting(
        32, "open connections per worker that follow a training; further pages reload its state instead", low=0, high=10_000
    )
    log_level: str = _setting(
        "info",
        "debug, info, warning or error; on a terminal info shows warnings only",
        choices=("debug", "info", "warning", "error"),
    )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the settings; an empty variable counts as unset.

        Args:
            environ: Variables and their values.

        Raises:
            ConfigError: A value is invalid, or a variable has an old name.
        """
        for old, new in RENAMED.items():
            if environ.get(old, "").strip():
                raise ConfigError(f"{old} was renamed to {new}. Rename it in the environment.")
        types_of = typing.get_type_hints(cls)
        values = {
            row.name: _parse(row, types_of[row.name], text)
            for row in dataclasses.fields(cls)
            if (text := environ.get(row.name.upper(), "").strip())
        }
        settings = cls(**values)
        _check_keys("API_KEYS", environ, settings.api_keys)
        _check_keys("ADMIN_KEYS", environ, settings.admin_keys)
        settings._check()
        return settings

    def _check(self) -> None:
        """Check folders, and limits that depend on each other. Raises ConfigError."""
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise ConfigError(f'DATA_DIR: no such folder "{self.data_dir}".')
        for path in self.evaluations:
            if not any((path / name).is_file() for name in (MANIFEST, EVALUATION)):
                raise ConfigError(f'EVALUATIONS: "{path}" is neither a bundle nor a folder written by `finetune evaluate`.')
        if self.max_buffered_mb < self.max_body_mb:
            raise ConfigError(
                f"MAX_BUFFERED_MB: {self.max_buffered_mb:g} is less than MAX_BODY_MB ({self.max_body_mb:g}), so that a full"
                " body never fits. Raise MAX_BUFFERED_MB or lower MAX_BODY_MB."
            )
        if self.studio:
            folder = self.resolved_studio_dir
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f'STUDIO_DIR: cannot create "{folder}" ({error.strerror}). Set a folder that is writable.'
                ) from None
            if not os.access(folder, os.W_OK):
                raise ConfigError(f'STUDIO_DIR: "{folder}" is not writable. Set another folder, or change its permissions.')
        if self.max_images > self.max_in_flight:
            raise ConfigError(
                f"MAX_IN_FLIGHT: {self.max_in_flight} is less than MAX_IMAGES ({self.max_images}), so that a full request never"
                " fits. Raise MAX_IN_FLIGHT or lower MAX_IMAGES."
            )

    @property
    def resolved_bundle_root(self) -> Path:
        """The folder whose bundles may be activated, with links resolved."""
        return (self.bundle_root or self.bundle.absolute().parent).resolve()

    @property
    def resolved_studio_dir(self) -> Path:
        """The folder of the studio as an absolute path."""
        return (self.studio_dir or default_data_dir() / "studio").absolute()

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * MIB)

    @property
    def max_pixels(self) -> int:
        return int(self.max_megapixels * 1e6)


@functools.cache
def process_settings() -> Settings:
    """Read the settings of this process once.

    gunicorn's parent process calls this before it forks. A worker that is started later uses these settings, even if a folder
    that was checked has been deleted since.
    """
    return Settings.from_environment()


def _parse(row: dataclasses.Field[Any], annotation: Any, text: str) -> Any:
    """Convert a variable's text to the type of its field. Raises ConfigError."""
    name, limits = row.name.upper(), row.metadata
    kind = next((kind for kind in typing.get_args(annotation) if kind is not types.NoneType), annotation)
    if typing.get_origin(annotation) is tuple:
        return tuple(kind(word.strip()) for word in text.split(",") if word.strip())
    if kind is Path:
        return Path(text).expanduser()
    if kind is bool:
        if text not in ("0", "1"):
            raise ConfigError(f'{name}: expected 0 or 1, got "{text}".')
        return text == "1"
    if kind is str:
        if "choices" in limits and text not in limits["choices"]:
            raise ConfigError(f'{name}: expected {", ".join(limits["choices"])}, got "{text}".')
        return text
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(f'{name}: expected {"an integer" if kind is int else "a number"}, got "{text}".') from None
    if not limits["low"] <= value <= limits["high"]:
        raise ConfigError(f"{name}: expected {limits['low']} to {limits['high']}, got {text}.")
    return value


def _check_keys(name: str, environ: Mapping[str, str], keys: tuple[str, ...]) -> None:
    """Reject an empty key, as from an unset variable inside API_KEYS: it would allow every request. Raises ConfigError."""
    text = environ.get(name, "")
    words = [row.rpartition(":")[2] for row in keys]
    if (text.strip() and not keys) or not all(word.isascii() and word.isprintable() and word.strip() for word in words):
        raise ConfigError(f"{name}: a key is empty or not printable ASCII. Write NAME:KEY or KEY, separated by commas.")
