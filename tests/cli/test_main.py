import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
VERBS = (
    "check",
    "bases",
    "pretrain",
    "fetch",
    "prepare",
    "encode",
    "reference",
    "distill",
    "evaluate",
    "package",
)


def _lcmlora(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lcmlora", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the shipped params.yaml, set to read pictures from `in`."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["data"] |= {"source": "folder", "path": "in"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def test_help_names_every_verb_without_heavy_imports(project: Path):
    heavy = ("torch", "diffusers", "mlflow", "pydantic")
    probe = f"import sys, lcmlora.cli.main; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"
    shown = _lcmlora(project, "--help")
    assert shown.returncode == 0
    for verb in (*VERBS, "config", "convert", "combine", "generate"):
        assert verb in shown.stdout


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("check", "bases", "pretrain", "prepare")])
def test_an_unknown_model_is_one_clear_line(project: Path, verb: str):
    ended = _lcmlora(project, verb, "sd99")
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: unknown model 'sd99'") and "emoji" in line


def test_a_params_key_that_does_not_exist_is_one_clear_line(project: Path):
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["distill"] = {"stepz": 3}
    (project / "params.yaml").write_text(yaml.safe_dump(raw))
    ended = _lcmlora(project, "check")
    assert ended.returncode == 2
    assert ended.stderr.strip() == "error: params.yaml: distill.stepz: there is no such key"


def test_an_empty_folder_is_one_clear_line_and_leaves_nothing(project: Path):
    (project / "in").mkdir()
    ended = _lcmlora(project, "prepare")
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: in:")
    assert not (project / "data" / "pictures").exists()


def test_a_base_that_is_not_there_is_one_clear_line(project: Path):
    ended = _lcmlora(project, "reference", "emoji")
    assert ended.returncode == 2
    assert ended.stderr.strip() == "error: bases/emoji: no such base folder"


def test_an_adapter_or_a_configuration_that_is_not_there_is_one_clear_line(project: Path):
    request = ("generate", "--adapter", "release/emoji", "--prompt", "owl", "--out", "owl.png")
    ended = _lcmlora(project, *request)
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: release/emoji: no such adapter; expected a folder, a .safetensors file, models:/")
    ended = _lcmlora(project, "--params", "mine.yaml", *request)
    assert (
        ended.stderr.strip() == "error: mine.yaml: no such file; run in the project's folder or name it with --params"
    )


def test_check_prints_what_the_configuration_resolves_to(project: Path):
    ended = _lcmlora(project, "check")
    assert ended.returncode == 0
    assert ended.stdout.startswith("emoji: bases/emoji at 64 px")
