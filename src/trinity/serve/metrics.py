"""What operators watch, in the Prometheus format, under /metrics. Counts and times only; no text ever comes here."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from trinity.engine.engine import Engine
from trinity.engine.step import ExpertReads

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class EngineCounts(Collector):
    """What an engine counts by itself: only numbers are read, from whatever thread."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.engine, self.model_name = engine, model_name

    def collect(self) -> Iterator[CounterMetricFamily]:
        prefix, scheduler = self.engine.prefix, self.engine.scheduler
        reads = self.engine.runner.expert_reads() or ExpertReads(0, 0, 0, 0.0)
        for name, meaning, value in (
            ("expert_cache_hits", "Experts that a step needed and memory held; 0 where it holds all", reads.hits),
            ("expert_cache_misses", "Experts that had to be read from the disk", reads.misses),
            ("expert_cache_read_bytes", "Bytes of experts read from the disk", reads.bytes),
            (
                "expert_cache_stall_seconds",
                "Seconds in which a thread had to wait for an expert",
                reads.stalled_seconds,
            ),
            ("prefix_cache_queries", "Tokens of texts looked up in the prefix cache", prefix.tokens_asked),
            ("prefix_cache_hits", "Of these, tokens that were found", prefix.tokens_found),
            ("num_preemptions", "Requests set back because pages ran out", scheduler.set_back),
            ("draft_tokens", "Tokens drafted by prompt lookup", self.engine.drafted),
            ("draft_tokens_taken", "Of these, tokens that the answer took", self.engine.drafts_taken),
        ):
            family = CounterMetricFamily(f"trinity_{name}", meaning, labels=("model_name",))
            family.add_metric((self.model_name,), value)
            yield family
        family = CounterMetricFamily(
            "trinity_prefix_cache_lookups", "Lookups by what came of them", labels=("model_name", "outcome")
        )
        for outcome, number in prefix.lookups.items():
            family.add_metric((self.model_name, outcome), number)
        yield family


class Metrics:
    """The series of one server, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        labels = {"labelnames": ("model_name",), "registry": self.registry}

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(f"trinity_{name}", meaning, **labels).labels(model_name)

        def histogram(name: str, meaning: str) -> Histogram:
            return Histogram(f"trinity_{name}", meaning, buckets=SECONDS, **labels).labels(model_name)

        def counter(name: str, meaning: str) -> Counter:
            return Counter(f"trinity_{name}", meaning, **labels).labels(model_name)

        self.running = gauge("num_requests_running", "Sequences that generate")
        self.waiting = gauge("num_requests_waiting", "Sequences that wait for a place")
        self.kv_cache = gauge("kv_cache_bytes", "Bytes held by the caches of running sequences")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts read")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token")
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self._finished = Counter(
            "trinity_request_success", "Sequences ended", ("model_name", "finished_reason"), registry=self.registry
        )
        self._http = Counter(
            "http_requests", "HTTP requests answered", ("handler", "method", "status"), registry=self.registry
        )
        self._model_name = model_name

    def watch(self, engine: Engine) -> None:
        """Tell what the engine has counted, as it stands when it is asked for."""
        self.registry.register(EngineCounts(engine, self._model_name))

    def finished(self, reason: str) -> None:
        self._finished.labels(self._model_name, reason).inc()

    def answered(self, handler: str, method: str, status: int) -> None:
        self._http.labels(handler, method, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
