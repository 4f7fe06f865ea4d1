"""Metrics of a served adapter for Prometheus, at /metrics of the server.

No label has text of a request. The labels' values are few: one model, eleven ranges of steps, ten outcomes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcmlora.releases.bundle import Provenance

PATH = "/metrics"
SERVED = "LCMLORA_SERVED"  # environment: the name under which the adapter was asked for, such as emoji@champion
PROCESSES = "PROMETHEUS_MULTIPROC_DIR"  # environment, of prometheus-client: the folder that several workers share

# How a request ends, by the HTTP status of its answer.
ANSWERED, DISCONNECTED, OTHER = "answered", "disconnected", "other"
_OUTCOMES = {
    200: ANSWERED,
    400: "invalid",
    408: "arrived_too_slowly",
    413: "too_large",
    415: "wrong_type",
    429: "queue_full",
    499: DISCONNECTED,  # no answer was sent, for nobody waits for it
    500: "failed",
    504: "deadline_exceeded",
}
_EXACT_STEPS = 8  # up to here, each number of steps has a label of its own
_SECONDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)  # upper ends of buckets


class ServingMetrics:
    """The metrics of one process that serves one adapter.

    Args:
        provenance: of the release that is served.
        queue_limit: how many requests may wait while one is drawn.
        device: torch's device of the pipeline; memory is measured where it is a CUDA device.
    """

    def __init__(
        self,
        provenance: Provenance,
        *,
        queue_limit: int,
        device: Any = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        self._model = provenance.model
        self._device = device if getattr(device, "type", None) == "cuda" else None
        of_model, by_steps = ("model",), ("model", "steps")

        def gauge(name: str, text: str, labels: tuple[str, ...] = of_model, mode: Any = "livesum") -> Gauge:
            # With several workers, `mode` says how a value of all is made of theirs.
            return Gauge(f"lcmlora_serving_{name}", text, labels, registry=self.registry, multiprocess_mode=mode)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"lcmlora_serving_{name}", text, by_steps, registry=self.registry, buckets=_SECONDS)

        self._requests = Counter(
            "lcmlora_serving_requests", "Requests, by how they ended.", ("model", "outcome"), registry=self.registry
        )
        self._pictures = Counter("lcmlora_serving_pictures", "Pictures drawn.", by_steps, registry=self.registry)
        self._prompts = Counter(
            "lcmlora_serving_prompts",
            "Prompts by what became of them: kept, left out of the sample, or lost by an error.",
            ("model", "outcome"),
            registry=self.registry,
        )
        self._answering = histogram("request_seconds", "Seconds from a request's arrival to its answer with pictures.")
        self._drawing = histogram("drawing_seconds", "Seconds of drawing a request's pictures, without waiting.")
        self._queue = gauge("queue_length", "Requests that wait while another is drawn.")
        gauge("queue_limit", "Requests that may wait; one more is refused.", mode="max").labels(self._model).set(
            queue_limit
        )
        # An info metric, which prometheus-client does not have for several workers.
        info = gauge("adapter_info", "The adapter that is served.", ("model", "sha256", "reference"), "max")
        info.labels(self._model, provenance.sha256[:12], environment.get(SERVED, "")).set(1)
        self._memory = gauge("gpu_memory_bytes", "GPU memory of this process.", ("model", "kind"))
        self._memory_size = gauge("gpu_memory_size_bytes", "Memory of the GPU.", mode="max")
        for outcome in (*_OUTCOMES.values(), OTHER):  # a rate needs the zero before the first one
            self._requests.labels(self._model, outcome)
        ProcessCollector(registry=self.registry)

    def ended(self, status: int, *, seconds: float, steps: int | None) -> None:
        """Counts a request that has ended.

        Args:
            status: HTTP's; 499 where the client has gone.
            seconds: since its arrival.
            steps: it was drawn with; None where none were read.
        """
        outcome = _OUTCOMES.get(status, OTHER)
        self._requests.labels(self._model, outcome).inc()
        if outcome == ANSWERED and steps is not None:
            self._answering.labels(self._model, steps_label(steps)).observe(seconds)

    def drawn(self, pictures: int, *, seconds: float, steps: int) -> None:
        """Counts a request's pictures, drawn in these seconds."""
        label = steps_label(steps)
        self._drawing.labels(self._model, label).observe(seconds)
        self._pictures.labels(self._model, label).inc(pictures)
        self._measure_memory()

    def kept(self, prompts: int, among_sample: int) -> None:
        """Counts prompts, and how many of them were added to the sample."""
        self._prompts.labels(self._model, "kept").inc(among_sample)
        self._prompts.labels(self._model, "left_out").inc(prompts - among_sample)

    def lost(self, prompts: int) -> None:
        """Counts prompts that could not be written."""
        self._prompts.labels(self._model, "lost").inc(prompts)

    def active(self, requests: int) -> None:
        """Says how many requests are drawn or wait now."""
        self._queue.labels(self._model).set(max(0, requests - 1))

    def _measure_memory(self) -> None:
        if self._device is None:
            return
        import torch

        self._memory.labels(self._model, "allocated").set(torch.cuda.memory_allocated(self._device))
        self._memory.labels(self._model, "reserved").set(torch.cuda.memory_reserved(self._device))
        self._memory.labels(self._model, "peak").set(torch.cuda.max_memory_allocated(self._device))
        self._memory_size.labels(self._model).set(torch.cuda.mem_get_info(self._device)[1])

    def application(self) -> Any:
        """Returns the ASGI application that answers with the metrics.

        Returns None in one of several workers that share no folder: it would tell of itself alone.
        """
        from prometheus_client import CollectorRegistry, make_asgi_app
        from prometheus_client.multiprocess import MultiProcessCollector

        self._measure_memory()
        if os.environ.get(PROCESSES):
            shared = CollectorRegistry()
            MultiProcessCollector(shared)
            return make_asgi_app(shared)
        return make_asgi_app(self.registry) if multiprocessing.parent_process() is None else None


def steps_label(steps: int) -> str:
    """Returns the label of a number of steps: itself up to 8, then a range, so that labels stay few."""
    if steps <= _EXACT_STEPS:
        return str(steps)
    return "9-16" if steps <= 16 else "17-32" if steps <= 32 else "33 or more"
