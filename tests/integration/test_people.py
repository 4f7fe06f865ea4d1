"""Several people at MLflow's server: who may read, and who may promote."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcmlora import registry
from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.registry import promotion, registration
from tests.integration.tracking_servers import MLflow
from tests.support.releases import load_settings, write_sealed

pytestmark = pytest.mark.integration

NAME = "lcm-lora-people"
PASSWORD = "a long password"


@pytest.mark.slow
def test_a_reader_reads_and_cannot_promote_and_an_editor_can(
    mlflow_server: MLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow.server import get_app_client

    settings = Registry(tracking_uri=mlflow_server.uri, experiment="people", alias="champion")
    gate = load_settings(tmp_path).gate
    for name in ("first", "second"):
        sealed = write_sealed(tmp_path / name, weights=f"{name} of people".encode(), model="people")
        registration.register_release("people", settings, sealed)
    promotion.promote(f"{NAME}/1", settings, gate, reason="the first one")
    people = get_app_client("basic-auth", tracking_uri=mlflow_server.uri)
    for name, permission, person in (("readers", "READ", "ada"), ("publishers", "EDIT", "bob")):
        role = people.create_role("default", name)
        for kind in ("registered_model", "experiment"):
            people.add_role_permission(role.id, kind, "*", permission)
        people.create_user(person, PASSWORD)
        people.assign_role(person, role.id)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    assert registry.resolve("people@champion", settings).version == 1
    pulled = registry.pull("people@champion", settings, tmp_path / "pulled")
    assert (pulled / "pytorch_lora_weights.safetensors").read_bytes() == b"first of people"
    with pytest.raises(
        UserError, match="it does not permit this to ada; its administrator may give the right"
    ) as caught:
        promotion.promote(f"{NAME}/2", settings, gate, reason="mine is better")
    assert "\n" not in str(caught.value)
    assert registry.resolve("people@champion", settings).version == 1
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "bob")
    promotion.promote(f"{NAME}/2", settings, gate, reason="better")
    assert registry.resolve("people@champion", settings).version == 2
