import base64
import importlib.metadata
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lcmlora import pipelines, serving
from tests import served
from tests.miniature import RESOLUTION

# Loads the model as a serving machine would, and tells what became of it. Our code can import the packages of its
# requirements, and what these require, and no others.
_SERVING_MACHINE = """
import base64, json, sys
from importlib import metadata
from pathlib import Path
from packaging.requirements import Requirement

model, base = Path(sys.argv[1]), Path(sys.argv[2])
known, waiting = set(), [Requirement(line).name for line in (model / "requirements.txt").read_text().splitlines()]
while waiting:
    name = waiting.pop().lower().replace("_", "-")
    if name not in known:
        known.add(name)
        try:
            wanted = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:
            continue
        waiting += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
owners = metadata.packages_distributions()

class Absent:
    def find_spec(self, name, path=None, target=None):
        owned = owners.get(name, [])
        importer = sys._getframe(1)
        while importer.f_globals["__name__"].startswith("importlib"):
            importer = importer.f_back
        ours = importer.f_globals["__name__"].startswith(("lcmlora", "code_model"))
        if ours and name != "lcmlora" and owned and not known & {o.lower().replace("_", "-") for o in owned}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

unpickled, connected, opened = [], [], set()
def watch(event, arguments):
    if event == "pickle.find_class":
        unpickled.append([str(argument) for argument in arguments[-2:]])
    elif event in ("socket.connect", "socket.getaddrinfo"):
        connected.append(repr(arguments))
    elif event == "open" and isinstance(arguments[0], str) and arguments[0].startswith((f"{model}/", f"{base}/")):
        opened.add(Path(arguments[0]).suffix)
sys.addaudithook(watch)

import mlflow, pandas
loaded = mlflow.pyfunc.load_model(str(model))
rows = loaded.predict(pandas.DataFrame({"prompt": ["red apple", "tree"]}), params={"steps": 3, "seed": 6})
import lcmlora
pictures = [base64.b64encode(png).decode() for png in rows["png"]]
print(json.dumps([unpickled, connected, sorted(opened), lcmlora.__file__, pictures]))
"""


