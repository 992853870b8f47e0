"""Derive the number of workers, threads and streams from the settings and the CPUs of the container."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from service.settings import Settings

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ResourceAllocation:
    """CPUs and workers of the server, and threads and streams of each worker."""

    cpus: int
    workers: int
    threads: int
    cpus_per_worker: int
    inference_threads: int
    streams: int

    def __str__(self) -> str:
        return (
            f"{self.cpus} CPUs: {self.workers} worker(s), each with {self.threads} request threads, "
            f"{self.inference_threads} threads that decode and compute, and {self.streams} batches at a time"
        )


def allocate_resources(settings: Settings) -> ResourceAllocation:
    """Allocate the CPUs, except where a setting decides.

    One stream per CPU computes more images per second than all CPUs on one batch after another. There is one inference thread
    more than CPUs, as one usually waits for the interpreter's lock.
    """
    cpus = settings.cpus or available_cpus()
    cpus_per_worker = max(1, cpus // settings.web_concurrency)
    return ResourceAllocation(
        cpus=cpus,
        workers=settings.web_concurrency,
        threads=settings.threads or settings.max_in_flight + 16,
        cpus_per_worker=cpus_per_worker,
        inference_threads=cpus_per_worker + 1,
        streams=settings.streams or cpus_per_worker,
    )


def available_cpus(cgroup: Path = CGROUP) -> int:
    """Return the number of CPUs that this process may run on, limited by the container's quota, which is rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(allowed, quota)) if quota else allowed


def _quota(cgroup: Path) -> int | None:
    """Read the CPU quota of control groups version 2 or 1, rounded up, or None without one."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit in ("max", "-1"):
        return None
    return -(-int(limit) // int(period))
