"""Pictures in a real bucket."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcmlora.config import Encode, Publish
from lcmlora.data.fingerprints import fingerprint
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.prepare import prepare_pictures
from lcmlora.data.sources.guess import source_of
from lcmlora.data.sources.source import open_picture, survey
from lcmlora.errors import Unavailable, UserError
from tests.data.conftest import data_in
from tests.data.test_bulk_sources import layouts
from tests.integration.seaweed import SeaweedFS, free_ports
from tests.support.distillation import load_parts

pytestmark = pytest.mark.integration

COUNT = int(os.environ.get("LCMLORA_TEST_PICTURES", "8"))


@pytest.fixture
def uploaded(s3: SeaweedFS, bucket: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a bucket with the same pictures in all layouts."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    layouts(tmp_path, COUNT)
    root = "/".join(bucket.to.split("/")[:3])
    for folder in ("folder", "jsonl", "csv", "tars", "tables"):
        for path in sorted((tmp_path / folder).iterdir()):
            s3.client().upload_file(str(path), root.removeprefix("s3://"), f"{folder}/{path.name}")
    return root


@pytest.mark.slow
def test_pictures_in_a_bucket_are_those_of_the_folder(s3: SeaweedFS, uploaded: str, tmp_path: Path):
    expected = survey(data_in(tmp_path / "folder")).records
    names = {"folder": "folder", "jsonl": "folder", "csv": "folder", "tars": "webdataset", "tables": "parquet"}
    for name, source in names.items():
        data = data_in(f"{uploaded}/{name}", source=source)
        assert source_of(data.path) == source
        found = survey(data)
        records, rejections = found.records, found.rejections
        assert rejections == []
        assert [(r.caption, r.sha256) for r in records] == [(r.caption, r.sha256) for r in expected]
        assert open_picture(data, records[5]).size == (32, 32)
    for file in (f"tars/{COUNT // 2:04d}.tar", f"tables/{COUNT // 2:04d}.parquet"):
        one = survey(data_in(f"{uploaded}/{file}", source=names[file.partition("/")[0]])).records
        assert [r.caption for r in one] == [f"subject {number}" for number in range(COUNT // 2, COUNT)]
    table = survey(data_in(f"{uploaded}/csv/metadata.csv")).records
    assert [(r.caption, r.sha256) for r in table] == [(r.caption, r.sha256) for r in expected]


@pytest.mark.slow
def test_the_same_pictures_have_the_same_latents_wherever_they_lie(
    s3: SeaweedFS, uploaded: str, base_folder: Path, tmp_path: Path
):
    base = load_parts(base_folder, "vae", "text")
    names = {"folder": "folder", "jsonl": "folder", "csv": "folder", "tars": "webdataset", "tables": "parquet"}
    caches = {}
    for place in (str(tmp_path), uploaded):
        for name, source in names.items():
            data, work = data_in(f"{place}/{name}", source=source), tmp_path / f"work-{len(caches)}"
            prepare_pictures(data, 4, work / "pictures")
            encode_latents(base, data, Encode(batch=64), work / "pictures", work / "scratch", work / "latents")
            caches[f"{place}/{name}"] = load_file(work / "latents" / "shard-00000.safetensors")
    first = caches[f"{tmp_path}/folder"]
    assert len(first["key"]) >= COUNT // 2
    for name, tensors in caches.items():
        assert all(torch.equal(tensors[part], first[part]) for part in first), name


def test_a_bucket_that_grows_is_seen(s3: SeaweedFS, uploaded: str, tmp_path: Path):
    before = fingerprint(f"{uploaded}/tars")
    assert fingerprint(f"{uploaded}/tars") == before
    s3.client().upload_file(str(tmp_path / "tars" / "0000.tar"), uploaded.removeprefix("s3://"), "tars/9999.tar")
    assert fingerprint(f"{uploaded}/tars") != before
    assert len(survey(data_in(f"{uploaded}/tars", source="webdataset")).records) == COUNT + COUNT // 2


def test_what_is_not_there_or_does_not_answer_is_one_line(uploaded: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="nothing: no such file or folder"):
        survey(data_in(f"{uploaded}/nothing", source="webdataset"))
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port}"):
        survey(data_in(f"{uploaded}/tars", source="webdataset"))
