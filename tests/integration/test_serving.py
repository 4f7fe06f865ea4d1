import base64
import io
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from lcmlora.inference import pipelines
from lcmlora.inference.pipelines import Pipeline
from lcmlora.inference.production import kept_prompts
from lcmlora.inference.production.kept_prompts import Keeping
from tests.integration.seaweed import free_ports
from tests.support import served
from tests.support.miniature import RESOLUTION

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Server:
    """`lcmlora serve` with a release, and the pipeline that it should draw as."""

    address: str
    draw: Pipeline
    release: Path
    prompts: Path  # the folder of those that are kept

    def ask(self, *prompts: Any, **params: Any) -> tuple[int, dict[str, Any]]:
        """Returns the status and the JSON of the answer."""
        body = {"dataframe_records": [{"prompt": prompt} for prompt in prompts], "params": params}
        return self.send(json.dumps(body).encode())

    def send(self, body: bytes) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(f"{self.address}/invocations", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def pictures(self, *prompts: str, **params: Any) -> list[Image.Image]:
        status, answer = self.ask(*prompts, **params)
        assert status == 200, answer
        found = [Image.open(io.BytesIO(base64.b64decode(row["png"]))) for row in answer["predictions"]]
        assert {picture.format for picture in found} == {"PNG"}
        return found


@pytest.fixture(scope="module")
def server(miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("serving")
    made = served.make(miniatures("sd15"), root / "made", gamma=0.4, grid=20)
    keeping = Keeping("text", tmp_path_factory.mktemp("kept") / "prompts")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "lcmlora", "serve", made, "--port", port, "--base", miniatures("sd15")]
    log = root / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=served.environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9", **keeping.environment),
        )
    try:
        draw = pipelines.load(made, warm=False)
        _wait(process, f"http://127.0.0.1:{port}/ping", log)
        yield Server(f"http://127.0.0.1:{port}", draw, made, keeping.folder)
    finally:
        process.terminate()
        status = process.wait()
    assert status == 128 + signal.SIGTERM
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    assert {path.name for path in root.iterdir()} == {"made", "log"}


def _wait(process: subprocess.Popen[bytes], ping: str, log: Path) -> None:
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(ping, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"lcmlora serve did not start: {log.read_text()[-3000:]}")


def test_a_request_is_answered_with_the_picture_that_the_pipeline_draws(server: Server):
    (found,) = server.pictures("owl", steps=3, guidance=1.5, seed=9)
    assert found.size == (RESOLUTION, RESOLUTION)
    assert found.tobytes() == server.draw("owl", steps=3, guidance=1.5, seed=9)[0].tobytes()
    (default,) = server.pictures("owl")
    assert default.tobytes() == server.draw("owl")[0].tobytes() != found.tobytes()


def test_several_prompts_are_several_pictures_of_the_size_that_was_asked_for(server: Server):
    found = server.pictures("red apple", "tree", "fruit", width=24, height=8)
    expected = server.draw(["red apple", "tree", "fruit"], width=24, height=8)
    assert [picture.size for picture in found] == [(24, 8)] * 3
    assert [picture.tobytes() for picture in found] == [picture.tobytes() for picture in expected]


def test_requests_at_once_are_answered_as_alone(server: Server):
    seeds = range(8)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda seed: server.pictures("tree", seed=seed)[0].tobytes(), seeds))
    assert found == [server.draw("tree", seed=seed)[0].tobytes() for seed in seeds]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"steps": 21}, "steps: expected 1 to 20, the timesteps of this adapter, got 21"),
        ({"guidance": 0}, "guidance: expected 1 (none) or more, got 0"),
        ({"height": 12}, "height: expected a positive multiple of 8 pixels, got 12"),
        ({"seed": "one"}, "seed: expected a whole number, got 'one'"),
        ({"width": 1 << 30, "height": 1 << 30}, "width, height: expected"),
        ({"steps": 1 << 62}, "steps: expected 50 at most"),
    ],
)
def test_a_bad_parameter_is_a_bad_request_that_names_it_and_no_path(
    server: Server, params: dict[str, Any], message: str
):
    status, answer = server.ask("owl", **params)
    assert (status, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert message in answer["message"]
    assert "stack_trace" not in answer and ".py" not in json.dumps(answer)


def test_a_prompt_that_is_no_text_is_a_bad_request_too(server: Server):
    for prompt in (3, None):
        status, answer = server.ask(prompt)
        assert (status, "stack_trace" in answer) == (400, False)
        assert f"prompt: expected text, got {prompt}" in answer["message"]
    assert server.pictures("owl")[0].size == (RESOLUTION, RESOLUTION)


LONG = {"dataframe_records": [{"prompt": "owl"}] * 16, "params": {"steps": 20, "guidance": 2}}


def test_hostile_bodies_are_refused_in_one_line_before_mlflow_reads_them(server: Server):
    for body, status, message in (
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"dataframe_records": [{"prompt": "\\ud800"}]}', 400, "half a surrogate pair"),
        (b'{"dataframe_records": [{"prompt": "a"}], "params": {"guidance": NaN}}', 400, "NaN is no number"),
        (b"\xff", 400, "not UTF-8"),
        (b"x" * (2 << 20), 413, "has more than 1048576 bytes (LCMLORA_MAX_BODY)"),
    ):
        got, answer = server.send(body)
        assert (got, answer.keys()) == (status, {"error_code", "message"})
        assert message in answer["message"] and "\n" not in answer["message"]
    with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=30) as client:
        client.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    assert server.pictures("owl")[0].size == (RESOLUTION, RESOLUTION)


