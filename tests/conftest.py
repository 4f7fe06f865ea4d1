"""What many tests share: a miniature base on disk, made once."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lcmlora import bases, plugins
from lcmlora.config import Base, Encode
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.prepare import prepare_pictures
from tests.data.conftest import add, data_in, picture
from tests.support.distillation import load_parts
from tests.support.miniature import RESOLUTION, save_base

ROOT = Path(__file__).parent

torch.set_num_threads(1)
# The processes that tests start share the cores with other tests: threads would wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that knows the servers of `make up` must not lead the tests to them.
for _name in ("LCMLORA_GPU_LIMIT", "LCMLORA_PUBLISH_TO", "LCMLORA_OFFLINE"):
    os.environ.pop(_name, None)
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
    os.environ.pop(_name, None)
for _name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
    os.environ.pop(_name, None)


_ROOMS = ("tests/flows/", "tests/integration/")  # each has a server that takes long to start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first."""
    items.sort(key=lambda item: not item.nodeid.startswith(_ROOMS))


def pytest_collection_finish() -> None:
    """Rarer garbage collections, and none of what the modules hold: they would be a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of many test processes one takes all the flows' tests, one all of the integration tests; the other files are
    dealt out whole. (xdist's own groups, --dist loadgroup, are lost on pytest 9.2: it writes an attribute that pytest
    no longer reads.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return next((room for room in _ROOMS if path.startswith(room)), path)

    return Rooms(config, log)


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests see in signed stores is remembered in a folder of their own, and so are their locks of GPUs: what
    trains on this machine must not keep them waiting. Locks of ports are of all test processes."""
    os.environ["LCMLORA_STATE"] = str(tmp_path_factory.mktemp("state"))
    os.environ["LCMLORA_LOCKS"] = str(tmp_path_factory.mktemp("locks"))
    runtime = tmp_path_factory.getbasetemp().parent / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)


@pytest.fixture(autouse=True)
def registered_classes() -> Iterator[None]:
    """What a test adds to the tables of classes is in them no longer after it."""
    found = [each for each in vars(plugins).values() if isinstance(each, plugins.Table)]
    kept = [dict(table._classes) for table in found]
    yield
    for table, classes in zip(found, kept, strict=True):
        table._classes = classes


_caches = itertools.count()


@pytest.fixture(autouse=True)
def cache_of_downloads(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test downloads adapters and bases to a folder of its own, which need not exist."""
    monkeypatch.setenv("LCMLORA_CACHE", str(tmp_path_factory.getbasetemp() / "caches" / str(next(_caches))))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "mini")


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a miniature by its architecture (tests.support.miniature.ARCHITECTURES), each made once."""

    @cache
    def make(architecture: str) -> Path:
        return save_base(tmp_path_factory.mktemp("miniatures") / architecture, architecture)

    return make


@pytest.fixture
def base(base_folder: Path) -> bases.LoadedBase:
    """The miniature in memory, bare, anew for each test: adapters are injected into it."""
    settings = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
    return bases.load("mini", settings, base_folder, device=torch.device("cpu"))


def make_latents(base_folder: Path, work: Path) -> LatentCache:
    """Returns a cache of nine pictures with a caption each, encoded by the base."""
    for number in range(10):
        add(work / "in", f"{number}.png", f"subject {number}", picture(number))
    data = data_in(work / "in", min_side=16, validation=0, test=0.2)
    prepare_pictures(data, 4, work / "pictures")
    base = load_parts(base_folder, "vae", "text")
    encode_latents(base, data, Encode(batch=4), work / "pictures", work / "scratch", work / "latents")
    return LatentCache(work / "latents")


@pytest.fixture(scope="session", name="cache")
def latents(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return make_latents(base_folder, tmp_path_factory.mktemp("latents"))
