"""What the server counts and measures, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from florence2.serve.settings import Settings
from florence2.serve.work.jobs import Answered
from florence2.serve.work.queue import JobQueue

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_OTHER_TASK = "other"


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, settings: Settings):
        """Make all metrics, at zero."""
        self._registry, self._settings = CollectorRegistry(), settings
        self._tasks: frozenset[str] = frozenset()
        count, seconds = self._counter, self._histogram
        self._success = count("request_success", "answers, by task and by how they ended", "task", "finish_reason")
        self._failure = count("request_failure", "requests without an answer, by their error's code", "code")
        self._prompt = count("prompt_tokens", "ids of prompts, image tokens included")
        self._generation = count("generation_tokens", "generated ids")
        self._latency = seconds("e2e_request_latency_seconds", "from acceptance to the answer")
        self._queued = seconds("request_queue_time_seconds", "from acceptance to the start")
        self._inference = seconds("request_inference_time_seconds", "from the start to the answer")
        self._first = seconds("time_to_first_token_seconds", "from acceptance to the first id")
        self._encode = seconds("picture_encode_seconds", "the vision tower, an image")
        self._step = seconds("decode_step_seconds", "one step of all answers", _STEPS)
        self._batch = seconds("batch_rows", "answers that one step advances", _ROWS)
        self._queries = count("picture_cache_queries", "images that requests asked about")
        self._workers = Gauge("florence2_workers", "workers that have the model", registry=self._registry)
        self._restarts = count("worker_restarts", "processes of devices that died and were started again")
        self._hits = count("picture_cache_hits", "those that were encoded already")
        if settings.vllm_metrics:
            self._add_vllm()

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"florence2_{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"florence2_{name}", about, buckets=buckets, registry=self._registry)

    def _add_vllm(self) -> None:
        """Add what dashboards and gateways made for vLLM look for."""
        registry = self._registry
        self._vllm_latency = Histogram(
            "vllm:e2e_request_latency_seconds", "as florence2", buckets=_SECONDS, registry=registry
        )
        self._vllm_tokens = Counter("vllm:generation_tokens", "as florence2", registry=registry)
        self._vllm_success = Counter("vllm:request_success", "as florence2", ("finished_reason",), registry=registry)

    def watch(self, queue: JobQueue) -> None:
        """Add the gauges of a queue, which are read when somebody asks."""
        gauges: dict[str, Callable[[], float]] = {
            "requests_running": lambda: queue.running,
            "requests_waiting": lambda: len(queue),
            "queue_bytes": lambda: queue.held_bytes,
            "picture_cache_bytes": lambda: queue.cache.bytes,
            "kv_cache_usage_perc": lambda: queue.running / queue.slots,
        }
        for name, read in gauges.items():
            Gauge(f"florence2_{name}", name.replace("_", " "), registry=self._registry).set_function(read)
        if self._settings.vllm_metrics:
            for name in ("requests_running", "requests_waiting", "kv_cache_usage_perc"):
                vllm = f"vllm:{name}".replace(":requests", ":num_requests")
                Gauge(vllm, "as florence2", registry=self._registry).set_function(gauges[name])

    def know_tasks(self, tasks: frozenset[str]) -> None:
        """Set the tasks that are labels; all other prompts count as one."""
        self._tasks = tasks

    def asked(self, cached: bool) -> None:
        """Count a job's image."""
        self._queries.inc()
        self._hits.inc(int(cached))

    def encoded(self, images: int, seconds: float) -> None:
        """Count images that were encoded together."""
        for _ in range(images):
            self._encode.observe(seconds / images)

    def stepped(self, rows: int, seconds: float) -> None:
        """Count one step of the decoder."""
        self._step.observe(seconds)
        self._batch.observe(rows)

    def answered(self, done: Answered) -> None:
        """Count an answer."""
        answer, times = done.answer, done.times
        if answer is None or times.ended is None or times.started is None:
            return
        task = answer.task if answer.task in self._tasks else _OTHER_TASK
        reason, answers = str(answer.finish_reason), (answer, *answer.alternatives)
        ids = sum(len(each.token_ids) - 1 for each in answers)
        self._success.labels(task, reason).inc()
        self._prompt.inc(done.prompt_tokens + done.image_tokens)
        self._generation.inc(ids)
        self._latency.observe(times.ended - times.accepted)
        self._queued.observe(times.started - times.accepted)
        self._inference.observe(times.ended - times.started)
        self._first.observe((times.first_id or times.ended) - times.accepted)
        if self._settings.vllm_metrics:
            self._vllm_latency.observe(times.ended - times.accepted)
            self._vllm_tokens.inc(ids)
            self._vllm_success.labels(reason).inc()

    def alive(self, workers: int) -> None:
        """Set how many workers have the model."""
        self._workers.set(workers)

    def restarted(self) -> None:
        """Count a process that is started again."""
        self._restarts.inc()

    def failed(self, code: str) -> None:
        """Count an error."""
        self._failure.labels(code).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
