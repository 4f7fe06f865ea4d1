"""`lcmlora init`: projects of every kind of base, in every kind of folder, and what it refuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from typer.testing import CliRunner

from lcmlora.cli.main import app
from lcmlora.dvc_files import resolved
from lcmlora.errors import Unavailable, UserError
from lcmlora.project import Project
from lcmlora.projects import generated, record
from tests.data.conftest import NODE_MODULES, add, picture
from tests.support.miniature import RESOLUTION
from tests.support.original import save_original

ROOT = Path(__file__).parents[2]
IDENTITY = {f"GIT_{role}_{key}": "owl@example.org" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}


@pytest.fixture(autouse=True)
def committer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Git knows a name, from nothing but the environment."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for name, value in IDENTITY.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with captioned pictures and prompts in it."""
    folder = tmp_path / "work of mine"
    for number in range(24):
        add(folder / "my pictures", f"{number}.png", f"subject {number}", picture(number))
    (folder / "prompts.txt").write_text("an owl\na fox\n")
    monkeypatch.chdir(folder)
    return folder


def init(*arguments: object) -> list[str]:
    """Runs the verb in this process and returns what it says on standard output. Raises UserError as it does."""
    result = CliRunner().invoke(app, ["init", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def params_of(*arguments: object) -> dict[str, Any]:
    """Returns the params.yaml that the verb would write."""
    text = "\n".join(init("new", "--dry-run", *arguments)).partition("\n\nnew/")[0]
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def program(folder: Path) -> Path:
    """Puts a program `lcmlora` into a folder, as an installed package does, and returns the folder."""
    folder.mkdir()
    script = folder / "lcmlora"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m lcmlora "$@"\n')
    script.chmod(0o755)
    return folder


def test_a_project_of_own_pictures_and_a_base_in_a_folder_runs_its_first_stages(
    here: Path, miniatures: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (here / "bases").mkdir()
    (here / "bases" / "tiny sdxl").symlink_to(miniatures("sdxl"))
    root = here / "my adapters"
    # Names of ours from before there was a package of one name.
    (root / "flows").mkdir(parents=True)
    (root / "flows" / "__init__.py").write_text("raise RuntimeError('this is not the package')\n")
    (root / "tasks.py").write_text("raise RuntimeError('this is not the package')\n")
    init("my adapters", "--base", "bases/tiny sdxl", "--like", "sdxl", "--data", "my pictures")
    written = yaml.safe_load((root / "params.yaml").read_text())
    assert written == {
        "models": ["tiny-sdxl"],
        "data": {"source": "folder", "path": str(here / "my pictures")},
        "bases": {"tiny-sdxl": {"source": str(here / "bases/tiny sdxl"), "like": "sdxl", "license": "unknown"}},
    }
    assert len((root / "params.yaml").read_text().splitlines()) <= 20
    settings = Project(root).settings()
    assert settings.base("tiny-sdxl").resolution == RESOLUTION and settings.distill_for("tiny-sdxl").steps == 1000
    assert resolved.is_current(settings, root / "resolved.yaml")
    assert git(root, "status", "--porcelain") == "?? flows/\n?? tasks.py\n"
    assert git(root, "log", "--format=%s").strip() == "Make a project of lcmlora"
    assert {"params.yaml", "dvc.yaml", "resolved.yaml", ".lcmlora/project.json"} <= {*git(root, "ls-files").split("\n")}

    text = (root / "params.yaml").read_text() + "\nevaluation: {features: efficientnet-lite0}\n"
    (root / "params.yaml").write_text(text.replace("path:", "min_side: 16\n  path:"))
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{program(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with Repo(str(root)) as repo:
        assert [stage.addressing for stage in repo.reproduce(["resolve", "prepare"])] == ["resolve", "prepare"]
        assert repo.status(["prepare"]) == {}
    assert json.loads((root / "data/pictures/report.json").read_text())["read"] == 24
    assert git(root, "status", "--porcelain", "--untracked-files=all").split("\n") == [
        *(" M params.yaml", " M resolved.yaml", "?? dvc.lock", "?? flows/__init__.py", "?? tasks.py", "")
    ]


def test_the_demo_has_all_that_this_repository_has_and_its_reference_is_not_drawn_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    root = here / "demo"
    (root / "node_modules").mkdir(parents=True)
    (root / "node_modules" / ".package-lock.json").symlink_to(NODE_MODULES / ".package-lock.json")
    init("demo", "--base", "emoji")
    weights = ("bases/emoji/unet/diffusion_pytorch_model.safetensors", "loras/fluent-emoji-high-contrast.safetensors")
    for name in ("params.yaml", "package.json", "package-lock.json", ".npmrc", *weights):
        assert (root / name).read_bytes() == (ROOT / name).read_bytes()
    # The stage that makes the base, and documents of the repository, are the repository's alone.
    ours, theirs = ((folder / "dvc.yaml").read_text() for folder in (ROOT, root))
    stages = {text: yaml.safe_load(text)["stages"] for text in (ours, theirs)}
    assert stages[ours].pop("pretrain")["frozen"] and stages[ours] == stages[theirs]
    locked = {folder: yaml.safe_load((folder / "dvc.lock").read_text())["stages"] for folder in (ROOT, root)}
    assert locked[ROOT].pop("pretrain") and locked[ROOT] == locked[root]
    assert git(root, "status", "--porcelain") == "" and len(git(root, "ls-files", "bases").split()) == 12

    monkeypatch.chdir(root)
    with Repo(str(root)) as repo:
        assert repo.status(["reference@emoji"])["reference@emoji"] == [
            {"changed deps": {"data/pictures": "deleted"}},
            {"changed outs": {"reference/emoji": "deleted"}},
        ]
        repo.checkout(["reference@emoji"])
    assert (root / "reference/emoji/reference.json").is_file()


def test_a_single_file_with_its_configuration_is_a_base(here: Path, miniatures: Callable[[str], Path]):
    save_original(miniatures("sdxl"), here / "mine v2.safetensors")
    (here / "configuration").symlink_to(miniatures("sdxl"))
    found = params_of(
        "--base", "mine v2.safetensors", "--config", "configuration", "--like", "sdxl", "--prompts", "prompts.txt"
    )
    assert found["models"] == ["mine-v2"]
    expected = {"source": str(here / "mine v2.safetensors"), "config": str(here / "configuration"), "like": "sdxl"}
    assert found["bases"] == {"mine-v2": expected | {"license": "unknown"}}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--base", "sdxl", "--prompts", "prompts.txt"), {"models": ["sdxl"], "data": {"source": "prompts"}}),
        (("--base", "segmind/SSD-1B", "--data", "prompts.txt"), {"models": ["ssd1b"], "data": {"source": "prompts"}}),
        (("--base", "sd15", "--data", "s3://bucket/set", "--kind", "parquet"), {"data": {"source": "parquet"}}),
        (("--base", "sd15", "--data", "my pictures", "--publish", "s3://b/lcm"), {"publish": {"to": "s3://b/lcm"}}),
        (("--base", "sd15", "--data", "my pictures", "--publish", "new/shelf"), {"publish": {"to": "shelf"}}),
    ],
)
def test_published_bases_need_no_entry_and_sources_and_stores_are_recognised(
    here: Path, arguments: tuple[str, ...], expected: dict[str, Any]
):
    found = params_of(*arguments)
    for section, values in expected.items():
        assert found[section] == values if isinstance(values, list) else values.items() <= found[section].items()
    assert "bases" not in found and not (here / "new").exists()


def test_paths_in_the_project_are_relative_to_it(here: Path, miniatures: Callable[[str], Path]):
    (here / "new").mkdir()
    (here / "my pictures").rename(here / "new" / "my pictures")
    (here / "new" / "base").symlink_to(miniatures("sdxl"))
    found = params_of("--base", here / "new/../new/base", "--like", "sdxl", "--data", "./new/my pictures")
    assert found["data"]["path"] == "my pictures"
    assert params_of("--base", "new/base", "--like", "sdxl", "--data", "new/my pictures")["bases"]["base"] == {
        "source": "./base",
        "like": "sdxl",
        "license": "unknown",
    }


def test_a_folder_keeps_its_files_and_a_repository_above_it_gets_no_commit(here: Path):
    git(here, "init", "--quiet")
    root = here / "team" / "adapters"
    root.mkdir(parents=True)
    (root / ".gitignore").write_text("/secret\n/bases/*")
    (root / "README.md").write_text("Ours.\n")
    arguments = ("team/adapters", "--base", "sdxl", "--data", "my pictures", "--with", "kubernetes", "--with", "docker")
    result = CliRunner().invoke(app, ["init", *arguments], catch_exceptions=False)
    assert f"the project belongs to the Git repository {here}; commit its files there" in result.stderr
    assert (root / "README.md").read_text() == "Ours.\n"
    ignored = (root / ".gitignore").read_text().splitlines()
    assert ignored[:2] == ["/secret", "/bases/*"] and ignored.count("/bases/*") == 1 and "/scratch/" in ignored
    assert not (root / ".git").exists() and (root / ".dvc" / "config").is_file()
    assert subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True).returncode != 0
    found = record.read(root)
    assert found.options.workers == ("kubernetes", "docker") and "README.md" not in found.files
    files = generated.generated_files(Project(root).settings(), found.options)
    assert {"deploy/Dockerfile", "deploy/kubernetes/base/worker.yaml", "deploy/README.md"} <= found.files.keys()
    del files["README.md"]
    assert found == generated.recorded(files, found.options)
    with pytest.raises(UserError, match=r"team/adapters: is a project already; .*lcmlora upgrade"):
        init("team/adapters", "--base", "sdxl", "--data", "my pictures")


def test_what_is_in_the_way_stops_it_before_anything_is_written(here: Path):
    root = here / "new"
    root.mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "prefect.yaml").mkdir()
    with pytest.raises(UserError, match=r"^new: has dvc\.yaml, prefect\.yaml, which a project has, too"):
        init("new", "--base", "sdxl", "--data", "my pictures")
    assert sorted(path.name for path in root.iterdir()) == ["dvc.yaml", "prefect.yaml"]
    (here / "file").write_text("")
    with pytest.raises(UserError, match=r"^file: is a file; name a folder"):
        init("file", "--base", "sdxl", "--data", "my pictures")


def test_without_a_name_of_a_committer_the_files_are_staged(here: Path, monkeypatch: pytest.MonkeyPatch):
    for name in IDENTITY:
        monkeypatch.delenv(name)
    result = CliRunner().invoke(app, ["init", "new", "--base", "sdxl", "--data", "my pictures"], catch_exceptions=False)
    assert "the files are staged, and not committed: Git does not know your name" in result.stderr
    assert (here / "new/.lcmlora/project.json").is_file()
    assert "A  params.yaml" in git(here / "new", "status", "--porcelain").splitlines()


def test_without_git_and_npm_there_is_a_project_all_the_same(here: Path, monkeypatch: pytest.MonkeyPatch):
    (here / "empty").mkdir()
    monkeypatch.setenv("PATH", str(here / "empty"))
    with pytest.raises(UserError, match=r"npm is not installed.*run `npm ci --ignore-scripts` in demo"):
        init("demo", "--base", "emoji")
    assert record.read(here / "demo").options.name == "demo"
    assert "no_scm = True" in (here / "demo/.dvc/config").read_text() and not (here / "demo/.git").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--base: is missing, and this is no terminal to ask on"),
        (("--base", "sdxl"), "--data: is missing, and this is no terminal to ask on"),
        (("--base", "sdxxl"), "--base: sdxxl: there is no such folder or file, and it is no published base .*sd15"),
        (("--base", "./owner/name"), "--base: ./owner/name: there is no such folder or file"),
        (("--base", "old.ckpt"), "--base: old.ckpt: a pickle can run any code"),
        (("--base", "my pictures"), "--base: my pictures: a diffusers base has a model_index.json, and there is none"),
        (("--base", "tiny", "--data", "my pictures"), "tiny: its family is not known; name it by --like"),
        (("--base", "tiny", "--like", "flux"), "--like: got 'flux': expected one of sd15, sd21, sdxl"),
        (("--base", "tiny", "--like", "sdxl", "--name", "a/b"), "--name: 'a/b' is no name"),
        (("--base", "tiny", "--like", "sdxl", "--config", "tiny"), "--config: goes with a .safetensors file"),
        (("--base", "sdxl", "--license", "mit"), "--license: the base sdxl has its own"),
        (("--base", "sdxl", "--data", "nowhere"), "--data: nowhere: no such folder or file$"),
        (("--base", "sdxl", "--data", "owner/owls"), "hf download --repo-type dataset owner/owls"),
        (("--base", "sdxl", "--data", "."), "--data: .: the project must not lie in its own data set"),
        (
            ("--base", "sdxl", "--data", "my pictures", "--kind", "zip"),
            "--kind: got 'zip': expected one of",
        ),
        (("--base", "sdxl", "--kind", "folder"), "--kind: goes with --data"),
        (("--base", "sdxl", "--prompts", "nowhere"), "--prompts: nowhere: no such file"),
        (("--base", "sdxl", "--data", "x", "--prompts", "y"), "--data and --prompts exclude each other"),
        (
            ("--base", "sdxl", "--data", "my pictures", "--publish", "gs://b"),
            "--publish: gs://b: expected one of",
        ),
        (("--base", "emoji", "--data", "my pictures"), "--base emoji is the demo and has data of its own"),
        (("--base", "emoji", "--like", "sd15"), "--like: the base emoji has its own"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(
    here: Path, miniatures: Callable[[str], Path], arguments: tuple[str, ...], message: str
):
    (here / "tiny").symlink_to(miniatures("sd15"))
    (here / "old.ckpt").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=message) as caught:
        init("new", *arguments)
    assert "\n" not in str(caught.value) and not (here / "new").exists()


class _Hub(BaseHTTPRequestHandler):
    """What the hub says about one model."""

    def do_GET(self) -> None:
        known = self.path.startswith("/api/models/owner/tuned")
        files = [{"rfilename": "unet/diffusion_pytorch_model.fp16.safetensors"}]
        body = {"id": "owner/tuned", "sha": "f" * 40, "siblings": files, "cardData": {"license": "openrail++"}}
        content = json.dumps(body if known else {"error": "Repository not found"}).encode()
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


def test_a_hub_id_is_pinned_to_its_newest_commit_with_its_variant_and_license(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    asked = ("--like", "sdxl", "--data", "my pictures")
    pinned = {"source": "owner/tuned", "revision": "f" * 40, "variant": "fp16", "like": "sdxl", "license": "openrail++"}
    try:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert params_of("--base", "owner/tuned", *asked)["bases"] == {"tuned": pinned}
        with pytest.raises(UserError, match=r"--base: owner/gone: .*Not Found"):
            init("new", "--base", "owner/gone", *asked)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(Unavailable, match=r"--base: the hub does not answer.*give it as owner/tuned@COMMIT"):
        init("new", "--base", "owner/tuned", *asked)
    assert params_of("--base", f"owner/tuned@{'a' * 40}", *asked)["bases"]["tuned"]["revision"] == "a" * 40


def test_a_person_at_a_terminal_is_asked_for_what_is_left_out(here: Path):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "lcmlora", "init", "new", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=terminal, stderr=terminal, stdout=subprocess.PIPE, env=environment)
    os.close(terminal)
    os.write(controller, b"sdxl\nmy pictures\n\n")
    printed, _ = process.communicate(timeout=60)
    shown = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert process.returncode == 0
    assert "The base (emoji for the demo" in shown and "The captioned pictures" in shown and "releases" in shown
    assert yaml.safe_load(printed.decode().partition("\n\nnew/")[0]) == {
        "models": ["sdxl"],
        "data": {"source": "folder", "path": str(here / "my pictures")},
    }
