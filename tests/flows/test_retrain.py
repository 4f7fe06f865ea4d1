import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lcmlora import registry
from lcmlora.config import Config, load
from lcmlora.flows.retrain import retrain_models, stages_of
from lcmlora.registry import promotion, registration
from tests.flows.conftest import Project, artifacts
from tests.support import repositories
from tests.support.releases import settings, write_sealed

ROOT = Path(__file__).parents[2]


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
def test_of_three_models_one_fails_the_others_are_finished_and_the_next_runs_do_only_what_is_left(
    project: Project, capfd
):
    project.change(lambda raw: raw.update(models=["a", "b", "c"]))
    (project.root / "broken-b").touch()
    state = retrain_models(return_state=True)
    assert state.is_failed()
    assert state.message == "b: distill@b: step 7: the loss is not finite"
    table = capfd.readouterr().out
    assert "error" in table and "distill@b: step 7: the loss is not finite" in table
    assert "lcm-lora-a/1 @champion (new)" in table and "lcm-lora-c/1 @champion (new)" in table
    assert "student 4.5, best solver 93.0 (dpm++@2)" in table
    assert "student@4 0.850, teacher@50 0.900" in table
    assert [project.aliases(model) for model in ("a", "c")] == [{"champion": 1}] * 2
    assert [len(project.versions(model)) for model in ("a", "b", "c")] == [1, 0, 1]
    sha = project.versions("a")[0].tags["sha256"]
    assert f"a/sha256-{sha[:12]}/manifest.json" in project.releases()
    pointer = json.loads((project.root / "releases/a/channels/champion.json").read_text())
    assert pointer["sha256"] == sha
    check_page_of_the_run(project)

    (project.root / "broken-b").unlink()
    state = retrain_models(return_state=True)
    assert (state.is_completed(), state.name) == (True, "Promoted")
    assert sorted(project.distilled()) == ["a", "b", "c"]
    assert [len(project.versions(model)) for model in ("a", "b", "c")] == [1, 1, 1]
    assert project.aliases("b") == {"champion": 1}
    assert len(project.releases()) == 3
    capfd.readouterr()

    before = sorted((str(p), p.stat().st_mtime_ns) for p in (project.root / "releases").rglob("*"))
    stamps = [project.versions(model)[0].last_updated_timestamp for model in ("a", "b", "c")]
    state = retrain_models(return_state=True)
    assert (state.is_completed(), state.name) == (True, "UpToDate")
    shown = capfd.readouterr()
    assert "nothing was stale" in shown.out
    assert "Stage '" not in shown.err  # DVC was asked once and no stage was started
    assert sorted(project.distilled()) == ["a", "b", "c"]
    assert stamps == [project.versions(model)[0].last_updated_timestamp for model in ("a", "b", "c")]
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in (project.root / "releases").rglob("*"))


def check_page_of_the_run(project: Project) -> None:
    """Table, card, figures and links are what Prefect's page of the run shows."""
    table = artifacts("retrain")[-1].data
    assert "| b | error | distill@b: step 7: the loss is not finite |" in table
    assert "| a | version | lcm-lora-a/1 @champion (new) |" in table
    card = artifacts("card-a")[-1].data
    assert card.lstrip().startswith("#") and "library_name" not in card
    assert "![" not in card or "](data:image/png;base64," in card
    rows = json.loads(artifacts("figures-a")[-1].data)
    assert {"drawn with": "student@4", "network evaluations": "4", "excess": "4.5", "retrieval@1": "0.850"} in rows
    assert str(project.root / "releases/a/sha256-") in artifacts("release-a")[-1].data


@pytest.mark.slow
def test_an_unreachable_registry_and_bucket_leave_the_release_for_the_next_run(project: Project, monkeypatch, capfd):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    down = project.params(
        "down.yaml",
        registry={"tracking_uri": f"http://127.0.0.1:{closed_port()}"},
        publish={"to": "s3://bucket/team", "endpoint_url": f"http://127.0.0.1:{closed_port()}"},
    )
    state = retrain_models(["a"], params=down, return_state=True)
    assert state.is_failed()
    table = capfd.readouterr().out
    assert "publish.to: bucket bucket at http://127.0.0.1:" in table
    assert "MLflow at http://127.0.0.1:" in table
    assert "release/a, not published" in table
    assert (project.root / "release/a/SHA256SUMS").is_file()

    state = retrain_models(["a"], return_state=True)
    assert (state.is_completed(), state.name) == (True, "Promoted")  # a version is new, though no stage ran
    assert project.distilled() == ["a"]
    assert project.aliases("a") == {"champion": 1}
    assert len(project.releases()) == 1


