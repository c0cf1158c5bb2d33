"""What operators watch, in the Prometheus format, under /metrics. Counts and times only; no text ever comes here."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


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

    def finished(self, reason: str) -> None:
        self._finished.labels(self._model_name, reason).inc()

    def answered(self, handler: str, method: str, status: int) -> None:
        self._http.labels(handler, method, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
