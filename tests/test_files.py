import hashlib
import multiprocessing
from pathlib import Path

import pytest

from lcmlora import checkpoint, files
from lcmlora.errors import UserError


def test_a_failed_write_leaves_the_former_file_and_no_other(tmp_path: Path):
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})

    def half(target: Path) -> None:
        target.write_text("{")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        files.atomic_write(path, half)
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_figures_that_are_no_numbers_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "m.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_whole_or_keeps_what_it_was(tmp_path: Path):
    out = tmp_path / "out"
    with files.atomic_folder(out) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), files.atomic_folder(out) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (out / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folders_digest_follows_names_and_contents(tmp_path: Path):
    (tmp_path / "a").write_text("1")
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(b"1").hexdigest()
    before = files.sha256_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert files.sha256_folder(tmp_path) != before


def _hold(folder: Path, ready: "multiprocessing.Event", done: "multiprocessing.Event") -> None:  # type: ignore[name-defined]
    with checkpoint.locked(folder):
        ready.set()
        done.wait(30)


def test_two_processes_cannot_work_in_one_scratch_folder(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="another run works in this folder"), checkpoint.locked(tmp_path):
        pass
    done.set()
    other.join()
    with checkpoint.locked(tmp_path):  # free again
        pass


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line_and_keeps_the_former(tmp_path: Path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save({"step": 1})
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        checkpoint.Checkpoints(Path("/proc")).save({"step": 2})
    assert checkpoints.load() == {"step": 1}
