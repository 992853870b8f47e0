"""gunicorn's configuration: threads and workers as allocated, the model loaded after the fork, JSON logs, shared metrics."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from gunicorn.arbiter import Arbiter

from models.artifacts.bundle import open_bundle
from models.errors import UserError
from service.context import services_of
from service.cpu_allocation import allocate_resources
from service.http.gunicorn_worker import raise_file_limit
from service.rollout.state import open_store, share_store
from service.settings import process_settings
from service.telemetry.json_logging import is_terminal, logging_config
from service.telemetry.metrics_dir import create_metrics_dir, remove_metrics_dir, restore_metrics_dir

try:
    _settings = process_settings()
    open_bundle(_settings.bundle, files=())  # report a wrong folder before anything is bound or forked
except UserError as error:
    print(f"service: {error}", file=sys.stderr)
    sys.exit(2)
_resources = allocate_resources(_settings)

wsgi_app = "service:create_wsgi_app()"
bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
worker_class = "gthread" if _settings.gunicorn_worker == "stock" else "service.http.gunicorn_worker.EventLoopWorker"
workers = _resources.workers
threads = _resources.threads
limit_request_line = 8190  # a filter of the gallery may name hundreds of classes
worker_connections = min(_settings.max_connections, raise_file_limit())
keepalive = _settings.keepalive_s
forwarded_allow_ips = ""  # only TRUSTED_PROXIES decides whose headers are trusted (service.http.middleware.TrustedProxies)
timeout = 60  # of a worker that hangs; loading runs in a thread of its own and does not count
graceful_timeout = _settings.shutdown_timeout_s
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a heartbeat must not wait for a disk
preload_app = False  # an engine's threads do not survive a fork
logconfig_dict = logging_config(_settings.log_level, terminal=is_terminal())
logger_class = "service.telemetry.json_logging.QuietLogger"
proc_name = "dogs-vs-cats"
control_socket_disable = True
LOAD_POLL_S = 1.0
BOOT_RETRY_S = 5.0
READY = f"Ready: {{}} ({'studio: /studio' if _settings.studio else 'gallery: /gallery'}). Ctrl-C stops it."


def on_starting(server: Any) -> None:
    """Create what the workers share: the metrics' folder and the rollout state."""
    create_metrics_dir()
    share_store(_settings)
    if _settings.studio:
        from service.studio.runner_supervisor import share_lifeline

        share_lifeline()
    server.log.info(str(_resources))


def when_ready(server: Any) -> None:
    """Say on a terminal that the server listens, while the model is being loaded."""
    if is_terminal():
        print(f"Starting on {_url(server.LISTENERS[0])} ...", flush=True)


def pre_fork(server: Any, worker: Any) -> None:
    """Create the metrics' folder again if something removed it, as a worker cannot start without it."""
    restore_metrics_dir()


def post_worker_init(worker: Any) -> None:
    """Wait for the model if other workers serve; end the server if none ever has.

    A replacement that cannot load its model keeps trying and accepts no connections, which the other workers handle.
    """
    services = services_of(worker.wsgi)
    models, store = services.model_manager, services.rollout.store

    def handle_failure(reason: str) -> None:
        if not store.has_served:
            os._exit(Arbiter.WORKER_BOOT_ERROR)

    models.add_failure_callback(handle_failure)
    if is_terminal() and worker.age == 1:
        models.add_install_callback(lambda model: print(READY.format(_url(worker.sockets[0])), flush=True))
    while worker.alive and worker.ppid == os.getppid() and store.worker_versions():
        if models.installed.wait(LOAD_POLL_S):
            break
        worker.notify()  # gunicorn's heartbeat


def _url(listener: Any) -> str:
    """Return the address of a listener as a browser on this machine takes it."""
    host, port = str(listener.getsockname()[0]), listener.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def worker_exit(server: Any, worker: Any) -> None:
    """Write the queued predictions, and exit immediately, without shutting down the engine and threads."""
    if app := getattr(worker, "wsgi", None):  # missing if the worker failed before it built the application
        services = services_of(app)
        services.model_manager.end_children()
        if services.recorder:
            services.recorder.close()
    code = getattr(sys.exc_info()[1], "code", None)
    if code == 0:
        os._exit(0)
    if code in (Arbiter.WORKER_BOOT_ERROR, Arbiter.APP_LOAD_ERROR) and open_store(_settings).has_served:
        time.sleep(BOOT_RETRY_S)
        os._exit(1)  # gunicorn replaces the worker; the other codes would end the server


def child_exit(server: Any, worker: Any) -> None:
    """Forget the gauges and the version of a worker that has ended; its counters stay."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
    open_store(_settings).remove_worker(worker.pid)


def on_exit(server: Any) -> None:
    if _settings.studio:
        from service.studio.runner_supervisor import end_runner

        end_runner(_settings)
    remove_metrics_dir()
