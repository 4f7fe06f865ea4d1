"""The page docs/command-line.md, from the help of every verb: python -m docs.command_line

A test holds the page against the verbs, so run this after a change of their help, options or arguments.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "command-line.md"

_HEAD = """\
# Command line

`python -m docs.command_line` writes this page, from the help of the verbs; `lcmlora VERB --help` prints it.

"""


@cache
def app() -> typer.Typer:
    """Returns the command line as it is when this version is installed, with the verbs of the flows."""
    from lcmlora.cli import main

    entries = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    known = {command.name for command in main.app.registered_commands}
    for name, value in entries["lcmlora.verbs"].items():
        if name not in known:
            main.app.command(name)(EntryPoint(name, value, "lcmlora.verbs").load())
    return main.app


@cache
def command() -> Any:
    """Returns the group of all verbs: `commands` by name, each with `params` and `help`."""
    return typer.main.get_command(app())


def page() -> str:
    """Returns docs/command-line.md."""
    group = command()
    verbs = list(_verbs(group, ""))
    parts = [_HEAD + _help(group), "```text\nlcmlora [OPTIONS] VERB\n```\n", _options(group)]
    rows = [f"| [`{name}`](#{_anchor(name)}) | {_summary(verb)} |" for name, verb in verbs]
    parts.append("\n".join(["| verb | what it does |", "| --- | --- |", *rows]) + "\n")
    for name, verb in verbs:
        parts += [f"## lcmlora {name}\n", f"```text\nlcmlora {name}{_usage(verb)}\n```\n", _help(verb)]
        parts += [table for table in (_arguments(verb), _options(verb)) if table]
    return "\n".join(parts)


def _verbs(group: Any, before: str) -> Iterator[tuple[str, Any]]:
    for name in group.list_commands(None):  # in the order of `lcmlora --help`
        verb = group.commands[name]
        if verb.hidden:
            continue
        if hasattr(verb, "commands"):
            yield from _verbs(verb, f"{before}{name} ")
        else:
            yield f"{before}{name}", verb


def _anchor(name: str) -> str:
    return f"lcmlora-{name.replace(' ', '-')}"


def _summary(verb: Any) -> str:
    return _cell(inspect.cleandoc(verb.help or "").partition("\n\n")[0])


def _help(verb: Any) -> str:
    """Returns the help in Markdown: paragraphs, then its examples as one block."""
    words, examples = [], []
    in_examples = False
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(verb.help or "").replace("\b\n", "")):
        text = " ".join(paragraph.split())
        if text.startswith(("Example:", "Examples:")):
            in_examples = text == "Examples:"
            if not in_examples:
                examples.append(text.removeprefix("Example:").strip())
        elif in_examples:
            examples += [_example(line) for line in paragraph.splitlines()]
        else:
            words.append(text)
    block = "```bash\n" + "\n".join(examples) + "\n```" if examples else ""
    return "\n\n".join([*words, *([block] if block else [])]) + "\n"


def _example(line: str) -> str:
    """Returns a line of examples, with what it says about the command as a comment before it."""
    command, _, said = (part.strip() for part in re.sub(r"\s{2,}", "\0", line.strip(), count=1).partition("\0"))
    return f"# {said}\n{command}" if said else command


def _usage(verb: Any) -> str:
    options = " [OPTIONS]" if any(_is_option(parameter) for parameter in verb.params) else ""
    arguments = "".join(
        f" {_name(p)}" if p.required else f" [{_name(p)}]" for p in verb.params if not _is_option(p) and not p.hidden
    )
    return options + arguments


def _is_option(parameter: Any) -> bool:
    return parameter.param_type_name == "option"


def _name(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper()) + ("..." if argument.nargs == -1 else "")


def _arguments(verb: Any) -> str:
    found = [parameter for parameter in verb.params if not _is_option(parameter) and not parameter.hidden]
    rows = [f"| `{_name(argument)}` | {_cell(argument.help or '')}{_default(argument)} |" for argument in found]
    return "\n".join(["| argument | meaning |", "| --- | --- |", *rows]) + "\n" if rows else ""


def _options(verb: Any) -> str:
    rows = []
    for option in verb.params:
        if _is_option(option) and not option.hidden and option.name not in ("install_completion", "show_completion"):
            names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
            rows.append(f"| {names} | {_cell(option.help or '')}{_default(option)} |")
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows]) + "\n" if rows else ""


def _default(parameter: Any) -> str:
    value = parameter.default
    if not parameter.show_default or value is None or callable(value) or isinstance(value, bool):
        return ""
    shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f" Default: `{shown}`." if shown else ""


def _cell(text: str) -> str:
    """Returns a text for a cell of a table: in one line, ending as a sentence does."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if not line or line.endswith((".", "?", "`")) else f"{line}."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
