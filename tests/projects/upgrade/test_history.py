"""Every version of a stage has its line of history, and CHANGELOG.md has it under the release that brought it."""

from __future__ import annotations

import re
from pathlib import Path

import lcmlora
from lcmlora import stages
from lcmlora.projects.upgrade.history import HISTORY, since

ROOT = Path(__file__).parents[3]
PLACE = "lcmlora/projects/upgrade/history.py"
HEADING = "### What becomes stale\n"


def sections() -> dict[str, str]:
    """Returns the text of CHANGELOG.md for each release."""
    parts = re.split(r"^## (\S+).*\n", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def test_every_version_of_a_stage_has_one_line_of_history():
    """Else add it: what gives another result, and the release that will have it."""
    found = {stage: [each.version for each in HISTORY if each.stage == stage] for stage in stages.VERSIONS}
    assert found == {stage: list(range(1, version + 1)) for stage, version in stages.VERSIONS.items()}, PLACE
    assert {each.stage for each in HISTORY} == stages.VERSIONS.keys()
    for each in HISTORY:
        assert numbers(each.release) <= numbers(lcmlora.__version__), f"{PLACE}: {each} is of a later release"
        assert each.change == each.change.strip() and "\n" not in each.change


def test_the_changelog_has_the_same_lines():
    texts = sections()
    assert next(iter(texts)) == lcmlora.__version__, "the newest release comes first"
    for release, text in texts.items():
        listed = text.partition(HEADING)[2].partition("\n### ")[0]
        lines = [line for line in listed.splitlines() if line.startswith("* ")]
        wanted = [f"* `{each.stage}` {each.version}: {each.change}" for each in HISTORY if each.release == release]
        assert lines == wanted, f"CHANGELOG.md, {release}"


def test_the_lines_since_a_version_are_those_of_the_later_ones():
    assert [each.version for each in since("package", 1)] == list(range(2, stages.VERSIONS["package"] + 1))
    assert next(iter(since("package", None))).version == 1
    assert since("package", stages.VERSIONS["package"]) == []
