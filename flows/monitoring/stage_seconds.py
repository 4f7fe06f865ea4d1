"""How long each stage took when it last ran, from the artifacts that the project's runs leave in Prefect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from uuid import UUID

from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort

from lcmlora.flows import outcomes
from lcmlora.flows.standing import server
from lcmlora.io.parsing import Malformed, parse_json

_PAGE = 200  # artifacts; Prefect returns no more in one answer


def read(runs: Sequence[UUID]) -> dict[str, dict[str, float]]:
    """Returns the seconds of stages: by the artifact's key, then by stage.

    Args:
        runs: the project's flow runs. Other projects on the same server may leave artifacts under the same keys.

    Raises:
        Unavailable: Prefect does not answer.
    """
    if not runs:
        return {}
    asked = ArtifactFilter(
        key=ArtifactFilterKey(like_=outcomes.STAGES_KEY), flow_run_id=ArtifactFilterFlowRunId(any_=list(runs))
    )
    with server.Client() as client:
        return last(client.read_artifacts(artifact_filter=asked, sort=ArtifactSort.CREATED_DESC, limit=_PAGE))


def last(artifacts: Iterable[Artifact]) -> dict[str, dict[str, float]]:
    """Returns the seconds that each stage took last. What other programs left under such a key is left out.

    Args:
        artifacts: the newest first.
    """
    found: dict[str, dict[str, float]] = {}
    for artifact in artifacts:
        rows = artifact.data
        if isinstance(rows, str):
            try:
                rows = parse_json(rows)
            except Malformed:
                continue
        for row in rows if isinstance(rows, list) else ():
            stage, seconds = (row.get("stage"), row.get("seconds")) if isinstance(row, dict) else (None, None)
            if artifact.key and isinstance(stage, str) and isinstance(seconds, int | float):
                found.setdefault(artifact.key, {}).setdefault(stage, float(seconds))
    return found
