"""What the machine refuses, by real file systems and limits where they can be had."""

import concurrent.futures
import contextlib
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lcmlora.cli.shell.reporting import reporting_errors
from lcmlora.errors import UserError
from lcmlora.io import faults, files
from lcmlora.tasks.processes import reason
from lcmlora.training import checkpoint

LARGE = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))  # 4 MB


def line_of(action: Callable[[], object], verb: str = "") -> str:
    """Returns the one line that a person is told."""
    told = None
    try:
        with reporting_errors(verb=verb):
            try:
                action()
            except Exception as error:
                told = str(error) if isinstance(error, UserError) else faults.explain(error, verb)
                raise
    except SystemExit as end:
        assert end.code == 2, "a traceback"
    assert told and "\n" not in told
    return told


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir()
    if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk that has room for the old content and not for the new one."""
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as folder:
        yield folder


def _numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, LARGE.numpy())


def _torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(LARGE, file)


def _picture(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="png")


def _chart(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 12))
    figure.figimage(np.random.default_rng(0).random((1200, 1200)))
    figure.savefig(path, format="png")


def _database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("create table a (b)")
        database.execute("insert into a values (?)", (b"x" * (4 << 20),))
        database.commit()


WRITERS = {
    "text": lambda path: path.write_text("x" * (4 << 20)),
    "numpy": _numpy,
    "torch, by name": lambda path: torch.save(LARGE, path),
    "torch, into a file": _torch,
    "safetensors": lambda path: save_file({"a": LARGE}, path),
    "parquet": lambda path: pyarrow.parquet.write_table(pyarrow.table({"a": LARGE.numpy()}), path, compression="none"),
    "picture": _picture,
    "chart": _chart,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_with_the_name_and_the_old_content_stays(full: Path, kind: str):
    path, folder = full / "out.bin", full / "folder"
    path.write_text("old")
    with files.atomic_folder(folder) as part:
        (part / "a").write_text("old")

    def fill() -> None:
        with files.atomic_folder(folder) as part:
            (part / "b").mkdir()
            WRITERS[kind](part / "b" / "c")

    assert line_of(lambda: files.atomic_write(path, WRITERS[kind])).startswith(f"{path}: No space left on device; free")
    assert line_of(fill).startswith(f"{folder}") and "No space left on device; free some" in line_of(fill)
    assert path.read_text() == "old" and (folder / "a").read_text() == "old"
    assert sorted(each.name for each in full.iterdir()) == ["folder", "out.bin"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_limit_of_a_files_size_is_one_line_with_the_name(tmp_path: Path, kind: str):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        line = line_of(lambda: files.atomic_write(tmp_path / "out.bin", WRITERS[kind]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.startswith(f"{tmp_path}/out.bin: File too large; raise the limit")
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_is_mounted_for_reading_alone(tmp_path: Path):
    with mounted(tmp_path / "ro", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs") as folder:
        for place in (folder / "a.json", folder / "sub" / "a.json"):
            assert "Read-only file system; mount it for writing" in line_of(lambda at=place: files.write_json(at, 1))
        with pytest.raises(OSError, match=f"{folder}/out"), files.atomic_folder(folder / "out"):
            pass


_OTHER = """
import sys
from pathlib import Path
from lcmlora.io import files
from lcmlora.cli.shell.reporting import reporting_errors
with reporting_errors():
    if sys.argv[1] == "folder":
        with files.atomic_folder(Path(sys.argv[2])) as folder:
            (folder / "a").write_text("1")
    else:
        files.write_json(Path(sys.argv[2]), 1)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_another_user_is_told_where_he_must_not_write(tmp_path: Path, kind: str):
    if os.geteuid():
        pytest.skip("needs the right to be another user")
    command = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", _OTHER, kind, str(tmp_path / "out")]
    if subprocess.run([*command[:3], sys.executable, "-c", "import lcmlora.io.files"], capture_output=True).returncode:
        pytest.skip("another user cannot read this installation")
    for folder in (tmp_path, *tmp_path.parents):
        if tempfile.gettempdir() in map(str, folder.parents):  # pytest's own, which it makes for its user alone
            folder.chmod(0o755)
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path}/out: Permission denied; change its permissions or its owner (")
    assert ended.stderr.count("\n") == 1


def test_what_is_in_the_way_and_names_that_are_too_long(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for place, expected in (
        (tmp_path / "file" / "a.json", "file: Not a directory; expected a folder; move the file that is in the way"),
        (tmp_path / "folder", "folder: Is a directory; expected a file; move the folder"),
        (tmp_path / ("x" * 300), "xxx: File name too long; choose a shorter name"),
        (tmp_path / "loop" / "a.json", "loop: Not a directory"),
    ):
        line = line_of(lambda at=place: files.write_json(at, 1))
        assert expected in line and str(tmp_path) in line
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file"), files.atomic_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_too_many_open_files(tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 256), before[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append((tmp_path / "held").open("w"))
        with pytest.raises(OSError, match="Too many open files") as caught:
            files.write_json(tmp_path / "a.json", 1)
    finally:
        for each in held:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "Too many open files; raise the limit of open files (ulimit -n 4096)" in str(faults.explain(caught.value))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_an_error_without_a_name_gets_that_of_the_file(tmp_path: Path, code: int):
    def refuse(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    line = line_of(lambda: files.atomic_write(tmp_path / "a", refuse))
    assert line.startswith(f"{tmp_path}/a: {os.strerror(code)}; ")


def test_an_error_of_another_file_keeps_its_name(tmp_path: Path):
    line = line_of(lambda: files.atomic_write(tmp_path / "a", lambda _: (tmp_path / "source").read_bytes()))
    assert line.startswith(f"{tmp_path}/source: No such file or directory")


def test_a_checkpoint_on_a_full_disk_is_told_and_the_former_one_stays(full: Path):
    checkpoints = checkpoint.Checkpoints(full)
    checkpoints.save({"step": 1})
    assert "cannot write the checkpoint (" in line_of(lambda: checkpoints.save({"step": 2, "weights": LARGE}))
    assert checkpoints.load() == {"step": 1}


@pytest.mark.parametrize(
    ("verb", "lower"),
    [
        ("distill", "lower distill.batch or raise distill.accumulate, set distill.checkpointing: full"),
        ("style", "lower style.batch"),
        ("encode", "lower encode.batch"),
        ("evaluate", "lower evaluation.batch"),
        ("reference", "lower evaluation.batch"),
        ("generate", "lower --batch"),
        ("prepare", "this machine has too little memory"),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_to_lower(verb: str, lower: str):
    assert lower in line_of(lambda: torch.empty(1 << 50), verb)
    assert lower in line_of(lambda: np.empty(1 << 50), verb)
    assert lower in line_of(lambda: bytearray(1 << 60), verb)


def test_workers_that_were_ended_are_probably_out_of_memory():
    def work() -> None:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            pool.submit(signal.raise_signal, signal.SIGKILL).result()

    assert line_of(work, "prepare").startswith("prepare: a process that worked for it was ended, probably for lack of")


def test_too_little_memory_of_a_gpu_is_told_apart():
    def allocate() -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.50 GiB of which 1.2 GiB\n"
            "is free. See documentation for Memory Management"
        )

    line = line_of(allocate, "distill")
    assert line.startswith("distill: the GPU has too little memory (tried to allocate 2.00 gib); lower distill.batch")


def test_a_copy_on_a_full_disk_names_where_it_was_to_go(full: Path, tmp_path: Path):
    (tmp_path / "source" / "b").mkdir(parents=True)
    (tmp_path / "source" / "b" / "c").write_bytes(bytes(4 << 20))

    def copy_all() -> None:
        with files.atomic_folder(full / "out") as part:
            shutil.copytree(tmp_path / "source", part / "a")

    one = line_of(lambda: files.atomic_write(full / "c", lambda path: shutil.copyfile(tmp_path / "source/b/c", path)))
    assert one.startswith(f"{full}/c: No space left on device; free some")
    assert line_of(copy_all).startswith(f"{full}/out: No space left on device; free some")
    assert not list(full.iterdir())


def test_the_machines_temporary_files_are_named(full: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(full))

    def fill() -> None:
        with files.temporary_folder() as folder:
            (folder / "a").write_bytes(bytes(4 << 20))

    assert line_of(fill).startswith(f"{full}/lcmlora-")
    assert not list(full.iterdir())


def test_a_database_on_a_full_disk(full: Path):
    assert line_of(lambda: _database(full / "a.db")) == "database or disk is full; free some, or work on another disk"


def test_other_errors_keep_their_traceback_and_lose_secrets(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught, reporting_errors():
        raise ValueError("a fault of ours, at http://me:sesame@h/x")
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and "ValueError: a fault of ours" in told and "sesame" not in told


def test_a_stage_that_the_kernel_killed_is_told_as_probably_out_of_memory():
    killed = "ERROR: failed to reproduce 'distill@emoji': failed to run: lcmlora distill emoji, exited with 137"
    for line in (killed, killed.replace("137", "-9")):
        told = reason([line, "> step 7"], 255)
        assert "probably for lack of memory" in told and told.endswith("distill.precision: bf16 in params.yaml")
    assert "was ended by SIGKILL, probably for lack of memory" in reason(["> step"], 137)
    assert "lack of memory" not in reason([killed.replace("137", "1"), "> step 7"], 255)


def test_the_command_line_tells_a_full_disk_in_one_line(full: Path):
    (full / "params.yaml").write_text((Path(__file__).parents[2] / "params.yaml").read_text())
    (full / "filler").write_bytes(bytes(900_000))
    ended = subprocess.run(
        [sys.executable, "-m", "lcmlora", "data", "preview", "."], cwd=full, capture_output=True, text=True
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr


def test_what_caused_an_error_is_told_last_and_a_long_one_keeps_its_end():
    cause = OSError("[Errno 111] Connection refused")
    outer = ValueError("Could not connect to the store")
    outer.__cause__ = cause
    assert faults.chain(outer) == "Could not connect to the store: [Errno 111] Connection refused"
    same = ValueError("Could not connect: [Errno 111] Connection refused")
    same.__cause__ = cause
    assert faults.chain(same) == str(same)
    long = ValueError(f"Max retries exceeded with url: /{'a' * 900} (Caused by [Errno 113] No route to host)")
    assert faults.chain(long).endswith("No route to host)") and len(faults.chain(long)) <= 600
    silent = RuntimeError()
    silent.__context__ = KeyError("step")
    assert faults.chain(silent) == "'step'"
    assert faults.chain(KeyboardInterrupt()) == "KeyboardInterrupt"
