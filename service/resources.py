"""How many processes, threads and streams: from the processors that the container really has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from service.settings import Settings

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ResourceAllocation:
    """Processes, threads and streams. ``cpus_per_worker``, ``inference_threads`` and ``streams`` are per worker."""

    cpus: int
    workers: int
    threads: int
    cpus_per_worker: int
    inference_threads: int
    streams: int

    def __str__(self) -> str:
        return (
            f"{self.cpus} processors: {self.workers} worker(s), each with {self.threads} threads for requests, "
            f"{self.inference_threads} that decode and compute, {self.streams} batches at a time"
        )


def allocate_resources(settings: Settings) -> ResourceAllocation:
    """Settings decide where they are given; the rest follows from the processors.

    One stream a processor computes more photos a second than all processors on one batch after another. The crew has one
    thread more than there are processors: there is always one that waits for Python's lock.
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
    """The processors that this process may use: those it may run on, and no more than the container's quota, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(allowed, quota)) if quota else allowed


def _quota(cgroup: Path) -> int | None:
    """The quota in whole processors, from version 2 or 1 of control groups, or None where there is none."""
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
