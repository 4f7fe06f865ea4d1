"""The templates of a project's files.

They are Jinja's with other brackets, [[ value ]] and <% if ... %>, since Prefect's, DVC's and Docker's own templates
have {{ }} and ${ }.
"""

from __future__ import annotations

import functools
import shlex
from importlib import resources
from typing import Any

import jinja2
import yaml

from lcmlora.io.terminal import markdown


def text(name: str) -> str:
    """Returns a template as it is, by its path below this folder."""
    return resources.files(__name__).joinpath(*name.split("/")).read_text(encoding="utf-8")


def rendered(name: str, **values: Any) -> str:
    """Returns a template with these values in it. A value that it names and that is not given is an error."""
    return _environment().from_string(text(name)).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
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
        autoescape=False,  # nothing here is HTML
    )
    environment.filters |= {"markdown": markdown, "quoted": shlex.quote, "scalar": _scalar}
    return environment


def _scalar(value: str) -> str:
    """Returns a text as YAML has it in one line, in quotes where it would be something else without."""
    found: str = yaml.safe_dump(value, allow_unicode=True, width=1 << 20)
    return found.removesuffix("\n").removesuffix("\n...")