def test_more_requests_than_may_wait_are_429_and_the_others_are_answered(server: Server):
    body = json.dumps({"dataframe_records": [{"prompt": "owl"}] * 2, "params": {"steps": 8}}).encode()
    with ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(lambda _: server.send(body), range(24)))
    assert {status for status, _ in answers} == {200, 429}
    told = next(answer for status, answer in answers if status == 429)
    assert told["error_code"] == "RESOURCE_EXHAUSTED" and "LCMLORA_MAX_QUEUE" in told["message"]
    assert server.pictures("owl")[0].size == (RESOLUTION, RESOLUTION)


def test_clients_that_leave_do_not_keep_the_server_busy(server: Server):
    body = json.dumps(LONG).encode()
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    for _ in range(20):  # more than may wait
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=30) as client:
            client.sendall(head.encode() + body)
    until = time.monotonic() + 60
    while (status := server.ask("owl")[0]) == 429 and time.monotonic() < until:
        time.sleep(0.1)
    assert status == 200


def _scraped(server: Server) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Returns the samples of /metrics by name and labels, as Prometheus's own client reads them."""
    with urllib.request.urlopen(f"{server.address}/metrics?name[]=nothing", timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=")
        text = answer.read().decode()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def _grown(before: dict, after: dict, name: str, **labels: str) -> float:
    key = tuple(sorted({"model": "mini", **labels}.items()))
    return after[name][key] - before.get(name, {}).get(key, 0)


def test_the_metrics_count_what_was_asked_and_drawn_and_have_no_word_of_a_prompt(server: Server):
    before = _scraped(server)
    server.pictures("a secret wish", "a second one", steps=3)
    server.pictures("a secret wish", steps=20)
    assert server.ask("a secret wish", steps=21)[0] == 400
    assert server.send(b"x" * (2 << 20))[0] == 413
    after = _scraped(server)
    kept = {each.text for each in kept_prompts.sample(server.prompts, "mini", 500)}
    assert {"a secret wish", "a second one"} <= kept
    assert _grown(before, after, "lcmlora_serving_prompts_total", outcome="kept") == 3
    requests = "lcmlora_serving_requests_total"
    outcomes = ("answered", "invalid", "too_large", "failed", "queue_full", "deadline_exceeded")
    assert [_grown(before, after, requests, outcome=outcome) for outcome in outcomes] == [2, 1, 1, 0, 0, 0]
    assert _grown(before, after, "lcmlora_serving_pictures_total", steps="3") == 2
    for kind in ("request", "drawing"):
        for steps in ("3", "17-32"):
            assert _grown(before, after, f"lcmlora_serving_{kind}_seconds_count", steps=steps) == 1
    assert after["lcmlora_serving_queue_length"][("model", "mini"),] == 0
    assert after["lcmlora_serving_queue_limit"][("model", "mini"),] == 8
    (info,) = after["lcmlora_serving_adapter_info"]
    assert dict(info) == {
        "model": "mini",
        "sha256": server.draw.provenance.sha256[:12],
        "reference": str(server.release),
    }
    assert after["process_resident_memory_bytes"][()] > 1 << 20
    assert "secret" not in json.dumps([[name, *map(str, samples)] for name, samples in after.items()])
    request = urllib.request.Request(f"{server.address}/metrics", b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert (refused.value.code, json.load(refused.value)["message"]) == (405, "/metrics: expected GET, got POST")
