"""Caches that grow, and caches whose shards lie elsewhere and come to this disk as training needs them."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcmlora import stages
from lcmlora.config import Encode
from lcmlora.data.latents import remote_shards
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.latents.remote_shards import RemoteShards, ShardFile
from lcmlora.data.prepare import prepare_pictures
from lcmlora.data.sources.source import survey, write_records
from lcmlora.errors import Unavailable, UserError
from lcmlora.io import temporaries
from lcmlora.io.remote import Files
from lcmlora.training.batches import Batches
from tests.data.conftest import add, data_in, picture
from tests.support.distillation import CPU, SETTINGS, load_parts
from tests.support.latents import count_batches, tree

SIDE = 128  # pixels; the latent is 4 x 64 x 64, and 1 MB holds 15 of them
PICTURES = 150


def fill(base_folder: Path, work: Path, count: int, *, shards: str | None = None, out: str = "latents") -> Any:
    """Encodes so many pictures of `work`/in and returns the sizes of the VAE's batches."""
    for number in range(count):
        if not (work / "in" / f"{number:03d}.png").exists():
            add(work / "in", f"{number:03d}.png", f"subject {number % 9}", picture(number))
    data = data_in(work / "in")
    write_records(work / "pictures" / "train.jsonl", survey(data).records)
    base = load_parts(base_folder, "vae", "text")
    base.resolution = SIDE
    sizes = count_batches(base)
    settings = Encode(batch=5, shard_mb=1, shards=shards)
    encode_latents(base, data, settings, work / "pictures", work / "scratch", work / out)
    return sizes


