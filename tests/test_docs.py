"""What the pages for people name exists: modules, folders, links, commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_folder_of_code_that_is_named_exists(page: Path):
    named = re.findall(r"`((?:lcmlora|tasks|flows|tests|benchmarks)/[\w./]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_that_is_run_exists(page: Path):
    run = re.findall(r"python -m ((?:lcmlora|tasks|flows|tests|benchmarks)[\w.]*)", page.read_text())
    paths = [ROOT / name.rstrip(".").replace(".", "/") for name in run]
    assert [path for path in paths if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists())] == []


def _settings() -> dict[str, set[str]]:
    """Returns the keys of each section, from docs/configuration.md, which another test holds against the settings."""
    page = (ROOT / "docs/configuration.md").read_text()
    sections = re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return {section: set(re.findall(r"^\| `(\w+)", text, re.M)) for section, text in sections}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "SECURITY.md", *PAGES], ids=lambda page: page.name)
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
