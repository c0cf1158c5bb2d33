"""The one thread that owns the engine. Requests go in as jobs; pieces come back on the event loop that asked."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from trinity.base.errors import CheckpointError
from trinity.config.serve import ServeConfig
from trinity.engine.engine import Engine
from trinity.engine.grammar import ConstraintError
from trinity.engine.request import Piece, Request
from trinity.serve.errors import ApiError
from trinity.serve.metrics import Metrics

IDLE_SECONDS = 0.5  # between looks at the clock when nothing arrives
PING_SECONDS = 15.0

UNREAD = ApiError(503, "Weights on the server's disk cannot be read now; its log says which. Try again later.")
log = logging.getLogger("trinity.serve")


@dataclass(eq=False)
class Job:
    """The sequences of one HTTP request, and where their pieces are delivered."""

    requests: list[Request]
    loop: asyncio.AbstractEventLoop
    deadline: float  # seconds on the monotonic clock
    arrived: float
    out: "asyncio.Queue[tuple[int, Piece] | ApiError]" = field(default_factory=asyncio.Queue)
    open: set[int] = field(default_factory=set)  # places in `requests` that have not ended
    started: set[int] = field(default_factory=set)  # places whose first token came
    ids: dict[int, int] = field(default_factory=dict)  # place -> request id in the engine

    async def pieces(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """(place, piece) until all sequences ended; None now and then while nothing comes. Raises ApiError."""
        left = len(self.requests)
        while left:
            try:
                item = await asyncio.wait_for(self.out.get(), PING_SECONDS)
            except TimeoutError:
                yield None
                continue
            if isinstance(item, ApiError):
                raise item
            if item[1].error is not None:
                raise ApiError(400 if isinstance(item[1].error, ConstraintError) else 500, str(item[1].error))
            left -= item[1].finish_reason is not None
            yield item


class Worker:
    """Runs the engine in a thread of its own. `submit`, `cancel` and `stop` may be called from any thread."""

    def __init__(self, engine: Engine, config: ServeConfig, metrics: Metrics) -> None:
        self.engine = engine
        self.config = config
        self.metrics = metrics
        self.places = config.max_active + config.max_queued
        self._load = 0  # sequences accepted and not ended
        self._jobs: set[Job] = set()
        self._lock = threading.Lock()  # guards _load, _jobs and Job.open
        self._inbox: queue.SimpleQueue[tuple[str, Job] | None] = queue.SimpleQueue()
        self._by_id: dict[int, tuple[Job, int]] = {}  # the thread's own
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: list[Request]) -> Job:
        """Accept the sequences of one HTTP request, or raise ApiError 429 (full) or 503 (stopping)."""
        if len(requests) > self.places:
            raise ApiError(400, f"{len(requests)} answers at once are asked for; this server holds {self.places}.")
        now = time.monotonic()
        job = Job(requests, asyncio.get_running_loop(), now + self.config.request_seconds, now)
        with self._lock:
            if self._stopped.is_set():
                raise ApiError(503, "The server is stopping.")
            if self._load + len(requests) > self.places:
                raise ApiError(429, "The server is busy. Try again in a moment.", code="overloaded")
            self._load += len(requests)
            job.open = set(range(len(requests)))
            self._jobs.add(job)
        self._inbox.put(("submit", job))
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: end what still runs of it."""
        with self._lock:
            ended = not job.open
        if not ended:
            self._inbox.put(("cancel", job))

    def stop(self) -> None:
        """Take no more work; every open job ends with an error now, without waiting for the engine's step."""
        with self._lock:
            self._stopped.set()
            jobs = list(self._jobs)
        for job in jobs:
            self._fail(job, ApiError(503, "The server was stopped while it answered."))
        self._inbox.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def counts(self) -> tuple[int, int]:
        """Sequences that generate, and sequences that wait."""
        with self._lock:
            running = min(self._load, len(self.engine.scheduler.active))
            return running, self._load - running

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._take_in()
            self._expire()
            try:
                pieces = self.engine.step()
            except CheckpointError as error:  # experts that can be read no longer; it says which file
                log.error("%s Running requests were ended.", error)
                self._give_up(UNREAD, {self._by_id[number][0] for number in self.engine.scheduler.active})
                continue
            except Exception as error:
                # A defect, or no memory left: what ran is lost, the server goes on. A message may quote text: unlogged.
                log.error("the engine failed with %s; its requests were ended", type(error).__name__)
                with self._lock:
                    jobs = set(self._jobs)
                self._give_up(ApiError(500, "The engine failed on this step. Try again."), jobs)
                continue
            for piece in pieces:
                self._deliver(piece)
            self.metrics.kv_cache.set(self.engine.kv_bytes())

    def _take_in(self) -> None:
        """Act on what arrived; sleep while there is nothing to do."""
        wait = not self.engine.busy
        while True:
            try:
                item = self._inbox.get(timeout=IDLE_SECONDS) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return
            wait = False
            if item is None:
                return
            what, job = item
            if what == "cancel":
                self._fail(job, None)
                continue
            for place in sorted(job.open):
                request_id = self.engine.submit(job.requests[place])
                job.ids[place] = request_id
                self._by_id[request_id] = (job, place)

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [job for job in self._jobs if job.deadline < now]
        for job in late:
            limit = f"{self.config.request_seconds:g} seconds"
            self._fail(job, ApiError(504, f"The answer was not done within {limit}; ask for fewer tokens."))

    def _deliver(self, piece: Piece) -> None:
        job, place = self._by_id[piece.request_id]
        now = time.monotonic()
        if place not in job.started:
            job.started.add(place)
            self.metrics.first_token.observe(now - job.arrived)
            self.metrics.prompt_tokens.inc(len(job.requests[place].prompt))
        self.metrics.generation_tokens.inc(len(piece.token_ids))
        if piece.finish_reason is not None:
            del self._by_id[piece.request_id]
            self.metrics.finished(piece.finish_reason)
            self.metrics.whole.observe(now - job.arrived)
            with self._lock:
                self._close(job, {place})
        self._send(job, (place, piece))

    def _fail(self, job: Job, error: ApiError | None) -> None:
        """End a job: free its places, tell its reader, and (in the engine's own thread) abort what runs."""
        with self._lock:
            places = set(job.open)
            self._close(job, places)
        if error is not None and places:
            self._send(job, error)
        if threading.current_thread() is self._thread:
            for place in places & job.ids.keys():
                self.engine.abort(job.ids[place])
                self._by_id.pop(job.ids[place], None)
                self.metrics.finished("abort")

    def _give_up(self, error: ApiError, jobs: "set[Job]") -> None:
        for job in jobs:
            self._fail(job, error)

    def _close(self, job: Job, places: set[int]) -> None:
        """With the lock held: these places of a job have ended."""
        self._load -= len(job.open & places)
        job.open -= places
        if not job.open:
            self._jobs.discard(job)

    def _send(self, job: Job, item: tuple[int, Piece] | ApiError) -> None:
        try:
            job.loop.call_soon_threadsafe(job.out.put_nowait, item)
        except RuntimeError:
            # The loop is closed: the server has gone, and with it whoever waited.
            self.cancel(job)
