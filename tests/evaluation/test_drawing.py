"""Workers that draw the image sets of one reference and one evaluation together."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lcmlora import bases
from lcmlora.config import Data, Launch
from lcmlora.errors import UserError
from lcmlora.evaluation.evaluate import evaluate_student
from lcmlora.evaluation.reference import draw_reference
from lcmlora.evaluation.sets.drawing import MakeDrawer, drawers
from lcmlora.parallel.workers import workers
from lcmlora.plugins import FEATURES
from tests.evaluation.conftest import CPU, Halves, Quarters, made_of, settings

pytestmark = pytest.mark.usefixtures("small_features")

ON_RAY = pytest.param(
    Launch(engine="ray", processes=2),
    marks=[pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")],
    id="ray",
)


@dataclass(frozen=True)
class Load:
    """Loads a miniature and the features of these tests."""

    folder: Path

    def __call__(self) -> bases.LoadedBase:
        FEATURES.register("quarters", Quarters)
        FEATURES.register("halves", Halves)
        torch.set_num_threads(1)
        return bases.load("mini", made_of(self.folder), self.folder, device=CPU)


@dataclass(frozen=True)
class LoadOnce(Load):
    """The first worker that has loaded them dies at its third forward of the network."""

    marks: Path

    def __call__(self) -> bases.LoadedBase:
        base = super().__call__()
        forwards: list[int] = []

        def die(*_: object) -> None:
            forwards.append(1)
            (self.marks / str(os.getpid())).touch()
            if len(forwards) == 3 and not (self.marks / "killed").exists():
                with contextlib.suppress(FileExistsError):  # the other worker is dead already
                    (self.marks / "killed").touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)

        base.network.register_forward_pre_hook(die)
        return base


@pytest.mark.parametrize("launch", [pytest.param(Launch(processes=2), id="local"), ON_RAY])
def test_two_workers_of_which_one_is_killed_draw_the_bytes_that_one_process_draws(
    base: bases.LoadedBase,
    base_folder: Path,
    data: Data,
    pictures: Path,
    reference: Path,
    tmp_path: Path,
    launch: Launch,
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    load, out = LoadOnce(base_folder, marks), (tmp_path / "s", tmp_path / "reference", tmp_path / "timings")
    with drawers(launch, load, base, settings()) as many:
        draw_reference(base, data, settings(), pictures, *out, many)
    assert (marks / "killed").exists() and len(list(marks.iterdir())) > 2
    for path in sorted(path for path in reference.rglob("*") if path.is_file()):
        assert (tmp_path / "reference" / path.relative_to(reference)).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("launch", [pytest.param(Launch(), id="local"), ON_RAY])
def test_the_drawers_of_an_evaluation_have_its_adapter(
    base: bases.LoadedBase,
    base_folder: Path,
    adapter: Path,
    data: Data,
    pictures: Path,
    reference: Path,
    tmp_path: Path,
    launch: Launch,
) -> None:
    load = Load(base_folder)
    shutil.copytree(reference.with_name("timings"), tmp_path / "timings")
    found = []
    for name, make in (("drawers", MakeDrawer(load, base.dtype, settings(), adapter)), ("none", None)):
        root = tmp_path / name
        root.mkdir()
        files = (root / "scratch", root / "evaluation", root / "metrics.json", root / "plot.csv", tmp_path / "timings")
        with workers(launch, make) if make else nullcontext() as many:
            evaluate_student(base, adapter, data, settings(), pictures, reference, *files, drawers=many)
        written = sorted(path for path in root.rglob("*") if path.is_file())
        found.append({str(path.relative_to(root)): path.read_bytes() for path in written})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    assert [name for name, content in found[0].items() if found[1][name] != content] == []


def test_a_worker_whose_base_has_another_precision_is_refused(base: bases.LoadedBase) -> None:
    make = MakeDrawer(lambda: base, torch.bfloat16, settings(), None)
    with pytest.raises(UserError, match=r"mini: a worker would draw in torch\.float32 on its cpu, and the process"):
        make()
