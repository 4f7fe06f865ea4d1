"""Everything that Prefect, Kubernetes and Docker are given, loaded by those who will read it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker.models.containers
import kubernetes_validate
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from prefect import Flow
from prefect.cli.deploy._config import _load_deploy_configs_and_actions
from prefect.cli.deploy._schedules import _schedule_config_to_deployment_schedule
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import Flow as FlowRecord
from prefect.client.schemas.objects import FlowRun
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.flows import load_flow_from_entrypoint
from prefect.workers.base import BaseJobConfiguration
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from rich.console import Console

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.flows.provision import dead_runs
from lcmlora.flows.retrain import prepare_of, stages_of
from lcmlora.flows.serve import read_deployments
from lcmlora.flows.servers import checks
from lcmlora.flows.services import POOL
from lcmlora.flows.watch import BASE_CHANGED, DATASET_CHANGED

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.31"  # of the schemas


@pytest.fixture(autouse=True, scope="module")
def in_the_project() -> Iterator[None]:
    """Entrypoints are relative to the project; what a machine has set is not asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in ("MLFLOW_TRACKING_URI", "LCMLORA_PROJECT", "AWS_ACCESS_KEY_ID"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def entries() -> list[dict[str, Any]]:
    """The deployments as `prefect deploy` reads them."""
    console = Console(record=True, quiet=True)
    entries, _ = _load_deploy_configs_and_actions(ROOT / "prefect.yaml", console=console)
    assert console.export_text() == ""  # where it says what it skips
    return entries


@pytest.fixture(scope="module")
def flows(entries: list[dict[str, Any]]) -> dict[str, Flow]:
    """The flows by their entrypoints."""
    return {entry["entrypoint"]: load_flow_from_entrypoint(entry["entrypoint"]) for entry in entries}


@pytest.fixture(scope="module")
def deployments(flows: dict[str, Flow]) -> list[RunnerDeployment]:
    """The deployments as `python -m flows.serve` reads them."""
    return read_deployments(ROOT / "prefect.yaml")


def test_every_flow_of_the_project_is_deployed_under_its_own_name(
    entries: list[dict[str, Any]], flows: dict[str, Flow]
):
    names = {f"{flows[entry['entrypoint']].name}/{entry['name']}" for entry in entries}
    assert names == {
        "retrain/lcmlora",
        "approve/lcmlora",
        "promote/lcmlora",
        "reject/lcmlora",
        "rollback/lcmlora",
        "watch/lcmlora",
        "report/lcmlora",
        "prune/lcmlora",
    }
    assert {entry["work_pool"]["name"] for entry in entries} == {POOL}
    assert all(entry["description"] and entry["tags"] for entry in entries)


def test_parameters_of_deployments_and_triggers_are_those_of_the_flows(
    entries: list[dict[str, Any]], flows: dict[str, Flow]
):
    # What has no default is asked for when a person starts the flow.
    asked = {
        "promote": {"reference": "lcm-lora-emoji/1", "reason": "better"},
        "rollback": {"model": "emoji", "reason": "x"},
        "approve": {"reference": "lcm-lora-emoji/1", "reason": "sharp", "who": "ada"},
        "reject": {"reference": "lcm-lora-emoji/1", "reason": "blurred", "who": "ada"},
    }
    for entry in entries:
        flow = flows[entry["entrypoint"]]
        flow.validate_parameters(entry.get("parameters", {}) | asked.get(flow.name, {}))
        for trigger in entry.get("triggers", []):
            assert set(trigger["parameters"]) <= set(flow.parameters.properties), flow.name
    described = [entry for flow in flows.values() for entry in flow.parameters.properties.values()]
    assert all(entry.get("description") for entry in described), described
    required = {flow.name: set(flow.parameters.required) for flow in flows.values() if flow.parameters.required}
    assert required == {name: set(values) for name, values in asked.items()}


def test_every_schedule_has_a_slug_of_its_own_and_a_time_zone(entries: list[dict[str, Any]]):
    schedules = [schedule for entry in entries for schedule in entry.get("schedules", [])]
    made = [_schedule_config_to_deployment_schedule(schedule)["schedule"] for schedule in schedules]
    assert {schedule["slug"]: (made.cron, made.timezone) for schedule, made in zip(schedules, made, strict=True)} == {
        "retrain-nightly": ("0 2 * * *", "UTC"),
        "watch-quarter-hourly": ("*/15 * * * *", "UTC"),
        "report-weekly": ("0 7 * * 1", "UTC"),
        "prune-monthly": ("0 12 1 * *", "UTC"),
    }
    assert len({schedule["slug"] for schedule in schedules}) == len(schedules)


def test_retrain_listens_for_what_watch_says_and_runs_once_at_a_time(deployments: list[RunnerDeployment]):
    retrain = next(each for each in deployments if each.flow_name == "retrain")
    expected = {DATASET_CHANGED: "lcmlora.dataset*", BASE_CHANGED: "lcmlora.base.*"}
    found = {}
    for trigger in retrain.triggers:
        assert isinstance(trigger, DeploymentEventTrigger)
        (event,) = trigger.expect
        (found[event],) = trigger.match["prefect.resource.id"]
        trigger.set_deployment_id(uuid.uuid4())
        assert trigger.as_automation().actions[0].parameters == {"models": "{{ event.payload.models }}"}
    assert found == expected
    assert retrain.concurrency_limit == 1
    assert retrain.concurrency_options.collision_strategy == "CANCEL_NEW"


def test_both_ways_to_deploy_find_the_same(entries: list[dict[str, Any]], deployments: list[RunnerDeployment]):
    assert [(each.entrypoint, each.name, each.tags, each.description) for each in deployments] == [
        (each["entrypoint"], each["name"], each["tags"], each["description"]) for each in entries
    ]
    slugs = [[schedule.slug for schedule in each.schedules] for each in deployments]
    assert slugs == [[schedule["slug"] for schedule in each.get("schedules", [])] for each in entries]


@pytest.mark.parametrize(
    "changes",
    [
        {"schedules": None, "triggers": None, "tags": None, "work_pool": None},
        {
            "schedules": "{{ $WHEN }}",
            "triggers": "{{ $ON }}",
            "concurrency_limit": "{{ $MOST }}",
            "paused": "{{ $NO }}",
        },
        {"schedules": [{"cron": "{{ $NIGHTLY }}", "timezone": "Europe/Berlin"}]},
        {"schedules": [{"interval": 3600.0, "anchor_date": "2024-01-01T00:00:00+00:00", "active": False, "slug": "x"}]},
        {"schedules": [{"rrule": "DTSTART:20220101T000000\nRRULE:FREQ=DAILY", "parameters": {"models": []}}]},
        {"work_pool": {"name": "gpus", "job_variables": {"image": "{{ build.image }}"}, "later": True}, "later": 1},
        {"triggers": [{"expect": ["a"], "within": "PT10M", "parameters": {"model": "{{ event.payload.model }}"}}]},
        {"triggers": [{"type": "sequence", "within": 60, "triggers": [{"expect": ["a"]}, {"expect": ["b"]}]}]},
        {"concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW", "grace_period_seconds": 120}},
    ],
)
def test_what_prefect_understands_or_fills_in_passes(tmp_path: Path, changes: dict[str, object]) -> None:
    entry = {"entrypoint": "lcmlora.flows.report.leave_digest", "name": "weekly"} | changes
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({"deployments": [entry]}))
    checks.check_deployments(tmp_path / "prefect.yaml")
    if "{{ $" not in str(changes):
        assert len(read_deployments(tmp_path / "prefect.yaml")) == 1


