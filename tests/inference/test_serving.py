import asyncio
import base64
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lcmlora.diffusion import sampling
from lcmlora.errors import UserError
from lcmlora.inference import pipelines, request_guard, serving
from lcmlora.inference.limits import Limits
from tests.support import fuzzing, served
from tests.support.miniature import RESOLUTION

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
def model(made: Path, miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow model with the release in it, as the registry has it."""
    folder = tmp_path_factory.mktemp("model") / "model"
    serving.write_model(folder, model="mini", base=served.identity(miniatures("sd15")))
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
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # what it writes is opened, too
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


def test_the_model_says_in_how_many_steps_it_draws_unless_told(made: Path, tmp_path: Path):
    import mlflow

    serving.write_model_of(served.copy(made, tmp_path / "release", recommended_steps=2), tmp_path / "model")
    parameters = mlflow.models.get_model_info(str(tmp_path / "model")).signature.params
    assert {each.name: each.default for each in parameters}["steps"] == 2


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
    for params, message in (
        ({"steps": 10**9}, "steps: expected 50 at most, got 1e"),
        ({"guidance": 1e300}, "guidance: expected 20 at most"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"width": 8 * RESOLUTION}, "width, height: expected .* pixels at most"),
        ({"width": -8}, "width: expected a positive"),
    ):
        with pytest.raises(MlflowException, match=f"^{message}") as caught:
            predict("tree", **params)
        assert caught.value.get_http_status_code() == 400
    assert predict("tree") == [plain]

    # The time is over before the first step, or nobody waits.
    for request in (request_guard.Request(time.monotonic() - 1), request_guard.Request(time.monotonic() + 100)):
        if request.deadline > time.monotonic():
            request.disconnected.set()
        token = request_guard.current.set(request)
        with pytest.raises(MlflowException, match=r"^the pictures were not drawn within 60 seconds") as caught:
            predict("tree")
        request_guard.current.reset(token)
        assert caught.value.get_http_status_code() == 504 and request.reached_model
    assert predict("tree") == [plain]

    # A drawing that fails is the server's fault, and the next one is drawn.
    vae = loaded.unwrap_python_model()._pipeline.pipeline.vae
    kept = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    for tensor in vae.state_dict().values():
        tensor.fill_(float("nan"))
    with pytest.raises(
        MlflowException, match=r"^drawing failed: NotFinite: mini: drew pictures that are not"
    ) as caught:
        predict("tree")
    assert caught.value.get_http_status_code() == 500
    vae.load_state_dict(kept)
    assert predict("tree") == [plain]


def test_mlflows_own_flavour_loads_it_as_an_adapter_of_its_base(made: Path, model: Path):
    """With the release's scheduler, the line of the model card, it draws what our pipeline draws."""
    import mlflow
    from diffusers import TCDScheduler

    adapter = mlflow.diffusers.load_model(str(model))
    assert (adapter.adapter_type, Path(adapter.adapter_path)) == ("lora", model / serving.RELEASE)
    pipeline = adapter.load_pipeline(device="cpu")
    pipeline.scheduler = TCDScheduler.from_pretrained(adapter.adapter_path)
    pipeline.set_progress_bar_config(disable=True)
    noise = sampling.initial_noise((4, 8, 8), 3, [0])
    size = {"width": RESOLUTION, "height": RESOLUTION}
    drawn = pipeline("tree", num_inference_steps=1, guidance_scale=1.0, eta=0.4, latents=noise, **size).images[0]
    (expected,) = pipelines.load(made, warm=False)("tree", steps=1, seed=3)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("base", "pinned"),
    [
        ({"source": "someone/base", "revision": "c" * 40}, {"base_model_revision": "c" * 40}),
        ({"source": "bases/mini", "revision": None}, {}),
        ({"source": "bases/mini", "revision": None, "style": "ink.safetensors"}, None),
    ],
)
def test_mlflows_own_flavour_names_the_base_unless_a_style_was_added_to_it(
    base: dict[str, str | None], pinned: dict[str, str] | None
):
    common = {
        "base_model": base["source"],
        "adapter_type": "lora",
        "adapter_weights": "artifacts/release",
        "weight_name": "pytorch_lora_weights.safetensors",
        "diffusers_version": importlib.metadata.version("diffusers"),
    }
    assert serving.lora_flavor(base) == (None if pinned is None else common | pinned)


