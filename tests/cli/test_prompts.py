"""`lcmlora prompts`: from kept prompts to a file for evaluation, to drift, and to people's choices in the history."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from lcmlora import config
from lcmlora.cli.main import app
from lcmlora.data.sources.source import Record, write_records
from lcmlora.evaluation.sets.own_prompts import read_own_prompts
from lcmlora.inference.production.kept_prompts import Keeping, PromptKeeper
from lcmlora.inference.production.pairs import Key
from lcmlora.registry.promotion import history
from lcmlora.registry.registration import register_release
from tests.support import served
from tests.support.registries import fresh
from tests.support.releases import settings, write_sealed

CAPTIONS = [f"red apple {number}" for number in range(110)]
ASKED = [f"{word} {number}\nwith a hat" for number in range(30) for word in ("tree", "fruit")]


@pytest.fixture
def project(
    miniatures: Callable[[str], Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch
) -> Path:
    base = miniatures("sd15")
    raw = settings(base, registry={"tracking_uri": fresh(tmp_path, tmp_path_factory).tracking_uri})
    raw["serving"] = {"keep_prompts": "text", "prompts_a_day": 100}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases/mini").symlink_to(base)
    (tmp_path / "data/pictures").mkdir(parents=True)
    for part, captions in {"train": CAPTIONS[20:], "validation": CAPTIONS[:10], "test": CAPTIONS[10:20]}.items():
        records = [Record(str(n), caption, "ab" * 32, 8, 8) for n, caption in enumerate(captions)]
        write_records(tmp_path / f"data/pictures/{part}.jsonl", records)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keep(project: Path, *prompts: str, mode: str = "text") -> None:
    PromptKeeper(Keeping(mode, project / "prompts", 100), "mini").keep(prompts)


def lcmlora(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["prompts", *arguments])


def done(*arguments: str) -> str:
    result = lcmlora(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refusal(*arguments: str) -> str:
    result = lcmlora(*arguments)
    assert result.exception is not None
    return str(result.exception)


def test_a_sample_becomes_a_file_that_evaluation_reads_and_nobody_else(project: Path):
    assert "serving.keep_prompts is text, and `lcmlora serve` keeps them" in refusal("list", "mini")
    keep(project, *ASKED, *ASKED, CAPTIONS[0])
    (day,) = json.loads(done("list", "mini", "--json"))
    assert 0 <= day["captions"] <= 1 and day["kept"] >= 100
    done("sample", "mini", "--count", "80", "--out", "asked.jsonl")
    found = read_own_prompts("asked.jsonl")
    assert 40 < len(found) <= 61 and {*found} <= {" ".join(text.split()) for text in ASKED} | {*ASKED, CAPTIONS[0]}
    assert stat.S_IMODE(Path("asked.jsonl").stat().st_mode) == 0o600
    assert "is there already" in refusal("sample", "mini", "--out", "asked.jsonl", "--count", "10")
    assert "100 at most (serving.prompts_a_day)" in refusal("sample", "mini", "--out", "b.jsonl", "--count", "101")
    assert "none of these days" in refusal(
        "sample", "mini", "--out", "b.jsonl", "--count", "9", "--until", "2020-01-01"
    )
    assert "--since: expected a day" in refusal("drift", "mini", "--since", "yesterday")


def test_hashes_are_no_prompts_to_draw(project: Path):
    keep(project, *ASKED, mode="hashes")
    assert "hashes alone are kept" in refusal("sample", "mini", "--out", "b.jsonl", "--count", "9")


def test_drift_is_said_of_prompts_unlike_the_captions_and_not_of_too_few(project: Path):
    keep(project, *ASKED[:20])
    assert json.loads(done("drift", "mini", "--json"))["drifted"] is None
    assert "20 distinct prompts are too few" in refusal("drift", "mini")
    keep(project, *ASKED[20:])
    said = done("drift", "mini")
    assert said.startswith("mini: the prompts have drifted from the training captions: distance ")
    assert json.loads(done("drift", "mini", "--json"))["drifted"] is True


@pytest.mark.slow
def test_two_adapters_are_drawn_side_by_side_and_what_people_choose_is_in_the_history(
    project: Path, miniatures: Callable[[str], Path]
):
    for number, name in enumerate(("one", "two")):
        served.make(miniatures("sd15"), project / name, grid=20 + number)
    keep(project, *ASKED)
    done("compare", "one", "two", "--count", "6", "--steps", "2", "--device", "cpu", "--out", "pairs")
    key = Key.read(project / "pairs/key.json")
    assert (key.first, key.second, len(key.second_side)) == ("one", "two", 6)
    assert (project / "pairs/pairs.html").read_text().count("data:image/png") == 12
    assert "expected a new or empty folder" in refusal("compare", "one", "two", "--out", "pairs")

    registry = config.load(project / "params.yaml").registry
    register_release("mini", registry, write_sealed(project / "sealed"), gate_failures=[])
    key.model_copy(update={"second": "models:/lcm-lora-mini/1"}).write(project / "pairs/key.json")
    for who in ("ada", "grace"):
        choices = {"page": key.page, "who": who, "choices": key.second_side}
        Path(f"{who}.json").write_text(json.dumps(choices))
    said = done("choices", "ada.json", "grace.json", "--key", "pairs/key.json")
    assert said.splitlines()[0] == (
        "ada: lcm-lora-mini/1 preferred in 6 of 6 pairs, 0 without a choice, sign test p = 0.0312"
    )
    done("choices", "ada.json", "--key", "pairs/key.json")  # once more
    compared = [event for event in history("lcm-lora-mini", registry) if event.action == "compared"]
    assert [(event.version, event.who) for event in compared] == [(1, "ada"), (1, "grace")]
    assert compared[0].reason == (
        f"preferred in 6 of 6 pairs, 0 without a choice, sign test p = 0.0312; against one, page {key.page}"
    )