@pytest.mark.parametrize(
    "schedules, told",
    [
        ([{"cron": "0 7 * * mondays"}], "schedules.0.cron: got '0 7 * * mondays': Invalid cron string"),
        ([{"cron": "0 25 * * *", "slug": "late"}], "schedules.0.cron: got '0 25 * * *': Invalid cron string"),
        ([{"cron": "0 7 * * 1", "timezone": "Mars"}], "schedules.0.timezone: got 'Mars': Invalid timezone"),
        ([{"interval": 60}, {"rrule": "FREQ=NEVER"}], "schedules.1.rrule: got 'FREQ=NEVER': "),
        ([{"interval": -5}], "schedules.0.interval: got "),
        ([{"interval": "often"}], "schedules.0.interval: got 'often': Input should be a valid timedelta"),
        ([{"corn": "0 7 * * 1"}], "schedules.0: expected one of cron, interval, rrule"),
        (
            [{"cron": "0 7 * * 1", "timezon": "Europe/Berlin"}],
            "schedules.0.timezon: there is no such key; did you mean timezone?",
        ),
        (
            [{"cron": "0 7 * * 1", "interval": 60}],
            "schedules.0: expected one of cron, interval, rrule, and there are cron and interval",
        ),
        ([{"cron": "0 7 * * 1", "active": "perhaps"}], "schedules.0.active: got 'perhaps': Input should be a valid bo"),
        (["0 7 * * 1"], "schedules.0: "),
        ({"cron": "0 7 * * 1"}, "schedules: got {'cron': '0 7 * * 1'}: Input should be a valid list"),
    ],
)
def test_a_mistake_in_a_schedule_is_one_line_that_names_the_deployment(
    tmp_path: Path, schedules: object, told: str
) -> None:
    entry = {"entrypoint": "lcmlora.flows.report.leave_digest", "name": "weekly", "schedules": schedules}
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump({"deployments": [entry]}))
    for read in (checks.check_deployments, read_deployments):
        with pytest.raises(UserError) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}: lcmlora.flows.report.leave_digest, weekly: {told}")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"scedules": [{"cron": "0 7 * * 1"}]}, "scedules: there is no such key; did you mean schedules?"),
        ({"tags": "weekly"}, "tags: got 'weekly': Input should be a valid list"),
        ({"parameters": ["emoji"]}, "parameters: got ['emoji']: Input should be a valid dictionary"),
        ({"concurrency_limit": "one"}, "concurrency_limit: got 'one': Input should be "),
        ({"concurrency_limit": {"limit": 1, "collision_strategy": "DROP"}}, "concurrency_limit.collision_strategy: "),
        ({"work_pool": {"name": "gpus", "job_variable": {}}}, "work_pool.job_variable: there is no such key; did you"),
        ({"work_pool": "gpus"}, "work_pool: got 'gpus': Input should be a valid dictionary"),
        ({"triggers": {"expect": ["lcmlora.dataset.changed"]}}, "triggers: got "),
        ({"triggers": [{"type": "evnt"}]}, "triggers.0.type: got 'evnt': expected event, metric, compound, sequence"),
        ({"triggers": [{"expects": ["a"]}]}, "triggers.0.expects: there is no such key; did you mean expect?"),
        ({"triggers": [{"expect": ["a"]}, {"within": "soon"}]}, "triggers.1.within: got 'soon': Input should be a "),
        ({"triggers": [{"expect": ["a"], "posture": "Reactiv"}]}, "triggers.0.posture: got 'Reactiv': Input should "),
        (
            {"triggers": [{"type": "compound", "require": "all", "triggers": [{"expct": ["a"]}]}]},
            "triggers.0.triggers.0.expct: there is no such key; did you mean expect?",
        ),
    ],
)
def test_a_mistake_in_a_deployment_is_one_line_that_names_it(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    path = tmp_path / "prefect.yaml"
    entry = {"entrypoint": "lcmlora.flows.report.leave_digest", "name": "weekly"}
    path.write_text(yaml.safe_dump({"deployments": [entry | changes]}))
    for read in (checks.check_deployments, read_deployments):
        with pytest.raises(UserError) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}: lcmlora.flows.report.leave_digest, weekly: {told}")
        assert "\n" not in str(raised.value)


