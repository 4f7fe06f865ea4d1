"""What the pages for people name exists: modules, folders, links, commands."""

import itertools
import re
from pathlib import Path

import pytest

import lcmlora
from docs import outside
from lcmlora import bases, registry
from tests.support import code_blocks

ROOT = Path(__file__).parent.parent
PAGES = [page for page in code_blocks.pages() if page not in (ROOT / "README.md", ROOT / "SECURITY.md")]
SITE = [page for page in PAGES if page.is_relative_to(ROOT / "docs") and page.name != "package-page.md"]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", code_blocks.pages(), ids=_name)
def test_every_link_within_the_repository_leads_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)", _without_blocks(page))
    wrong = []
    for path, anchor in links:
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor[1:] not in _anchors(target)):
            wrong.append(path + anchor)
    assert wrong == []


def _without_blocks(page: Path) -> str:
    """Returns the text of a page without its code."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2 *$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]+`", "", text)


def _anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2 *$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = next(n for n in itertools.count() if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def test_each_page_of_the_site_stands_once_in_its_navigation():
    index = (ROOT / "docs/index.md").read_text()
    trees = "".join(re.findall(r"```\{toctree\}\n(.*?)```", index, re.S))
    listed = re.findall(r"^\w.*", trees, re.M)
    pages = [str(page.relative_to(ROOT / "docs").with_suffix("")) for page in SITE]
    assert sorted(listed) == sorted(name for name in pages if name != "index")


@pytest.mark.parametrize("page", outside.TEXTS)
def test_the_text_of_a_file_outside_docs_has_its_links_as_the_page_needs_them(page: str):
    text, file = outside.page_text(page, "")
    assert file == ROOT / outside.TEXTS[page] and text.startswith("# ")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert [link for link in links if not (ROOT / "docs" / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[rules](../CONTRIBUTING.md#style)", "[rules](../project/contributing.md#style)"),
        ("[README](../../README.md)", "[README](../index.md)"),
        ("[sources](../sources.md)", "[sources](../sources.md)"),
        ("see [loop](../../lcmlora/training/loop.py)", "see loop"),
        ("[paper](https://arxiv.org/abs/2311.05556) ![](../grid.png)", None),
    ],
)
def test_links_out_of_docs_lead_to_pages_or_become_text(text: str, shown: str | None):
    text = text.replace("(../CONTRIBUTING", "(../../CONTRIBUTING")
    assert outside.relinked(text, "docs/guides/serve.md", "guides/serve") == (text if shown is None else shown)


def test_the_page_of_the_python_api_has_every_public_name():
    page = (ROOT / "docs/python-api.md").read_text()
    public = [f"lcmlora.{name}" for name in lcmlora.__all__]
    public += [f"lcmlora.registry.{name}" for name in registry.__all__]
    public += [f"lcmlora.bases.{name}" for name in bases.__all__]
    assert [name for name in public if not re.search(rf"\b{re.escape(name)}\b", page)] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_and_folder_of_code_that_is_named_exists(page: Path):
    named = re.findall(r"`((?:lcmlora|tasks|flows|tests|benchmarks)/[\w./]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_module_that_is_run_exists(page: Path):
    run = re.findall(r"python -m ((?:lcmlora|tasks|flows|tests|benchmarks)[\w.]*)", page.read_text())
    paths = [ROOT / name.rstrip(".").replace(".", "/") for name in run]
    assert [path for path in paths if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists())] == []


def _settings() -> dict[str, set[str]]:
    """Returns the keys of each section, from docs/configuration.md, which another test holds against the settings."""
    page = (ROOT / "docs/configuration.md").read_text()
    sections = re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return {section: set(re.findall(r"^\| `(\w+)", text, re.M)) for section, text in sections}


@pytest.mark.parametrize("page", code_blocks.pages(), ids=_name)
def test_every_setting_that_is_quoted_with_its_section_exists(page: Path):
    settings = _settings()
    quoted = re.findall(rf"`({'|'.join(settings)})\.(?!(?:json|md|py)\b)(\w+)", page.read_text())
    assert [f"{section}.{key}" for section, key in quoted if key not in settings[section]] == []


def test_the_page_of_settings_has_the_sections_and_keys_that_other_pages_quote():
    settings = _settings()
    assert {"solver_evaluations", "pictures"} <= settings["evaluation"] and "test" in settings["data"]
    assert "solver_steps" not in settings["evaluation"] and len(settings) > 12


def test_the_glossary_has_one_sentence_for_each_term_and_no_term_twice():
    rows = re.findall(
        r"^\| (?!term \||---)([^|]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs/glossary.md").read_text(), re.M
    )
    terms = [term for term, *_ in rows]
    assert len(terms) == len(set(terms)) > 60
    assert [meaning for _, meaning, _ in rows if not re.fullmatch(r"[A-Z`].*[^.]\.", meaning)] == []
