"""Each undocumented part of a library is used through one module, and each does what that module says.

A test is named by what the library must have: it fails where a new version has it no longer.
"""

import ast
import asyncio
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import mlflow
import prefect
import pytest
import sqlalchemy
import torch
import torch.utils.checkpoint
from prefect.states import Failed
from torch import nn

from lcmlora.inference import mlflow_internals
from lcmlora.patches import peft_internals, torch_internals
from lcmlora.tasks import dvc_internals, prefect_internals
from tests.support.repositories import make

ROOT = Path(__file__).parent.parent
MODULES = {
    "torch": torch_internals,
    "peft": peft_internals,
    "mlflow": mlflow_internals,
    "prefect": prefect_internals,
    "dvc": dvc_internals,
}
# Own attributes by an underscore that are public all the same, and one library whose layers have no other names.
_PUBLIC = {"_replace", "_fields", "_asdict"}
_EFFICIENTNET = "lcmlora/evaluation/measures/features.py"


@pytest.mark.parametrize("library", MODULES)
def test_a_new_version_in_the_lock_asks_for_a_look_at_the_module(library: str):
    locked = re.search(rf"^{library}==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    locked = locked or re.search(rf"^{library}==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    module = MODULES[library]
    assert locked, f"{library} is not in the lock"
    assert locked[1] == module.VERSION, (
        f"{library} is {locked[1]} now: read what {module.__name__} relies on in its source, then raise VERSION there"
    )


def test_nothing_else_reaches_into_a_library():
    found = []
    for wing in ("lcmlora", "tasks", "flows"):
        for path in sorted((ROOT / wing).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.endswith("_internals.py") and name != _EFFICIENTNET:
                found += [f"{name}:{line}: {text}" for line, text in _reaches(ast.parse(path.read_text()))]
    assert not found, "to be moved into the library's *_internals.py:\n" + "\n".join(found)


def _reaches(tree: ast.Module) -> list[tuple[int, str]]:
    """Returns the lines that read an attribute with an underscore of something else, or import such a name."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_self(node.value)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_hidden(node.attr) and node.attr not in own | _PUBLIC:
            found.append((node.lineno, ast.unparse(node)))
        if isinstance(node, ast.ImportFrom | ast.Import) and getattr(node, "module", None) != "__future__":
            words = [
                *(getattr(node, "module", None) or "").split("."),
                *(n for a in node.names for n in a.name.split(".")),
            ]
            if any(_is_hidden(word) for word in words):
                found.append((node.lineno, ast.unparse(node)))
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_hidden(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


# --- torch --------------------------------------------------------------------------------------------------------


def _tensors() -> list[torch.Tensor]:
    return [torch.tensor([3.0, 4.0]), torch.tensor([[6.0], [8.0]])]


def test_torch_foreach_copy_():
    into = [torch.zeros(2), torch.zeros(2, 1)]
    torch_internals.foreach_copy_(into, _tensors())
    assert all(torch.equal(one, other) for one, other in zip(into, _tensors(), strict=True))


def test_torch_foreach_mul_and_sub_and_norm_and_lerp_():
    doubled = torch_internals.foreach_mul(_tensors(), 2.0)
    assert [each.flatten().tolist() for each in doubled] == [[6.0, 8.0], [12.0, 16.0]]
    once = torch_internals.foreach_sub(doubled, _tensors())
    assert [norm.item() for norm in torch_internals.foreach_norm(once)] == [5.0, 10.0]
    moved = _tensors()
    torch_internals.foreach_lerp_(moved, doubled, 0.5)
    assert [each.flatten().tolist() for each in moved] == [[4.5, 6.0], [9.0, 12.0]]


def test_torch_amp_update_scale_():
    scale, growth = torch.tensor(8.0), torch.zeros((), dtype=torch.int32)
    torch_internals.amp_update_scale_(scale, growth, torch.tensor(1.0), 2.0, 0.5, 1)
    assert scale.item() == 4.0
    torch_internals.amp_update_scale_(scale, growth, torch.tensor(0.0), 2.0, 0.5, 1)
    assert scale.item() == 8.0


def test_torch_flash_attention_and_its_gradient_on_the_meta_device():
    query, key, value = (torch.empty(2, 3, 50, 8, device="meta", requires_grad=True) for _ in range(3))
    seen: list[str] = []

    class Names(torch_internals.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            result = op(*arguments, **options or {})
            seen.append(op.overloadpacket.__name__)
            assert not [each.shape for each in torch_internals.tensors_of(result) if each.shape[-2:] == (50, 50)]
            return result

    with Names():
        torch_internals.run_backward(torch_internals.flash_attention(query, key, value).sum())
    assert query.grad is not None and query.grad.shape == query.shape
    assert {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"} <= set(seen)


def test_torch_run_backward_keeps_the_mode_of_functions_on():
    called = []

    class Noting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            called.append(function)
            return function(*arguments, **options or {})

    weight = torch.ones(2, requires_grad=True)
    with Noting():
        loss = torch.utils.checkpoint.checkpoint(lambda: (weight.exp() * weight).sum(), use_reentrant=False)
        before = len(called)
        torch_internals.run_backward(loss)
    assert torch.Tensor.exp in called[before:]
    assert weight.grad is not None and weight.grad.tolist() == pytest.approx([2 * torch.e] * 2)


def test_torch_storages_are_told_apart_where_tensors_have_no_memory():
    one, other = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    assert torch_internals.storage_key(one) != torch_internals.storage_key(other)
    assert torch_internals.address(one) == torch_internals.address(one.view(2, 2))
    assert torch_internals.address(one) != torch_internals.address(one[1:])
    real = torch.zeros(4)
    assert torch_internals.address(real) == torch_internals.address(real.view(2, 2)) == (real.data_ptr(), 0)


def test_torch_tensor_version():
    tensor = torch.zeros(2)
    before = torch_internals.version_of(tensor)
    tensor.add_(1)
    assert torch_internals.version_of(tensor) == before + 1
    torch.autograd.graph.increment_version([tensor])
    assert torch_internals.version_of(tensor) == before + 2
    tensor.data.add_(1)
    assert torch_internals.version_of(tensor) == before + 2


def test_torch_conv2d_conv_forward():
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular")
    x, weight = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
    found = torch_internals.convolve(layer, x, weight, layer.bias)
    layer.weight.data = weight
    assert torch.equal(found, layer(x))


def test_torch_module_compiled_call_impl():
    layer = nn.Linear(2, 2)
    layer.compile(backend="eager")
    assert torch_internals.COMPILED_CALL in vars(layer)
    x, called = torch.ones(1, 2), []
    vars(layer)[torch_internals.COMPILED_CALL] = lambda x: called.append(x)
    layer(x)
    assert called == [x]
    del vars(layer)[torch_internals.COMPILED_CALL]
    assert torch.equal(layer(x), layer.forward(x))


def test_torch_dynamo_config_recompile_limit():
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8):
        torch_internals.allow_graphs(3)
        assert torch._dynamo.config.recompile_limit == 3


def test_torch_inductor_get_cpp_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torch._inductor.cpp_builder import cpp_compiler_search

    cpp_compiler_search.cache_clear()  # where an earlier test has found one
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not torch_internals.has_cpp_compiler()
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho g++ 12\n")
    compiler.chmod(0o755)
    cpp_compiler_search.cache_clear()
    assert torch_internals.has_cpp_compiler()
    cpp_compiler_search.cache_clear()


# --- PEFT ---------------------------------------------------------------------------------------------------------


def test_peft_lora_layer_disable_adapters():
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(nn.Linear(4, 4))
    bare = model[0]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, "lcm")
    layer, x = model[0], torch.randn(3, 4)
    assert not torch.equal(layer(x), bare(x))
    peft_internals.set_adapters_off([vars(layer)], True)
    assert layer.disable_adapters and torch.equal(layer(x), bare(x))
    assert all(p.requires_grad for name, p in layer.named_parameters() if "lora" in name)
    peft_internals.set_adapters_off([vars(layer)], False)
    assert not layer.disable_adapters and not torch.equal(layer(x), bare(x))


# --- MLflow -------------------------------------------------------------------------------------------------------


def test_mlflow_scoring_server_app(monkeypatch: pytest.MonkeyPatch):
    """The module makes its application with fastapi.FastAPI, in `scoring_server.init`, once it has loaded the model."""
    from mlflow.pyfunc import scoring_server

    source = Path(scoring_server.__file__).with_name("app.py").read_text()
    assert re.search(r"^app = scoring_server\.init\(\s*scoring_server\.load_model_with_mlflow_config\(", source, re.M)
    assert not mlflow_internals.guard_next_application(lambda application: application)  # no such server here

    asked: list[str] = []

    def guard(application: mlflow_internals.Application) -> mlflow_internals.Application:
        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            asked.append(scope["type"])

        return guarded

    # What the module is while it loads the model: imported, and without an application.
    monkeypatch.setitem(
        sys.modules, mlflow_internals.SCORING_APPLICATION, types.ModuleType(mlflow_internals.SCORING_APPLICATION)
    )
    assert mlflow_internals.guard_next_application(guard)
    guarded, plain = (scoring_server.init(_NoModel()) for _ in range(2))
    asyncio.run(guarded({"type": "http"}, None, None))
    assert asked == ["http"]
    assert type(plain).__name__ == "FastAPI"  # the next one is nobody's


class _NoModel:
    metadata = types.SimpleNamespace(get_input_schema=lambda: None, get_params_schema=lambda: None)
    loader_module = None


def _parameters(module: types.ModuleType, file: str, function: str) -> set[str]:
    """Returns the parameters of a function in a library's file, which is not imported: servers take seconds."""
    tree = ast.parse(Path(str(module.__file__)).parent.joinpath(file).read_text())
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return {argument.arg for argument in found.args.args}


def test_mlflow_server_auth_create_app():
    """tests/integration/test_registry_server.py starts it."""
    assert "app" in _parameters(mlflow, "server/auth/__init__.py", "create_app")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> mlflow.MlflowClient:
    """A registry of three models, a deleted version, one without tags, and a prompt."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    client = mlflow.MlflowClient(uri, uri)
    for name in ("one", "two", "it's three"):
        client.create_registered_model(name)
        for number in range(4):
            tags = {"objective": "tcd" if number % 2 else "lcm", "number": str(number), "empty": ""}
            client.create_model_version(name, "source", tags=tags if number < 3 else {}, description="a card")
    client.delete_model_version("two", "2")
    client.register_prompt("prompt", "a text")
    return client


@pytest.mark.parametrize(
    "search", [None, "name = 'two'", "tags.objective = 'tcd'", "name = 'one' and tags.number = '2'"]
)
def test_mlflow_store_searches_rows_as_its_client_searches_versions(
    registered: mlflow.MlflowClient, search: str | None
):
    order = ["creation_timestamp DESC"]
    for size in (1, 2, 100):
        theirs = own = None
        while True:
            there = registered.search_model_versions(search, size, order, theirs)
            here = mlflow_internals.search_versions(registered, search, order, size, own)
            assert [vars(each) for each in here] == [vars(each) for each in there]
            theirs, own = there.token, here.token
            assert (theirs is None) == (own is None)
            if own is None:
                break


def test_mlflow_version_that_takes_the_place_of_another_while_tags_are_read(
    registered: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
):
    order = ["creation_timestamp DESC", "name ASC", "version_number DESC"]
    before = registered.search_model_versions(None, 2, order)
    rows = sqlalchemy.engine.Result.all

    def all_and_one_more(self: Any) -> Any:
        found = rows(self)
        monkeypatch.undo()
        for _ in range(2):
            registered.create_model_version("one", "source", tags={"objective": "new"})
        return found

    monkeypatch.setattr(sqlalchemy.engine.CursorResult, "all", all_and_one_more)
    found = mlflow_internals.search_versions(registered, None, order, 2, None)
    assert [vars(each) for each in found] == [vars(each) for each in before]
    assert len(registered.search_model_versions("tags.objective = 'new'")) == 2


# mlflow.system_metrics.system_metrics_monitor: tests/registry/test_lookup.py has a registry for it to log to.


# --- Prefect ------------------------------------------------------------------------------------------------------
# Patience and leases: tests/flows/test_outages.py has a server. The temporary server's process: test_outages.py in
# tests/integration kills one.


def test_prefect_state_data():
    error = ValueError("why")
    assert prefect_internals.failure(Failed(data=error)) is error
    assert prefect_internals.failure(Failed(message="why")) is None


def test_prefect_server_create_app():
    """tests/integration/test_schedules.py starts it."""
    assert "final" in _parameters(prefect, "server/api/server.py", "create_app")


def test_prefect_temporary_server_is_started_with_the_subprocess_of_its_module(monkeypatch: pytest.MonkeyPatch):
    """tests/flows/test_retrain.py interrupts one as Ctrl-C does."""
    from prefect.server.api import server

    monkeypatch.setattr(server, "subprocess", server.subprocess)  # put back afterwards
    prefect_internals.keep_temporary_server_apart()
    start = server.SubprocessASGIServer._run_uvicorn_command
    assert {"subprocess", "Popen"} <= set(start.__code__.co_names)
    assert start.__globals__["subprocess"].Popen.keywords == {"start_new_session": True}


# --- DVC ----------------------------------------------------------------------------------------------------------

_STAGES = "stages:\n  copy:\n    cmd: cp source copy\n    deps: [source]\n    outs: [copy]\n"


def test_dvc_lock_file_and_its_locks_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its schema, `.dvc/tmp/lock` and `rwlock`, the line of a stage that runs, and the default remote."""
    monkeypatch.chdir(make(tmp_path / "repository", _STAGES))
    Path("source").write_text("1\n")
    assert dvc_internals.default_remote() is None
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], check=True, capture_output=True, text=True)
    assert any(dvc_internals.is_run_message(line, "copy") for line in done.stdout.splitlines())
    whole = Path("dvc.lock").read_bytes()
    assert dvc_internals.is_lock_file(whole) and not dvc_internals.is_lock_file(whole[: whole.index(b"cmd") + 2])
    assert dvc_internals.LOCK.exists() and dvc_internals.READERS_AND_WRITERS_LOCK.exists()
    assert json.loads(dvc_internals.READERS_AND_WRITERS.read_text()) == {}
    Path(".dvc/config").write_text("[core]\n    remote = there\n['remote \"there\"']\n    url = /mnt/there\n")
    assert dvc_internals.default_remote() == "/mnt/there"
    Path(".dvc/config").write_text("[core]\n    remote = there\n    what = 1\n")
    with pytest.raises(ValueError, match="what"):
        dvc_internals.default_remote()


