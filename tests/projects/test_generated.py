"""The generated files of a project: this repository's own are what they would be anywhere."""

from __future__ import annotations

from pathlib import Path

from lcmlora import config
from lcmlora.projects import generated, record

ROOT = Path(__file__).parents[2]


def test_this_repositorys_own_project_files_are_generated():
    """Else `lcmlora upgrade` writes them."""
    found = record.read(ROOT)
    files = generated.generated_files(config.load(ROOT / "params.yaml", ROOT), found.options)
    own = {"README.md"}  # of the repository, not of the project
    assert found == generated.recorded({p: t for p, t in files.items() if p not in own}, found.options)
    for path in files.keys() - own:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text == (generated.with_lines(text, files[path]) if path in generated.BY_LINES else files[path]), path


def test_lines_that_a_file_lacks_are_added_and_its_own_stay():
    assert generated.with_lines("mine\n/bases/*", "/bases/*\n/scratch/\n") == "mine\n/bases/*\n/scratch/\n"
    assert generated.with_lines("", "/scratch/\n") == "/scratch/\n"
