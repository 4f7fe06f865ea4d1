"""Pictures in a real bucket."""

from pathlib import Path

import pytest

from lcmlora.changes import fingerprint
from lcmlora.config import Publish
from lcmlora.data.remote import guess
from lcmlora.data.sources import find, open_picture
from lcmlora.errors import Unavailable, UserError
from tests.data.conftest import data_in
from tests.data.test_bulk_sources import layouts
from tests.integration.seaweed import SeaweedFS, free_ports

pytestmark = pytest.mark.integration


@pytest.fixture
def uploaded(s3: SeaweedFS, bucket: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a bucket with eight pictures as tar files and as tables."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    layouts(tmp_path)
    root = "/".join(bucket.to.split("/")[:3])
    for name in ("tars/0.tar", "tars/4.tar", "tables/0.parquet", "tables/4.parquet"):
        s3.client().upload_file(str(tmp_path / name), root.removeprefix("s3://"), name)
    return root


def test_pictures_in_a_bucket_are_those_of_the_folder(s3: SeaweedFS, uploaded: str, tmp_path: Path):
    expected = find(data_in(tmp_path / "folder"))[0]
    for name, source in (("tars", "webdataset"), ("tables", "parquet")):
        data = data_in(f"{uploaded}/{name}", source=source)
        assert guess(data.path) == source
        records, rejections = find(data)
        assert rejections == []
        assert [(r.caption, r.sha256) for r in records] == [(r.caption, r.sha256) for r in expected]
        assert open_picture(data, records[5]).size == (32, 32)
        one = find(data_in(f"{data.path}/4{Path(records[0].key).parts[0][1:]}", source=source))[0]
        assert [r.caption for r in one] == [f"subject {number}" for number in range(4, 8)]


def test_a_bucket_that_grows_is_seen(s3: SeaweedFS, uploaded: str, tmp_path: Path):
    before = fingerprint(f"{uploaded}/tars")
    assert fingerprint(f"{uploaded}/tars") == before
    s3.client().upload_file(str(tmp_path / "tars" / "0.tar"), uploaded.removeprefix("s3://"), "tars/8.tar")
    assert fingerprint(f"{uploaded}/tars") != before
    assert len(find(data_in(f"{uploaded}/tars", source="webdataset"))[0]) == 12


def test_what_is_not_there_or_does_not_answer_is_one_line(uploaded: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="nothing: no such file or folder"):
        find(data_in(f"{uploaded}/nothing", source="webdataset"))
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port}"):
        find(data_in(f"{uploaded}/tars", source="webdataset"))
