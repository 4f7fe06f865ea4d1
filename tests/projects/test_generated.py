"""The generated files of a project: this repository's own are what they would be anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lcmlora import config
from lcmlora.projects import generated, record
from tests.support import code_blocks
from tests.test_docs_commands import fault_of

ROOT = Path(__file__).parents[2]


# In a process of its own: other tests add names to the tables that the schema lists.
GENERATED = """
import json, sys
from pathlib import Path
from lcmlora import config
from lcmlora.projects import generated, record

root = Path(sys.argv[1])
print(json.dumps(generated.generated_files(config.load(root / "params.yaml", root), record.read(root).options)))
"""


def test_this_repositorys_own_project_files_are_generated():
    """Else `lcmlora upgrade` writes them."""
    command = [sys.executable, "-c", GENERATED, str(ROOT)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files: dict[str, str] = json.loads(printed)
    found = record.read(ROOT)
    own = {"README.md"}  # of the repository, not of the project
    assert found == generated.recorded({p: t for p, t in files.items() if p not in own}, found.options)
    for path in files.keys() - own:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text == (generated.with_lines(text, files[path]) if path in generated.BY_LINES else files[path]), path


def test_lines_that_a_file_lacks_are_added_and_its_own_stay():
    assert generated.with_lines("mine\n/bases/*", "/bases/*\n/scratch/\n") == "mine\n/bases/*\n/scratch/\n"
    assert generated.with_lines("", "/scratch/\n") == "/scratch/\n"


@pytest.mark.parametrize("workers", [(), ("docker", "kubernetes")])
def test_every_command_in_a_projects_readme_exists(workers: tuple[record.Workers, ...], tmp_path: Path):
    options = record.Options(name="my owls", workers=workers)
    files = generated.generated_files(config.load(ROOT / "params.yaml", ROOT), options)
    pages = [path for path in files if path.endswith("README.md")]
    assert pages == ["README.md", "deploy/README.md"][: 1 + bool(workers)]
    commands = []
    for path in pages:
        page = tmp_path / "page.md"
        page.write_text(files[path])
        commands += [words for block in code_blocks.blocks(page) for words in block.commands]
    assert [fault for words in commands if (fault := fault_of(words))] == []
    assert ["lcmlora", "run"] in commands and ["cd", "my owls"] in commands
    assert files["requirements.txt"].splitlines()[-1].startswith("lcmlora[pipeline,emoji")
