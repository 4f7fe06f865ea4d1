import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner, Result

from lcmlora.cli.main import add_declared_verbs, app
from lcmlora.cli.shell.verbs import HIDDEN, PANELS

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


def test_help_is_shown_without_heavy_imports(project: Path):
    heavy = ("torch", "diffusers", "mlflow", "pydantic")
    probe = f"import sys, lcmlora.cli.main; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"
    shown = _lcmlora(project, "--help")
    assert shown.returncode == 0
    for verb in ("check", "config", "prepare", "distill", "generate"):
        assert verb in shown.stdout


@pytest.fixture(scope="module", autouse=True)
def declared() -> None:
    """The verbs that pyproject.toml declares, which an installed package finds by its metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["lcmlora.verbs"]
    add_declared_verbs(EntryPoint(name, value, "lcmlora.verbs") for name, value in entries.items())


def _ended(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="lcmlora")


def _panels(text: str) -> dict[str, list[str]]:
    """Returns the verbs by panel, as --help shows them."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.match(r"╭─ (.*?) ─+╮$", line):
            names = found.setdefault(title[1], [])
        elif name := re.match(r"│ ([a-z]+)  ", line):
            names.append(name[1])
    return found


def test_help_shows_every_verb_in_its_panel_and_hides_those_that_only_other_commands_call():
    shown = _panels(_ended("--help").stdout)
    del shown["Options"]
    verbs = get_command(app).commands
    present = {title: [name for name in names if name in verbs] for title, names in PANELS.items()}
    assert shown == {title: names for title, names in present.items() if names}
    assert set(HIDDEN) == {name for name, verb in verbs.items() if verb.hidden}
    assert all("Usage: lcmlora " in _ended(name, "--help").stdout for name in HIDDEN)


def test_every_verb_and_every_part_of_one_has_a_help_page_with_an_example_outside_a_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name, verb in get_command(app).commands.items():
        parts = [[name], *([name, part] for part in getattr(verb, "commands", ()))]
        for words in parts:
            page = _ended(*words, "--help")
            assert page.exit_code == 0, words
            assert (hasattr(verb, "commands") and len(words) == 1) or re.search(r"Examples?:", page.stdout), words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["retrain"], "`lcmlora run`: Bring every model up to date"),
        (["train"], "`lcmlora run`"),
        (["stop"], "`lcmlora down`"),
        (["promote", "emoji/3"], "`lcmlora registry promote`: Make a version champion"),
        (["distil", "emoji"], "did you mean distill"),
        (["xyz"], "`lcmlora --help` lists all of them"),
    ],
)
def test_a_word_that_is_no_verb_ends_with_the_verb_that_is_meant(words: list[str], hint: str):
    ended = _ended(*words)
    assert ended.exit_code == 2
    message = " ".join(re.sub("[│╭╮╰╯─]", " ", ended.stderr).split())
    assert f"there is no verb '{words[0]}'" in message and hint in message
    assert "pretrain" not in message


def test_a_verb_of_another_package_comes_last_and_a_broken_one_is_told(capsys: pytest.CaptureFixture[str]):
    broken = EntryPoint("broken", "no_such_package.verbs:broken", "lcmlora.verbs")
    added = EntryPoint("owls", "tests.support.additions:owls", "lcmlora.verbs")
    try:
        add_declared_verbs([broken, added])
        assert "the verb broken as no_such_package.verbs:broken, and No module named" in capsys.readouterr().err
        *_, (last, names) = _panels(_ended("--help").stdout).items()
        assert (last, names) == ("Verbs of other packages", ["owls"])
        assert _ended("owls").stdout == "two owls\n"
    finally:
        app.registered_commands[:] = [each for each in app.registered_commands if each.name != "owls"]


def _completed(line: str, shell: str = "bash") -> list[str]:
    """Returns what pressing the tab key at the end of a command line offers."""
    asked = {"_LCMLORA_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    asked |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return CliRunner().invoke(app, env=asked, prog_name="lcmlora").stdout.split()


def test_a_shell_completes_verbs_options_and_the_names_of_params_yaml(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project)
    assert _completed("lcmlora eval") == ["evaluate"]
    assert "pretrain" not in _completed("lcmlora p")
    assert _completed("lcmlora distill ") == ["emoji"]
    assert _completed("lcmlora style emoji noto") == ["noto-v1"]
    assert "--other-base" in _completed("lcmlora generate --o")
    assert _completed("lcmlora generate --adapter em") == ["emoji", "emoji@champion"]
    assert any(line == "evaluate" for line in _completed("lcmlora eval", "fish"))
    monkeypatch.chdir(project.parent)
    assert _completed(f"lcmlora --project {project} distill e") == ["emoji"]
    assert _completed("lcmlora distill e") == []
    (project / "params.yaml").write_text("models: {")
    assert _completed(f"lcmlora --project {project} distill ") == []


def test_the_script_for_a_shell_asks_this_program():
    assert "_LCMLORA_COMPLETE=complete_bash $1" in _ended("--show-completion", "bash").stdout


def test_completion_imports_neither_torch_nor_the_models_of_settings(project: Path):
    code = "import sys, types; from lcmlora.cli.shell import completion; completion.bases(types.SimpleNamespace("
    code += "find_root=lambda: types.SimpleNamespace(params={})), ''); print({'torch', 'pydantic', 'mlflow'} & set("
    code += "sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert ended.stdout.strip() == "set()", ended.stderr


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
    assert ended.stderr.strip() == "error: params.yaml: distill.stepz: there is no such key; did you mean steps?"


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
    assert line.startswith(
        "error: release/emoji: no such file or folder; expected a folder, a .safetensors file, MODEL,"
    )
    ended = _lcmlora(project, "--params", "mine.yaml", *request)
    assert (
        ended.stderr.strip() == "error: mine.yaml: no such file; run in the project's folder or name it with --params"
    )


def test_check_prints_what_the_configuration_resolves_to(project: Path):
    ended = _lcmlora(project, "check")
    assert ended.returncode == 0
    assert ended.stdout.startswith("emoji: bases/emoji at 64 px")