@pytest.fixture(scope="module")
def places(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The same cache whole, and with its shards elsewhere; and where they are."""
    work = tmp_path_factory.mktemp("places")
    fill(base_folder, work, PICTURES)
    fill(base_folder, work, PICTURES, shards=str(work / "bucket"), out="far")
    return work / "latents", work / "far", work / "bucket" / "mini"


def stream(cache: LatentCache, window: int = 30) -> Batches:
    settings = SETTINGS.model_copy(update={"window": window, "batch": 5})
    return Batches(cache, torch.arange(len(cache)), settings, CPU, grid=50)


def far(places: tuple[Path, Path, Path], folder: Path, megabytes: float) -> LatentCache:
    return LatentCache(places[1], shards=folder, budget=int(megabytes * (1 << 20)))


def held(folder: Path) -> int:
    """Bytes in a folder whose files come and go while they are counted: the least of three counts."""
    return min(_count(folder) for _ in range(3))


def _count(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


# --- growth


@pytest.mark.parametrize("elsewhere", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_list_that_grew_has_its_new_shards_encoded_alone(base_folder: Path, tmp_path: Path, elsewhere: bool) -> None:
    shards = str(tmp_path / "bucket") if elsewhere else None
    assert sum(fill(base_folder, tmp_path, 40, shards=shards)) == 40
    before = tree(tmp_path / "latents")
    assert sum(fill(base_folder, tmp_path, 40, shards=shards)) == 0
    assert tree(tmp_path / "latents") == before
    assert sum(fill(base_folder, tmp_path, 60, shards=shards)) == 30  # of the third shard on, which had 10 pictures
    grown = tree(tmp_path / "latents")
    fresh = tmp_path / "fresh"
    (tmp_path / "in").rename(fresh / "in") if fresh.mkdir() is None else None
    fill(base_folder, fresh, 60, shards=shards and str(fresh / "bucket"))
    whole = tree(fresh / "latents")
    for name in grown.keys() - {"manifest.json"}:
        assert grown[name] == whole[name]
    one, other = (json.loads(files["manifest.json"]) for files in (grown, whole))
    assert one["shards"] == other["shards"] and one["fingerprint"] == other["fingerprint"]


def test_a_picture_that_changed_has_its_shard_encoded_again_and_a_damaged_shard_too(
    base_folder: Path, tmp_path: Path
) -> None:
    fill(base_folder, tmp_path, 45)
    add(tmp_path / "in", "020.png", "subject 2", picture(500))
    assert sum(fill(base_folder, tmp_path, 45)) == 15
    shard = tmp_path / "latents" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert sum(fill(base_folder, tmp_path, 45)) == 15
    LatentCache(tmp_path / "latents").verify()


def test_a_new_caption_before_the_others_changes_all_rows_of_text(base_folder: Path, tmp_path: Path) -> None:
    fill(base_folder, tmp_path, 45)
    add(tmp_path / "in", "000.png", "another subject", picture(0))
    assert sum(fill(base_folder, tmp_path, 45)) == 45


def test_no_shard_of_another_version_of_the_algorithm_is_taken_over(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(base_folder, tmp_path, 20)
    monkeypatch.setitem(stages.VERSIONS, "encode", stages.VERSIONS["encode"] + 1)
    assert sum(fill(base_folder, tmp_path, 20)) == 20
    assert sum(fill(base_folder, tmp_path, 20)) == 0


# --- elsewhere


def test_the_stream_from_elsewhere_is_that_of_the_whole_cache_within_the_budget(
    places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    assert sorted(p.name for p in places[1].iterdir() if "captions" not in p.name) == [
        "manifest.json", "rows.safetensors", "text.safetensors",
    ]  # fmt: skip
    here, there = stream(LatentCache(places[0])), stream(far(places, tmp_path / "disk", 4.2))
    for step in range(40):
        one, other = here.draw(step), there.draw(step)
        assert torch.equal(one.z, other.z) and torch.equal(one.index, other.index)
        for name, value in one.conditioning.items():
            assert torch.equal(value, other.conditioning[name])
        assert held(tmp_path / "disk") <= 4.2 * (1 << 20)


def test_each_shard_comes_once_in_an_epoch_and_before_it_is_needed(
    places: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[str] = []
    real = Files.read
    monkeypatch.setattr(Files, "read", lambda self, *piece: came.append(piece[0]) or real(self, *piece))
    cache = far(places, tmp_path, 4.2)
    batches = stream(cache)
    steps = PICTURES // 5
    for step in range(3 * steps):
        batches.draw(step)
    # Ten shards in three epochs. Those under the edge of two windows come once, as the budget has room for four, and
    # so do those in which an epoch ends and the next one begins.
    assert 20 <= len(came) <= 33


def test_what_an_earlier_run_left_goes_when_the_next_one_begins(
    places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    stream(far(places, tmp_path, 4.2)).draw(0)
    until = time.monotonic() + 60
    while len([*tmp_path.glob("*.safetensors")]) < 4 and time.monotonic() < until:  # it has brought what it may hold
        time.sleep(0.01)
    (tmp_path / f"{'a' * 64}.safetensors").write_bytes(b"of another cache")
    (tmp_path / f".{'b' * 64}.safetensors.999999999.part").write_bytes(b"of a run that was killed")
    temporaries.name_beside(tmp_path / f"{'b' * 64}.safetensors").write_bytes(b"of another one")
    stream(far(places, tmp_path, 4.2)).draw(20)
    names = {path.name for path in tmp_path.iterdir()}
    assert not any(name.startswith(("a" * 64, f".{'b' * 64}")) for name in names)
    assert held(tmp_path) <= 4.2 * (1 << 20)


def test_shards_that_another_process_deletes_are_brought_again_or_still_open(
    places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    here, there = stream(LatentCache(places[0])), stream(far(places, tmp_path, 4.2))
    for step in range(0, 3 * PICTURES // 5, 2):
        assert torch.equal(here.draw(step).z, there.draw(step).z)
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()


def test_a_shard_that_goes_while_it_is_opened_is_brought_again_and_other_errors_are_told(
    places: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def load(path: Path) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls % 2:
            path.unlink()
            raise RuntimeError(f"unable to open file <{path}> in read-only mode")  # as torch says it
        return load_file(path)

    monkeypatch.setattr(remote_shards, "load_file", load)
    here, there = stream(LatentCache(places[0])), stream(far(places, tmp_path / "one", 4.2))
    assert torch.equal(here.draw(0).z, there.draw(0).z) and calls > 1

    def fail(path: Path) -> dict[str, torch.Tensor]:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(remote_shards, "load_file", fail)
    with pytest.raises(RuntimeError, match="not enough memory"):
        stream(far(places, tmp_path / "two", 4.2)).draw(0)


def test_two_runs_share_a_folder_of_shards(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    here = stream(LatentCache(places[0]))
    one, other = stream(far(places, tmp_path, 4.2)), stream(far(places, tmp_path, 4.2))
    for step in range(0, 2 * PICTURES // 5, 3):
        expected = here.draw(step).z
        assert torch.equal(expected, one.draw(step).z)
        assert torch.equal(here.draw(step + 40).z, other.draw(step + 40).z)


def test_rows_kept_from_training_widen_what_a_window_needs(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    cache = far(places, tmp_path, 4.2)
    few = torch.arange(len(cache))[::3]  # five of each shard: a window of 30 is spread over six
    settings = SETTINGS.model_copy(update={"window": 30, "batch": 5})
    with pytest.raises(UserError, match=r"30 pictures \(distill\.window\) may lie in 0\.0059 GB"):
        Batches(cache, few, settings, CPU, grid=50).draw(0)


def test_a_run_goes_on_from_any_step(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    here, there = stream(LatentCache(places[0])), stream(far(places, tmp_path, 4.2))
    for step in (17, 18, 33, 2):
        assert torch.equal(here.draw(step).z, there.draw(step).z)


def test_rows_that_no_step_reads_come_one_by_one(
    places: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = Files.read
    monkeypatch.setattr(Files, "read", lambda self, name, a, n: sizes.append(n) or real(self, name, a, n))
    rows = torch.tensor([3, 70, 31])
    mean, logvar = far(places, tmp_path, 4.2).latents(rows)
    expected = LatentCache(places[0]).latents(rows)
    assert torch.equal(mean, expected[0]) and torch.equal(logvar, expected[1])
    assert max(sizes) == 4 * 64 * 64 * 2


def test_a_budget_below_a_window_is_refused_with_the_number_that_is_needed(
    places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    message = r"0\.0021 is not enough.*30 pictures \(distill\.window\) may lie in 0\.00295 GB.* raise it to 0\.00295"
    with pytest.raises(UserError, match=message):
        stream(far(places, tmp_path, 2)).draw(0)
    stream(far(places, tmp_path, 2), window=5).draw(0)


def test_a_bucket_that_does_not_answer_for_a_while_is_asked_again_and_not_for_ever(
    places: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, silent = Files.read, [3]

    def read(self: Files, *piece: Any) -> bytes:
        if silent[0]:
            silent[0] -= 1
            raise Unavailable("no answer")
        return real(self, *piece)

    monkeypatch.setattr(Files, "read", read)
    expected = stream(LatentCache(places[0])).draw(0)
    assert torch.equal(stream(far(places, tmp_path / "a", 4.2)).draw(0).z, expected.z)
    assert "no answer; asking again for 600 s" in capfd.readouterr().err
    silent[0] = 1 << 30
    cache = far(places, tmp_path / "b", 4.2)
    assert cache._remote is not None
    cache._remote._timeout = 2.0
    with pytest.raises(Unavailable, match="no answer"):
        stream(cache).draw(0)


def test_a_shard_that_is_damaged_there_is_refused_and_one_that_is_damaged_here_comes_again(
    places: tuple[Path, Path, Path], tmp_path: Path, base_folder: Path
) -> None:
    batches = stream(far(places, tmp_path / "disk", 4.2))
    expected = batches.draw(0).z
    one = next((tmp_path / "disk").glob("*.safetensors"))
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    one.write_bytes(content)
    assert torch.equal(stream(far(places, tmp_path / "disk", 4.2)).draw(0).z, expected)
    listed = LatentCache(places[1]).manifest.shards
    files = [ShardFile.model_validate(shard.plain() | {"sha256": "0" * 64}) for shard in listed]
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (bucket / f"{'0' * 64}.safetensors").write_bytes(bytes(max(file.bytes for file in files)))
    damaged = RemoteShards(Files(str(bucket)), files, tmp_path / "other", 1 << 30)
    with pytest.raises(UserError, match="is damaged in the bucket"):
        damaged._fetch(0)
    assert not list((tmp_path / "other").iterdir())


def test_prepared_pictures_of_a_growing_folder_keep_their_order(tmp_path: Path) -> None:
    for count in (20, 30):
        for number in range(count):
            add(tmp_path / "in", f"{number:03d}.png", f"subject {number}", picture(number))
        prepare_pictures(data_in(tmp_path / "in"), 4, tmp_path / str(count))
    few, many = ((tmp_path / n / "train.jsonl").read_text().splitlines() for n in ("20", "30"))
    assert many[: len(few)] == few and len(many) > len(few)
