"""Shards of a latent cache in a real bucket."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from lcmlora.config import Encode, Publish
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.prepare import prepare_pictures
from tests.data.conftest import add, data_in, picture
from tests.data.test_remote_shards import held, stream
from tests.integration.seaweed import SeaweedFS
from tests.support.distillation import load_parts

pytestmark = pytest.mark.integration

BUDGET = 4 << 20


@pytest.mark.slow
def test_training_reads_a_bucket_within_its_budget_and_survives_that_it_is_cut_off(
    s3: SeaweedFS, bucket: Publish, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for number in range(160):
        add(tmp_path / "in", f"{number:03d}.png", f"subject {number}", picture(number))
    data = data_in(tmp_path / "in", validation=0, test=0.01)
    prepare_pictures(data, 4, tmp_path / "pictures")
    base = load_parts(base_folder, "vae", "text")
    base.resolution = 128
    for name, shards in (("here", None), ("there", f"{bucket.to}/shards")):
        settings = Encode(batch=5, shard_mb=1, shards=shards)
        encode_latents(base, data, settings, tmp_path / "pictures", tmp_path / "scratch", tmp_path / name)
    place = bucket.to.removeprefix("s3://")
    keys = [o["Key"] for o in s3.client().list_objects_v2(Bucket=place.split("/")[0])["Contents"]]
    whole = LatentCache(tmp_path / "here")
    assert len([key for key in keys if "/shards/mini/" in f"/{key}"]) == len(whole.manifest.shards) >= 10

    here = stream(whole)
    there = stream(LatentCache(tmp_path / "there", shards=tmp_path / "disk", budget=BUDGET))
    for step in range(40):
        if step == 8:
            s3.kill()
            back = threading.Timer(5.0, s3.start)
            back.start()
            began = time.monotonic()
        assert torch.equal(here.draw(step).z, there.draw(step).z)
        assert held(tmp_path / "disk") <= BUDGET
    back.join()
    assert time.monotonic() - began > 4.0  # it did wait
