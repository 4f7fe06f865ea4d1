"""Encoding that is killed, that meets a full disk, and that meets pictures it cannot use."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lcmlora.config import Data, Encode
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.sources.source import fit, open_picture, write_records
from lcmlora.errors import UserError
from lcmlora.io.files import locked
from tests.data.conftest import data_in
from tests.support.latents import LARGE, Load, count_batches, records, run, tree


def test_a_killed_run_encodes_no_finished_shard_again(load_base: Load, listed: Data, tmp_path: Path) -> None:
    undisturbed = run(load_base(LARGE), listed, tmp_path, out="undisturbed")
    base = load_base(LARGE)
    count_batches(base, fail_after=5)  # of the eight: three make a shard
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    assert not (tmp_path / "latents").exists()
    (files,) = (tmp_path / "scratch").glob("*/files")
    (files / ".shard-00001.safetensors.1.part").write_bytes(b"what a kill leaves half written")
    base = load_base(LARGE)
    sizes = count_batches(base)
    assert tree(run(base, listed, tmp_path)) == tree(undisturbed)
    assert sizes == [5] * 5


def test_a_finished_shard_that_was_damaged_is_encoded_again(load_base: Load, listed: Data, tmp_path: Path) -> None:
    undisturbed = run(load_base(LARGE), listed, tmp_path, out="undisturbed")
    base = load_base(LARGE)
    count_batches(base, fail_after=6)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    (shard,) = (tmp_path / "scratch").rglob("shard-00000.safetensors")
    with shard.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\xff")
    base = load_base(LARGE)
    sizes = count_batches(base)
    assert tree(run(base, listed, tmp_path)) == tree(undisturbed)
    assert sizes == [5] * 5


def test_other_settings_do_not_reuse_unfinished_work(load_base: Load, listed: Data, tmp_path: Path) -> None:
    base = load_base(LARGE)
    count_batches(base, fail_after=6)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    base = load_base(LARGE)
    sizes = count_batches(base)
    run(base, listed, tmp_path, Encode(batch=8, shard_mb=1))
    assert sum(sizes) == 40


def test_a_second_run_on_the_same_work_is_refused(load_base: Load, listed: Data, tmp_path: Path) -> None:
    base = load_base(LARGE)
    count_batches(base, fail_after=1)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    (work,) = (tmp_path / "scratch").iterdir()
    with locked(work), pytest.raises(UserError, match="another run"):
        run(base, listed, tmp_path)


def test_a_latent_that_is_not_finite_is_refused_by_the_name_of_its_picture(
    load_base: Load, listed: Data, tmp_path: Path
) -> None:
    base = load_base(16)
    real = base.encode_pictures
    twelfth = records(tmp_path)[12]
    broken = torch.from_numpy(np.asarray(fit(open_picture(listed, twelfth), 16)[0]).copy()).permute(2, 0, 1)

    def overflowing(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = real(pictures)
        mean[(pictures == broken / 127.5 - 1).flatten(1).all(1)] *= 1e9  # finite, but not in fp16
        return mean, logvar

    base.encode_pictures = overflowing  # type: ignore[method-assign]
    with pytest.raises(UserError, match=rf"^{twelfth.key}: its latent is not finite"):
        run(base, listed, tmp_path)
    assert not (tmp_path / "latents").exists()


def test_a_text_encoder_that_gives_nan_is_refused(load_base: Load, listed: Data, tmp_path: Path) -> None:
    base = load_base(16)
    base.text_encoders[0].get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"encoder_hidden_states of caption 'subject 0' is not finite"):
        run(base, listed, tmp_path)


def test_a_disk_that_fills_up_is_one_line_and_the_finished_shards_stay(
    load_base: Load, listed: Data, tmp_path: Path
) -> None:
    base = load_base(LARGE)
    count_batches(base, fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    real = os.fsync
    with pytest.MonkeyPatch.context() as patch:  # where a disk that has promised room says that there is none

        def full(descriptor: int) -> None:
            if "shard-00001" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        patch.setattr(os, "fsync", full)
        message = r"shard-00001\.safetensors: no disk space: the latent cache needs \d+ bytes more"
        with pytest.raises(UserError, match=message) as error:
            run(load_base(LARGE), listed, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "latents").exists()
    base = load_base(LARGE)
    sizes = count_batches(base)
    assert len(LatentCache(run(base, listed, tmp_path))) == 40
    assert sizes == [5] * 5


def test_too_small_a_disk_is_refused_before_anything_is_encoded(
    load_base: Load, listed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    base = load_base(LARGE)
    sizes = count_batches(base)
    needed = 40 * (2 * 2 * 4 * 64 * 64 + 36) + 9 * 24 * 16 * 4
    with pytest.raises(UserError, match=rf"needs {needed} bytes more in .*scratch and 1000000 are free"):
        run(base, listed, tmp_path)
    assert sizes == []


def test_no_list_or_an_empty_one_is_an_error_that_says_what_to_run(load_base: Load, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lcmlora prepare"):
        run(load_base(16), data_in(tmp_path), tmp_path)
    write_records(tmp_path / "pictures" / "train.jsonl", [])
    with pytest.raises(UserError, match="lists no pictures"):
        run(load_base(16), data_in(tmp_path), tmp_path)
