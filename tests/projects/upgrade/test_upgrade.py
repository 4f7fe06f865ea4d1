"""`lcmlora upgrade`: a project of 0.1.0 becomes one of today, and what a person has edited stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from dvc.repo import Repo
from typer.testing import CliRunner

from lcmlora.cli.main import app
from lcmlora.dvc_files import expansion
from lcmlora.errors import UserError
from lcmlora.io.parsing import read_yaml
from lcmlora.project import Project
from lcmlora.projects import durations, generated, record
from lcmlora.projects.upgrade.history import since
from lcmlora.projects.upgrade.plan import apply, plan_upgrade
from tests.projects.upgrade import former
from tests.projects.upgrade.former import ROOT, commit, git

STAGES = [
    "prepare", "encode@emoji", "reference@emoji", "distill@emoji", "evaluate@emoji", "package@emoji"
]  # fmt: skip


def upgrade(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--project", str(root), "upgrade", "--no-estimate", *arguments])


def refused(root: Path, *arguments: str) -> str:
    """Returns the error with which `upgrade` ends."""
    result = upgrade(root, *arguments)
    assert isinstance(result.exception, UserError), result
    return str(result.exception)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return former.make(tmp_path_factory.mktemp("former") / "owls")


@pytest.fixture
def old(made: Path, tmp_path: Path) -> Path:
    """A project of 0.1.0, all of whose files are committed."""
    shutil.copytree(made, tmp_path / "owls")
    return tmp_path / "owls"


@pytest.fixture(scope="module")
def current(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("current") / "owls"
    shutil.copytree(made, root)
    apply(plan_upgrade(Project(root)))
    commit(root)
    return root


@pytest.fixture
def new(current: Path, tmp_path: Path) -> Path:
    """The project after its upgrade, all of whose files are committed."""
    shutil.copytree(current, tmp_path / "new" / "owls")
    return tmp_path / "new" / "owls"


def test_a_project_of_0_1_0_becomes_one_that_dvc_and_check_take(old: Path, monkeypatch: pytest.MonkeyPatch):
    result = upgrade(old, "--yes")
    assert result.exit_code == 0, result.output
    checked = CliRunner().invoke(app, ["--project", str(old), "check"])
    assert checked.stdout == "emoji: bases/emoji at 64 px, 700 steps of distillation\n"
    shutil.copytree(ROOT / "bases" / "emoji", old / "bases" / "emoji")
    (old / "study").mkdir(exist_ok=True)
    lock = read_yaml(old / "dvc.lock")["stages"]
    for out in (out["path"] for stage in lock.values() for out in stage["outs"]):
        path = old / out
        if not path.exists():  # DVC would fetch the outputs of 0.1.0
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}") if path.suffix else path.mkdir()
    monkeypatch.chdir(old)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    with Repo.init(str(old), force=True) as repo:
        ran = [stage.addressing for stage in repo.reproduce(dry=True)]
        assert set(repo.status()) == {*STAGES, "resolve"}
    assert ran == ["resolve", *STAGES]


def test_the_report_says_for_each_stage_why_it_is_stale_and_what_is_not_known(old: Path):
    told = upgrade(old, "--dry-run").stdout
    assert [line.split(":")[0].strip() for line in told.splitlines() if "unknown time (" in line] == STAGES
    assert "reference version 2 (0.2.0): the best settings of each solver are searched on validation captions" in told
    assert "      reads what prepare, reference@emoji, distill@emoji will make\n" in told
    assert "release/emoji/scheduler_config.json, no more release/emoji\n" in told
    assert "distill@emoji: unknown time (this machine has not measured it; `lcmlora doctor emoji` estimates it)" in told
    assert told.endswith("in all unknown time\n")
    assert git(old, "status", "--porcelain") == ""


def test_settings_are_converted_with_their_comments_and_nothing_else_changes(new: Path, made: Path):
    before, after = ((root / "params.yaml").read_text().splitlines() for root in (made, new))
    added, lacking = [line for line in after if line not in before], [line for line in before if line not in after]
    assert added == [
        "# yaml-language-server: $schema=.lcmlora/params.schema.json",
        "  validation: 0.09               # share of captions kept from training; evaluation draws these",
        "  test: 0.16",
        "  solver_evaluations: [2, 4, 8, 16, 32, 64]",
        *["    evaluation: {guidance_scale: 8.5, batch: 4, solver_evaluations: [2, 4, 8, 16]}"] * 2,
    ]
    recipe = before[before.index("pretrain:                        # how bases/emoji was made; the stage is frozen") :]
    assert [line for line in lacking if line not in recipe] == [
        "  validation: 0.25               # share of captions kept from training; evaluation draws these",
        "  solver_steps: [1, 2, 4, 8, 16, 32]",
        *["    evaluation: {guidance_scale: 8.5, batch: 4, solver_steps: [1, 2, 4, 8]}"] * 2,
    ]


def test_a_second_upgrade_has_nothing_to_do(new: Path):
    result = upgrade(new)
    assert result.stdout == f"{new}/params.yaml: the project is up to date with lcmlora {record.own_version()}\n"
    assert git(new, "status", "--porcelain") == ""


def test_a_project_that_init_has_just_made_has_nothing_to_do(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("an owl\n")
    root = tmp_path / "words"
    made = CliRunner().invoke(
        app, ["init", str(root), "--base", "sdxl", "--prompts", str(tmp_path / "prompts.txt"), "--with", "kubernetes"]
    )
    assert made.exit_code == 0, made.output
    assert upgrade(root).stdout.endswith(f"is up to date with lcmlora {record.own_version()}\n")


def test_lines_that_a_person_added_to_gitignore_stay_and_what_is_new_is_added(old: Path):
    (old / ".gitignore").write_text("/owls.zip\n" + (old / ".gitignore").read_text())
    commit(old)
    apply(plan_upgrade(Project(old)))
    lines = (old / ".gitignore").read_text().splitlines()
    assert lines[0] == "/owls.zip" and lines[-2:] == ["/release/", "/timings/"]


def test_edits_of_a_file_of_0_1_0_are_merged_with_the_new_text_if_git_has_the_former_one(old: Path):
    path = old / "prefect.yaml"
    path.write_text(path.read_text().replace("0 2 * * *", "0 5 * * 1"))
    commit(old)
    assert "prefect.yaml: is written; your changes stay" in upgrade(old, "--yes").stdout
    assert "0 5 * * 1" in path.read_text() and "lcmlora.flows.retrain.retrain_models" in path.read_text()


def test_edits_that_contradict_the_new_text_stay_and_it_goes_beside_them(old: Path):
    path, beside = old / "prefect.yaml", old / "prefect.yaml.new"
    edited = path.read_text().replace("flows/retrain.py:retrain\n", "flows/mine.py:mine\n")
    path.write_text(edited)
    commit(old)
    told = upgrade(old, "--dry-run").stdout
    assert "prefect.yaml: has changes of yours that contradict the new text, which goes to prefect.yaml.new" in told
    assert "-    entrypoint: flows/mine.py:mine\n" in told
    beside.write_text("a part of it is merged\n")
    assert "prefect.yaml.new: is left from a former upgrade; merge it into prefect.yaml" in refused(old, "--yes")
    beside.unlink()
    assert "prefect.yaml.new: merge it into prefect.yaml, then delete it\n" in upgrade(old, "--yes").stdout
    assert path.read_text() == edited and "lcmlora.flows.retrain.retrain_models" in beside.read_text()
    commit(old)
    assert upgrade(old).stdout.endswith(f"is up to date with lcmlora {record.own_version()}\n")  # it is said once


def test_edits_of_a_file_are_merged_with_what_a_later_version_adds(new: Path):
    path = new / "prefect.yaml"
    text = path.read_text()
    report = text.index("    entrypoint: lcmlora.flows.report")
    begin, end = text.rindex("  - name:", 0, report), text.index("  - name:", report)
    weekly = text[begin:end]
    path.write_text(text.replace(weekly, ""))
    kept = record.read(new)
    kept.model_copy(update={"files": kept.files | {path.name: generated.digest(path.read_text())}}).write(new)
    commit(new)
    path.write_text(path.read_text().replace("0 2 * * *", "0 5 * * 1"))
    commit(new)
    assert "prefect.yaml: is written; your changes stay" in upgrade(new, "--yes").stdout
    assert path.read_text() == text.replace("0 2 * * *", "0 5 * * 1")


def test_a_file_that_only_the_person_changed_or_deleted_stays(new: Path):
    (new / "prefect.yaml").write_text("name: mine\n")
    (new / "README.md").unlink(missing_ok=True)
    (new / ".lcmlora" / "params.schema.json").write_text("{}")  # for editors; never a person's
    commit(new)
    apply(plan_upgrade(Project(new)))
    assert git(new, "status", "--porcelain").split() == []
    assert (new / "prefect.yaml").read_text() == "name: mine\n"


def test_uncommitted_changes_are_in_the_way_of_an_upgrade(old: Path):
    (old / "owls.txt").write_text("a file of no concern\n")
    path = old / "params.yaml"
    path.write_text(path.read_text() + "# mine\n")
    assert refused(old, "--yes").startswith("params.yaml: with changes that Git does not have")
    assert not (old / ".lcmlora").exists()
    git(old, "checkout", "params.yaml")
    assert upgrade(old, "--yes").exit_code == 0


def test_without_git_nothing_is_written(old: Path):
    shutil.rmtree(old / ".git")
    before = (old / "params.yaml").read_text()
    assert "Git is what brings the former ones back" in refused(old, "--yes")
    assert (old / "params.yaml").read_text() == before and not (old / ".lcmlora").exists()


def test_without_a_terminal_it_asks_for_yes(old: Path):
    assert refused(old) == "nothing was written: there is no terminal to ask on; with --yes the files are written"
    assert git(old, "status", "--porcelain") == ""


def test_settings_that_no_conversion_mends_are_named_and_nothing_is_written(old: Path):
    path = old / "params.yaml"
    path.write_text(path.read_text().replace("teacher_steps: 50", "teacher_steps: many"))
    commit(old)
    assert "evaluation.teacher_steps: got 'many'" in refused(old, "--yes")
    assert git(old, "status", "--porcelain") == ""


def test_a_project_of_a_later_version_and_a_folder_that_is_none_are_refused(new: Path, tmp_path: Path):
    record.read(new).model_copy(update={"lcmlora": "9.1.0"}).write(new)
    assert "the project is of lcmlora 9.1.0, and this is" in refused(new)
    (tmp_path / "empty").mkdir()
    assert "is no project" in refused(tmp_path / "empty")


def test_what_nothing_needs_any_more_is_named_and_stays(old: Path, new: Path):
    for name in ("lcmlora", "flows"):
        (old / name).mkdir()
        (old / name / "code.py").touch()
    commit(old)
    assert "no longer needed, yours to delete: lcmlora/, flows/\n" in upgrade(old, "--yes").stdout
    assert (old / "lcmlora" / "code.py").exists()
    kept = record.read(new)
    kept.model_copy(update={"files": kept.files | {"prefect.toml": "0" * 64}}).write(new)
    (new / "prefect.toml").touch()
    commit(new)
    assert "yours to delete: prefect.toml\n" in upgrade(new, "--yes").stdout and (new / "prefect.toml").exists()


def test_a_file_in_another_encoding_is_named(old: Path):
    (old / "prefect.yaml").write_bytes("# Käuze\n".encode("latin-1"))
    assert "prefect.yaml: is not UTF-8: byte 0xe4 at 3" in refused(old)


def test_a_base_of_large_pictures_gets_the_features_of_its_family_where_0_1_0_took_those_of_small_ones(old: Path):
    path = old / "params.yaml"
    path.write_text(path.read_text().replace("  - emoji\n", "  - emoji\n  - sdxl\n", 1))
    commit(old)
    settings = plan_upgrade(Project(old)).settings
    assert settings.evaluation_for("sdxl").features == "clip"
    assert settings.evaluation_for("emoji").features == "efficientnet-lite0"


def ran(root: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Writes a dvc.lock whose stages have all run with today's settings, but for these changes of their entries."""
    upgraded = plan_upgrade(Project(root))
    resolved = read_yaml(root / "resolved.yaml")
    stages = {}
    for stage in expansion.expanded(read_yaml(root / "dvc.yaml"), read_yaml(root / "params.yaml")):
        entry = resolved
        for key in stage.entry.split(".") if stage.entry else ():
            entry = entry[key]
        for path, value in changes.get(stage.name, {}).items():
            *above, last = path.split(".")
            inner = entry
            for key in above:
                inner = inner[key]
            inner[last] = value
        stages[stage.name] = {
            "cmd": stage.command,
            "deps": [{"path": path} for path in stage.inputs],
            "params": {"resolved.yaml": {stage.entry: entry}} if stage.entry else {},
            "outs": [{"path": path} for path in stage.outputs],
        }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    assert upgraded.made_by == "0.2.0"


