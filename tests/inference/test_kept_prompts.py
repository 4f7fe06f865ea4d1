import datetime
import json
import stat
from collections import Counter
from pathlib import Path

import pytest

from lcmlora.errors import UserError
from lcmlora.inference.production import kept_prompts
from lcmlora.inference.production.kept_prompts import Keeping, PromptKeeper

DAY = datetime.date(2026, 11, 29)


@pytest.fixture(autouse=True)
def today(monkeypatch: pytest.MonkeyPatch) -> None:
    move(monkeypatch, DAY)


def move(monkeypatch: pytest.MonkeyPatch, day: datetime.date) -> None:
    monkeypatch.setattr(kept_prompts, "_today", lambda: day)


def keeper(folder: Path, mode: str = "text", a_day: int = 50, days: int = 30) -> PromptKeeper:
    return PromptKeeper(Keeping(mode, folder, a_day, days), "mini")


def content(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted((folder / "mini").rglob("*.jsonl")))


def test_nothing_is_kept_unless_it_is_asked_for_and_the_environment_says_how(tmp_path: Path):
    assert Keeping.read({}).mode == "off"
    asked = Keeping("hashes", tmp_path, 60, 7)
    assert Keeping.read(asked.environment) == asked
    for environment, message in (
        ({"LCMLORA_KEEP_PROMPTS": "yes"}, "LCMLORA_KEEP_PROMPTS: expected off, hashes or text, got 'yes'"),
        ({"LCMLORA_KEEP_PROMPTS": "text"}, "LCMLORA_PROMPTS: is not set"),
        ({"LCMLORA_PROMPTS_A_DAY": "0"}, "LCMLORA_PROMPTS_A_DAY: expected a whole number"),
        ({"LCMLORA_PROMPT_DAYS": "1.5"}, "LCMLORA_PROMPT_DAYS: expected a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            Keeping.read(environment)


def test_a_days_sample_is_bounded_and_each_prompt_has_the_same_chance(tmp_path: Path):
    """Of 400 prompts that two servers draw in turn 20 are kept; 60 times, each prompt 3 times in the mean."""
    kept: Counter[str] = Counter()
    for run in range(60):
        folder = tmp_path / str(run)
        servers = [keeper(folder, a_day=20), keeper(folder, a_day=20)]
        for number in range(400):
            servers[number % 2].keep([f"prompt {number}"])
        lines = content(folder).splitlines()
        assert 20 <= len(lines) < 3 * 20
        found = kept_prompts.sample(folder, "mini", 20)
        assert len({each.text for each in found}) == 20
        kept.update(int(each.text.split()[1]) // 100 for each in found if each.text)
    # A quarter of the day has 300 in the mean; the standard deviation is 15.
    assert set(kept) == {0, 1, 2, 3} and all(abs(count - 300) < 75 for count in kept.values()), kept


def test_samples_of_days_and_servers_merge_into_one_where_busy_days_count_more(tmp_path: Path, monkeypatch):
    for day, count in ((DAY, 50), (DAY + datetime.timedelta(1), 950)):
        move(monkeypatch, day)
        keeper(tmp_path, a_day=200).keep([f"{day} {number}" for number in range(count)])
    (tmp_path / "mini/second-server").mkdir()
    (tmp_path / "mini/second-server/2026-12-01.jsonl").write_text('{"key": 1e-12, "prompt": "from elsewhere"}\n')
    assert list(kept_prompts.days(tmp_path, "mini")) == [DAY + datetime.timedelta(n) for n in range(3)]
    found = kept_prompts.sample(tmp_path, "mini", 200)
    assert found[0].text == "from elsewhere"
    assert 0 <= sum(str(each.text).startswith(str(DAY)) for each in found) < 30  # 10 in the mean
    only = kept_prompts.sample(tmp_path, "mini", 200, DAY, DAY)
    assert len(only) == 50 and all(str(each.text).startswith(str(DAY)) for each in only)


def test_what_is_too_old_is_deleted_when_a_day_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = keeper(tmp_path, days=3)
    for later in range(6):
        move(monkeypatch, DAY + datetime.timedelta(later))
        server.keep([f"of day {later}"])
    assert [day.day for day in kept_prompts.days(tmp_path, "mini")] == [2, 3, 4]
    assert "of day 0" not in content(tmp_path)


def test_hashes_have_no_word_and_tell_captions_only_with_the_key(tmp_path: Path):
    keeper(tmp_path, "hashes").keep(["my address is here", "red apple"])
    assert "apple" not in content(tmp_path) and "address" not in content(tmp_path)
    found = kept_prompts.sample(tmp_path, "mini", 10)
    assert [each.text for each in found] == [None, None]
    assert kept_prompts.among(tmp_path, "mini", found, {"red apple", "tree"}) == 1
    keeper(tmp_path, "hashes").keep(["red apple"])  # after a restart the key is the same
    hashes = [each.digest for each in kept_prompts.sample(tmp_path, "mini", 10)]
    assert len(set(hashes)) == 2 and len(hashes) == 3
    keeper(tmp_path / "other", "hashes").keep(["red apple"])
    assert kept_prompts.sample(tmp_path / "other", "mini", 1)[0].digest not in hashes


def test_nobody_else_can_read_them(tmp_path: Path):
    folder = tmp_path / "prompts"
    keeper(folder, "hashes").keep(["a"])
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert (folder / ".gitignore").read_text() == "*\n"  # nor does it get into Git
    folder.chmod(0o750)
    with pytest.raises(UserError, match=r"others may read what people write; run `chmod 700 "):
        keeper(folder)
    with pytest.raises(UserError, match="is no name"):
        PromptKeeper(Keeping("text", tmp_path), "../elsewhere")


def test_a_line_of_a_killed_server_is_left_out_and_the_next_one_goes_on(tmp_path: Path):
    keeper(tmp_path).keep(["one"])
    with (tmp_path / "mini/2026-11-29.jsonl").open("a") as file:
        file.write('{"key": 0.5, "prom')
    keeper(tmp_path).keep(["two"])
    assert {each.text for each in kept_prompts.sample(tmp_path, "mini", 10)} == {"one", "two"}
    assert all(json.loads(line) for line in content(tmp_path).splitlines())
