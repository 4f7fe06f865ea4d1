"""The alert of docs/guides/monitor.md, made on a Prefect server by the block as it stands there."""

import pytest
from prefect.client.orchestration import get_client
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import EventTrigger

from lcmlora.flows.outcomes import ENDS
from tests.support import code_blocks
from tests.support.code_blocks import ROOT

PREFECTS_OWN = {"Crashed", "TimedOut"}  # the other ends that mean trouble


@pytest.mark.slow
def test_the_alert_of_the_guide_is_an_automation_for_the_ends_that_need_a_person(prefect: None) -> None:
    (block,) = [b for b in code_blocks.blocks(ROOT / "docs/guides/monitor.md") if b.language == "python"]
    exec(compile(block.text, str(block), "exec"), {})
    with get_client(sync_client=True) as client:
        (made,) = client.read_automations_by_name("lcmlora: a run needs a person")
    assert made.enabled and isinstance(made.trigger, EventTrigger)
    ends = {event.removeprefix("prefect.flow-run.") for event in made.trigger.expect}
    assert {"Failed", "Rejected"} <= ends <= {*ENDS, *PREFECTS_OWN}
    (action,) = made.actions
    assert isinstance(action, SendNotification)
    assert "flow_run.state.message" in action.body