def test_a_candidate_that_fails_the_gate_is_registered_with_the_reason_and_without_alias(project: Project, capfd):
    strict = project.params("strict.yaml", gate={"min_retrieval": 1.0})
    state = retrain_models(["a"], params=strict, return_state=True)
    assert state.is_completed()
    version = project.versions("a")[0]
    assert version.tags["gate"] == "rejected"
    assert "caption retrieval 0.850 is below 0.900" in version.tags["gate_reason"]
    assert project.aliases("a") == {}
    assert not (project.root / "releases/a/channels").exists()
    assert "failed: student@4: caption retrieval 0.850" in capfd.readouterr().out

    retrain_models(["a"])  # the same adapter under the milder gate
    assert project.versions("a")[0].tags["gate"] == "passed"
    assert project.aliases("a") == {"champion": 1}


def test_a_champion_that_a_person_rolled_back_stays_rolled_back(project: Project):
    retrain_models(["a"])
    name = "lcm-lora-a"
    settings = load().registry
    older = registration.register_release("a", settings, write_sealed(project.root / "older"))
    promotion.promote_passed(registry.resolve(f"{name}/{older.version}", settings), settings, reason="blurred")
    pointer = project.root / "releases/a/channels/champion.json"
    pointer.write_text("moved by hand")
    retrain_models(["a"])
    assert project.aliases("a") == {"champion": older.version, "previous": 1}
    assert pointer.read_text() == "moved by hand"


@pytest.mark.slow
def test_without_publishing_and_promoting_there_is_a_version_only_and_force_runs_everything(project: Project, capfd):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout

    retrain_models(["a"], publish=False, promote=False)
    assert project.releases() == []
    assert project.aliases("a") == {}
    assert "as in Git" not in capfd.readouterr().out  # which has nothing yet
    git("add", "dvc.lock", "metrics")
    git("commit", "-qm", "first")
    state = retrain_models(["a"], force=True, publish=False, return_state=True)
    assert state.name == "Promoted"
    assert project.distilled() == ["a", "a"]
    assert len(project.versions("a")) == 1
    assert project.aliases("a") == {"champion": 1}
    assert not (project.root / "releases").exists()
    trained = project.versions("a")[0].tags["adapter"]
    assert f"all as in Git, nothing to commit, adapter {trained[:12]}" in capfd.readouterr().out
    assert git("status", "--porcelain", "--untracked-files=no") == ""


@pytest.mark.slow
def test_settings_of_one_model_retrain_that_model_only_and_a_data_change_retrains_all(project: Project):
    retrain_models()
    project.change(lambda raw: raw["bases"].update(b=raw["bases"]["b"] | {"distill": {"steps": 3}}))
    state = retrain_models(return_state=True)
    assert sorted(project.distilled()) == ["a", "b", "b"]
    assert state.name == "Reproduced"  # the stock's adapter is the same for all settings
    assert state.message.startswith("a: UpToDate lcm-lora-a/1; b: Reproduced lcm-lora-b/1; ")
    (project.root / "pictures").write_text('{"more": 1}\n')
    retrain_models()
    assert sorted(project.distilled()) == ["a", "a", "b", "b", "b"]
    assert [len(project.versions(model)) for model in ("a", "b")] == [1, 1]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "flows.retrain", *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "params", "expected"),
    [
        (
            ["--model", "nope"],
            {},
            "error: unknown model 'nope': params.yaml `models` has a, b; known bases: a, b,",
        ),
        ([], {"gate": {"steps": "many"}}, "error: params.yaml: gate.steps: got 'many':"),
        ([], {"gate": {"stops": 4}}, "error: params.yaml: gate.stops: there is no such key; did you mean steps?\n"),
    ],
)
def test_what_cannot_be_started_is_told_in_one_line(
    arguments: list[str], params: dict, expected: str, stock: Path, base_folder: Path, tmp_path: Path
):
    import yaml

    from tests.support.releases import settings

    raw = settings(base_folder, models=("a", "b"), **params)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1


def test_a_studied_model_has_its_styles_and_fine_tunes_between_evaluation_and_release(base_folder: Path):
    raw = settings(base_folder, models=("a", "b"))
    raw |= {"styles": {"ink": {}}, "finetunes": {"clay": {}}}
    raw["study"] |= {"models": ["a"], "styles": ["ink"], "finetunes": ["clay"], "grid_style": None}
    loaded = Config.model_validate(raw)
    assert stages_of("b", loaded) == ["encode@b", "reference@b", "distill@b", "evaluate@b", "package@b"]
    between = ["style@a-ink", "style-alone@a-ink", "finetune@a-clay", "finetune-alone@a-clay", "study@a"]
    assert stages_of("a", loaded) == ["encode@a", "reference@a", "distill@a", "evaluate@a", *between, "package@a"]