def test_dvc_locks_that_are_left_out_for_a_look_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`Stage.status` takes `dvc.rwlock.rwlock` from its module when it is called, and the lock of `Repo.lock`."""
    from dvc import rwlock

    monkeypatch.chdir(make(tmp_path / "repository", _STAGES))
    Path("source").write_text("1\n")
    taken = rwlock.rwlock
    table = Path(dvc_internals.READERS_AND_WRITERS)
    with dvc_internals.without_locks() as repo:
        (stage,) = repo.stage.collect("copy")
        assert stage.status() and not table.exists() and not dvc_internals.LOCK.exists()
        assert not any(item.hash_info for item in (*stage.deps, *stage.outs))  # it has never run
    assert rwlock.rwlock is taken


def test_dvc_names_the_processes_that_block_a_path():
    from dvc.lock import LockError
    from dvc.rwlock import _infos_to_str

    infos = [{"pid": 12, "cmd": "dvc repro (PID 9): a"}, {"pid": 345, "cmd": "dvc status"}]
    busy = LockError(f"'/a' is busy, it is being blocked by:\n{_infos_to_str(infos)}\n\nIf there are no processes")
    failed = ValueError("failed to reproduce 'a'")
    failed.__cause__ = busy
    assert dvc_internals.blockers(failed) == [12, 345]
    assert dvc_internals.blockers(LockError("Unable to acquire lock.")) == []
    assert dvc_internals.blockers(ValueError("a")) is None


def test_dvc_repository_lock_waits_by_its_own_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dvc import lock

    monkeypatch.setattr(lock, "Lock", lock.Lock)  # put back afterwards
    made = lock.make_lock(str(tmp_path / "lock"), friendly=True, wait=True)
    assert made._wait is True and made._friendly is True and made.lockfile == str(tmp_path / "lock")
    said: list[int | None] = []
    dvc_internals.say_what_the_lock_is_waited_for(lambda path: None, said.append)
    with lock.make_lock(str(tmp_path / "lock"), wait=True) as _, pytest.raises(lock.LockError):
        lock.make_lock(str(tmp_path / "lock"), wait=False).lock()
    assert said == []
