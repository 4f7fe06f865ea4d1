"""What becomes of names on the way from params.yaml through DVC and the shell to a verb: a real `dvc repro`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lcmlora import names
from lcmlora.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["emoji", "sd15", "noto-v1", "SSD-1B", "a", "1.5_x", "x" * 64, "console", "com10"])
def test_ordinary_names_are_names(name: str):
    assert names.check(name, "model") == name


def test_a_refused_name_is_told_in_a_line_whatever_it_is():
    for name in ("\x1b[31m" + "x" * 100_000, "a\nerror: b", "\ud800", "a\u202eb"):
        with pytest.raises(UserError) as refused:
            names.check(name, "model")
        assert str(refused.value).isascii() and "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_what_dvc_writes_as_options_are_the_arguments_of_a_verb():
    assert names.positional_arguments(["--model", "emoji", "--name", "noto-v1"]) == ["emoji", "noto-v1"]
    assert names.positional_arguments(["emoji", "--json"]) == ["emoji", "--json"]
    for words in (["--model"], ["--model", "--help"], ["--model", ""]):
        with pytest.raises(UserError, match=r"--model: .* is no name"):
            names.positional_arguments(words)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the commands of the project's own dvc.yaml, where `lcmlora` writes down its arguments."""
    folder = tmp_path_factory.mktemp("pipeline")
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    kept = {name: {"cmd": stages[name]["cmd"], "matrix": stages[name]["matrix"]} for name in ("encode", "style")}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": kept}))
    command = folder / "bin" / "lcmlora"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:], file=open('said', 'a'))\n")
    command.chmod(0o755)
    for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(words, cwd=folder, check=True)
    return folder


HOSTILE = ["x; touch y", "x'; touch y; '", '"; touch y; "', "$(touch y)", "`touch y`", "x\ntouch y\n", "x & touch y"]


def test_no_name_of_params_yaml_is_a_command(pipeline: Path):
    said = pipeline / "said"
    study = {"models": ["emoji"], "styles": HOSTILE}
    (pipeline / "params.yaml").write_text(yaml.safe_dump({"models": ["emoji", *HOSTILE], "study": study}))
    command = [sys.executable, "-m", "dvc", "repro", "--keep-going"]
    path = f"{pipeline / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, cwd=pipeline, env=os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"}, capture_output=True)
    assert not (pipeline / "y").exists()
    lines = said.read_text().splitlines()
    one_line = [name for name in HOSTILE if "\n" not in name]  # DVC has no command of two lines: it ends with an error
    wanted = [str(["encode", "--model", name]) for name in ["emoji", *one_line]]
    wanted += [str(["style", "--model", "emoji", "--name", name]) for name in one_line]
    assert sorted(lines) == sorted(wanted)


def test_every_stage_of_a_model_quotes_its_names():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert all("${" not in stage["cmd"].replace("${item}", "") for stage in stages.values())
