"""Sphinx's settings for the site: `make docs` builds it into docs/_build/html, without a network."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs.outside import page_text  # noqa: E402
from lcmlora import __version__  # noqa: E402

project = "lcmlora"
author = "the lcmlora authors"
copyright = "the lcmlora authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "package-page.md"]  # the latter is for the package index
source_suffix = {".md": "markdown"}
nitpicky = True
# Types in signatures and what is raised: those of other libraries and of modules that are not public have no page here.
nitpick_ignore_regex = [("py:(class|exc)", r".*")]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4
# An untagged block would be highlighted as Python; tests/test_docs.py asks for a language on each.
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
toc_object_entries = False
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"lcmlora {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}


def _bring_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts the text of a file outside docs/ into its page, and makes links out of docs/ lead to pages of the site."""
    source[0], file = page_text(docname, source[0])
    if file is not None:
        app.env.note_dependency(str(file), docname=docname)


def setup(app: Sphinx) -> None:
    app.connect("source-read", _bring_in)
