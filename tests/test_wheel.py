"""What one installs: the wheel, in fresh environments, with what its extras bring and nothing else."""

from __future__ import annotations

import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import lcmlora
from tests.support import wheels
from tests.support.wheels import Environment

ROOT = Path(__file__).parents[1]
UNUSED = "http://127.0.0.1:9"  # the port `discard`, where nothing listens

# What settings, lookups and releases consist of, which therefore load without an extra.
LIGHT = ("cli.main", "config", "dvc_files", "plugins", "project", "settings", "stages", "templates")
LIGHT += tuple(f"registry.{name}" for name in ("lookup", "promotion", "references", "registration", "tracking"))
LIGHT += tuple(f"releases.{name}" for name in ("bundle", "catalog", "manifest", "publish", "stores", "trust"))

# Imports every module of the package, and prints what hindered those that did not load.
_IMPORT_ALL = """
import importlib, json, os, pkgutil, sys
import lcmlora
from lcmlora import extras

hindered = {}
for module in pkgutil.walk_packages(lcmlora.__path__, "lcmlora.", onerror=lambda name: None):
    if module.name.endswith(("__main__", "pyfunc_model")):  # which run when they are imported
        continue
    try:
        importlib.import_module(module.name)
    except Exception as error:
        explained = extras.missing(error)
        hindered[module.name] = str(explained) if explained else repr(error)
print(json.dumps(hindered))
"""

# What a program meets that uses the library without its extras.
_LIBRARY = """
import sys
from pathlib import Path
import lcmlora
from lcmlora import UserError, registry
from lcmlora.config import Registry
from lcmlora.registry import tracking

settings = Registry(tracking_uri=sys.argv[1], experiment="none")

def said(call):
    try:
        call()
    except UserError as error:
        print(f"{type(error).__name__}: {error}")

said(lambda: lcmlora.load_pipeline("lcm-lora-owl@champion", settings=settings))
said(lambda: lcmlora.bases.load)
said(lambda: registry.versions(settings))
with tracking.log_run(settings, "owl", {}) as run:
    print(run.id)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The sdist, the wheel made from it, and the wheel made from the checkout."""
    return wheels.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environments(
    built: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Environment]:
    """Returns the environment with the packages of an extra: none, one that is light, or all of this one."""

    @cache
    def make(kind: str) -> Environment:
        made = Environment(tmp_path_factory.mktemp("environment") / (kind or "bare"), built[1])
        if kind == "all":
            made.add_all()
        else:
            made.add(*filter(None, [kind]))
        return made

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a space in its name, in which own files and folders have the names of packages."""
    mine = tmp_path / "my owls"
    (mine / "flows").mkdir(parents=True)
    (mine / "flows/__init__.py").write_text("raise RuntimeError('these flows are mine')\n")
    (mine / "tasks.py").write_text("raise RuntimeError('these tasks are mine')\n")
    (mine / "mlflow").mkdir()
    return mine


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the line with which a command refuses."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def tracked(folder: str) -> Iterator[str]:
    """Yields the files of a folder in Git, and those that are new; files behind a link by the link's name."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_dir():  # a link, which Git does not follow
            behind = str((ROOT / name).resolve().relative_to(ROOT))
            yield from (name + each.removeprefix(behind) for each in tracked(behind))
        elif (ROOT / name).exists():
            yield name


def test_sdist_and_wheel_have_every_file_of_the_package_and_no_other(built: tuple[Path, Path, Path]):
    own = set(tracked("lcmlora"))
    sdist, wheel, direct = built
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    packaged = {name for name, member in members.items() if name.startswith("lcmlora/") and not member.isdir()}
    assert packaged == own
    assert all(members[name].isfile() for name in own), "links lead nowhere once they are unpacked"
    contents = []
    for each in (wheel, direct):
        with zipfile.ZipFile(each) as archive:
            names = archive.namelist()
            facts = f"lcmlora-{lcmlora.__version__}.dist-info/"
            assert {name for name in names if not name.startswith(facts)} == own
            contents.append({name: archive.read(name) for name in own})
    assert contents[0] == contents[1] == {name: (ROOT / name).read_bytes() for name in own}


def test_the_wheel_claims_one_name(environments: Callable[[str], Environment]):
    packages = environments("all").packages
    of_uv = {"_virtualenv.py", "_virtualenv.pth", "__pycache__"}
    claimed = {path.name for path in packages.iterdir()} - of_uv - {"tests.pth"}
    assert claimed == {"lcmlora", f"lcmlora-{lcmlora.__version__}.dist-info"}