def outdate(root: Path) -> None:
    kept = record.read(root)
    kept.model_copy(update={"lcmlora": "0.0.1"}).write(root)
    commit(root)


def test_a_version_and_a_default_that_changed_are_named_with_both_values_and_all_stages_after_them(new: Path):
    ran(
        new, {"distill@emoji": {"distill.gamma": 0.2, "distill.steps": 350}, "package@emoji": {"algorithms.package": 1}}
    )
    Project(new).durations.parent.mkdir()
    seconds = {"models.emoji.distill": 120.0, "models.emoji.evaluate": 100.0}
    durations.Durations(seconds=seconds).write(Project(new).durations)
    outdate(new)
    told = upgrade(new, "--dry-run").stdout
    assert told[told.index("stages that") :].splitlines() == [
        "stages that become stale, and why",
        "  emoji",
        "    distill@emoji: 4 min (its last run, for 2 times its steps)",
        "      distill.steps: 350 -> 700 (params.yaml distill)",
        "      distill.gamma: 0.2 -> 0.3 (default)",
        "    evaluate@emoji: 2 min (its last run)",
        "      reads what distill@emoji will make",
        "    package@emoji: unknown time (this machine has not measured it)",
        *(f"      package version {each.version} ({each.release}): {each.change}" for each in since("package", 1)),
        "      reads what distill@emoji, evaluate@emoji will make",
        "in all about 6 min, and 1 of unknown time",
    ]


