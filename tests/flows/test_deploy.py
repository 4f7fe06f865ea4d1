"""deploy/: what Docker compose, kustomize and Kubernetes are given, held against their schemas; passwords; names."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lcmlora import config
from lcmlora.flows import services
from lcmlora.flows.credentials import Login
from lcmlora.projects import generated
from lcmlora.projects.record import Options
from tests.flows.test_definitions import KUBERNETES, confined
from tests.support.wheels import locked

ROOT = Path(__file__).parents[2]
SCHEMAS = resources.files("check_jsonschema") / "builtin_schemas/vendor"
LEASES = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
DIGEST = "sha256:" + "0" * 64  # of no image


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a project of another name, with passwords."""
    root = tmp_path_factory.mktemp("project")
    options = Options(name="my owls", workers=("docker", "kubernetes"))
    for path, text in generated.generated_files(config.load(ROOT / "params.yaml", ROOT), options).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    for place in ("kubernetes/overlays/whole/secrets", "compose/secrets"):
        command = [sys.executable, root / "deploy/passwords.py", root / "deploy" / place]
        subprocess.run(command, check=True, capture_output=True)
    return root


@pytest.fixture(scope="module")
def compose(project: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((project / "deploy/compose/compose.yaml").read_text())
    return found


def variables(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if line and not line.startswith("#"))


def test_the_compose_file_fits_the_compose_specification(compose: dict[str, Any]):
    schema = json.loads((SCHEMAS / "compose-spec.json").read_text(encoding="utf-8"))
    checker = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in checker.iter_errors(compose)] == []
    compose["services"]["prefect"] |= {"commands": []}
    assert [error.message for error in checker.iter_errors(compose)]  # it can tell
    del compose["services"]["prefect"]["commands"]


def test_compose_names_only_what_there_is(compose: dict[str, Any], project: Path):
    kinds = ("networks", "volumes", "configs", "secrets")
    used: dict[str, set[str]] = {kind: set() for kind in kinds}
    for name, service in compose["services"].items():
        used["networks"] |= set(service["networks"])
        for kind in ("configs", "secrets"):
            used[kind] |= {each["source"] for each in service.get(kind, [])}
        used["volumes"] |= {each.split(":")[0] for each in service.get("volumes", []) if isinstance(each, str)}
        files = service.get("env_file", [])
        for file in [files] if isinstance(files, str) else files:
            assert (project / "deploy/compose" / file).is_file(), (name, file)
        assert set(service.get("depends_on", {})) <= compose["services"].keys()
        assert service.get("ports", ["127.0.0.1:"])[0].startswith("127.0.0.1:")  # of this machine alone
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"\$\{\w+:\?.+\}", service["image"])  # nothing starts before a digest is set
    assert used == {kind: set(compose[kind]) for kind in kinds}
    text = (project / "deploy/compose/compose.yaml").read_text()
    needed = set(re.findall(r"\$\{(\w+)", text))
    known = variables(project / "deploy/compose/example.env")
    assert needed == known.keys()
    assert (known["LCMLORA_POOL"], known["LCMLORA_MODEL"]) == ("my-owls", "emoji@champion")


def test_who_has_no_business_with_a_database_has_no_way_to_it(compose: dict[str, Any]):
    on = {name: set(service["networks"]) for name, service in compose["services"].items()}
    assert {name for name in on if "databases" in on[name]} == {"postgresql", "prefect", "mlflow"}
    users = {"bucket", "mlflow", "deploy", "worker", "serve"}
    assert {name for name in on if "store" in on[name]} == users | {"seaweedfs"}
    assert compose["networks"]["databases"] == compose["networks"]["store"] == {"internal": True}


@pytest.fixture(scope="module", params=["workers", "whole"])
def built(project: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The objects of an overlay, as `kubectl apply --kustomize` sends them to the cluster."""
    if shutil.which("kubectl") is None:
        pytest.skip("no `kubectl`, which has kustomize")
    folder = project / "deploy/kubernetes/overlays" / request.param
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield request.param, list(yaml.safe_load_all(done.stdout))


def test_every_object_of_an_overlay_fits_kubernetes_and_names_images_by_digest(
    built: tuple[str, list[dict[str, Any]]],
):
    overlay, objects = built
    for each in objects:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
        assert each["metadata"].get("namespace", "lcmlora") == "lcmlora"
    pods = pods_of(objects)
    assert (
        pods.keys()
        == {
            "workers": {"lcmlora-worker"},
            "whole": {
                "lcmlora-worker",
                "lcmlora-serve",
                "lcmlora-bucket",
                "postgresql",
                "seaweedfs",
                "prefect",
                "mlflow",
            },
        }[overlay]
    )
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    by_hand = {("Secret", "lcmlora-worker")} if overlay == "workers" else set()
    for name, pod in pods.items():
        for container in pod["containers"]:
            assert container["image"].endswith(f"@{DIGEST}"), name
        assert named_by(pod) <= there | by_hand, name
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is (name == "lcmlora-worker")  # it makes jobs
        if name not in ("postgresql", "seaweedfs"):
            confined(pod)
    worker = pods["lcmlora-worker"]["containers"][0]
    assert worker["args"][worker["args"].index("--pool") + 1] == "$(POOL)"
    (settings,) = [each for each in objects if each["metadata"]["name"] == "lcmlora-settings"]
    assert settings["data"]["POOL"] == "my-owls"


def pods_of(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the pods' specifications by the names of what makes them."""
    kinds = ("Deployment", "Job")
    return {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in objects if each["kind"] in kinds}


def named_by(pod: dict[str, Any]) -> set[tuple[str, str]]:
    """Returns the secrets, maps and volumes that a pod names."""
    found = set()
    for container in pod["containers"]:
        found |= {("Secret", each["secretRef"]["name"]) for each in container.get("envFrom", [])}
        for each in container.get("env", []):
            if "valueFrom" in each:
                found.add(("ConfigMap", each["valueFrom"]["configMapKeyRef"]["name"]))
    for volume in pod.get("volumes", []):
        for key, kind, name in (
            ("secret", "Secret", "secretName"),
            ("configMap", "ConfigMap", "name"),
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
        ):
            if key in volume:
                found.add((kind, volume[key][name]))
    return found


def test_pods_may_call_what_they_need_and_nobody_else_may(built: tuple[str, list[dict[str, Any]]]):
    overlay, objects = built
    if overlay != "whole":
        return
    policies = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "NetworkPolicy"}
    admitted = {}
    for name in ("postgresql", "seaweedfs", "prefect", "mlflow"):
        (rule,) = policies[name]["ingress"]
        (service,) = [each for each in objects if each["kind"] == "Service" and each["metadata"]["name"] == name]
        assert rule["ports"][0]["port"] == service["spec"]["ports"][0]["port"]
        admitted[name] = set(rule["from"][0]["podSelector"]["matchExpressions"][0]["values"])
        for caller in admitted[name]:
            targets = [peer for each in policies[f"{caller}-to-servers"]["egress"] for peer in each.get("to", [])]
            assert {"podSelector": {"matchLabels": {"app": name}}} in targets, (caller, name)
    assert admitted["postgresql"] == {"prefect", "mlflow"}
    assert "lcmlora-worker" not in admitted["seaweedfs"] | admitted["mlflow"]


