import base64
import hashlib
import json
import re
import stat
from pathlib import Path

import pytest
from PIL import Image

from lcmlora.errors import UserError
from lcmlora.inference.production import pairs
from lcmlora.inference.production.pairs import Choices, Key, judge, sign_test

PROMPTS = [f"prompt {number}" for number in range(39)] + ["<script>alert('x')</script>"]
NAMES = ("models:/lcm-lora-mini/1", "models:/lcm-lora-mini/2")


def pictures(colour: str) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), colour) for _ in PROMPTS]


@pytest.fixture
def made() -> tuple[str, Key]:
    return pairs.render("mini", PROMPTS, pictures("red"), pictures("blue"), 4, NAMES)


def sides(page: str) -> dict[str, tuple[str, str]]:
    """Returns the sources of the left and the right picture, by the pair's name."""
    found = re.findall(r'<img src="([^"]*)"[^>]*><input type="radio" name="(\w+)" value="(left|right)">', page)
    return {
        name: tuple(source for side in ("left", "right") for source, n, s in found if (n, s) == (name, side))
        for _, name, _ in found
    }  # type: ignore[misc]


def test_the_page_shows_both_pictures_of_each_prompt_and_the_key_alone_knows_whose_they_are(made: tuple[str, Key]):
    page, key = made
    blue = pairs._embedded(pictures("blue")[0])
    shown = sides(page)
    assert shown.keys() == key.second_side.keys() and len(shown) == len(PROMPTS)
    for name, (left, right) in shown.items():
        assert {left, right} == {blue, pairs._embedded(pictures("red")[0])}
        assert key.second_side[name] == ("left" if left == blue else "right")
    assert {*key.second_side.values()} == {"left", "right"}  # but for one time of 2^39
    assert "lcm-lora-mini/" not in page and "models:" not in page
    again, other = pairs.render("mini", PROMPTS, pictures("red"), pictures("blue"), 4, NAMES)
    assert list(other.second_side.values()) != list(key.second_side.values()) and other.page != key.page != again


def test_no_prompt_can_run_as_a_script_and_the_pages_own_is_allowed_by_its_digest(made: tuple[str, Key]):
    page, _ = made
    assert "<script>alert" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page


def choose(key: Key, second: int, first: int, neither: int = 0) -> Choices:
    names = iter(key.second_side)
    other = {"left": "right", "right": "left"}
    chosen = {name: key.second_side[name] for name, _ in zip(names, range(second), strict=False)}
    chosen |= {name: other[key.second_side[name]] for name, _ in zip(names, range(first), strict=False)}
    chosen |= {name: "neither" for name, _ in zip(names, range(neither), strict=False)}
    return Choices.model_validate({"page": key.page, "who": "ada", "choices": chosen})


def test_choices_are_counted_for_the_adapter_and_not_the_side(made: tuple[str, Key], tmp_path: Path):
    _, key = made
    key.write(tmp_path / "key.json")
    assert stat.S_IMODE((tmp_path / "key.json").stat().st_mode) == 0o600
    assert Key.read(tmp_path / "key.json") == key
    given = choose(key, second=15, first=5, neither=4)
    (tmp_path / "choices.json").write_text(given.model_dump_json())
    verdict = judge(key, Choices.read(tmp_path / "choices.json"))
    assert (verdict.second, verdict.first, verdict.neither) == (15, 5, 4)
    assert verdict.text == "preferred in 15 of 20 pairs, 4 without a choice, sign test p = 0.0414"


def test_the_sign_test_is_the_exact_one():
    """Of 20 fair throws 15 or more fall on one side with probability 2 * 21700 / 2^20."""
    assert sign_test(15, 5) == sign_test(5, 15) == pytest.approx(2 * 21700 / 2**20)
    assert sign_test(0, 0) == sign_test(10, 10) == sign_test(1, 0) == 1.0
    assert sign_test(0, 10) == pytest.approx(2 / 1024)


def test_choices_of_another_page_or_of_none_are_refused(made: tuple[str, Key], tmp_path: Path):
    _, key = made
    foreign = choose(key, 1, 0).model_copy(update={"page": "other"})
    with pytest.raises(UserError, match="made on page 'other'"):
        judge(key, foreign)
    with pytest.raises(UserError, match="no choice"):
        judge(key, choose(key, 0, 0))
    with pytest.raises(UserError, match="no pair 'zz'"):
        judge(key, choose(key, 1, 0).model_copy(update={"choices": {"zz": "left"}}))
    path = tmp_path / "choices.json"
    for wrong, message in (
        ({"page": "p", "who": "a", "choices": {"x": "both"}}, r"choices\.x: "),
        ({"page": "p", "who": "a" * 61, "choices": {}}, "who: "),
        ({"page": "p"}, "who: "),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=f"^{path}: {message}"):
            Choices.read(path)