def test_check_says_that_a_project_is_of_another_version_and_what_converts_its_settings(old: Path, new: Path):
    checked = CliRunner().invoke(app, ["--project", str(old), "check"])
    assert "pretrain: there is no such key; `lcmlora upgrade` converts files of lcmlora 0.1.0" in str(checked.exception)
    assert CliRunner().invoke(app, ["--project", str(new), "check"]).stderr == ""
    outdate(new)
    told = f"the project is of lcmlora 0.0.1; `lcmlora upgrade` brings it to {record.own_version()}\n"
    assert CliRunner().invoke(app, ["--project", str(new), "check"]).stderr == told


def test_where_nothing_that_decides_has_changed_no_stage_is_stale(new: Path):
    ran(new, {})
    outdate(new)
    assert upgrade(new, "--dry-run").stdout.endswith("No stage becomes stale.\n")
    result = upgrade(new, "--yes")
    assert result.exit_code == 0 and record.read(new).lcmlora == record.own_version()


def test_resolve_rewrites_stages_without_making_dvc_yaml_a_file_that_a_person_has_edited(new: Path):
    raw = yaml.safe_load((new / "params.yaml").read_text())
    raw["bases"]["emoji"]["data"] = {"path": "owls"}
    (new / "params.yaml").write_text(yaml.safe_dump(raw))
    assert CliRunner().invoke(app, ["--project", str(new), "resolve"]).exit_code == 0
    text = (new / "dvc.yaml").read_text()
    assert "prepare-own" in text and record.read(new).files["dvc.yaml"] == generated.digest(text)
