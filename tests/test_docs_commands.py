"""Code blocks of README and docs: every command in them exists, and each block says which test runs it, or why none."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import logging
import re
import tomllib
from functools import cache
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from docs import command_line
from lcmlora.config import Config
from lcmlora.projects import settings_reference
from tests import test_guides
from tests.projects.test_settings_reference import unknown
from tests.support import code_blocks
from tests.support.code_blocks import ROOT, Block

BLOCKS = [block for page in code_blocks.pages() for block in code_blocks.blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("bash", "console", "sh")]
WRITTEN = ROOT / "docs/command-line.md"  # of the help of the verbs, whose own tests run them
NEEDS = {"gpu", "hub", "server", "docker", "hours"}
LANGUAGES = {
    "bash",
    "text",
    "python",
    "yaml",
    "toml",
    "json",
    "markdown",
    "ini",
    "dockerfile",
    "{toctree}",
    "{eval-rst}",
}
# Verbs that read settings and nothing else; a block of these alone needs no comment and is run here.
READING = {("check",), ("config",)}
# Programs of others, whose arguments are not looked at.
OTHERS = {
    *(
        "cd",
        "source",
        "export",
        "env",
        "ls",
        "cat",
        "cp",
        "sha256sum",
        "mkdir",
        "rm",
        "tar",
        "unset",
        "sudo",
        "diff",
        "grep",
        "jq",
    ),
    *("git", "curl", "ssh", "openssl", "docker", "kubectl", "nvidia-smi", "crontab", "systemctl", "journalctl"),
    *(
        "prefect",
        "mlflow",
        "aws",
        "rclone",
        "torchrun",
        "accelerate",
        "ray",
        "npm",
        "uv",
        "python3",
        "chmod",
        "chown",
        "watch",
    ),
}


def _ids(block: Block) -> str:
    return str(block)


def test_the_pages_have_blocks_of_commands() -> None:
    assert len(SHELL) > 25 and {block.page.name for block in SHELL} >= {"README.md", "CONTRIBUTING.md"}


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    assert WRITTEN.read_text() == command_line.page(), "run python -m docs.command_line"


@pytest.mark.parametrize("block", BLOCKS, ids=_ids)
def test_a_block_names_its_language(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block}: a language is one of {sorted(LANGUAGES)}"


@pytest.mark.parametrize("block", SHELL, ids=_ids)
def test_every_command_of_a_block_exists(block: Block) -> None:
    assert [fault for words in block.commands if (fault := fault_of(words))] == []


@pytest.mark.parametrize("block", [block for block in SHELL if block.page != WRITTEN], ids=_ids)
def test_a_block_is_run_by_a_test_or_says_what_it_needs(block: Block) -> None:
    if block.claim is None:
        assert all(tuple(words[1:2]) in READING for words in block.commands if words[0] == "lcmlora"), (
            f"{block}: put <!-- run by: tests/FILE.py::test_name --> or <!-- needs: gpu --> before it"
        )
        assert all(words[0] == "lcmlora" for words in block.commands), f"{block}: not only verbs that read settings"
        for words in block.commands:
            _run(words[1:])
        return
    key, values = block.claim
    if key == "needs":
        assert set(values) <= NEEDS, f"{block}: a need is one of {sorted(NEEDS)}"
        return
    if values == (test_guides.THIS,):
        assert block.page in test_guides.PAGES, f"{block}: {test_guides.THIS} runs blocks of docs/guides alone"
        return
    text = "".join(_text_of_test(value) for value in values)
    if "code_blocks.blocks(" in text:  # the test runs what stands here
        return
    verbs = {word for words in block.commands if words[0] == "lcmlora" for word in verb_of(words[1:])}
    assert [verb for verb in verbs if not re.search(rf"\b{verb}\b", text)] == [], f"{block}: not in {values}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=_ids)
def test_python_compiles_and_imports_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, str(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lcmlora":
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not _has(module, alias.name)] == []
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.split(".")[0] == "lcmlora"]
            assert [name for name in ours if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=_ids)
def test_yaml_has_settings_that_there_are(block: Block) -> None:
    values, schema = yaml.safe_load(block.text), settings_reference.json_schema(Config)
    if set(values) & set(schema["properties"]):  # else of another file, such as prefect.yaml
        assert unknown(values, schema, schema) == []


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("lcmlora check   # the pages' names", [["lcmlora", "check"]]),
        ("cd owls && lcmlora config distill.lr > lr.txt", [["cd", "owls"], ["lcmlora", "config", "distill.lr"]]),
        ("A=1 B='2 3' make demo\n# no command\n\nmake test", [["make", "demo"], ["make", "test"]]),
        ("lcmlora registry list \\\n    --where 'a<1'", [["lcmlora", "registry", "list", "--where", "a<1"]]),
        ("curl localhost |\n  jq . 2> /dev/null", [["curl", "localhost"], ["jq", "."]]),
        ("python -c 'a = 1\nprint(a)'", [["python", "-c", "a = 1\nprint(a)"]]),
    ],
)
def test_a_block_is_read_as_a_shell_reads_it(text: str, commands: list[list[str]]) -> None:
    assert Block(ROOT / "README.md", 1, "bash", text, None).commands == commands


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("lcmlora retrian", "retrian"),
        ("lcmlora generate --adapter a --prompts owl --out owl.png", "--prompts"),
        ("lcmlora registry demote x", "demote"),
        ("lcmlora fetch", "Missing argument"),
        ("make dmeo", "dmeo"),
        ("python -m benchmarks.figrues", "figrues"),
        ("python -m benchmarks.figures --chekc", "--chekc"),
        ("python -m flows.retrain --publsh s3://a/b", "--publsh"),
        ("pip install 'lcmlora[pipelines]'", "pipelines"),
        ("dvc repro --sngle-item prepare", "--sngle-item"),
        ("lcmlroa check", "lcmlroa"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str, fault: str) -> None:
    (words,) = Block(ROOT / "README.md", 1, "bash", command, None).commands
    assert fault in str(fault_of(words))


def fault_of(words: list[str]) -> str | None:
    """Returns what is wrong with a command; None where nothing is, or nothing is looked at."""
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "lcmlora":
        return _fault_of_verb(command_line.command(), arguments)
    if program == "make":
        return None if set(_goals(arguments)) <= _targets() else f"make: no target {arguments}"
    if program in ("python", "torchrun") or (program == "accelerate" and "-m" in arguments):
        return _fault_of_python(arguments)
    if program == "dvc":
        return _fault_of_dvc(tuple(arguments))
    if program in ("pip", "pipx"):
        return _fault_of_install(arguments)
    return None if program in OTHERS or program.startswith("./") else f"{program}: an unknown program"


def verb_of(arguments: list[str]) -> list[str]:
    """Returns the verb, of a group with the verb within it."""
    command, found = command_line.command(), []
    for word in arguments:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
            found.append(word)
    return found


def _fault_of_verb(command: Any, arguments: list[str], parent: Any = None, name: str = "lcmlora") -> str | None:
    if arguments == ["--help"] or (parent is None and arguments == ["--version"]):
        return None
    from typer._click.exceptions import ClickException, NoArgsIsHelpError  # typer's own copy of click

    try:
        call = command.make_context(name, list(arguments), parent=parent)
        if hasattr(command, "commands"):
            verb, inner, rest = command.resolve_command(call, [*call._protected_args, *call.args])
            return _fault_of_verb(inner, rest, call, f"{name} {verb}")
    except NoArgsIsHelpError:
        return None
    except ClickException as error:
        return f"{name} {' '.join(arguments)}: {error.format_message()}"
    return None


def _goals(arguments: list[str]) -> list[str]:
    return [word for word in arguments if "=" not in word and not word.startswith("-")]


@cache
def _targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))


def _fault_of_python(arguments: list[str]) -> str | None:
    """Looks at `-m MODULE` of this repository: the module, and each option in its text or that of its parser."""
    if "-m" not in arguments:
        return None
    module, *rest = arguments[arguments.index("-m") + 1 :]
    if module == "lcmlora":
        return _fault_of_verb(command_line.command(), rest)
    if module.split(".")[0] not in ("benchmarks", "docs", "flows", "tests", "tasks", "lcmlora"):
        return None if importlib.util.find_spec(module.split(".")[0]) else f"{module}: no such module"
    place = ROOT.joinpath(*module.split("."))
    path = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__main__.py"
    if not path.exists():
        return f"{module}: no such module"
    text = path.read_text() + ((ROOT / "flows/command.py").read_text() if module == "flows.retrain" else "")
    for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
        declared = option in text or re.search(rf"\b{option[2:].replace('-', '_')}: Annotated", text)
        negated = option.startswith("--no-") and re.search(rf"\b{option[5:].replace('-', '_')}: Annotated", text)
        if option != "--help" and not declared and not negated:
            return f"{module}: no option {option}"
    return None


@cache
def _fault_of_dvc(arguments: tuple[str, ...]) -> str | None:
    from dvc.cli import DvcParserError
    from dvc.cli.parser import get_main_parser

    # DVC's handlers keep the standard error of the test that has imported it, and raise when that is closed.
    logging.disable()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(told):
            get_main_parser().parse_args(list(arguments))
    except DvcParserError:
        return f"dvc {' '.join(arguments)}: {told.getvalue()}"
    finally:
        logging.disable(logging.NOTSET)
    return None


def _fault_of_install(arguments: list[str]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [extra.strip() for word in arguments for extra in ",".join(re.findall(r"\[(.*?)\]", word)).split(",")]
    wrong = [extra for extra in named if extra and extra not in extras]
    return f"pip: no extra {wrong}" if wrong else None


def _text_of_test(claim: str) -> str:
    """Returns the text of the file that a claim names; the test must be in it."""
    path, _, name = claim.partition("::")
    text = (ROOT / path).read_text()
    assert not name or re.search(rf"def {re.escape(name)}\(", text), f"{claim}: no such test"
    return text


def _run(arguments: list[str]) -> None:
    result = CliRunner().invoke(command_line.app(), ["--project", str(ROOT), *arguments])
    assert result.exit_code == 0, result.output


def _has(module: Any, name: str) -> bool:
    return hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None
