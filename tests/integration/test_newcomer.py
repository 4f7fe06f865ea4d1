"""A newcomer's way with the built wheel: a project in an empty folder, a run, and its adapter found from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.data.conftest import add, picture
from tests.integration.tracking_servers import MLflow
from tests.projects.upgrade import former
from tests.support import wheels
from tests.support.wheels import Environment

pytestmark = pytest.mark.integration

GIT = {f"GIT_{role}_{key}": "owl@example.org" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
GIT |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}

# What makes a run short. None of it makes the demo's reference stale, which comes with the wheel.
SHORT = {
    "distill": {"steps": 2, "batch": 4, "warmup": 0, "checkpoint_every": 2, "validate_every": 2},
    "evaluation": {"student_steps": [4], "latency_repeats": 1, "resamples": 0, "worst_captions": 2},
}
# And a reference that is drawn in seconds.
SMALL = {"pictures": 336, "batch": 56, "teacher_steps": 4, "solvers": ["ddim"], "solver_evaluations": [4]}
SMALL |= {"grid_rows": 2, "guidance_scales": [1.0, 8.5], "choosing_pictures": 16, "features": "efficientnet-lite0"}


@dataclass(frozen=True)
class Newcomer:
    """A person with two environments, of whom one makes adapters and the other only looks them up."""

    home: Path
    making: Environment
    looking: Environment
    registry: str

    def says(self, environment: Environment, *command: str, cwd: Path, status: int = 0) -> str:
        """Returns what a command prints, on both outputs, that ends with this status."""
        done = environment.run(*command, cwd=cwd, MLFLOW_TRACKING_URI=self.registry, **GIT)
        assert done.returncode == status, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Environment]:
    work = tmp_path_factory.mktemp("wheel")
    wheel = wheels.build_wheel(work)
    making, looking = (Environment(work / name, wheel) for name in ("making", "looking"))
    making.add_all()
    looking.add("registry")
    return making, looking


@pytest.fixture
def newcomer(environments: tuple[Environment, Environment], mlflow_server: MLflow, tmp_path: Path) -> Newcomer:
    """In a folder with a space in its name, and with own files and folders that have the names of packages."""
    home = tmp_path / "my owls"
    (home / "flows").mkdir(parents=True)
    (home / "flows" / "__init__.py").write_text("raise RuntimeError('these flows are mine')\n")
    for name in ("tasks.py", "prefect.py", "torch.py"):
        (home / name).write_text("raise RuntimeError('this module is mine')\n")
    return Newcomer(home, *environments, mlflow_server.uri)


def changed(params: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = yaml.safe_load(params.read_text())
    change(raw)
    params.write_text(yaml.safe_dump(raw))


def shorten(raw: dict[str, Any]) -> None:
    for section, values in SHORT.items():
        for settings in (raw, *raw["bases"].values()):
            if settings is raw or section in settings:
                settings[section] = settings.get(section, {}) | values


def run_and_look_up(newcomer: Newcomer, project: Path, model: str) -> None:
    """Runs the project, promotes its adapter, and looks it up from another environment and folder."""
    making, looking = newcomer.making, newcomer.looking
    elsewhere = newcomer.home.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("flows", "tasks.py", "prefect.py", "torch.py"):
        (project / name).symlink_to(newcomer.home / name)
    # An adapter of two steps beats the solvers by chance alone, so a person decides.
    told = newcomer.says(making, "lcmlora", "run", "--no-promote", cwd=project)
    assert f"lcm-lora-{model}/1 (new)" in told, told
    shown = newcomer.says(making, "lcmlora", "status", cwd=project)
    assert f"lcm-lora-{model}" in shown, shown
    promote = ("lcmlora", "registry", "promote", f"{model}/1", "--override", "--reason", "to look at")
    assert f"lcm-lora-{model}@champion is lcm-lora-{model}/1" in newcomer.says(making, *promote, cwd=project)

    listed = newcomer.says(looking, "lcmlora", "registry", "list", model, cwd=elsewhere)
    assert f"lcm-lora-{model}" in listed and "champion" in listed
    pulled = ("lcmlora", "registry", "pull", f"{model}@champion", "--out", "pulled")
    newcomer.says(looking, *pulled, cwd=elsewhere)
    weights = "pytorch_lora_weights.safetensors"
    assert (elsewhere / "pulled" / weights).read_bytes() == (project / "release" / model / weights).read_bytes()
    assert not list(looking.packages.glob("torch")) and [path.name for path in elsewhere.iterdir()] == ["pulled"]
    draw = ("--prompt", "owl", "--steps", "4", "--out", "owl.png")
    newcomer.says(making, "lcmlora", "generate", "--adapter", f"{model}@champion", *draw, cwd=project)
    with Image.open(project / "owl.png") as drawn:
        assert drawn.width == drawn.height


@pytest.mark.slow
def test_the_demo(newcomer: Newcomer) -> None:
    newcomer.says(newcomer.making, "lcmlora", "init", "demo", "--base", "emoji", cwd=newcomer.home)
    project = newcomer.home / "demo"
    changed(project / "params.yaml", shorten)
    run_and_look_up(newcomer, project, "emoji")


@pytest.mark.slow
def test_a_base_and_pictures_of_ones_own(newcomer: Newcomer, miniatures: Callable[[str], Path]) -> None:
    home = newcomer.home
    (home / "tiny owl xl").symlink_to(miniatures("sdxl"))
    for number in range(24):
        add(home / "my pictures", f"{number}.png", f"subject {number}", picture(number))
    own = ("--base", "tiny owl xl", "--like", "sdxl", "--data", "my pictures", "--publish", "releases of mine")
    newcomer.says(newcomer.making, "lcmlora", "init", "adapters", *own, cwd=home)
    project = home / "adapters"

    def small(raw: dict[str, Any]) -> None:
        shorten(raw)
        raw["evaluation"] |= SMALL
        raw["data"]["min_side"] = 16

    changed(project / "params.yaml", small)
    run_and_look_up(newcomer, project, "tiny-owl-xl")


def test_a_project_of_an_earlier_version_is_upgraded(newcomer: Newcomer) -> None:
    project = former.make(newcomer.home / "of 2025")
    told = newcomer.says(newcomer.making, "lcmlora", "upgrade", "--no-estimate", "--yes", cwd=project)
    assert "0.2.0" in told and "distill" in told, told
    newcomer.says(newcomer.making, "lcmlora", "check", cwd=project)
    assert (project / ".lcmlora" / "project.json").is_file()
