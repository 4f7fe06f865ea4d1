"""Loading one of the templates beside this module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

NO_FILTERS: Mapping[str, Callable[..., Any]] = MappingProxyType({})


def load_template(name: str, filters: Mapping[str, Callable[..., Any]] = NO_FILTERS) -> Template:
    """Returns a template by its file name. Values are escaped where it is HTML; a value that is missing raises.

    Args:
        filters: functions that this template uses beside those of jinja.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("lcmlora"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