def test_every_stage_that_the_flow_names_is_in_dvc_yaml():
    settings = config.load(ROOT / "params.yaml")
    assert settings.study is not None
    studied = settings.model_copy(update={"study": settings.study.model_copy(update={"models": settings.models})})
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for model in settings.models:
        names = {name.split("@")[0] for name in (prepare_of(model, studied), *stages_of(model, studied))}
        assert names <= set(stages), f"dvc.yaml lacks {names - set(stages)}"
        assert {"study", "style", "package"} <= names


def test_a_run_is_dead_only_when_nothing_is_heard_of_it_whatever_its_last_state_was_named():
    trigger = dead_runs().trigger
    assert trigger.expect == {"prefect.flow-run.*"}
    assert trigger.after == {"prefect.flow-run.heartbeat"}
    assert trigger.within.total_seconds() >= 3 * 30  # of make up's heartbeats


@pytest.mark.parametrize("pool", ["kubernetes", "docker"])
def test_a_template_uses_all_its_variables_and_no_others(pool: str):
    template = json.loads((ROOT / "deploy" / pool / "base-job-template.json").read_text())
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    declared = set(template["variables"]["properties"])
    assert used <= declared
    # Docker's environment is written out, and what is set as `env` is merged into it.
    assert declared - used <= {"env"}


