import asyncio
import base64
import functools
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.objects import Artifact

from lcmlora.errors import Unavailable, UserError
from lcmlora.flows.access_guard import AccessGuard
from lcmlora.flows.credentials import Login
from lcmlora.flows.monitoring import exporter, sources, stage_seconds
from lcmlora.flows.monitoring.exporter import Endpoint, Exporter
from lcmlora.flows.monitoring.sources import Source
from lcmlora.flows.monitoring.trainings import Trainings
from lcmlora.inference.production.metrics import ServingMetrics
from lcmlora.project import Project as Folder
from lcmlora.releases.bundle import Provenance
from tests.flows.conftest import Project
from tests.support import releases
from tests.support.scraping import samples

MONITORING = Path(__file__).parents[2] / "deploy/monitoring"


def test_a_training_is_told_of_while_it_runs(project: Project):
    client = project.mlflow()
    experiment = client.create_experiment("lcmlora")
    for speed in (3.0, 7.5):
        run = client.create_run(experiment, tags={"model": "a"})
        client.log_metric(run.info.run_id, "images_per_second", speed)
        client.log_metric(run.info.run_id, "loss", speed / 10)
    client.create_run(experiment, tags={"model": "a"})  # has reported nothing yet
    source = Source("mlflow", 1, functools.partial(sources.of_mlflow, trainings=Trainings()))
    made = Exporter([source], Folder().settings)
    assert made.look_at_all()
    found = samples(made)
    assert found["lcmlora_training_images_per_second"] == {("a",): 7.5}
    assert found["lcmlora_training_loss"] == {("a",): 0.75}
    assert found["lcmlora_training_running"] == {("a",): 1, ("b",): 0}
    # The next look reads what has changed since.
    client.log_metric(run.info.run_id, "loss", 0.5)
    client.set_terminated(run.info.run_id)
    other = client.create_run(experiment, tags={"model": "b"})
    client.log_metric(other.info.run_id, "images_per_second", 2.0)
    assert made.look_at_all()
    found = samples(made)
    assert found["lcmlora_training_images_per_second"] == {("a",): 7.5, ("b",): 2.0}
    assert found["lcmlora_training_loss"] == {("a",): 0.5}
    assert found["lcmlora_training_running"] == {("a",): 0, ("b",): 1}


def test_seconds_are_of_the_stages_last_run_and_artifacts_of_others_are_left_out():
    def left(data: object, key: str = "stages-b") -> Artifact:
        return Artifact(key=key, data=json.dumps(data) if not isinstance(data, str) else data)

    found = stage_seconds.last(
        [
            left([{"stage": "encode@b", "seconds": 12.5}]),
            left([{"stage": "encode@b", "seconds": 99}, {"stage": "style@b-ink", "seconds": 4}]),
            left("# hello", key="stages-of-another-program"),
            left([{"stage": 3, "seconds": None}, 7], key="stages-of-a-third"),
        ]
    )
    assert found == {"stages-b": {"encode@b": 12.5, "style@b-ink": 4.0}}


