"""JobManager: the jobs of one graph. They run in the graph's task group and end, at the latest, when it closes.

Invariants
- An id names at most one job; it is reserved before anything is opened for the job, and free when the job is NULL.
- Jobs never raise into the task group: a job's error is its own.
- When the graph closes, all jobs are cancelled and awaited before any node is closed.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from blocklayer.base.errors import DuplicateError, NotFoundError, StateError
from blocklayer.jobs.backup import BackupJob
from blocklayer.jobs.backup_start import start_backups
from blocklayer.jobs.events import EventHub
from blocklayer.jobs.job import check_job_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from blocklayer.graph.graph import Graph
    from blocklayer.jobs.backup_options import BackupRequest
    from blocklayer.jobs.events import EventStream
    from blocklayer.jobs.job import Job, JobRecord


class JobManager:
    """Iterates over the jobs that exist, oldest first."""

    def __init__(self, graph: Graph) -> None:
        """Made with the graph; ``graph`` need not be open yet."""
        self.graph = graph
        self._jobs: dict[str, Job] = {}
        self._reserved: set[str] = set()
        self._made = 0
        self._hub = EventHub()
        self._closing = False
        graph.at_close(self.close)

    def __iter__(self) -> Iterator[Job]:
        """The jobs as they are now."""
        return iter(tuple(self._jobs.values()))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._jobs)

    def get(self, job_id: str) -> Job:
        """The job called ``job_id``; ``NotFoundError`` if there is none (any more)."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFoundError(f"no job is called {job_id!r}") from None

    def query(self) -> list[JobRecord]:
        """The records of all jobs."""
        return [job.query() for job in self]

    def backups(self) -> Iterator[BackupJob]:
        """The backups that have not ended."""
        return (job for job in self if isinstance(job, BackupJob) and not job.concluded)

    def events(self) -> EventStream:
        """The events of all jobs from now on."""
        return self._hub.stream()

    async def start_backups(self, requests: Sequence[BackupRequest], *, grouped: bool = False) -> list[BackupJob]:
        """Start backups that share one point in time; if one cannot start, none does. See ``backup_start.py``.

        ``grouped``: all succeed or none does. If the caller is cancelled before this returns, nothing is started.
        """
        return await start_backups(self, requests, grouped=grouped)

    # -- for those who start jobs ------------------------------------------------------------------------------

    @contextmanager
    def reserve_id(self, wanted: str | None, kind: str) -> Iterator[str]:
        """Keep an id for a while: ``wanted``, or one made of ``kind`` and a number. ``DuplicateError`` if taken."""
        job_id = self._make_id(kind) if wanted is None else check_job_id(wanted)
        if job_id in self._jobs or job_id in self._reserved:
            raise DuplicateError(f"job ID {job_id!r} already in use")
        self._reserved.add(job_id)
        try:
            yield job_id
        finally:
            self._reserved.discard(job_id)

    def _make_id(self, kind: str) -> str:
        while True:
            job_id = f"{kind}{self._made}"
            self._made += 1
            if job_id not in self._jobs and job_id not in self._reserved:
                return job_id

    def register(self, job: Job) -> None:
        """The job exists from now on."""
        self._jobs[job.id] = job
        job.register(self._hub.emit, self._forget)

    def withdraw(self, job: Job) -> None:
        """A job that was registered is not going to be started."""
        job.unregister()
        self._forget(job)

    def start(self, jobs: Sequence[Job]) -> None:
        """Start all of ``jobs`` at once. ``StateError`` if the graph is closing."""
        if self._closing:
            raise StateError("the graph is closing")
        for job in jobs:
            self.graph.start_task(job.live, name=job.describe())

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)

    async def close(self) -> None:
        """Cancel all jobs and wait for them; then end all event streams."""
        self._closing = True
        for job in self:
            if not job.concluded:
                job.end(force=True)
        for job in self:
            await job.wait_concluded()
        self._hub.close()
