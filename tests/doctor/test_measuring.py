import json
from pathlib import Path

import pytest
import torch

from lcmlora import patches
from lcmlora.config import Base, Launch
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.distill import distill_adapter
from lcmlora.distillation.loss import Distillation
from lcmlora.doctor import measuring
from lcmlora.doctor.measuring import Trial
from lcmlora.errors import UserError
from lcmlora.training.loop import NullLogger
from tests.support.distillation import SETTINGS, load_parts
from tests.support.miniature import RESOLUTION


def _estimate(base_folder: Path, cache: LatentCache, scratch: Path, processes: int = 1, **changes: object):
    base = load_parts(base_folder, "network", "vae")
    settings = SETTINGS.model_copy(update=changes)
    return base, measuring.estimate_run(base, cache, settings, Launch(processes=processes), scratch)


def test_the_figures_are_those_of_the_run_that_follows(base_folder: Path, cache: LatentCache, tmp_path: Path):
    base, found = _estimate(base_folder, cache, tmp_path)
    assert (found.pictures, found.validation_pictures, found.captions) == (8, 1, 9)
    assert found.epochs == pytest.approx(SETTINGS.steps * SETTINGS.batch / 8)
    (trial,) = found.trials
    assert (trial.accumulate, trial.checkpointing) == (1, "none") and trial.seconds and trial.peak
    assert found.images_per_second == pytest.approx(SETTINGS.batch / trial.seconds)
    assert found.total == pytest.approx(6 * trial.seconds + found.targets_seconds + 2 * found.validation)
    adapter = sum(p.numel() for p in base.network.parameters() if p.requires_grad)
    assert found.checkpoint_bytes == 5 * 4 * adapter
    assert found.patches == [str(each) for each in patches.installed(base.network)]
    assert [patch.partition(":")[0] for patch in found.patches] == ["direct attention", "LoRA forwards"]
    assert json.loads(found.to_json())["device"].startswith("cpu")


def test_a_checkpoint_has_the_estimated_size(base_folder: Path, cache: LatentCache, tmp_path: Path):
    _, found = _estimate(base_folder, cache, tmp_path)
    distill_adapter(load_parts(base_folder, "network"), cache, SETTINGS, tmp_path, tmp_path / "out", identity={},
            logger=NullLogger())  # fmt: skip
    size = (tmp_path / "checkpoint.pt").stat().st_size
    assert (
        found.checkpoint_bytes <= size < 1.2 * found.checkpoint_bytes + 20_000
    )  # plus the alignment of the views and a header


def test_each_of_many_processes_takes_its_share_of_a_step(base_folder: Path, cache: LatentCache, tmp_path: Path):
    _, found = _estimate(base_folder, cache, tmp_path, processes=2)
    assert found.images_per_second == pytest.approx(SETTINGS.batch / found.trials[0].seconds)


def test_too_few_pictures_and_too_small_a_disk_are_errors(
    base_folder: Path, cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=r"distill\.batch: 12 is more than the 8 pictures"):
        _estimate(base_folder, cache, tmp_path, batch=12)
    usage = measuring.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(measuring.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"a checkpoint takes \d+ MB, and the next one is written beside it"):
        _estimate(base_folder, cache, tmp_path)


def test_settings_that_fit_are_named_if_the_chosen_ones_do_not(
    base_folder: Path, cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A forward of more than two pictures raises what a GPU without memory raises."""
    losses = Distillation.losses

    def short_of_memory(self: Distillation, batch, optimization=None):
        if len(batch.z) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return losses(self, batch, optimization)

    monkeypatch.setattr(Distillation, "losses", short_of_memory)
    with pytest.raises(UserError, match=r"4 pictures at a time do not fit cpu.*; "
                       r"distill\.accumulate: 2 with distill\.checkpointing: none does"):  # fmt: skip
        _estimate(base_folder, cache, tmp_path)


@pytest.mark.parametrize(
    ("accumulate", "checkpointing", "fits", "expected"),
    [
        (1, "none", False, [(1, "selective"), (1, "full"), (2, "none"), (2, "selective"), (2, "full"),
                            (4, "none"), (4, "selective"), (4, "full")]),
        (2, "selective", True, [(1, "none"), (1, "selective"), (2, "none")]),
        (2, "full", False, [(4, "full")]),
    ],
)  # fmt: skip
def test_other_settings_are_tried_from_the_fastest_on(accumulate: int, checkpointing: str, fits: bool, expected: list):
    settings = SETTINGS.model_copy(update={"accumulate": accumulate, "checkpointing": checkpointing})
    others = list(measuring._others(settings, fits=fits))
    assert others == [Trial(*pair) for pair in expected]


def test_without_a_cache_the_steps_are_measured_on_random_latents(base_folder: Path, tmp_path: Path):
    settings = SETTINGS.model_copy(update={"device": "cpu"})
    entry = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
    for name in ("scratch", "work"):
        (tmp_path / name).mkdir()
    found = measuring.estimate_without_cache(
        "mini", entry, base_folder, settings, Launch(), tmp_path / "scratch", tmp_path / "work"
    )
    assert found.random_latents and json.loads(found.to_json())["random_latents"]
    assert (found.pictures, found.validation_pictures) == (9, 1)  # of 10: a tenth is kept from training
    assert found.trials[0].seconds and found.images_per_second > 0 and found.total > 0