@pytest.mark.parametrize("flow", ["retrain", "watch"])
def test_the_kubernetes_template_gives_a_job_that_the_api_accepts(flow: str, entries: list[dict[str, Any]]):
    job = _prepared(KubernetesWorkerJobConfiguration, "kubernetes", flow, entries).job_manifest
    pod = job["spec"]["template"]["spec"]
    # Prefect demands these of a pod, where Kubernetes does not know them and passes them over.
    assert (pod.pop("completions"), pod.pop("parallelism")) == (1, 1)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    container, project = pod["containers"][0], pod["initContainers"][0]
    gpus = 1 if flow == "retrain" else 0
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert container["resources"]["requests"]["nvidia.com/gpu"] == gpus
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["LCMLORA_PROJECT"] == container["volumeMounts"][0]["mountPath"] == "/project"
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"  # of a node that is drained
    assert container["envFrom"] == [{"secretRef": {"name": "lcmlora"}}]
    assert project["envFrom"] == [{"secretRef": {"name": "lcmlora-git", "optional": True}}]
    assert pod["automountServiceAccountToken"] is False
    assert job["spec"]["template"]["metadata"]["labels"]["app"] == "lcmlora-run"  # which the network policies name
    confined(pod)
    assert {each["name"]: each["value"] for each in project["env"]}["UPDATE"] == ("true" if gpus else "false")
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert pod["terminationGracePeriodSeconds"] > 10  # which a flow takes to end its trainer


