"""Which settings decide a stage, and the file in which DVC reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lcmlora import config, stages
from lcmlora.dvc_files import resolved
from lcmlora.errors import UserError
from lcmlora.io.parsing import read_yaml
from lcmlora.stages import Run
from tests.support import params

ROOT = Path(__file__).parents[1]
RAW = params.raw()


def load(**changes: Any) -> config.Config:
    """Returns the shipped settings with these changes of their sections."""
    raw = params.raw()
    for section, values in changes.items():
        raw[section] = raw[section] | values if isinstance(values, dict) else values
    return config.Config.model_validate(raw)


def test_the_committed_file_is_up_to_date():
    """Else `lcmlora resolve` writes it; see docs/staleness.md for what that makes stale."""
    assert read_yaml(ROOT / "resolved.yaml") == resolved.resolve(config.load(ROOT / "params.yaml"))


def test_every_stage_of_dvc_yaml_reads_the_entry_of_its_own_run():
    settings = load(models=["emoji", "sdxl"], study={"models": ["emoji"]}, compatibility={"models": ["sdxl"]})
    described = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    asked = set()
    for name, stage in described.items():
        assert not any(dep.startswith(("lcmlora/", "params.yaml")) for dep in stage.get("deps", ()))
        for key in stage["params"][0]["resolved.yaml"] if "params" in stage else ():
            names = {"style": settings.study.styles, "finetune": settings.study.finetunes}.get(name.split("-")[0], [""])
            own = {"study": settings.study, "compatibility": settings.compatibility}
            listed = str(stage.get("matrix"))
            models = next((each.models for section, each in own.items() if section in listed), settings.models)
            for model in models:
                asked |= {key.replace("${item.model}", model).replace("${item.name}", each) for each in names}
    assert asked == {".".join(resolved._keys(run)) for run in stages.runs(settings)}


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({"encode": {"device": "cuda"}, "evaluation": {"batch": 8}, "launch": {"processes": 2}}, set()),
        ({"distill": {"log_every": 1, "checkpoint_every": 5}, "teacher_cache_gb": 1.0, "shard_cache_gb": 2.0}, set()),
        ({"registry": {"experiment": "other"}, "publish": {"to": "elsewhere"}, "flow": {"retries": 9}}, set()),
        ({"data": {"min_side": 32}}, {"prepare"}),
        ({"data": {"max_aspect": 3.0}}, {"prepare", "encode"}),
        ({"encode": {"shard_mb": 1}}, {"encode"}),
        ({"distill": {"lr": 3e-3}}, {"distill"}),
        ({"distill": {"precision": "fp32"}}, {"distill", "package"}),
        ({"evaluation": {"student_steps": [1, 2, 4]}}, {"evaluate"}),
        ({"evaluation": {"seed": 3}}, {"reference", "evaluate"}),
        ({"gate": {"min_retrieval": 0.5}}, {"package"}),
        ({"gate": {"steps": 2}}, {"evaluate", "package"}),  # at which the worst captions are shown
        ({"evaluation": {"worst_captions": 3}}, {"evaluate"}),
        ({"bases": {"emoji": RAW["bases"]["emoji"] | {"license": "mit"}}}, {"package"}),
        ({"bases": {"emoji": RAW["bases"]["emoji"] | {"distill": {"rank": 8}}}}, {"distill"}),
        ({"bases": RAW["bases"] | {"sdxl": {"resolution": 512}}}, set()),
    ],
)
def test_a_setting_decides_the_stages_that_read_it_and_no_others(changes: dict[str, Any], stale: set[str]):
    before, after = load(), load(**changes)
    runs = stages.runs(before)
    assert {
        run.stage for run in runs if stages.decisive_settings(before, run) != stages.decisive_settings(after, run)
    } == stale


def test_of_the_file_of_own_prompts_the_content_decides_and_not_the_name(tmp_path: Path):
    def entries(name: str, text: str) -> dict[str, Any]:
        (tmp_path / name).write_text(text)
        settings = load(evaluation={"prompts": str(tmp_path / name)})
        return {run.stage: stages.decisive_settings(settings, run) for run in stages.runs(settings)}

    without = {run.stage: stages.decisive_settings(load(), run) for run in stages.runs(load())}
    one, same, other = entries("a.txt", "an owl"), entries("b.txt", "an owl"), entries("a.txt", "a fox")
    assert one == same
    assert {stage for stage in one if one[stage] != without[stage]} == {"reference", "evaluate"}
    assert {stage for stage in one if one[stage] != other[stage]} == {"reference", "evaluate"}
    with pytest.raises(UserError, match=r"evaluation\.prompts: .*missing\.txt: No such file"):
        settings = load(evaluation={"prompts": str(tmp_path / "missing.txt")})
        stages.decisive_settings(settings, Run("reference", "emoji"))


def test_of_a_studied_model_styles_and_the_study_are_decided_by_what_they_read():
    def studied(**changes: Any) -> config.Config:
        return load(**changes | {"study": {"models": ["emoji"]} | changes.get("study", {})})

    def stale(**changes: Any) -> set[tuple[str, str | None]]:
        before, after = studied(), studied(**changes)
        different = [
            run
            for run in stages.runs(before)
            if stages.decisive_settings(before, run) != stages.decisive_settings(after, run)
        ]
        return {(run.stage, run.name) for run in different}

    def own(**data: Any) -> dict[str, Any]:
        return {"noto-v1": {"data": {"styles": ["noto-v1"], "copies": 8} | data}}

    assert stale(styles=own(copies=4)) == {("style", "noto-v1")}  # study.real says how many it is measured against
    assert stale(styles=own(styles=["noto"])) == {("style", "noto-v1"), ("alone", "noto-v1")}
    assert {stage for stage, _ in stale(finetune={"lr": 1e-5})} == {"finetune"}
    assert {stage for stage, _ in stale(study={"guidance_scales": [1.5]})} == {"study"}
    assert {stage for stage, _ in stale(study={"real": {"copies": 16}})} == {"alone"}


def test_what_a_stage_does_within_itself_is_among_its_algorithms():
    assert list(stages.algorithms("style")) == ["prepare", "encode", "style"]
    assert list(stages.algorithms("distill")) == ["distill"]


def test_names_with_dots_have_entries_of_their_own_and_two_names_never_share_one():
    bases = {"sd1": RAW["bases"]["emoji"], "sd1.5": RAW["bases"]["emoji"] | {"resolution": 32}}
    found = resolved.resolve(load(bases=bases, models=["sd1", "sd1.5"]))["models"]["sd1"]
    assert (found["encode"]["base"]["resolution"], found["5"]["encode"]["base"]["resolution"]) == (64, 32)
    for names in (["sd1", "sd1.encode"], ["sd1.encode", "sd1"]):
        bases = dict.fromkeys(names, RAW["bases"]["emoji"])
        with pytest.raises(UserError, match=r"models\.sd1\.encode: one name ends in `\.encode`"):
            resolved.resolve(load(bases=bases, models=names))


ENCODE = Run("encode", "emoji")


def test_by_hand_the_file_is_brought_up_to_date_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    path = tmp_path / "resolved.yaml"
    with resolved.running(load(), ENCODE, path):
        assert not path.exists()
    assert resolved.refresh(load(), path) and not resolved.refresh(load(), path)
    with resolved.running(load(encode={"batch": 8}), ENCODE, path):
        assert read_yaml(path)["models"]["emoji"]["encode"]["encode"]["batch"] == 8
    assert capsys.readouterr().err == f"{path}: is up to date now\n"


def test_called_by_dvc_a_stage_refuses_a_file_that_is_missing_or_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DVC_STAGE", "encode@emoji")
    path = tmp_path / "resolved.yaml"
    with pytest.raises(UserError, match="no such file; run `lcmlora resolve`"), resolved.running(load(), ENCODE, path):
        raise AssertionError("it ran")
    resolved.refresh(load(), path)
    with resolved.running(load(distill={"rank": 8}), ENCODE, path):
        pass  # what does not decide this stage does not matter
    with (
        pytest.raises(UserError, match=r"models\.emoji\.encode: is not what params\.yaml and this version"),
        resolved.running(load(encode={"batch": 8}), ENCODE, path),
    ):
        raise AssertionError("it ran")


def test_dvc_records_the_settings_that_a_stage_ran_with_though_they_were_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("DVC_STAGE", "encode@emoji")
    path = tmp_path / "resolved.yaml"
    changed = load(encode={"batch": 8}, distill={"rank": 8})
    resolved.refresh(load(), path)
    with resolved.running(load(), ENCODE, path):
        resolved.refresh(changed, path)
    found = read_yaml(path)["models"]["emoji"]
    assert found["encode"]["encode"]["batch"] == RAW["encode"]["batch"]
    assert found["distill"]["distill"]["rank"] == 8  # of another stage
    assert "warning: " in capsys.readouterr().err
    assert not resolved.is_current(changed, path)  # so that the next run sees it