@pytest.fixture(scope="module")
def made(miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(miniatures("sd15"), tmp_path_factory.mktemp("served") / "made", gamma=0.4, grid=20)


@pytest.fixture(scope="module")
def model(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow model with the release in it, as the registry has it."""
    folder = tmp_path_factory.mktemp("model") / "model"
    serving.write_model(folder, model="mini")
    served.copy(made, folder / serving.RELEASE)
    return folder


def picture(png: bytes) -> Image.Image:
    found = Image.open(io.BytesIO(png))
    assert found.format == "PNG"
    return found


def test_a_serving_machine_needs_its_requirements_alone_and_unpickles_and_fetches_nothing(
    made: Path, model: Path, miniatures: Callable[[str], Path], tmp_path: Path
):
    environment = served.environment(LCMLORA_BASE=str(miniatures("sd15")))
    del environment["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, "-c", _SERVING_MACHINE, str(model), str(miniatures("sd15"))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    unpickled, connected, opened, code, pictures = json.loads(done.stdout)
    assert (unpickled, connected) == ([], [])
    assert set(opened) <= {"", ".py", ".pyc", ".json", ".txt", ".yaml", ".safetensors"}
    assert ".safetensors" in opened
    assert Path(code) == model / "code/lcmlora/__init__.py"
    assert done.stderr == ""
    expected = pipelines.load(made, warm=False)(["red apple", "tree"], steps=3, seed=6)
    for found, wanted in zip(pictures, expected, strict=True):
        assert picture(base64.b64decode(found)).tobytes() == wanted.tobytes()


def test_in_this_process_too_and_null_is_the_default(
    made: Path, model: Path, miniatures: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    import mlflow
    import pandas
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("LCMLORA_BASE", str(miniatures("sd15")))
    monkeypatch.setenv("LCMLORA_DEVICE", "cpu")
    loaded = mlflow.pyfunc.load_model(str(model))

    def predict(*prompts: Any, **params: Any) -> list[bytes]:
        return list(loaded.predict(pandas.DataFrame({"prompt": prompts}), params=params)["png"])

    (plain,) = predict("tree")
    draw = pipelines.load(made, warm=False)
    assert picture(plain).tobytes() == draw("tree", seed=0)[0].tobytes()
    assert predict("tree", steps=None, seed=None, width=0) == [plain]
    assert picture(predict("tree", width=24, height=8)[0]).size == (24, 8)
    assert picture(plain).size == (RESOLUTION, RESOLUTION)
    assert predict("tree", guidance=2) != [plain]
    for params, message in (
        ({"steps": 21}, "steps: expected 1 to 20, "),
        ({"width": 12}, "width: expected a positive"),
    ):
        with pytest.raises(MlflowException, match=f"^{message}"):
            predict("tree", **params)
    with pytest.raises(MlflowException, match=r"'steps'.*Can not safely convert .*'str'"):
        predict("tree", steps="four")
    with pytest.raises(MlflowException, match=r"^prompt: expected text, got None"):
        predict(None)


def test_the_folder_has_code_and_no_pickle(model: Path):
    files = {path.relative_to(model) for path in model.rglob("*") if path.is_file()}
    assert {path.name for path in model.iterdir()} == {
        "MLmodel",
        "artifacts",
        "code",
        "conda.yaml",
        "input_example.json",
        "pyfunc_model.py",
        "python_env.yaml",
        "requirements.txt",
        "serving_input_example.json",
    }
    code = [path for path in files if path.parts[0] == "code" and "__pycache__" not in path.parts]
    assert {path.suffix for path in code if path.name != "py.typed"} == {".py", ".json", ".j2"}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt")]
    package = Path(serving.__file__).parent
    assert (model / "code/lcmlora/data/cache.py").read_bytes() == (package / "data/cache.py").read_bytes()


def test_the_mlmodel_says_what_goes_in_and_comes_out_and_no_path_of_this_machine(model: Path):
    text = (model / "MLmodel").read_text()
    assert str(Path(serving.__file__).parents[1]) not in text
    described = yaml.safe_load(text)
    flavor = described["flavors"]["python_function"]
    assert flavor["artifacts"] == {"release": {"path": "artifacts/release", "uri": "artifacts/release"}}
    assert (flavor["model_code_path"], flavor["code"]) == ("pyfunc_model.py", "code")
    assert "python_model" not in flavor  # which would be a pickle
    assert described["metadata"] == {"model": "mini"}
    signature = {key: json.loads(value) for key, value in described["signature"].items()}
    assert signature["inputs"] == [{"type": "string", "name": "prompt", "required": True}]
    assert signature["outputs"] == [{"type": "binary", "name": "png", "required": True}]
    params = {param["name"]: (param["type"], param["default"]) for param in signature["params"]}
    assert params == {
        "steps": ("long", 4),
        "guidance": ("double", 1.0),
        "seed": ("long", 0),
        "width": ("long", 0),
        "height": ("long", 0),
    }


def test_the_requirements_are_the_installed_versions_without_their_builds(model: Path):
    pins = dict(line.split("==") for line in (model / "requirements.txt").read_text().splitlines())
    assert set(pins) == set(serving.REQUIREMENTS)
    assert pins["torch"] == importlib.metadata.version("torch").split("+")[0]
    assert pins["mlflow"] == importlib.metadata.version("mlflow")


def test_writing_is_silent_loads_no_torch_and_changes_nothing_of_mlflows(tmp_path: Path):
    script = (
        "import logging, sys, mlflow; from pathlib import Path; from lcmlora import serving\n"
        "mlflow.set_tracking_uri('sqlite:///kept.db')\n"
        "level = logging.getLogger('mlflow').level\n"
        f"serving.write_model(Path({str(tmp_path / 'model')!r}), model='mini')\n"
        "assert mlflow.get_tracking_uri() == 'sqlite:///kept.db' and mlflow.active_run() is None\n"
        "assert logging.getLogger('mlflow').level == level\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=served.environment(), cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
