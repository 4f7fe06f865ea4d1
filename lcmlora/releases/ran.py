"""What the stages before `package` ran with, for provenance: their own records, not the state of the project now."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import lcmlora
from lcmlora.config import Config
from lcmlora.dvc_files import commits, stage_records
from lcmlora.dvc_files.commits import Commit
from lcmlora.io.parsing import JsonObject
from lcmlora.io.terminal import note
from lcmlora.project import Project
from lcmlora.releases.bundle import RanWith
from lcmlora.stages import Run

_STAGES = ("prepare", "encode", "reference", "distill", "evaluate")  # that every release comes from
_SECTIONS = {"data": "encode", "encode": "encode", "evaluation": "evaluate"}  # of provenance: the stage that read it


@dataclass(frozen=True)
class StagesRan:
    """What the stages of a release ran with.

    sections: the settings in force then, by section; those that are not known are missing.
    git: the project's commit when the adapter was trained; that of packaging where it is not known.
    versions: of the packages of that training; those of packaging where they are not known.
    """

    stages: dict[str, RanWith]
    packaging: RanWith
    sections: JsonObject
    git: Commit
    versions: dict[str, str]

    @classmethod
    def of(cls, model: str, config: Config, project: Project) -> StagesRan:
        """Returns what the present outputs of a model's stages were made with, as far as this machine knows.

        Raises:
            UserError: a file of records is damaged.
        """
        names = (*_STAGES, *(["polish"] if config.distill_for(model).polish else []))
        own = {stage: model if stage != "prepare" or config.has_own_data(model) else None for stage in names}
        found = {stage: stage_records.find(project, Run(stage, name), config) for stage, name in own.items()}
        known = {stage: record for stage, record in found.items() if record is not None}
        versions = {"python": platform.python_version(), "lcmlora": lcmlora.__version__}
        now = RanWith(git=commits.of_project(project.root), package=commits.of_package(), versions=versions)
        stages = {
            stage: RanWith.model_validate(record.model_dump(exclude={"output", "sections"}))
            for stage, record in known.items()
        }
        trained = stages.get("polish") or stages.get("distill", now)
        _warn(trained, now, model)
        return cls(
            stages=stages,
            packaging=now,
            sections={
                section: known[stage].sections[section]
                for section, stage in _SECTIONS.items()
                if stage in known and section in known[stage].sections
            },
            git=trained.git,
            versions=trained.versions,
        )


def _warn(trained: RanWith, now: RanWith, model: str) -> None:
    """Notes that the code is another one than that which the adapter was trained with."""
    if trained.git.commit and trained.git != now.git:
        note(
            f"note: {model} was trained at commit {trained.git.text} and is packaged at {now.git.text}; "
            "its provenance has both"
        )
