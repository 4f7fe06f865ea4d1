import datetime
import os
from pathlib import Path

import pytest
import yaml

from lcmlora import config
from lcmlora.errors import UserError
from tests.support import params

RAW = params.raw()


def _load(tmp_path: Path, **changes: object) -> config.Config:
    raw = yaml.safe_load(yaml.safe_dump(RAW))
    for key, value in changes.items():
        place = raw
        *parents, last = key.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    return config.load(path)


def test_the_shipped_params_load_and_hold_presets_for_the_papers_bases(tmp_path: Path):
    loaded = _load(tmp_path)
    assert loaded.models == ("emoji",)
    assert {"emoji", "sd15", "sdxl", "ssd1b"} <= set(loaded.bases)
    for base in loaded.bases.values():
        assert base.revision is None or len(base.revision) == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__stepz": 5}, r"params.yaml: distill.stepz: there is no such key; did you mean steps\?$"),
        ({"distill__steps": "many"}, r"distill.steps: got 'many': .*integer"),
        ({"distill__steps": 0}, r"distill.steps: got 0: .*greater than 0"),
        ({"distill__w_min": 7.5, "distill__w_max": 1.0}, r"distill: .*w_min 7.5 is above w_max 1.0"),
        ({"models": ["sd99"]}, r"no base named 'sd99'; bases has emoji"),
        ({"bases__emoji__distill": {"stepz": 1}}, r"bases.emoji.distill.stepz: there is no such key; did you mean ste"),
        ({"bases__emoji__licence": "mit"}, r"bases.emoji.licence: there is no such key; did you mean license\?$"),
        ({"distill__polish": {"fake_update": 3}}, r"distill.polish.fake_update: .*; did you mean fake_updates\?$"),
        ({"gates": {}}, r"params.yaml: gates: there is no such key; did you mean gate\?$"),
        ({"data__source": "ftp"}, r"data.source: got 'ftp'"),
        ({"study__models": ["sdxl"]}, r"study.models: 'sdxl' is not among models: emoji"),
        ({"study__styles": ["ink", "fluent-emoji-high-contrast"]}, r"study.*'ink' is not among styles: fluent-emoji, "),
        ({"study__grid_style": "f" * 9000}, r"^.{0,300}study: got .{0,1100} more ...f+.{0,300}$"),
        ({"study__steps": 3}, r"study: .*steps 3 is odd, and a guided solver step costs two"),
        ({"study__student_steps": [1, 2]}, r"study: .*student_steps has no 4, at which all is compared"),
        ({"study__finetunes": ["noto-v1"], "finetunes__noto-v1": {}}, r"'noto-v1' is the name of a style and of a"),
        ({"study__real": {"copys": 3}}, r"study.real.copys: there is no such key; did you mean copies\?$"),
        (
            {"gate__approval": True},
            r"params.yaml: gate.approval: got True: Input should be 'none' or 'required', or Input should be a valid",
        ),
        (
            {"publish__to": 5},
            r"params.yaml: publish.to: got 5: Input should be a valid string, or Input should be a valid list",
        ),
        ({"gate__x[y]": 3}, r"params.yaml: gate.x\[y\]: there is no such key"),
        (
            {"bases__emoji__resolution": 512},
            r"emoji: evaluation.features: efficientnet-lite0 sees .*128.* blur at 512 is",
        ),
        (
            {"bases__emoji__evaluation": {"batch": 4, "check_features": "efficientnet-lite0"}},
            r"evaluation: .*check_features: efficientnet-lite0 are the features already",
        ),
        (
            {"evaluation": {"solver_steps": [1, 2]}},
            r"evaluation: .*solver_steps was replaced by solver_evaluations, which counts network evaluations",
        ),
        ({"evaluation": {"solvers": ["plms"]}}, r"evaluation.solvers.0: got 'plms': .*'ddim'"),
        (
            {"evaluation": {"solvers": [{"solver": "ddim", "guidance_scale": 4, "karras": True}]}},
            r"evaluation.solvers.0: got .*ddim has no Karras sigmas; dpm\+\+, unipc, euler have",
        ),
        ({"evaluation": {"solvers": [{"solver": "ddim"}]}}, r"evaluation.solvers.0.guidance_scale: is missing"),
        (
            {"bases__emoji__evaluation": {"batch": 4, "solvers": ["ddim", {"solver": "ddim", "guidance_scale": 4}]}},
            r"evaluation: .*solvers: ddim stands there twice",
        ),
        ({"bases__emoji__config": "my/base"}, r"bases.emoji: .*config goes with a .safetensors source"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file_key_and_value(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        _load(tmp_path, **changes)


def test_a_missing_key_a_missing_file_and_a_file_that_is_no_yaml_are_named(tmp_path: Path):
    path = tmp_path / "params.yaml"
    with pytest.raises(UserError, match="no such file"):
        config.load(path)
    path.write_text("models: [a\n")
    with pytest.raises(UserError, match="is not YAML"):
        config.load(path)
    path.write_text(yaml.safe_dump({k: v for k, v in RAW.items() if k != "data"}))
    with pytest.raises(UserError, match="data: is missing"):
        config.load(path)


def test_a_base_overrides_a_stages_settings_for_itself_alone(tmp_path: Path):
    loaded = _load(tmp_path, bases__emoji__distill={"batch": 7})
    assert loaded.distill_for("emoji").batch == 7
    assert loaded.distill["batch"] == RAW["distill"]["batch"]


def test_a_model_is_studied_with_every_style_and_fine_tune_where_it_is_asked_for(tmp_path: Path):
    assert _load(tmp_path).studied("emoji") == []
    loaded = _load(tmp_path, study__models=["emoji"])
    assert loaded.studied("emoji")[0] == ("style", "noto-v1")
    assert loaded.studied("emoji")[-1] == ("finetune", "noto-v1-full")
    assert loaded.studied("sdxl") == []
    trained, measured = loaded.variation("emoji", "style", "noto-v1")[0], loaded.real_pictures("style", "noto-v1")
    assert measured == trained.model_copy(update=RAW["study"]["real"])


def test_equal_settings_have_equal_digests_and_others_have_not(tmp_path: Path):
    one, two = _load(tmp_path).distill_for("emoji"), _load(tmp_path, distill__seed=1).distill_for("emoji")
    assert config.digest(one) == config.digest(_load(tmp_path).distill_for("emoji"))
    assert config.digest(one) != config.digest(two)
    assert config.digest({"a": 1, "b": 2}) == config.digest({"b": 2, "a": 1})


def test_addresses_in_the_environment_go_before_those_of_the_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("LCMLORA_PUBLISH_TO", "s3://lcmlora/releases")
    monkeypatch.setenv("LCMLORA_GPU_LIMIT", "gpu-b")
    loaded = config.load(Path(__file__).parents[1] / "params.yaml")
    found = (loaded.registry.tracking_uri, loaded.publish.to, loaded.flow.limit)
    assert found == ("http://127.0.0.1:5000", "s3://lcmlora/releases", "gpu-b")
    monkeypatch.delenv("LCMLORA_GPU_LIMIT")
    assert loaded.flow.limit == loaded.flow.gpu_limit == "gpu"


@pytest.mark.parametrize(
    ("source", "rollouts", "message"),
    [
        ("emoji", {}, r"emoji: distill\.trajectory: 0\.5 needs data\.source: prompts, and encode\.rollouts\.states"),
        ("prompts", {"states": False}, r"emoji: distill\.trajectory: 0\.5 needs data\.source: prompts"),
        ("prompts", {"steps": 50}, r"emoji: encode\.rollouts\.steps: 50 is not distill\.grid, 20"),
        ("prompts", {"w": 7.5}, r"emoji: encode\.rollouts\.w: 7\.5 is not within distill\.w_min 2 and w_max 2"),
        ("prompts", {}, None),
    ],
)
def test_a_trajectory_needs_the_states_of_rollouts_on_its_grid_and_with_its_guidance(
    tmp_path: Path, source: str, rollouts: dict[str, object], message: str | None
):
    changes = {"data__source": source, "distill__trajectory": 0.5}
    changes["encode__rollouts"] = {"steps": 20, "w": 2.0, "states": True} | rollouts
    if message is None:
        assert _load(tmp_path, **changes).distill_for("emoji").trajectory == 0.5
        return
    with pytest.raises(UserError, match=message):
        _load(tmp_path, **changes)


def test_an_override_changes_of_settings_within_settings_what_it_names(tmp_path: Path):
    loaded = _load(tmp_path, encode__rollouts={"states": True})
    assert loaded.encode_for("sd15").rollouts == config.Rollouts(steps=50, w=7.5, states=True)


FOREIGN = [
    "x; touch y",
    "../../..",
    "..",
    ".",
    "",
    "a/b",
    "-h",
    "$(id)",
    "a\nb",
    "x" * 65,
    "ü",
    "a b",
    "CON",
    "nul.txt",
    "a.",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_that_would_be_more_than_a_name_is_refused_wherever_it_stands(tmp_path: Path, name: str):
    emoji, style = RAW["bases"]["emoji"], RAW["styles"]["noto-v1"]
    for changes in (
        {"bases": RAW["bases"] | {name: emoji}},
        {"models": [name]},
        {"styles": RAW["styles"] | {name: style}},
        {"finetunes": RAW["finetunes"] | {name: style}},
        {"study__styles": [name]},
        {"registry__alias": name},
        {"flow__gpu_limit": name},
        {"bases__emoji__variant": name},
    ):
        with pytest.raises(UserError, match="is no name") as refused:
            _load(tmp_path, **changes)
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registry__experiment": "../x"}, "experiment"),
        ({"registry__alias": "v1"}, "is no alias"),
        ({"registry__alias": "Latest"}, "is no alias"),
        ({"registry__alias": "a.b"}, "is no alias"),
        ({"registry__alias": "previous"}, "no alias of its own"),
        ({"bases__emoji__revision": "../../x"}, "revision"),
    ],
)
def test_what_the_registry_or_the_hub_would_not_take_is_refused_at_once(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        _load(tmp_path, **changes)


def test_names_that_are_one_folder_or_one_registered_model_are_refused(tmp_path: Path):
    emoji = RAW["bases"]["emoji"]
    with pytest.raises(UserError, match="Emoji and emoji are one folder"):
        _load(tmp_path, bases=RAW["bases"] | {"Emoji": emoji})
    both = ["emoji", "lcm-lora-emoji"]
    with pytest.raises(UserError, match="emoji and lcm-lora-emoji would be registered under one name"):
        _load(tmp_path, models=both, bases=RAW["bases"] | {"lcm-lora-emoji": emoji})


def test_the_gpu_limit_of_the_environment_is_a_name_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LCMLORA_GPU_LIMIT", "gpu; touch y")
    with pytest.raises(UserError, match="LCMLORA_GPU_LIMIT: 'gpu; touch y' is no name"):
        assert config.Flow().limit


# Each line stands for nine times the one before.
_BOMB = b"a: &a [x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 9)) for n in range(97, 110)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping of settings, got nothing"),
        (b"null", "expected a mapping of settings, got nothing"),
        (b"[1, 2]", "expected a mapping of settings, got a list"),
        (b"just text", "expected a mapping of settings, got a text"),
        (b"a: 1\n\tb: 2", "is not YAML: .*'.t'"),
        ("models: [é]".encode("latin-1"), "is not UTF-8: byte 0xe9"),
        ("models: [a]".encode("utf-16"), "is not UTF-8 but UTF-16"),
        (b"2021-01-01: 3", r"the key datetime\.date\(2021, 1, 1\) is no text \(date\); put it in quotes"),
        (b"yes: 3", r"the key True is no text \(true or false\)"),
        (b"models:\n  ? 5\n  : a", r"models: the key 5 is no text \(a number\)"),
        (b"? [a]\n: b", "is not YAML: .*unhashable key"),
        (b"a: &a [*a]", "line 1: contains an alias of itself"),
        (_BOMB, "line 7: more than 1000000 values"),
        (b"a: " + b"9" * 5000, "is not YAML: Exceeds the limit"),
        (b"a: 0x" + b"f" * 9000, "a number of 36000 bits"),
        (b"[" * 5000, "nested too deeply"),
        (b'a: "\\ud800"', "half a surrogate pair"),
        (b"a: 1\na: 2", "line 2: the key 'a' stands twice"),
        (b"a: !!python/object/apply:os.system [ls]", "is not YAML: could not determine a constructor"),
        (b"a: " + b"x" * (2 << 20), "more than 1048576 bytes"),
    ],
    ids=lambda value: value[:20].decode("ascii", "replace") if isinstance(value, bytes) else "",
)
def test_a_file_that_holds_no_settings_is_one_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"params.yaml: {message}") as caught:
        config.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__steps": True}, "distill.steps: got True: expected a number, not true"),
        ({"data__max_aspect": False}, "data.max_aspect: got False: expected a number, not false"),
        ({"distill__lr": float("inf")}, "distill.lr: got inf: expected a finite number"),
        ({"gate__max_excess": float("nan")}, "gate.max_excess: got nan: expected a finite number"),
        ({"bases__emoji__distill": {"lr": float("nan")}}, "bases.emoji.distill.lr: got nan: expected a finite number"),
        ({"bases__emoji__distill": {"batch": {"a": 1}}}, "bases.emoji.distill.batch: got {'a': 1}: .*valid integer"),
        ({"bases__emoji__encode": {"rollouts": 3}}, "bases.emoji.encode.rollouts: got 3"),
        ({"distill__seed": -1}, "distill.seed: got -1: .*greater than or equal to 0"),
        ({"distill__seed": 1 << 64}, "distill.seed: got a number of 65 bits: expected one up to"),
        ({"distill__steps": 1 << 60}, "distill.steps: got a number of 61 bits"),
        ({"registry__experiment": 5}, "registry.experiment: got 5: .*valid string"),
        ({"registry__experiment": "a\0b"}, r"registry.experiment: got 'a.x00b': a zero byte"),
        ({"registry__alias": datetime.date(2021, 1, 1)}, "registry.alias: got datetime.date.*put it in quotes"),
        ({"bases": []}, r"bases: got \[\]: .*valid dictionary"),
        ({"distill": None}, "distill: got None"),
        ({"data__path": None}, "data.path: got None: .*valid string"),
        ({"data__path": 3}, "data.path: got 3: .*valid string"),
    ],
)
def test_a_value_that_would_mean_something_else_is_one_line(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=f"params.yaml: {message}") as caught:
        _load(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_a_password_in_the_settings_is_not_shown(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        _load(tmp_path, registry__tracking_uri=["postgresql://me:sesame@db/x"])
    assert "me:***@db" in str(caught.value) and "sesame" not in str(caught.value)


def test_of_very_many_faults_some_are_told(tmp_path: Path):
    with pytest.raises(UserError, match="and 81 more") as caught:
        _load(tmp_path, **{f"key{number}": 1 for number in range(101)})
    assert len(str(caught.value).splitlines()) == 21


def test_no_file_and_what_is_no_ordinary_one_are_told(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "not an ordinary file"), (".", ""), ("none.yaml", "no such file; run in the")):
        with pytest.raises(UserError, match=message):
            config.load(tmp_path / name)