def test_a_prefect_server_keeps_its_leases_on_a_disk_wherever_it_runs(
    compose: dict[str, Any], project: Path, tmp_path: Path
):
    module = "prefect.server.concurrency.lease_storage.filesystem"
    own = services.prefect(4200, tmp_path, Login("a", "b")).environment
    container = next(
        each["spec"]["template"]["spec"]["containers"][0]
        for each in yaml.safe_load_all((project / "deploy/kubernetes/servers/prefect.yaml").read_text())
        if each["kind"] == "Deployment"
    )
    cluster = {each["name"]: each["value"] for each in container["env"]}
    homes = []
    for environment in (own, cluster, compose["services"]["prefect"]["environment"]):
        assert environment[LEASES] == module
        homes.append(environment["PREFECT_HOME"])
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    assert homes[1] in mounted and f"prefect:{homes[2]}" in compose["services"]["prefect"]["volumes"]


def test_passwords_are_new_each_time_for_their_owner_alone_and_never_overwritten(project: Path, tmp_path: Path):
    script = project / "deploy/passwords.py"
    assert script.read_text() == (ROOT / "deploy/passwords.py").read_text()
    folders = [tmp_path / "one", project / "deploy/compose/secrets"]
    subprocess.run([sys.executable, script, folders[0]], check=True, capture_output=True)
    again = subprocess.run([sys.executable, script, folders[0]], capture_output=True, text=True)
    assert again.returncode == 1 and "nothing was written" in again.stderr
    found = [{path.name: path.read_text() for path in folder.iterdir()} for folder in folders]
    assert all(found[0][name] != found[1][name] for name in found[0] if name != ".gitignore")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders[0].iterdir()} == {0o600}
    server, client = variables(folders[0] / "prefect.env"), variables(folders[0] / "worker.env")
    assert server["PREFECT_SERVER_API_AUTH_STRING"] == client["PREFECT_API_AUTH_STRING"]
    keys = {each["name"]: each for each in json.loads(found[0]["identities.json"])["identities"]}
    serve = variables(folders[0] / "serve.env")
    assert keys["serve"]["credentials"][0]["accessKey"] == serve["AWS_ACCESS_KEY_ID"]
    assert keys["serve"]["actions"] == ["Read:lcmlora/releases/*", "List:lcmlora/releases/*"]


# Fields of a RayCluster by KubeRay's reference (ray.io/v1, 1.6) that the example uses; Kubernetes' schemas have none.
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"serviceType", "rayStartParams", "template"}
NODES = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def test_the_ray_cluster_fits_kuberay_the_locked_ray_and_kubernetes(project: Path):
    if shutil.which("kubectl") is None:
        pytest.skip("no `kubectl`, which has kustomize")
    folder = project / "deploy/kubernetes/ray"
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    kubernetes_validate.validate(found["NetworkPolicy"], KUBERNETES, strict=True)
    cluster = found["RayCluster"]
    spec, head, nodes = cluster["spec"], cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert cluster["apiVersion"] == "ray.io/v1"
    assert spec.keys() == RAY_CLUSTER and head.keys() == HEAD and all(each.keys() == NODES for each in nodes)
    assert spec["rayVersion"] == locked("requirements.lock")["ray"][0]
    assert spec["authOptions"] == {"mode": "token"}
    from ray.scripts.scripts import start

    options = {option.removeprefix("--") for each in start.params for option in each.opts}
    for group in (head, *nodes):
        assert group["rayStartParams"].keys() <= options
        assert all(isinstance(each, str) for each in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        confined(pod["spec"])
        (container,) = pod["spec"]["containers"]
        assert container["image"] == f"registry.example.org/lcmlora@{DIGEST}"
        # The policy names their label, and KubeRay's own probes would ask the dashboard.
        assert group["template"]["metadata"]["labels"] == found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
        assert {"readinessProbe", "livenessProbe"} < container.keys()
        assert {each["name"]: each["mountPath"] for each in container["volumeMounts"]}["project"] == "/project"
    # The head only manages: it has no CPUs for workers (lcmlora/parallel/ray_workers.py).
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert nodes[0]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
