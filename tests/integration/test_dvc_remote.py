"""A DVC remote in a real bucket: read by one who may not write, refused, and full of what another machine sent."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lcmlora import config
from lcmlora.config import Publish
from lcmlora.tasks.dvc import RemoteUnavailable, push, repro
from lcmlora.tasks.processes import Processes
from lcmlora.tasks.workspace.remote import Remote, ask
from tests.integration.seaweed import SeaweedFS
from tests.support.repositories import make

SETTINGS = config.load(Path(__file__).parents[2] / "params.yaml")
STAGES = "stages:\n  first: {cmd: cp source first, deps: [source], outs: [first]}\n"

pytestmark = pytest.mark.slow


@pytest.fixture
def repository(tmp_path: Path, bucket: Publish, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make(tmp_path / "repository", STAGES)
    (root / "source").write_text("1\n")
    monkeypatch.chdir(root)
    for arguments in (
        ["add", "-q", "-d", "s3", f"{bucket.to}/dvc"],
        ["modify", "s3", "endpointurl", bucket.endpoint_url],
    ):
        subprocess.run([sys.executable, "-m", "dvc", "remote", *arguments], check=True)
    return root


def test_a_remote_that_may_only_be_read_or_not_even_that_stops_no_stage_and_later_gets_all(
    repository: Path, bucket: Publish, s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch
):
    def become(access: str, secret: str) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)

    writer = s3.keys["writer"]
    with Processes() as processes:
        become(writer[0], "wrong")
        refused = Remote(bucket.to)
        assert repro.fn("first", processes, SETTINGS, remote=refused).ran
        assert refused.fault is not None and "403" in refused.fault and "wrong" not in refused.fault
        with pytest.raises(RemoteUnavailable, match=r"403|Forbidden"):
            push.fn(processes, SETTINGS)
        become(*s3.keys["reader"])
        assert ask(processes) is None
        with pytest.raises(RemoteUnavailable, match=r"(?i)access ?denied|forbidden"):
            push.fn(processes, SETTINGS)
        become(*writer)
        push.fn(processes, SETTINGS)
        for path in (".dvc/cache", ".dvc/tmp"):
            shutil.rmtree(path)
        Path("first").unlink()
        Path("dvc.lock").unlink()
        become(*s3.keys["reader"])
        assert not repro.fn("first", processes, SETTINGS, remote=Remote(bucket.to)).ran  # it is restored
    assert Path("first").read_text() == "1\n"