def test_the_folder_has_code_and_no_pickle(model: Path):
    files = {path.relative_to(model) for path in model.rglob("*") if path.is_file()}
    assert {path.name for path in model.iterdir()} - {"__pycache__"} == {
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
    assert {path.suffix for path in code if path.name != "py.typed"} == {".py", ".json"}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt")]
    package, cache = Path(serving.__file__).parents[1], "data/latents/cache.py"
    assert (model / "code/lcmlora" / cache).read_bytes() == (package / cache).read_bytes()


def test_the_mlmodel_says_what_goes_in_and_comes_out_and_no_path_of_this_machine(model: Path):
    text = (model / "MLmodel").read_text()
    assert str(Path(serving.__file__).parents[2]) not in text
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
        "import logging, sys, mlflow; from pathlib import Path; from lcmlora.inference import serving\n"
        "mlflow.set_tracking_uri('sqlite:///kept.db')\n"
        "level = logging.getLogger('mlflow').level\n"
        f"serving.write_model(Path({str(tmp_path / 'model')!r}), model='mini', base={{'source': 'bases/mini'}})\n"
        "assert mlflow.get_tracking_uri() == 'sqlite:///kept.db' and mlflow.active_run() is None\n"
        "assert logging.getLogger('mlflow').level == level\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=served.environment(), cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- the door of MLflow's server ----------------------------------------------------------------------------------

GOOD = {"dataframe_records": [{"prompt": "owl"}], "params": {"steps": 2, "seed": 7, "guidance": 1.5}}


class Served:
    """MLflow's own application with a model, behind the door, called as uvicorn calls it."""

    def __init__(self, model: Path, limits: Limits) -> None:
        import mlflow
        from mlflow.pyfunc import scoring_server

        loaded = mlflow.pyfunc.load_model(str(model))
        metrics = loaded.unwrap_python_model()._metrics
        self._guard = request_guard.RequestGuard(scoring_server.init(loaded), limits, metrics)

    def ask(self, *pieces: bytes, kind: str = "application/json", leaves: bool = False) -> tuple[int, bytes]:
        """Returns status and body of the answer. `leaves`: the client goes as soon as it has asked."""
        return asyncio.run(self._ask(pieces, kind, leaves))

    async def _ask(self, pieces: tuple[bytes, ...], kind: str, leaves: bool) -> tuple[int, bytes]:
        waiting = [{"type": "http.request", "body": each, "more_body": True} for each in pieces[:-1]]
        waiting.append({"type": "http.request", "body": pieces[-1], "more_body": False})
        answered, said = asyncio.Event(), []

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop(0)
            if not leaves:
                await answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        headers = [(b"content-type", kind.encode())]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
        scope |= {"path": "/invocations", "raw_path": b"/invocations", "query_string": b"", "root_path": ""}
        scope |= {"headers": headers, "client": ("127.0.0.1", 9), "server": ("127.0.0.1", 5001), "state": {}}
        await self._guard(scope, receive, send)
        answered.set()
        return said[0]["status"], b"".join(message.get("body", b"") for message in said[1:])


@pytest.fixture(scope="module")
def door(model: Path, miniatures: Callable[[str], Path]) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCMLORA_BASE", str(miniatures("sd15")))
        patch.setenv("LCMLORA_DEVICE", "cpu")
        yield Served(model, Limits(body=100_000))


def refused(answer: tuple[int, bytes], status: int) -> str:
    """Returns the message of a refusal, which is one line of JSON without a traceback."""
    got, body = answer
    said = json.loads(body)
    assert (got, said.keys()) == (status, {"error_code", "message"}), said
    assert said["message"] and "\n" not in said["message"] and ".py" not in body.decode()
    return str(said["message"])


BAD: list[tuple[Any, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[" * 50_000, "nested too deeply"),
    (b'{"a":' * 10_000, "nested too deeply"),
    (b"[]", "expected an object"),
    (b"null", "expected an object"),
    (b'{"dataframe_records": [{"prompt": "\\ud800"}]}', "half a surrogate pair"),
    (b'{"dataframe_records": [{"prompt": "a"}], "params": {"guidance": NaN}}', "NaN is no number"),
    (b'{"dataframe_records": [{"prompt": "a"}], "params": {"seed": ' + b"9" * 5000 + b"}}", "not JSON"),
    (GOOD | {"params": {"seed": 10**30}}, "seed: does not fit a 64-bit integer"),
    (GOOD | {"params": {"seed": -1}}, "seed: expected 0 to"),
    (GOOD | {"params": {"seed": "1"}}, "seed: expected a whole number, got '1'"),
    (GOOD | {"params": {"seed": [1]}}, r"seed: expected a whole number, got \[1\]"),
    (GOOD | {"params": {"steps": True}}, "steps: expected a whole number, got True"),
    (GOOD | {"params": {"steps": 2.5}}, r"steps: expected a whole number, got 2\.5"),
    (GOOD | {"params": {"steps": 0}}, "steps: expected 1 to"),
    (GOOD | {"params": {"guidance": 1e300}}, "guidance: expected 20 at most"),
    (GOOD | {"params": {"width": 1 << 40}}, "width, height: expected .* pixels at most"),
    (GOOD | {"params": {"stpes": 4}}, "params: 'stpes': expected one of steps, guidance, seed, width, height"),
    (GOOD | {"params": [1]}, r"params: expected an object, got \[1\]"),
    (GOOD | {"params": "steps"}, "params: expected an object, got 'steps'"),
    (GOOD | {"instances": ["a"]}, "dataframe_records"),
    ({"params": {}}, "."),
    ({"dataframe_records": []}, "."),
    ({"dataframe_records": 3}, "."),
    ({"dataframe_records": [1, 2]}, "."),
    ({"dataframe_records": [{"prompt": ["a"]}]}, "."),
    ({"dataframe_records": [{"prompt": {"a": 1}}]}, "."),
    ({"dataframe_records": [{"prompt": None}]}, "."),
    ({"dataframe_records": [{"text": "a"}]}, "."),
    ({"dataframe_records": [{"prompt": "a"}] * 17}, "prompt: expected 1 to 16 in a request, got 17"),
    ({"dataframe_records": [{"prompt": "a" * 2001}]}, "prompt 1: expected 2000 characters at most, got 2001"),
    ({"dataframe_split": {"columns": ["prompt"], "data": "x"}}, "."),
    ({"dataframe_split": {"columns": ["prompt", "prompt"], "data": [["a", "b"]]}}, "."),
    ({"instances": {"prompt": 3}}, "."),
    ({"inputs": [[[1]]]}, "."),
    ({"messages": [{"role": "user", "content": "a"}]}, "."),
    ({"prompt": 3}, "."),
    ({"dataframe_records": [{"prompt": True}]}, "prompt: expected text, got True"),
    ({"inputs": {"prompt": [1.5]}}, r"prompt: expected text, got 1\.5"),
]


@pytest.mark.parametrize(("body", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_request_is_400_in_one_line_and_the_server_lives_on(door: Served, body: Any, message: str):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert re.search(message, refused(door.ask(content), 400))
    status, answer = door.ask(json.dumps(GOOD).encode())
    assert status == 200 and len(json.loads(answer)["predictions"]) == 1


def test_what_is_too_large_or_no_json_is_not_read(door: Served):
    assert refused(door.ask(*[b"x" * 1000] * 200), 413) == "the request has more than 100000 bytes (LCMLORA_MAX_BODY)"
    for kind in ("application/vnd.apache.parquet", "text/plain", "", "application/octet-stream"):
        assert refused(door.ask(b"PAR1", kind=kind), 415).startswith("Content-Type: expected application/json")
    assert door.ask(b"prompt\nowl\n", kind="text/csv")[0] == 200
    refused(door.ask(b"prompt\n" + b"owl\n" * 20_000, kind="text/csv"), 400)
    refused(door.ask(b'a,b\n"', kind="text/csv"), 400)


def test_who_leaves_is_not_drawn_for(door: Served):
    long = GOOD | {"dataframe_records": [{"prompt": "owl"}] * 16, "params": {"steps": 20, "guidance": 2}}
    message = refused(door.ask(json.dumps(long).encode(), leaves=True), 504)
    assert message == "the pictures were not drawn within 60 seconds (LCMLORA_MAX_SECONDS)"
    assert door.ask(json.dumps(GOOD).encode())[0] == 200


_BEHIND: dict[int, Served] = {}


def ask_behind(model: Path, base: Path, content: bytes) -> None:
    """Asks a server of this process, which the first request starts: threads do not survive a fork."""
    if os.getpid() not in _BEHIND:
        os.environ |= {"LCMLORA_BASE": str(base), "LCMLORA_DEVICE": "cpu", "LCMLORA_MAX_STEPS": "2"}
        os.environ |= {"LCMLORA_MAX_PROMPTS": "2"}
        _BEHIND[os.getpid()] = Served(model, Limits(body=100_000))
    status, body = _BEHIND[os.getpid()].ask(content)
    if status != 200:
        assert status in (400, 413), (status, body)
        raise UserError(refused((status, body), status))


def fuzz(model: Path, base: Path, count: int) -> None:
    others = [{"dataframe_split": {"columns": ["prompt"], "data": [["owl"]]}}, {"instances": [{"prompt": "owl"}]}]
    examples = [json.dumps(each).encode() for each in (GOOD, *others, {"inputs": {"prompt": ["owl"]}})]
    words = [b"prompt", b"params", b"inputs", b"instances", b"seed", b"width", b"\\ud800", b"true", b"1e400", b"[[]]"]
    inputs = fuzzing.mutated(examples, count, seed=21, words=words)
    counts = fuzzing.check(partial(ask_behind, model, base), inputs, memory=16 << 30, seconds=60)
    assert counts["refused"] > count // 2


def test_mutated_requests_are_answered_with_a_picture_or_refused_in_a_line(
    model: Path, miniatures: Callable[[str], Path]
):
    fuzz(model, miniatures("sd15"), fuzzing.QUICK)


@pytest.mark.slow
def test_many_mutated_requests_are_answered_with_a_picture_or_refused_in_a_line(
    model: Path, miniatures: Callable[[str], Path]
):
    fuzz(model, miniatures("sd15"), fuzzing.FULL)
