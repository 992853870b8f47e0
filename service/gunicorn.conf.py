"""How gunicorn runs the service: threads from the plan, the model loaded after the fork, JSON logs, measures of all workers."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from models.artifacts.paths import resolve_bundle
from models.errors import UserError
from service.context import services_of
from service.http.gunicorn_worker import raise_file_limit
from service.resources import allocate_resources
from service.rollout.bundle_link import initial_state
from service.rollout.state import STATE_DIR_VARIABLE, RolloutStore, create_state_dir, remove_worker
from service.settings import Settings
from service.telemetry.json_logging import logging_config

try:
    _settings = Settings.from_environment()
    resolve_bundle(_settings.bundle)  # an obvious mistake is told before anything is bound or forked
except UserError as error:
    print(f"service: {error}", file=sys.stderr)
    sys.exit(2)
_plan = allocate_resources(_settings)

wsgi_app = "service:create_wsgi_app()"
bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
worker_class = "gthread" if _settings.gunicorn_worker == "stock" else "service.http.gunicorn_worker.EventLoopWorker"
workers = _plan.workers
threads = _plan.threads
worker_connections = min(_settings.max_connections, raise_file_limit())
keepalive = _settings.keepalive_s
forwarded_allow_ips = ""  # only TRUSTED_PROXIES decides whose headers are trusted (service.http.middleware.TrustedProxies)
timeout = 60  # of a worker that hangs; loading is a thread of its own, and does not count
graceful_timeout = _settings.shutdown_timeout_s
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a heartbeat must not wait for a disk
preload_app = False  # an engine's threads do not live through a fork
logconfig_dict = logging_config(_settings.log_level)
logger_class = "service.telemetry.json_logging.QuietLogger"
proc_name = "dogs-vs-cats"
control_socket_disable = True


def on_starting(server: Any) -> None:
    """Give the workers' measures a folder, and what they have to agree on another; and say what was planned."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="dogs-vs-cats-metrics-")
    RolloutStore(create_state_dir()).write(initial_state(_settings))
    server.log.info(str(_plan))


def post_worker_init(worker: Any) -> None:
    """A model that cannot be loaded stops the whole server, with gunicorn's own exit code for that."""
    from gunicorn.arbiter import Arbiter

    services_of(worker.wsgi).model_manager.add_failure_callback(lambda reason: os._exit(Arbiter.WORKER_BOOT_ERROR))


def worker_exit(server: Any, worker: Any) -> None:
    """End at once where all is done: to take engine and threads apart first would keep a stop waiting for nothing.

    Photos that were answered and are to be kept are written first.
    """
    if getattr(worker, "wsgi", None) and (recorder := services_of(worker.wsgi).recorder):
        recorder.close()
    ending = sys.exc_info()[1]
    if isinstance(ending, SystemExit) and ending.code == 0:
        os._exit(0)


def child_exit(server: Any, worker: Any) -> None:
    """Forget a dead worker's gauges, and what it served; its counters stay."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
    remove_worker(worker.pid)


def on_exit(server: Any) -> None:
    for name in ("PROMETHEUS_MULTIPROC_DIR", STATE_DIR_VARIABLE):
        shutil.rmtree(Path(os.environ[name]), ignore_errors=True)
