"""Files outside docs/ that are pages of the site, and links of pages to what is not in docs/.

The site has CONTRIBUTING.md and the like as pages. In the repository these pages say where the text is; Sphinx reads
the text in their place. A link to such a file leads to its page, and a link to any other file outside docs/, such as a
module, becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]

# Page of the site -> file of the repository that has its text.
TEXTS = {
    "project/changelog": "CHANGELOG.md",
    "project/contributing": "CONTRIBUTING.md",
    "project/security": "SECURITY.md",
    "project/deploy": "deploy/README.md",
}
_PAGES = {file: page for page, file in TEXTS.items()} | {"README.md": "index"}
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def page_text(docname: str, text: str) -> tuple[str, Path | None]:
    """Returns the Markdown that Sphinx reads for a page, and the file outside docs/ that it is from, if it is."""
    file = TEXTS.get(docname)
    if file is None:
        return relinked(text, f"docs/{docname}.md", docname), None
    return relinked((ROOT / file).read_text(encoding="utf-8"), file, docname), ROOT / file


def relinked(text: str, file: str, docname: str) -> str:
    """Returns the text of `file`, with its relative links as they must be on the page `docname`.

    Args:
        text: Markdown.
        file: where the text lies, from the root of the repository.
        docname: the page on which it is shown, from docs/, without its ending.
    """

    def replace(match: re.Match[str]) -> str:
        target = os.path.normpath(PurePosixPath(file).parent / match["target"])
        page = _PAGES.get(target)
        if page is None and not target.startswith("docs/"):
            return match["text"]
        inside = f"{page}.md" if page is not None else target.removeprefix("docs/")
        relative = os.path.relpath(inside, PurePosixPath(docname).parent)
        return f"[{match['text']}]({relative}{match['anchor'] or ''})"

    return _LINK.sub(replace, text)