class Faulty:
    """A source that answers, fails, or has a fault of its own."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.looks = 0

    def __call__(self, settings: Any) -> Any:
        self.looks += 1
        if self.error is not None:
            raise self.error
        gauges = sources._Gauges(sources.OF_DVC)
        gauges.set("stale_stages", 2, "a")
        return gauges.families()


def test_a_source_that_fails_has_no_figures_and_is_noted_once_and_a_scrape_asks_nobody(capsys: pytest.CaptureFixture):
    faulty, steady = Faulty(), Source("disk", 1, sources.of_disk)
    made = Exporter([Source("dvc", 1, faulty), steady], lambda: None)  # type: ignore[arg-type, return-value]
    assert "lcmlora_collection_success" not in samples(made)  # before the first look
    assert made.look_at_all()
    assert [samples(made)["lcmlora_stale_stages"] for _ in range(3)] == [{("a",): 2}] * 3
    assert faulty.looks == 1
    faulty.error = Unavailable("dvc status: is busy")
    for _ in range(3):
        assert not made.look_at_all()
    found = samples(made)
    assert "lcmlora_stale_stages" not in found and found["lcmlora_disk_size_bytes"][()] > 0
    assert found["lcmlora_collection_success"] == {("dvc",): 0, ("disk",): 1}
    assert found["lcmlora_collection_timestamp_seconds"]["dvc",] > 1.7e9  # when it last answered
    assert capsys.readouterr().err.splitlines() == ["warning: no metrics of dvc: dvc status: is busy"]
    faulty.error = ZeroDivisionError("at https://user:secret@host")
    assert not made.look_at_all()
    assert "secret" not in capsys.readouterr().err
    faulty.error = None
    assert made.look_at_all()
    assert capsys.readouterr().err == "metrics of dvc are there again\n"
    assert samples(made)["lcmlora_stale_stages"] == {("a",): 2}


def test_each_source_is_looked_at_in_its_own_time(monkeypatch: pytest.MonkeyPatch):
    """One that hangs keeps no other from being looked at again."""
    released, looked = threading.Event(), threading.Semaphore(0)

    def hang(settings: Any) -> Any:
        released.wait()
        return []

    def quick(settings: Any) -> Any:
        looked.release()
        return []

    stop = threading.Event()
    made = Exporter([Source("slow", 0.01, hang), Source("quick", 0.01, quick)], lambda: None)  # type: ignore[arg-type, return-value]
    threads = made.keep_looking(stop)
    for _ in range(3):
        assert looked.acquire(timeout=60)
    stop.set()
    released.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def ask(application: Any, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, bytes]:
    said: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        said.append(message)

    encoded = [(name.encode(), value.encode()) for name, value in {"host": "localhost:9464", **headers}.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": encoded, "query_string": b""}
    asyncio.run(application(scope, receive, send))
    return said[0]["status"], b"".join(message.get("body", b"") for message in said[1:])


def basic(pair: str) -> str:
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def test_the_metrics_are_given_to_whoever_has_the_login_and_under_no_other_name_of_the_machine():
    made = Exporter([Source("disk", 1, sources.of_disk)], lambda: None)  # type: ignore[arg-type, return-value]
    made.look_at_all()
    open_to_all = Endpoint(made.registry, None)
    status, body = ask(open_to_all)
    assert status == 200 and b"lcmlora_disk_free_bytes" in body
    assert ask(open_to_all, "/")[0] == 404
    assert ask(open_to_all, method="POST")[0] == 405
    closed = Endpoint(made.registry, Login("scraper", "pass:word"))
    assert ask(closed, authorization=basic("scraper:pass:word"))[0] == 200
    for wrong in (
        None,
        "",
        "Basic",
        "Basic !",
        basic("scraper:password"),
        basic("scraper"),
        "Bearer scraper:pass:word",
    ):
        status, body = ask(closed, **({} if wrong is None else {"authorization": wrong}))
        assert (status, b"lcmlora_disk" in body) == (401, False)
    assert ask(closed, "/elsewhere")[0] == 401
    assert ask(AccessGuard(open_to_all, ()), host="evil.example.org")[0] == 403


def test_other_machines_are_answered_only_with_a_password():
    made = Exporter([], lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match=r"^--host 0\.0\.0\.0: .*LCMLORA_METRICS_LOGIN"):
        exporter.serve(made, "0.0.0.0", 9464, None)


def test_a_textfile_is_written_whole_and_says_which_source_is_missing(tmp_path: Path):
    faulty = Faulty()
    faulty.error = Unavailable("away")
    made = Exporter([Source("mlflow", 1, faulty), Source("disk", 1, sources.of_disk)], lambda: None)  # type: ignore[arg-type, return-value]
    path = tmp_path / "lcmlora.prom"
    assert not exporter.write(made, path)
    assert 'lcmlora_collection_success{source="mlflow"} 0.0' in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["lcmlora.prom"]
    faulty.error = None
    assert exporter.write(made, path)


# --- the dashboard and the alerts ---------------------------------------------------------------------------------


def exported() -> dict[str, set[str]]:
    """Returns the labels of every metric that is exported, by the name under which it is queried."""
    names = {f"lcmlora_{name}": set(labels) for name, (_, labels) in sources.DECLARED.items()}
    names |= {f"lcmlora_collection_{each}": {"source"} for each in ("success", "timestamp_seconds", "seconds")}
    served = ServingMetrics(Provenance.model_validate(releases.provenance("mini", "ab" * 32)), queue_limit=8)
    for metric in vars(served).values():
        if hasattr(metric, "_labelnames"):
            for family in metric.describe():
                labels = set(metric._labelnames)
                if family.type == "counter":
                    names[f"{family.name}_total"] = labels
                elif family.type == "histogram":
                    names |= {f"{family.name}_{part}": labels | {"le"} for part in ("bucket", "sum", "count")}
                else:
                    names[family.name] = labels
    for family in served.registry.collect():  # those without a name of their own, such as the process's memory
        for sample in family.samples:
            names.setdefault(sample.name, set(sample.labels))
    return names


_ADDED = {"job", "instance"}  # by Prometheus to every sample
_WORDS = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def queried(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yields each metric of a PromQL expression with the labels that its selector names."""
    without_texts = re.sub(r'"[^"]*"', '""', expression)
    for match in re.finditer(r"\b((?:lcmlora|process|up)\w*)\b(?:\{([^}]*)\})?", without_texts):
        yield match[1], set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", match[2] or ""))


