"""What `prepare` does shard by shard: nothing twice, the same bytes however it is divided, the large on disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lcmlora.config import Data, Launch
from lcmlora.data.duplicates import NearDuplicates
from lcmlora.data.preparation import near_duplicates, partitions, splitting, surveying
from lcmlora.data.prepare import prepare_pictures
from lcmlora.data.sources import folder
from lcmlora.errors import UserError
from lcmlora.io.files import locked
from lcmlora.plugins import SOURCES
from tests.data.conftest import add, data_in, picture
from tests.data.test_bulk_sources import png, sample, tar
from tests.support.crashing import Crashing

RUN = """
import sys
from pathlib import Path
from lcmlora.config import Data
from lcmlora.data.prepare import prepare_pictures
if __name__ == "__main__":
    root = Path(sys.argv[1])
    data = Data.model_validate_json(sys.argv[2])
    prepare_pictures(data, 1, root / "out", scratch=root / "scratch")
"""


@pytest.fixture
def tars(tmp_path: Path) -> Data:
    """Six tar files; some pictures are in two of them, are too small, broken or without a caption."""
    for number in range(6):
        numbers = range(7 * number, 7 * number + 8)
        tar(
            tmp_path / "in" / f"{number}.tar",
            *(member for each in numbers for member in sample(each)),
            (f"small{number}.png", png(number, (8, 8))),
            (f"small{number}.txt", b"small"),
            (f"broken{number}.png", b"no picture"),
            (f"broken{number}.txt", b"broken"),
            (f"bare{number}.png", png(number)),
        )
    return data_in(tmp_path / "in", source="webdataset", near_duplicates=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(scratch: Path) -> dict[str, int]:
    """The files of finished shards, and which file of the disk each is."""
    return {path.name: path.stat().st_ino for path in scratch.glob("shards/*/*.gz")}


def test_what_was_read_is_not_read_again(tars: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_pictures(tars, 1, tmp_path / "one", scratch=tmp_path / "scratch")
    before = finished(tmp_path / "scratch")
    assert len(before) == 12  # of each tar file what it lists, and what was decoded
    assert "were read before" not in capsys.readouterr().err
    prepare_pictures(tars, 1, tmp_path / "two", scratch=tmp_path / "scratch")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert finished(tmp_path / "scratch") == before
    assert "6 of 6 shards were read before" in capsys.readouterr().err


def test_of_a_set_that_grows_only_the_new_shards_are_read(tars: Data, tmp_path: Path) -> None:
    prepare_pictures(tars, 1, tmp_path / "out", scratch=tmp_path / "scratch")
    before = finished(tmp_path / "scratch")
    tar(tmp_path / "in" / "3b.tar", *sample(200), *sample(201))
    os.utime(tmp_path / "in" / "5.tar", (1, 1))  # it was written again
    report = prepare_pictures(tars, 1, tmp_path / "out", scratch=tmp_path / "scratch")
    after = finished(tmp_path / "scratch")
    assert report["read"] == 6 * 11 + 2
    assert len(before.items() & after.items()) == 10 and len(after) == 14  # those of the former 5.tar are gone
    prepare_pictures(tars, 1, tmp_path / "anew")
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


@pytest.mark.parametrize("change", [{"min_side": 4}, {"test": 0.5, "seed": 3}])
def test_other_limits_and_another_split_read_nothing_again(
    tars: Data, tmp_path: Path, change: dict[str, float]
) -> None:
    prepare_pictures(tars, 1, tmp_path / "out", scratch=tmp_path / "scratch")
    before = finished(tmp_path / "scratch")
    changed = tars.model_copy(update=change)
    prepare_pictures(changed, 1, tmp_path / "out", scratch=tmp_path / "scratch")
    assert finished(tmp_path / "scratch") == before
    prepare_pictures(changed, 1, tmp_path / "anew")
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def test_the_bytes_are_the_same_however_the_set_is_divided(
    tars: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_pictures(tars, 1, tmp_path / "whole")
    monkeypatch.setattr(surveying, "_SLICE", 3)
    monkeypatch.setattr(partitions, "_BUFFERED", 5)
    monkeypatch.setattr(near_duplicates, "BLOCK", 4)
    monkeypatch.setattr("lcmlora.data.preparation.selecting.BLOCK", 4)
    monkeypatch.setattr("lcmlora.data.prepare._CHUNK", 5)
    prepare_pictures(tars, 1, tmp_path / "small", scratch=tmp_path / "scratch")
    assert contents(tmp_path / "whole") == contents(tmp_path / "small")
    assert len(finished(tmp_path / "scratch")) == 6 + 24


def test_processes_give_the_bytes_of_one(tars: Data, tmp_path: Path) -> None:
    prepare_pictures(tars, 1, tmp_path / "one")
    prepare_pictures(tars, 1, tmp_path / "two", launch=Launch(processes=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_ray_gives_the_bytes_of_one_process(tars: Data, tmp_path: Path) -> None:
    prepare_pictures(tars, 1, tmp_path / "one")
    prepare_pictures(tars, 1, tmp_path / "two", launch=Launch(engine="ray", processes=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def run_killed(data: Data, root: Path, after: int) -> None:
    """Prepares in another process, which is killed as soon as so many shards are finished."""
    command = [sys.executable, "-c", RUN, str(root), data.model_dump_json()]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while run.poll() is None and len(finished(root / "scratch")) < after:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()


def check_kills(tars: Data, root: Path, moments: list[int]) -> None:
    """Kills runs on one set when so many shards are finished; no finished one may be done again."""
    prepare_pictures(tars, 1, root / "undisturbed")
    before: dict[str, int] = {}
    for moment in moments:
        run_killed(tars, root, moment)
        assert before.items() <= finished(root / "scratch").items()
        before = finished(root / "scratch")
    prepare_pictures(tars, 1, root / "out", scratch=root / "scratch")
    assert before.items() <= finished(root / "scratch").items()
    assert contents(root / "out") == contents(root / "undisturbed")


def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(tars: Data, tmp_path: Path) -> None:
    check_kills(tars, tmp_path, [2, 7, 9])


@pytest.mark.slow
def test_twenty_kills_at_random_moments_cost_the_shards_under_way(tars: Data, tmp_path: Path) -> None:
    for number in range(6, 40):
        tar(tmp_path / "in" / f"{number:02d}.tar", *(m for each in range(8) for m in sample(8 * number + each)))
    check_kills(tars, tmp_path, sorted(random.Random(0).choices(range(80), k=20)))


def test_two_runs_at_a_time_are_refused(tars: Data, tmp_path: Path) -> None:
    with locked(tmp_path / "scratch"), pytest.raises(UserError, match="another run works in this folder"):
        prepare_pictures(tars, 1, tmp_path / "out", scratch=tmp_path / "scratch")


def test_a_picture_that_crashes_its_decoder_costs_itself_alone(tmp_path: Path) -> None:
    for number in range(12):
        add(tmp_path / "in", f"{number:02d}.png", f"subject {number}", picture(number))
    SOURCES.register("crashing", Crashing)
    report = prepare_pictures(data_in(tmp_path / "in", source="crashing"), 1, tmp_path / "out")
    assert report["dropped"] == {"made its decoder crash": {"count": 2, "first": ["03.png", "07.png"]}}
    assert report["kept"] == 10


# --- folders


def test_a_new_picture_has_its_own_slice_of_a_folder_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_END", bytes([64, 0, 0, 0]))  # a slice ends at one name in four
    for number in range(40):
        add(tmp_path / "in", f"{number:02d}.png", f"subject {number}", picture(number))
    data = data_in(tmp_path / "in")
    prepare_pictures(data, 1, tmp_path / "out", scratch=tmp_path / "scratch")
    before = finished(tmp_path / "scratch")
    assert 10 <= len(before) <= 40
    add(tmp_path / "in", "17b.png", "a new one", picture(50))
    (tmp_path / "in" / "30.txt").write_text("another caption")
    report = prepare_pictures(data, 1, tmp_path / "out", scratch=tmp_path / "scratch")
    after = finished(tmp_path / "scratch")
    assert report["kept"] == 41
    assert 4 <= len(after.items() - before.items()) <= 8  # of two slices, perhaps divided by the new name
    prepare_pictures(data, 1, tmp_path / "anew")
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def test_a_picture_that_was_changed_is_read_again(tmp_path: Path) -> None:
    for number in range(8):
        add(tmp_path / "in", f"{number}.png", f"subject {number}", picture(number))
    data = data_in(tmp_path / "in")
    prepare_pictures(data, 1, tmp_path / "out", scratch=tmp_path / "scratch")
    add(tmp_path / "in", "3.png", "subject 3", picture(3, (48, 40)))
    prepare_pictures(data, 1, tmp_path / "out", scratch=tmp_path / "scratch")
    prepare_pictures(data, 1, tmp_path / "anew")
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


# --- on disk


@pytest.mark.parametrize("bits", [0, 1, 4, 6, 8])
def test_near_duplicates_in_a_file_are_those_in_memory(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "_CHUNK", 50)
    numbers = random.Random(bits)
    hashes: list[int] = []
    for _ in range(600):
        each = numbers.getrandbits(64)
        if hashes and numbers.random() < 0.6:
            each = numbers.choice(hashes)
            for bit in numbers.sample(range(64), numbers.randrange(2 * bits + 2)):
                each ^= 1 << bit
        hashes.append(each)
    in_memory = NearDuplicates(bits)
    expected = [in_memory.has_or_add(each) for each in hashes]
    edges = [0, 1, 64, 100, 333, 600]
    blocks = (np.array(hashes[low:high], np.uint64) for low, high in pairwise(edges))
    found = near_duplicates.find_near_duplicates(blocks, bits, tmp_path / "kept")
    assert np.concatenate([*found]).tolist() == expected
    assert 50 < sum(expected) < 550


def test_equal_texts_are_found_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "_BUFFERED", 64)
    numbers = random.Random(0)
    texts = [f"text {numbers.randrange(300)}" for _ in range(1000)]
    digests = partitions.Digests(tmp_path / "digests")
    for number, text in enumerate(texts):
        digests.add(text, number)
    first: dict[int, int] = {}
    for rows, firsts in digests.groups():
        first |= dict(zip(rows["value"].tolist(), rows["value"][firsts].tolist(), strict=True))
    assert first == {number: texts.index(text) for number, text in enumerate(texts)}


def test_bits_are_set_and_read_back() -> None:
    bits = partitions.Bits(1000)
    some = np.array([0, 7, 8, 8, 500, 999], np.uint64)
    bits.set(some)
    assert [index for index in range(1000) if bits[index]] == [0, 7, 8, 500, 999]
    assert bits.at(np.array([7, 9], np.uint64)).tolist() == [True, False]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 50])
@pytest.mark.parametrize(
    ("validation", "test"), [(0.0, 0.3), (0.09, 0.16), (0.001, 0.001), (0.5, 0.499), (0.001, 0.99)]
)
def test_the_limits_of_the_split_are_those_of_all_levels_at_once(count: int, validation: float, test: float) -> None:
    levels = np.random.default_rng(count).random(count)
    levels = np.concatenate([levels, levels[: count // 2]])  # captions that differ in case only
    limits = splitting.find_limits(lambda: np.array_split(levels, 7), validation, test)
    ordered = sorted({*levels})
    wanted = validation > 0 and len(ordered) > 2
    test_limit = min(max(test, ordered[1]), ordered[-2] if wanted else ordered[-1])
    limit = test_limit
    if wanted:
        following = [level for level in ordered if level >= test_limit][1]
        limit = min(max(test + validation, following), ordered[-1])
    assert (limits.test, limits.validation) == (test_limit, limit)
    assert limits.sizes(levels) == {
        part: sum(limits.part(level) == part for level in levels) for part in limits.sizes(levels)
    }
