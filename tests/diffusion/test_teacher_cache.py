import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcmlora import bases
from lcmlora.config import Distill
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion.teacher_cache import TeacherCache
from lcmlora.distillation.distill import distill_adapter
from lcmlora.training.loop import NullLogger
from tests.support.distillation import SETTINGS

SHAPE = (4, 8, 8)


class Losses(NullLogger):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.losses.append(metrics.get("loss", metrics.get("validation_loss", 0.0)))


@pytest.fixture
def run(base_folder: Path, cache: LatentCache, tmp_path: Path) -> Callable[..., tuple[list[float], int]]:
    """Distils the miniature; returns the losses, and the number of rows of the teacher's forwards."""

    def distilled(limit: int = 10**9, settings: Distill = SETTINGS) -> tuple[list[float], int]:
        from tests.support.distillation import load_parts

        base: bases.LoadedBase = load_parts(base_folder, "network")
        rows = 0

        def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal rows
            if len(inputs[0]) == 2 * settings.batch:  # guidance is batched; nothing else has as many rows
                rows += len(inputs[0])

        base.network.register_forward_pre_hook(count)
        losses = Losses()
        (tmp_path / "scratch").mkdir(exist_ok=True)
        distill_adapter(
            base,
            cache,
            settings,
            tmp_path / "scratch",
            tmp_path / "adapter",
            identity={"digest": "0"},
            logger=losses,
            teacher_cache=(tmp_path / "teacher", limit) if limit else None,
        )
        for left in (tmp_path / "scratch").iterdir():
            left.unlink()
        return losses.losses, rows

    return distilled


def adapter(tmp_path: Path) -> bytes:
    return (tmp_path / "adapter/pytorch_lora_weights.safetensors").read_bytes()


def test_a_second_run_needs_no_forward_of_the_teacher_and_ends_with_the_same_bytes(run: Callable, tmp_path: Path):
    without = run(limit=0)
    expected = adapter(tmp_path)
    assert run() == without
    assert adapter(tmp_path) == expected
    losses, rows = run()
    assert (losses, rows) == (without[0], 0)
    assert adapter(tmp_path) == expected


def test_runs_of_other_guidance_rank_rate_and_objective_read_the_same_cache(run: Callable):
    run()
    other = SETTINGS.model_copy(update={"w_min": 1.0, "w_max": 2.0, "rank": 2, "lr": 1e-3, "objective": "tcd"})
    losses, rows = run(settings=other)
    assert rows == 0
    assert losses == run(limit=0, settings=other)[0]
    assert run(settings=SETTINGS.model_copy(update={"seed": 4}))[1] > 0  # other samples


@pytest.mark.slow
def test_samples_beyond_the_limit_are_computed_again(run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture):
    record = TeacherCache(tmp_path / "one", SHAPE, torch.float32, 1, 10**9).record_bytes
    without = run(limit=0)
    run(limit=10 * record)  # of 24 samples, two forwards of four
    assert "teacher cache: 10 of 24 samples are kept, all need teacher_cache_gb: " in capsys.readouterr().err
    losses, rows = run(limit=10 * record)
    assert losses == without[0]
    assert rows == without[1] * 4 // 6


def test_damaged_and_missing_records_are_not_read(tmp_path: Path):
    cache = TeacherCache(tmp_path / "cache", SHAPE, torch.bfloat16, 8, 10**9)
    outputs = torch.randn(2, 3, *SHAPE).bfloat16()
    assert cache.read(range(2, 5)) is None
    cache.write(range(2, 5), *outputs)
    found = cache.read(range(2, 5))
    assert found is not None
    assert torch.equal(torch.stack(found), outputs)
    assert cache.read(range(1, 4)) is None  # the first is a hole in the file
    assert cache.read(range(4, 7)) is None  # the file ends
    assert cache.read(range(-3, 0)) is None
    with (tmp_path / "cache").open("r+b") as file:
        file.seek(4 * cache.record_bytes + 30)
        file.write(b"\xff\x00\xff")
    assert cache.read(range(2, 5)) is None
    assert cache.read(range(2, 4)) is not None


def test_a_run_continues_without_the_cache_if_the_disk_is_full(
    run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    without = run(limit=0)
    monkeypatch.setattr(os, "pwrite", full)
    assert run() == without
    assert capsys.readouterr().err.count("nothing more is kept of the teacher: No space left on device") == 1
