"""Pictures of many shapes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Encode
from lcmlora.data.latents.aspect import bucket_sizes, nearest, used_sizes
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.sources.source import fit, open_picture, read_records, survey, write_records
from lcmlora.distillation.distill import distill_adapter
from lcmlora.errors import UserError
from lcmlora.training.batches import Batches, chunks
from lcmlora.training.loop import NullLogger
from tests.data.conftest import add, data_in, load_encoders, picture
from tests.support.distillation import CPU, SETTINGS, load_parts
from tests.support.latents import Load, count_batches, tree

SHAPES = [(40, 40), (64, 40), (40, 64), (72, 40), (41, 40)]  # width and height


def test_shapes_have_the_area_of_the_square_and_sides_of_whole_units() -> None:
    sizes = bucket_sizes(512, 64, 2.0)
    assert sizes == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    assert (1024, 1024) in bucket_sizes(1024, 64, 2.0) and (832, 1216) in bucket_sizes(1024, 64, 2.0)  # of SDXL's own
    for height, width in bucket_sizes(1024, 64, 4.0):
        assert height % 64 == width % 64 == 0 and 0.85 * 1024 * 1024 <= height * width <= 1024 * 1024
        assert max(height, width) <= 4 * min(height, width)
    assert bucket_sizes(64, 64, 4.0) == [(64, 64)]


def test_a_picture_goes_to_the_shape_of_the_closest_aspect() -> None:
    sizes = bucket_sizes(1024, 64, 2.0)
    found = nearest([(1000, 1000), (1920, 1080), (1080, 1920), (1, 3000)], sizes)
    assert [sizes[number] for number in found] == [(1024, 1024), (768, 1344), (1344, 768), sizes[0]]


SIDES = st.integers(1, 3000)


@given(st.dictionaries(st.tuples(SIDES, SIDES), st.integers(1, 200), min_size=1), st.integers(1, 300))
def test_no_shape_that_is_chosen_has_too_few_pictures_but_the_only_one(shapes: dict[Any, int], least: int) -> None:
    sizes, pairs, counts = bucket_sizes(512, 64, 2.0), list(shapes), list(shapes.values())
    found = used_sizes(pairs, counts, sizes, least)
    assert found == [size for size in sizes if size in found]
    each = np.bincount(nearest(pairs, found), counts, minlength=len(found))
    assert (len(found) == 1 and each.min() > 0) or each.min() >= least


@pytest.fixture(scope="module")
def made(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("shapes")
    fill(load_encoders(base_folder, 32), work, 60)
    return work


def fill(base: LoadedBase, work: Path, count: int, **changes: Any) -> LatentCache:
    for number in range(count):
        if not (work / "in" / f"{number:03d}.png").exists():
            add(work / "in", f"{number:03d}.png", f"subject {number % 9}", picture(number, SHAPES[number % 5]))
    data = data_in(work / "in")
    write_records(work / "pictures" / "train.jsonl", survey(data).records)
    settings = Encode.model_validate({"batch": 4, "aspect_buckets": True, "bucket_pictures": 8} | changes)
    encode_latents(base, data, settings, work / "pictures", work / "scratch", work / "latents")
    return LatentCache(work / "latents")


def test_each_picture_is_encoded_in_its_shape_and_told_so(base_folder: Path, made: Path) -> None:
    cache, base = LatentCache(made / "latents"), load_encoders(base_folder, 32)
    assert base.size_unit == 4
    assert cache.buckets == [(40, 24), (32, 32), (24, 40)]
    counts = Counter(cache.bucket(torch.arange(60)).tolist())
    assert counts == {0: 12, 1: 24, 2: 24}
    records = {r.key: r for r in read_records(made / "pictures" / "train.jsonl")}
    for row in (0, 20, 59):
        (name,) = cache.names(torch.tensor([row]))
        size = cache.buckets[int(cache.bucket(torch.tensor([row])))]
        fitted, crop = fit(open_picture(data_in(made / "in"), records[name]), *size)
        assert fitted.size == size[::-1]
        pixels = torch.tensor(list(fitted.tobytes()), dtype=torch.uint8).view(1, *size, 3).permute(0, 3, 1, 2)
        mean, _ = base.encode_pictures(pixels / 127.5 - 1)
        found, _ = cache.latents(torch.tensor([row]))
        assert found.shape == (1, 4, size[0] // 2, size[1] // 2)
        torch.testing.assert_close(found, mean, rtol=2e-3, atol=1e-3)
        assert cache._rows["crop_tl"][row].tolist() == list(crop)


def test_sdxl_is_told_the_shape(load_base: Load, tmp_path: Path) -> None:
    cache = fill(load_base(32, sdxl=True), tmp_path, 60)
    rows = torch.tensor([0, 30, 59])
    targets = cache.conditioning(rows)["time_ids"][:, 4:]
    assert targets.tolist() == [list(cache.buckets[n]) for n in cache.bucket(rows).tolist()]


def test_a_batch_is_of_one_shape_and_all_are_seen(made: Path) -> None:
    cache = LatentCache(made / "latents")
    batches = Batches(cache, torch.arange(60), SETTINGS, CPU, grid=50)
    shapes, seen = Counter[tuple[int, ...]](), Counter[int]()
    for step in range(15):
        rows = batches.rows(batches.sample_indices(step, 0))
        assert len(cache.bucket(rows).unique()) == 1
        shapes[tuple(batches.draw(step).z.shape[2:])] += 1
        seen.update(rows.tolist())
    assert shapes == {(20, 12): 3, (16, 16): 6, (12, 20): 6}
    assert set(seen.values()) == {1} and len(seen) == 60
    parts = chunks(cache, torch.arange(60), 10)
    assert sorted(torch.cat(parts).tolist()) == list(range(60))
    assert all(len(cache.bucket(part).unique()) == 1 and len(part) <= 10 for part in parts)


@pytest.mark.slow
def test_a_distillation_on_many_shapes_learns(made: Path, base_folder: Path, tmp_path: Path) -> None:
    cache, losses = LatentCache(made / "latents"), []

    class Recorder(NullLogger):
        def log(self, metrics: dict[str, float], step: int) -> None:
            losses.append(metrics.get("loss"))

    base = load_parts(base_folder, "network", "vae")
    base.resolution = 32
    changes = {"steps": 40, "batch": 8, "lr": 3e-3, "log_every": 10, "validate_every": 40, "validation_pictures": 9}
    settings = SETTINGS.model_copy(update=changes)
    arguments = (cache, settings, tmp_path, tmp_path / "adapter")
    told: dict[str, Any] = {"identity": {"digest": "0"}, "logger": Recorder(), "decode": base.decode}
    distill_adapter(base, *arguments, **told)
    found = [loss for loss in losses if loss is not None]
    assert found[-1] < 0.95 * found[0]
    fresh = load_parts(base_folder, "network")
    fresh.resolution = 32
    with pytest.raises(UserError, match="teacher_cache_gb: outputs of one shape are kept"):
        distill_adapter(fresh, *arguments, **told | {"teacher_cache": (tmp_path / "teacher", 1 << 20)})


def test_a_set_that_grows_keeps_its_shards_whatever_stands_before_them(base_folder: Path, tmp_path: Path) -> None:
    base = load_encoders(base_folder, 32)
    fill(base, tmp_path, 60)
    before = {file: load_file(tmp_path / "latents" / file) for file in tree(tmp_path / "latents") if "shard" in file}
    assert len(before) == 3
    add(tmp_path / "in", "100.png", "subject 1", picture(100, (40, 64)))
    sizes = count_batches(base)
    cache = fill(base, tmp_path, 60)
    assert sum(sizes) == 13  # of the shape that has one more
    entries = json.loads((tmp_path / "latents/manifest.json").read_text())["shards"]
    assert [(entry["bucket"], entry["pictures"]) for entry in entries] == [(0, 13), (1, 24), (2, 24)]
    assert len(cache) == 61


def test_one_shape_that_is_no_square_is_told_too(base_folder: Path, tmp_path: Path) -> None:
    base = load_encoders(base_folder, 32)
    for number in range(12):
        add(tmp_path / "in", f"{number:03d}.png", f"subject {number}", picture(number, (64, 40)))
    cache = fill(base, tmp_path, 12)
    assert cache.buckets == [(24, 40)]
    assert cache.latents(torch.arange(12))[0].shape == (12, 4, 12, 20)


def test_squares_alone_make_the_cache_that_knows_no_shapes(base_folder: Path, tmp_path: Path) -> None:
    base = load_encoders(base_folder, 32)
    for number in range(12):
        add(tmp_path / "in", f"{number:03d}.png", f"subject {number}", picture(number, (40, 40)))
    fill(base, tmp_path, 12)
    manifest = json.loads((tmp_path / "latents/manifest.json").read_text())
    assert "buckets" not in manifest and "bucket" not in manifest["shards"][0]
