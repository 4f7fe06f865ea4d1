import json

from lcmlora.config import load
from lcmlora.flows.promote import promote_version, roll_back_champion
from lcmlora.flows.retrain import retrain_models
from lcmlora.registry import promotion, registration
from tests.flows.conftest import Project, artifacts
from tests.support.releases import write_sealed


def register_another(project: Project) -> int:
    """Registers a version that was never published and fails the gate, and returns its number."""
    folder = write_sealed(project.root / "another")
    failures = ["student@4: blurred"]
    return registration.register_release("a", load().registry, folder, gate_failures=failures).version


def test_a_person_promotes_against_the_gate_and_rolls_back_and_the_history_is_left_as_an_artifact(project: Project):
    assert retrain_models(["a"], return_state=True).name == "Promoted"
    pointer = project.root / "releases/a/channels/champion.json"
    assert register_another(project) == 2

    state = promote_version("lcm-lora-a/2", "looks better", return_state=True)
    assert state.is_failed()
    assert state.message.startswith("lcm-lora-a/2: student@4: blurred; to make it champion anyway")
    assert project.aliases("a") == {"champion": 1}

    state = promote_version("lcm-lora-a/2", "looks better", override=True, who="ada", return_state=True)
    assert (state.name, state.is_completed()) == ("Promoted", True)
    assert state.message == "lcm-lora-a@champion is lcm-lora-a/2, which was never published, so no channel was moved"
    assert project.aliases("a") == {"champion": 2, "previous": 1}

    pointer.unlink()
    state = roll_back_champion("a", "hands", who="ada", return_state=True)
    assert (state.name, state.is_completed()) == ("RolledBack", True)
    assert project.aliases("a") == {"champion": 1}
    assert json.loads(pointer.read_text())["sha256"] == project.versions("a")[0].tags["sha256"]

    table = artifacts("history-lcm-lora-a")[-1].data
    assert "| rolled back | champion | ada | hands |" in table
    told = [(event.version, event.action) for event in promotion.history("lcm-lora-a", load().registry)]
    assert told[-2:] == [(2, "promoted"), (1, "rolled back")]


def test_a_model_that_is_not_registered_cannot_be_rolled_back(project: Project):
    state = roll_back_champion("a", "hands", return_state=True)
    assert state.is_failed()
    assert state.message.startswith("lcm-lora-a: not registered at sqlite:///")
