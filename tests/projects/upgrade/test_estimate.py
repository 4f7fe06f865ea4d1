"""What an upgrade says that a stale distillation costs: real steps of a miniature, where its latent cache is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from lcmlora.cli import projects
from lcmlora.project import Project
from lcmlora.projects.upgrade.costs import Cost
from tests.support import params
from tests.support.miniature import RESOLUTION, save_base

LATENTS = Path(__file__).parents[2] / "stages" / "inputs" / "latents"


def test_the_doctor_tries_steps_on_a_cache_and_says_why_it_cannot(tmp_path: Path):
    project = Project(tmp_path)
    base = {"source": str(save_base(project.base("mini"))), "resolution": RESOLUTION, "license": "mit"}
    raw = params.raw() | {"models": ["mini"], "bases": {"mini": base}}
    raw["distill"] |= {"steps": 3, "batch": 4, "validation_pictures": 2, "device": "cpu"}
    project.params_file.write_text(yaml.safe_dump(raw))
    settings = project.settings()
    assert projects._estimated(project, settings, "mini") is None  # without a cache
    shutil.copytree(LATENTS, project.latents("mini"))
    found = projects._estimated(project, settings, "mini")
    assert found is not None and found.source == "doctor" and found.seconds is not None and found.seconds > 0
    (project.latents("mini") / "manifest.json").write_text("{")
    found = projects._estimated(project, settings, "mini")
    assert isinstance(found, Cost) and found.seconds is None and "manifest.json" in found.source