def check(expression: str, names: dict[str, set[str]]) -> None:
    found = list(queried(expression))
    assert found, expression
    for metric, labels in found:
        assert metric in names, f"{metric} is not exported: {expression}"
        assert labels <= names[metric] | _ADDED, f"{metric} has no labels {labels - names[metric]}: {expression}"
    everything = set().union(*(names[metric] for metric, _ in found)) | _ADDED
    for grouped in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        assert set(_WORDS.findall(grouped)) <= everything, expression
    assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def expressions(panel: dict[str, Any]) -> Iterator[str]:
    for target in panel.get("targets", []):
        yield target["expr"]
        names = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        metrics = exported()
        known = set().union(*(metrics[metric] for metric, _ in queried(target["expr"])))
        assert names <= known | _ADDED, target
    for inner in panel.get("panels", []):
        yield from expressions(inner)


def test_the_dashboard_queries_only_what_is_exported_and_shows_all_of_it():
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    names = exported()
    found = [each for panel in dashboard["panels"] for each in expressions(panel)]
    for expression in found:
        check(expression.replace("$__rate_interval", "5m"), names)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    shown = {metric for expression in found for metric, _ in queried(expression)}
    unseen = {"lcmlora_training_loss", "lcmlora_newest_version_passed", "lcmlora_collection_seconds"}
    lcmlora = {
        name for name in names if name.startswith("lcmlora_") and not name.endswith(("_sum", "_count", "_created"))
    }
    assert lcmlora - shown == unseen
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    asked = variables["model"]["query"]["query"]
    assert all(name in names and "model" in names[name] for name in re.findall(r"lcmlora_\w+", asked))
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(dashboard))) - {"__rate_interval", "__all"}
    assert used == variables.keys()


def test_alerts_query_only_what_is_exported_and_of_jobs_that_are_scraped():
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    jobs = {each["job_name"] for each in scraped["scrape_configs"]}
    assert (MONITORING / scraped["rule_files"][0]).is_file()
    names = exported() | {"up": set()}
    seen = set()
    for rule in [rule for group in rules["groups"] for rule in group["rules"]]:
        check(rule["expr"], names)
        assert set(re.findall(r'job="([^"]*)"', rule["expr"])) <= jobs
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        known = set().union(*(names[metric] for metric, _ in queried(rule["expr"]))) | _ADDED
        assert labels <= known and rule["alert"] not in seen
        seen.add(rule["alert"])
    ends = re.search(r'end=~"([^"]*)"', rules["groups"][0]["rules"][0]["expr"])
    assert ends is not None and set(ends[1].split("|")) <= set(sources._ENDS)
