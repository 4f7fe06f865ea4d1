import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lcmlora.errors import UserError
from lcmlora.io import files, temporaries
from lcmlora.io.files import locked
from lcmlora.training import checkpoint


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
    with locked(folder):
        ready.set()
        done.wait(30)


def test_two_processes_cannot_work_in_one_scratch_folder(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="another run works in this folder"), locked(tmp_path):
        pass
    done.set()
    other.join()
    with locked(tmp_path):  # free again
        pass


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line_and_keeps_the_former(tmp_path: Path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save({"step": 1})
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        checkpoint.Checkpoints(Path("/proc")).save({"step": 2})
    assert checkpoints.load() == {"step": 1}


def _python(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


_TWENTY = """
import sys
from pathlib import Path
from lcmlora.io import files
out, me = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(10):
    with files.atomic_folder(out) as folder:
        for name in range(20):
            (folder / str(name)).write_text(me)
"""


def test_twelve_processes_replace_one_folder_and_none_sees_half_of_it_or_none(tmp_path: Path):
    out = tmp_path / "out"
    with files.atomic_folder(out) as folder:
        for name in range(20):
            (folder / str(name)).write_text("0")
    processes = [_python(_TWENTY, out, number) for number in range(12)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    while any(process.poll() is None for process in processes):
        assert len((out / "7").read_text()) in (1, 2)
    for process in processes:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint
    assert len({path.read_text() for path in out.iterdir()}) == 1
    assert len(list(out.iterdir())) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


_HALF = """
import sys
from pathlib import Path
from lcmlora.io import files
kind, out = sys.argv[1], Path(sys.argv[2])
def wait(target):
    target.write_text("half")
    print("half", flush=True)
    sys.stdin.readline()
if kind == "file":
    files.atomic_write(out, wait)
else:
    with files.atomic_folder(out) as folder:
        wait(folder / "a")
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_swept_and_not_what_a_living_one_writes(tmp_path: Path, kind: str):
    out = tmp_path / "out"
    living, killed = _python(_HALF, kind, out), _python(_HALF, kind, out)
    for process in (living, killed):
        assert process.stdout and process.stdout.readline() == "half\n"
    assert len(list(tmp_path.iterdir())) == 2
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    files.write_json(tmp_path / "other.json", 1)
    assert len([p for p in tmp_path.iterdir() if p.name.endswith(".part")]) == 1
    _, complaint = living.communicate("\n")
    assert living.returncode == 0, complaint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "out"]
    assert (out if kind == "file" else out / "a").read_text() == "half"


def test_what_another_machine_writes_is_left_alone_for_a_day(tmp_path: Path):
    there = tmp_path / ".out.00000000-0123456789ab.part"
    there.mkdir()
    (there / "a").write_text("")
    temporaries.sweep(tmp_path)
    assert there.exists()
    for path in (there / "a", there):
        os.utime(path, (0, 0))
    temporaries.sweep(tmp_path)
    assert not there.exists()


def test_files_that_only_look_like_leftovers_are_kept(tmp_path: Path):
    names = [".part", ".out.part", "out.00000000-0123456789ab.part", ".env"]
    for name in names:
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    temporaries.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_a_file_system_that_cannot_exchange_folders_replaces_them_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unable(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files, "_exchange", unable)
    out = tmp_path / "out"
    for content in ("1", "2"):
        with files.atomic_folder(out) as folder:
            (folder / "a").write_text(content)
        assert (out / "a").read_text() == content
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_a_killed_process_had_moved_aside_comes_back(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("1")
    out.rename(temporaries.name_beside(out, "former"))
    temporaries.sweep(tmp_path)
    assert (out / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_and_the_current_folder_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to("far")
    with pytest.raises(UserError, match="near: is a link to far"), files.atomic_folder(tmp_path / "near"):
        pass
    monkeypatch.chdir(tmp_path / "far")
    for here in (Path(), Path(".."), tmp_path / "far", tmp_path):
        with pytest.raises(UserError, match="is the folder that this runs in"), files.atomic_folder(here):
            pass


def test_modes_follow_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", 1)
        with files.atomic_folder(tmp_path / "out") as folder:
            (folder / "b").write_text("")
    finally:
        os.umask(before)
    modes = [oct(p.stat().st_mode & 0o777) for p in (tmp_path / "a.json", tmp_path / "out", tmp_path / "out" / "b")]
    assert modes == ["0o640", "0o750", "0o640"]


def test_a_planted_link_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "victim").write_text("precious")
    names = iter([tmp_path / ".planted", tmp_path / ".free"])
    (tmp_path / ".planted").symlink_to("victim")
    monkeypatch.setattr(temporaries, "name_beside", lambda path: next(names))
    with pytest.raises(FileExistsError):
        files.write_json(tmp_path / "out.json", 1)
    assert (tmp_path / "victim").read_text() == "precious"


_LOCKED = """
import sys
from pathlib import Path
from lcmlora.io import temporaries
place = Path(sys.argv[1])
for _ in range(20):
    with temporaries.locked(place):
        count = int(place.read_text())
        place.write_text(str(count + 1))
"""


def test_one_process_at_a_time_works_under_a_lock_which_leaves_nothing(tmp_path: Path):
    place = tmp_path / "count"
    place.write_text("0")
    processes = [_python(_LOCKED, place) for _ in range(6)]
    for process in processes:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint
    assert place.read_text() == "120"
    assert [p.name for p in tmp_path.iterdir()] == ["count"]


def test_a_file_that_a_library_puts_in_place_of_the_temporary_one_has_the_mode_of_all(tmp_path: Path):
    def replace(target: Path) -> None:
        (target.parent / "fresh").write_text("1")
        (target.parent / "fresh").chmod(0o600)
        (target.parent / "fresh").replace(target)

    before = os.umask(0o022)
    try:
        files.atomic_write(tmp_path / "out", replace)
    finally:
        os.umask(before)
    assert (tmp_path / "out").read_text() == "1" and (tmp_path / "out").stat().st_mode & 0o777 == 0o644


def test_what_a_library_leaves_beside_the_file_goes(tmp_path: Path):
    def write(target: Path) -> None:
        target.write_text("1")
        (target.parent / ".tmpXYZ").write_text("")

    files.atomic_write(tmp_path / "out", write)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