def test_every_stage_that_the_flow_names_is_in_dvc_yaml_and_the_other_way_round(tmp_path: Path):
    root = repositories.make(tmp_path, (ROOT / "dvc.yaml").read_text())
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw |= {"models": ["emoji", "sdxl"]}
    raw["study"]["models"] = ["emoji"]
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    named = [name for model in raw["models"] for name in stages_of(model, load(root / "params.yaml"))]
    assert sorted(listed) == sorted(["resolve", "pretrain", "prepare", *named])


@pytest.mark.slow
def test_of_models_with_different_pictures_those_run_whose_pictures_have_changed(project: Project):
    raw = yaml.safe_load((project.root / "dvc.yaml").read_text())
    prepare = "mkdir -p data/own-pictures/${key} && cp ${item} data/own-pictures/${key}/train.jsonl"
    outs = ["data/own-pictures/${key}"]
    raw["stages"]["prepare-own"] = {"foreach": {"b": "own"}, "do": {"cmd": prepare, "deps": ["${item}"], "outs": outs}}
    folders = dict.fromkeys("abc", "data/pictures") | {"b": "data/own-pictures/b"}
    for name in ("encode", "reference"):
        stage = {key: value for key, value in raw["stages"][name].items() if key != "matrix"}
        text = json.dumps(stage).replace("data/pictures", "${item}").replace("${item.model}", "${key}")
        raw["stages"][name] = {"foreach": folders, "do": json.loads(text)}
    (project.root / "dvc.yaml").write_text(yaml.safe_dump(raw))
    (project.root / "own").write_text('{"own": 1}\n')
    project.change(lambda raw: raw["bases"].update(b=raw["bases"]["b"] | {"data": {"path": "own"}}))

    def ran() -> dict[str, list[str]]:
        """Runs the flow and returns the stages that ran for each model."""
        state = retrain_models(publish=False, promote=False, return_state=True)
        assert state.is_completed(), state.message
        rows = [line.strip("| ").split(" | ") for line in artifacts("retrain")[-1].data.splitlines()]
        return {row[0]: [each.split()[0] for each in row[2].split(", ")] for row in rows if row[1:2] == ["ran"]}

    assert [found[:2] for found in ran().values()] == [["prepare", "encode"], ["prepare-own", "encode"]]
    (project.root / "own").write_text('{"own": 2}\n')
    assert ran() == {"a": ["nothing"], "b": ["prepare-own", "encode", "reference", "distill", "evaluate"]}
    (project.root / "pictures").write_text('{"more": 1}\n')
    assert ran() == {"a": ["prepare", "encode", "reference", "distill", "evaluate"], "b": ["nothing"]}


def test_help_shows_examples_without_importing_prefect():
    script = (
        "import sys; sys.argv[1:] = ['--help']\ntry:\n    from lcmlora.flows.command import main; main()\nfinally:\n"
    )
    script += "    assert not {'prefect', 'torch', 'mlflow', 'pydantic'} & set(sys.modules), 'heavy'\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "lcmlora run emoji --force" in result.stdout


def test_a_gpu_model_is_examined_before_it_is_trained(project: Project):
    project.change(lambda raw: raw["bases"].update(a=raw["bases"]["a"] | {"distill": {"device": "cuda"}}))
    state = retrain_models(["a"], return_state=True)
    assert state.message == "a: doctor a: device: cuda, and this machine has no usable GPU"
    assert not (project.root / "distilled").exists()


@pytest.mark.integration
@pytest.mark.parametrize("ending", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_command_runs_without_a_server_and_ends_with_its_trainer_saying_where_it_goes_on(
    project: Project, ending: signal.Signals
):
    """SIGINT as Ctrl-C sends it, to all who share the terminal; Prefect's server must not be among them."""
    (project.root / "distill.sh").write_text("echo $$ > pid.part; mv pid.part pid; exec sleep 300\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {"PYTHONPATH": str(ROOT)}
    # A runner started in the background has SIGINT ignored, and what it starts leaves it so.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    flow = subprocess.Popen(
        [sys.executable, "-m", "flows.retrain", "--model", "a"],
        env=environment | {"PREFECT_HOME": str(project.root / "prefect")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, former)
    pid = project.root / "pid"
    until = time.monotonic() + 180
    while not pid.exists() and flow.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    assert pid.exists(), flow.communicate()[0]
    (os.killpg if ending == signal.SIGINT else os.kill)(flow.pid, ending)
    out, err = flow.communicate(timeout=60)
    assert flow.returncode == 128 + ending
    assert out == ""
    assert err.splitlines() == [
        "starting Prefect ...",
        *(f"Running stage '{stage}':" for stage in ("prepare", "encode@a", "reference@a", "distill@a")),
        "ending the processes that run ...",
        "ended in distill@a; the same command goes on from there and keeps all results so far",
    ]
    shown = subprocess.run(["ps", "-o", "stat=", "-p", pid.read_text().strip()], capture_output=True, text=True)
    assert shown.stdout.strip() in ("", "Z")