def confined(pod: dict[str, Any]) -> None:
    """Asserts what Kubernetes calls the restricted standard, and a root file system that nobody writes to."""
    shared = pod["securityContext"]
    assert (shared["runAsNonRoot"], shared["runAsUser"]) == (True, 1000)
    assert shared["seccompProfile"] == {"type": "RuntimeDefault"}
    writable = {each["name"] for each in pod["volumes"] if "emptyDir" in each}
    for container in (*pod["containers"], *pod.get("initContainers", [])):
        own = container["securityContext"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert (own["allowPrivilegeEscalation"], own["readOnlyRootFilesystem"]) == (False, True)
        mounted = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        assert {mounted["/tmp"], mounted["/home/lcmlora"]} <= writable


def test_the_clusters_other_objects_are_those_that_the_template_names():
    objects = _base()
    for each in objects:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    found = {each["kind"]: each for each in objects if each["kind"] != "NetworkPolicy"}
    template = json.loads((ROOT / "deploy/kubernetes/base-job-template.json").read_text())
    defaults = {name: each.get("default") for name, each in template["variables"]["properties"].items()}
    assert found["Namespace"]["metadata"]["name"] == defaults["namespace"]
    assert found["PersistentVolumeClaim"]["metadata"]["name"] == defaults["claim"]
    worker = found["Deployment"]["spec"]["template"]["spec"]
    assert worker["containers"][0]["image"] == defaults["image"]
    # Of Prefect's password alone; keys to data are for runs.
    assert worker["containers"][0]["envFrom"] == [{"secretRef": {"name": "lcmlora-worker"}}]
    assert defaults["secret"] != "lcmlora-worker"
    environment = {each["name"]: each.get("value") for each in worker["containers"][0]["env"]}
    handed_on = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    assert environment[f"{handed_on}_NAME"] == "lcmlora-worker"
    assert environment[f"{handed_on}_KEY"] == "PREFECT_API_AUTH_STRING"
    confined(worker)
    assert worker["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"]
    assert found["Namespace"]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    assert found["ServiceAccount"]["automountServiceAccountToken"] is False


def _base() -> list[dict[str, Any]]:
    """Returns the objects that every overlay has."""
    files = sorted((ROOT / "deploy/kubernetes/base").glob("*.yaml"))
    texts = [path.read_text() for path in files if path.name != "kustomization.yaml"]
    return [each for text in texts for each in yaml.safe_load_all(text)]


def test_pods_are_called_by_nobody_and_call_what_is_listed():
    objects = _base()
    policies = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "NetworkPolicy"}
    assert policies["lcmlora-nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert not any("ingress" in each for each in policies.values())
    calls = policies["lcmlora-calls"]
    assert calls["podSelector"]["matchExpressions"][0]["values"] == ["lcmlora-run", "lcmlora-worker"]
    assert all(rule["ports"] for each in policies.values() for rule in each.get("egress", []))
    (anywhere,) = [peer["ipBlock"] for rule in calls["egress"] for peer in rule.get("to", []) if "ipBlock" in peer]
    assert anywhere["except"] == ["169.254.0.0/16"]  # where clouds give out credentials


def test_the_docker_template_gives_a_container_that_dockers_client_accepts(
    entries: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the worker")
    configuration = _prepared(DockerWorkerJobConfiguration, "docker", "retrain", entries)
    wanted = DockerWorker(POOL)._build_container_settings(docker_client=None, configuration=configuration)
    arguments = docker.models.containers._create_container_args(wanted | {"version": "1.43"})
    host = arguments["host_config"]
    (request,) = host["DeviceRequests"]
    assert (request["Driver"], request["Count"], request["Capabilities"]) == ("nvidia", -1, [["gpu"]])
    assert (host["Init"], host["ShmSize"], host["Binds"]) == (True, 8 << 30, ["/srv/lcmlora:/project"])
    assert arguments["environment"]["AWS_ACCESS_KEY_ID"] == "of the worker"
    assert arguments["environment"]["LCMLORA_PROJECT"] == "/project"
    assert arguments["user"] == "1000:1000"
    assert (host["CapDrop"], host["SecurityOpt"], host["ReadonlyRootfs"]) == (["ALL"], ["no-new-privileges"], True)
    assert set(host["Tmpfs"]) == {"/tmp", "/home/lcmlora"}


def test_the_image_is_built_from_the_lock_and_runs_as_nobody_special():
    parsed = DockerfileParser(str(ROOT / "deploy/Dockerfile"))
    steps = [(each["instruction"], each["value"]) for each in parsed.structure if each["instruction"] != "COMMENT"]
    ignored = (ROOT / "deploy/Dockerfile.dockerignore").read_text().split()
    for instruction, value in steps:
        if instruction == "COPY":
            for name in value.split()[:-1]:
                assert (ROOT / name).exists(), name
                assert f"!{name}" in ignored
    (install,) = [value for instruction, value in steps if instruction == "RUN" and "pip install" in value]
    assert "--constraint requirements.lock --constraint constraints.txt" in " ".join(install.split())
    assert "pip install --no-cache-dir --require-hashes -r bootstrap.lock" in install
    extras = set(re.search(r'"\.\[(.*)\]"', install)[1].split(","))
    assert extras < set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert [value for instruction, value in steps if instruction == "USER"] == ["1000:1000"]
    # Without a digest, which is no default of ours, this is no image's name, and nothing is built.
    assert steps[:2] == [("ARG", "DIGEST"), ("FROM", "python:3.11-bookworm@${DIGEST}")]


def test_the_notices_have_the_licences_of_what_is_installed():
    script = ROOT / "deploy/docker/notices.py"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    entries = {entry.split(" ", 1)[0].lower(): entry for entry in made.split(f"{'=' * 80}\n")[1:]}
    installed = {str(each.metadata["Name"]).lower() for each in importlib.metadata.distributions()}
    assert installed <= entries.keys()
    assert "Apache License" in entries["prefect"] and "--- torch-" in entries["torch"]


def _prepared(kind: type[BaseJobConfiguration], pool: str, flow: str, entries: list[dict[str, Any]]) -> Any:
    """Returns what a worker of this pool would start for a run of this flow's deployment."""
    template = json.loads((ROOT / "deploy" / pool / "base-job-template.json").read_text())
    entry = next(each for each in entries if each["entrypoint"].startswith(f"lcmlora.flows.{flow}."))
    # Nothing of the template is on a server, and so nothing is asked of this one.
    client = PrefectClient("http://prefect.example.org/api")
    variables = entry["work_pool"].get("job_variables", {})
    made = asyncio.run(kind.from_template_and_values(template, variables, client=client))
    record = FlowRecord(id=uuid.uuid4(), name=flow)
    made.env["PREFECT_API_URL"] = "http://prefect.example.org/api"
    made.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=record.id, name="quiet-owl"), flow=record)
    return made
