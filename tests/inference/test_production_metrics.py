import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from lcmlora.inference import request_guard
from lcmlora.inference.limits import Limits
from lcmlora.inference.production.metrics import ServingMetrics, steps_label
from lcmlora.releases.bundle import Provenance
from tests.support import releases

PROVENANCE = Provenance.model_validate(releases.provenance("mini", "ab" * 32))


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"model": "mini", **labels})


@pytest.fixture
def metrics() -> ServingMetrics:
    return ServingMetrics(PROVENANCE, queue_limit=8, environment={"LCMLORA_SERVED": "emoji@champion"})


def test_labels_stay_few_whatever_is_asked(metrics: ServingMetrics):
    assert [steps_label(steps) for steps in (1, 8, 9, 16, 17, 50)] == ["1", "8", "9-16", "9-16", "17-32", "33 or more"]
    lines = len(generate_latest(metrics.registry).splitlines())
    for steps in range(1, 1000):
        metrics.drawn(1, seconds=0.1, steps=steps)
        metrics.ended(200, seconds=0.2, steps=steps)
    for status in range(100, 600):
        metrics.ended(status, seconds=0.2, steps=None)
    outcomes = {
        sample.labels["outcome"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "lcmlora_serving_requests_total"
    }
    assert len(outcomes) == 10
    assert len(generate_latest(metrics.registry).splitlines()) < lines + 600
    assert value(metrics.registry, "lcmlora_serving_requests_total", outcome="other") == 500 - 9


def test_a_refused_request_waits_nowhere_and_is_counted_and_a_client_that_leaves_is_told_apart(metrics: ServingMetrics):
    async def application(scope: Any, receive: Any, send: Any) -> None:
        request = request_guard.current.get()
        while request is not None and not request.abandoned():  # as a drawing looks between its steps
            await asyncio.sleep(0.001)

    async def ask() -> None:
        guard = request_guard.RequestGuard(application, Limits(queue=1), metrics)
        body = json.dumps({"dataframe_records": [{"prompt": "owl"}]}).encode()
        scope = {"type": "http", "path": "/invocations", "method": "POST"}
        scope |= {"headers": [(b"content-type", b"application/json")]}

        def client() -> Any:
            leaves = asyncio.Event()
            waiting = [{"type": "http.request", "body": body}]

            async def receive() -> dict[str, Any]:
                if waiting:
                    return waiting.pop()
                await leaves.wait()
                return {"type": "http.disconnect"}

            return leaves, receive

        said: list[Any] = []

        async def send(message: Any) -> None:
            said.append(message)

        async def forward(receive: Any) -> None:
            await guard(scope, receive, send)

        clients = [client() for _ in range(3)]
        tasks = [asyncio.create_task(forward(receive)) for _, receive in clients]
        await tasks[2]
        assert said[0]["status"] == 429
        assert value(metrics.registry, "lcmlora_serving_queue_length") == 1
        assert value(metrics.registry, "lcmlora_serving_requests_total", outcome="queue_full") == 1
        for leaves, _ in clients:
            leaves.set()
        await asyncio.gather(*tasks)

    asyncio.run(ask())
    assert value(metrics.registry, "lcmlora_serving_requests_total", outcome="disconnected") == 2
    assert value(metrics.registry, "lcmlora_serving_queue_length") == 0


_WORKER = """
import multiprocessing
import asyncio
from types import SimpleNamespace
from lcmlora.inference.production.metrics import ServingMetrics

def work(answers):
    metrics = ServingMetrics(SimpleNamespace(model="mini", sha256="ab" * 32), queue_limit=8)
    metrics.ended(200, seconds=0.3, steps=4)
    application = metrics.application()
    if application is None:
        answers.put(None)
        return
    body = []
    async def receive():
        return {"type": "http.request"}
    async def send(message):
        body.append(message.get("body", b""))
    asyncio.run(application({"type": "http", "headers": [], "query_string": b""}, receive, send))
    answers.put(b"".join(body).decode())

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    for _ in range(2):
        process = context.Process(target=work, args=(answers,))
        process.start()
        text = answers.get(timeout=60)
        process.join()
    print(text)
"""


def test_several_workers_are_counted_together_or_not_at_all(tmp_path: Path):
    script = tmp_path / "workers.py"
    script.write_text(_WORKER)
    (tmp_path / "shared").mkdir()
    command = [sys.executable, str(script)]
    environment = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    alone = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert alone.stdout == "None\n"
    environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path / "shared")
    together = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert 'lcmlora_serving_requests_total{model="mini",outcome="answered"} 2.0' in together.stdout
    assert 'lcmlora_serving_adapter_info{model="mini",reference="",sha256="abababababab"} 1.0' in together.stdout
