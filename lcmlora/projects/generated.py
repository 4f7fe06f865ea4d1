"""The generated files of a project, as text: what they hold follows from its settings, its options and this package.

`lcmlora init` writes them, and `lcmlora upgrade` writes them anew. This repository's own are the same
(tests/projects/test_generated.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources

import jinja2

from lcmlora.config import Config
from lcmlora.dvc_files import dvc_yaml, resolved
from lcmlora.projects.record import Options, Record, own_version
from lcmlora.projects.settings_reference import json_schema

SCHEMA = ".lcmlora/params.schema.json"  # which editors find by the first line of params.yaml

RESOLVED = "resolved.yaml"  # which `lcmlora resolve` writes anew whenever a setting changes

# Files of which a project may have more lines than those that are generated.
BY_LINES = (".gitignore", ".dvcignore")


def generated_files(config: Config, options: Options) -> dict[str, str]:
    """Returns the text of every generated file of a project, by its path relative to the project's folder.

    params.yaml is the person's own, and .lcmlora/project.json is the record of these files; neither is among them.

    Raises:
        UserError: settings do not fit, or two names would share one entry of resolved.yaml.
    """
    found = {
        ".dvcignore": _rendered("dvcignore", config, options),
        ".gitignore": _rendered("gitignore", config, options),
        "README.md": _rendered("README.md", config, options),
        "dvc.yaml": dvc_yaml.whole(config, pretrain=options.from_source),
        "prefect.yaml": _rendered("prefect.yaml", config, options),
        RESOLVED: resolved.text(config),
        SCHEMA: json.dumps(json_schema(Config), indent=2) + "\n",
    }
    if config.study is not None:  # a dependency of `package`, which is there before the first study is
        found["study/.gitignore"] = "/*\n!/.gitignore\n"
    return found


def recorded(files: Mapping[str, str], options: Options) -> Record:
    """Returns the record of files that were generated with these options by this version."""
    digests = {path: digest(text) for path, text in files.items() if path != RESOLVED}
    return Record(lcmlora=own_version(), options=options, files=digests)


def with_lines(before: str, wanted: str) -> str:
    """Returns the text of a file of lines, with those that it lacks of the wanted ones at its end."""
    lacking = [line for line in wanted.splitlines() if line not in before.splitlines()]
    head = before if before.endswith("\n") or not before else before + "\n"
    return head + "".join(f"{line}\n" for line in lacking)


def digest(text: str) -> str:
    """Returns the SHA-256 of a generated file, as the record has it."""
    return hashlib.sha256(text.encode()).hexdigest()


def _rendered(name: str, config: Config, options: Options) -> str:
    # Prefect's own templates are in {{ }}.
    environment = jinja2.Environment(
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="[[",
        variable_end_string="]]",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    text = resources.files("lcmlora.projects.templates").joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(text).render(config=config, options=options)