@pytest.mark.slow
def test_the_base_has_the_command_line_and_settings(environments: Callable[[str], Environment], folder: Path):
    bare = environments("")
    shown = bare.run("lcmlora", "--version", cwd=folder)
    assert (shown.returncode, shown.stdout) == (0, f"lcmlora {lcmlora.__version__}\n"), shown.stderr
    module = bare.run("python", "-m", "lcmlora", "--version", cwd=folder)
    assert (module.returncode, module.stdout) == (0, shown.stdout), module.stderr
    for arguments in ([], ["distill"], ["registry", "list"], ["status"]):
        helped = bare.run("lcmlora", *arguments, "--help", cwd=folder)
        assert helped.returncode == 0 and "Usage: lcmlora" in helped.stdout, helped.stderr
    params = (ROOT / "params.yaml").read_text()
    (folder / "params.yaml").write_text(params)
    for arguments in (["check"], ["config"], ["resolve"], ["releases", "list", "--to", "releases"]):
        done = bare.run("lcmlora", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert (folder / "params.yaml").read_text() == params


@pytest.mark.parametrize(
    ("arguments", "needed_by", "extra"),
    [
        (["distill", "emoji"], "lcmlora distill needs torch, diffusers, peft and 9 more, which are", "train"),
        (["doctor", "emoji"], "lcmlora doctor needs torch, diffusers, peft and 9 more, which are", "train"),
        (["data", "preview"], "lcmlora data preview needs torch, diffusers, peft and 9 more, which are", "train"),
        (["generate", "--adapter", "a", "--prompt", "owl", "--out", "owl.png"], "torch is", "draw"),
        (["bases"], "torch is", "draw"),
        (["registry", "list"], "mlflow is", "registry"),
        (
            ["releases", "list", "--to", "s3://owls/adapters"],
            "--to: bucket owls needs boto3, tenacity, which are",
            "registry",
        ),
        (["status"], "lcmlora status needs", "pipeline"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_verb_without_its_extra_ends_with_the_command_that_installs_it(
    environments: Callable[[str], Environment], folder: Path, arguments: list[str], needed_by: str, extra: str
):
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    line = one_line(environments("").run("lcmlora", *arguments, cwd=folder))
    assert line.startswith(f"error: {needed_by} ") and line.endswith(f"not installed: pip install 'lcmlora[{extra}]'")


def test_every_module_loads_or_is_explained_by_an_extra(environments: Callable[[str], Environment], folder: Path):
    hindered = {}
    for kind in ("", "all"):
        done = environments(kind).run("python", "-c", _IMPORT_ALL, cwd=folder)
        assert done.returncode == 0, done.stderr
        hindered[kind] = json.loads(done.stdout.splitlines()[-1])
    assert hindered["all"] == {}
    assert [line for line in hindered[""].values() if "not installed: pip install 'lcmlora[" not in line] == []
    assert [name for name in hindered[""] if name.removeprefix("lcmlora.").startswith(LIGHT)] == []


def test_the_library_without_its_extras_says_what_to_install(environments: Callable[[str], Environment], folder: Path):
    done = environments("").run("python", "-c", _LIBRARY, UNUSED, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "MissingExtra: load_pipeline needs torch, diffusers, peft and 6 more, which are not installed: "
        "pip install 'lcmlora[draw]'",
        "MissingExtra: torch is not installed: pip install 'lcmlora[draw]'",
        "MissingExtra: mlflow is not installed: pip install 'lcmlora[registry]'",
        "None",
    ]
    assert done.stderr.splitlines() == [
        "warning: mlflow is not installed: pip install 'lcmlora[registry]'; training goes on without it, and the "
        "adapter gets its run when it is registered"
    ]


def test_lookups_need_the_extra_registry_alone(environments: Callable[[str], Environment], folder: Path):
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    looking = environments("registry")
    unreached = {"MLFLOW_TRACKING_URI": UNUSED, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    line = one_line(looking.run("lcmlora", "registry", "list", cwd=folder, **unreached))
    assert line.startswith(f"error: MLflow at {UNUSED}: ") and line.endswith("; ask again later")
    local = one_line(looking.run("lcmlora", "registry", "list", cwd=folder, MLFLOW_TRACKING_URI="sqlite:///owls.db"))
    assert local == "error: sqlalchemy is not installed: pip install 'lcmlora[pipeline]'"
    for package in ("torch", "prefect", "dvc"):
        assert not (looking.packages / package).exists()


def test_templates_presets_flows_and_entry_points_come_with_the_wheel(
    environments: Callable[[str], Environment], folder: Path
):
    probe = """
import importlib.metadata, json
from pathlib import Path
import lcmlora, lcmlora.flows.retrain, lcmlora.tasks.models
from lcmlora.settings import presets
from lcmlora.templates.loading import load_template

mine = Path(lcmlora.__file__).parent
assert presets.load() and load_template("rejected.html.j2")
others = [name for name in ("flows", "tasks") if importlib.util.find_spec(name).origin.startswith(str(mine.parent))]
places = [str(Path(module.__file__).parent) for module in (lcmlora.flows, lcmlora.tasks)]
for group in ("lcmlora.verbs", "mlflow.app", "console_scripts"):
    for entry in importlib.metadata.entry_points(group=group):
        if entry.dist.name == "lcmlora":
            assert callable(entry.load()), entry
print(json.dumps([str(mine), places, others, importlib.metadata.version("lcmlora")]))
"""
    environment = environments("all")
    done = environment.run("python", "-c", probe, cwd=folder)
    assert done.returncode == 0, done.stderr
    mine, places, others, version = json.loads(done.stdout.splitlines()[-1])
    assert Path(mine) == environment.packages / "lcmlora"
    assert places == [f"{mine}/flows", f"{mine}/tasks"]
    assert others == [] and version == lcmlora.__version__
