"""Changes of a file that a person wrote: only the lines of the key change, and what cannot be changed so is refused."""

from __future__ import annotations

import pytest

from lcmlora.errors import UserError
from lcmlora.projects.upgrade.yaml_text import YamlText

TEXT = """\
# Settings of the owls.
models: [owls]   # one

evaluation:
  # Guided steps.
  solver_steps: [1, 2]   # few
  seed: 3

pretrain:                # how the base was made
  seed: 0
  rounds:
    - {steps: 1}
# After pretrain.

bases:
  owls: {license: mit, evaluation: {batch: 4, solver_steps: [1]}}
"""


@pytest.fixture
def params() -> YamlText:
    return YamlText(TEXT, "params.yaml")


def test_a_renamed_key_keeps_its_comments_and_its_place(params: YamlText):
    params.rename(("evaluation", "solver_steps"), "solver_evaluations")
    assert params.text == TEXT.replace("solver_steps: [1, 2]", "solver_evaluations: [1, 2]")
    assert list(params.values["evaluation"]) == ["solver_evaluations", "seed"]


def test_a_value_is_replaced_in_a_block_and_within_braces(params: YamlText):
    params.replace(("evaluation", "solver_steps"), [2, 4])
    params.replace(("bases", "owls", "evaluation", "solver_steps"), [2])
    assert params.text == TEXT.replace("[1, 2]", "[2, 4]").replace("[1]", "[2]")


def test_a_list_of_several_lines_becomes_one_line_with_the_comment_beside_its_key():
    params = YamlText("steps:   # few\n- 1\n- 2\nseed: 0\n", "params.yaml")
    params.replace(("steps",), [2, 4])
    assert params.text == "steps: [2, 4]   # few\nseed: 0\n"


def test_a_key_is_added_below_another_one_or_behind_it(params: YamlText):
    params.insert_after(("evaluation", "solver_steps"), "test", 0.5)
    params.insert_after(("bases", "owls", "license"), "author", "a: b")
    changed = TEXT.replace("# few\n", "# few\n  test: 0.5\n").replace("license: mit", "license: mit, author: 'a: b'")
    assert params.text == changed


def test_a_removed_section_leaves_one_blank_line_and_the_comments_around_it(params: YamlText):
    params.remove(("pretrain",))
    params.remove(("bases", "owls", "evaluation", "solver_steps"))
    section = TEXT[TEXT.index("pretrain:") : TEXT.index("# After")]
    assert params.text == TEXT.replace(section, "").replace(", solver_steps: [1]", "")
    params.remove(("bases", "owls", "license"))
    assert params.values["bases"] == {"owls": {"evaluation": {"batch": 4}}}


def test_the_last_key_of_a_section_leaves_an_empty_mapping():
    params = YamlText("evaluation:\n  features: clip\nseed: 0\n", "params.yaml")
    params.remove(("evaluation", "features"))
    assert params.values == {"evaluation": {}, "seed": 0}


def test_the_line_of_a_key_is_that_of_the_file_before_all_changes(params: YamlText):
    params.insert_after(("evaluation", "solver_steps"), "test", 0.5)
    assert params.line(("pretrain", "rounds")) == TEXT.splitlines().index("  rounds:") + 1


def test_what_an_alias_shares_changes_in_both_places():
    params = YamlText("evaluation: &all\n  seed: 1\nother: *all\n", "params.yaml")
    params.replace(("other", "seed"), 2)
    assert params.text == "evaluation: &all\n  seed: 2\nother: *all\n"


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (("evaluation", "seed"), r"evaluation\.seed: cannot be changed in place"),  # without a change of the other
        (("other", "seed"), r"other\.seed: is not written there, but merged \(<<\)"),
    ],
)
def test_what_is_merged_from_elsewhere_is_refused_and_the_text_stays(key: tuple[str, ...], told: str):
    text = "evaluation: &all\n  seed: 1\nother:\n  <<: *all\n  batch: 4\n"
    params = YamlText(text, "params.yaml")
    with pytest.raises(UserError, match=f"params.yaml: {told}; change it by hand"):
        params.replace(key, 2)
    assert params.text == text and params.values["evaluation"] == {"seed": 1}
