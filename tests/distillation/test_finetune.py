import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.adapters.metadata import Tuned
from lcmlora.bases import folders
from lcmlora.config import Base, Tuning
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.finetune import Denoising, train_variation
from lcmlora.errors import UserError
from lcmlora.training.batches import Batches
from lcmlora.training.loop import NullLogger
from tests.support.distillation import CPU, SETTINGS, load_parts
from tests.support.miniature import RESOLUTION, save_base

COMMON = {name: value for name, value in SETTINGS.model_dump().items() if name in Tuning.model_fields}
STYLE = Tuning.model_validate(COMMON | {"rank": 4, "alpha": None})
WHOLE = Tuning.model_validate(COMMON | {"rank": None, "alpha": None, "lr": 1e-3})


class Recorder(NullLogger):
    def __init__(self) -> None:
        self.validation: list[float] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.validation += [value for name, value in metrics.items() if name == "validation_loss"]


def _train(
    folder: Path, cache: LatentCache, work: Path, settings: Tuning, logger: Any = None, variant: str | None = None
) -> Tuned:
    (work / "scratch").mkdir(parents=True, exist_ok=True)
    base, logger = load_parts(folder, "network", variant=variant), logger or NullLogger()
    scratch, out = work / "scratch", work / "out"
    made = train_variation(base, cache, settings, scratch, out, identity={"digest": "0"}, logger=logger)
    assert made is not None and made == Tuned.read(out / "config.json")
    return made


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_the_bases_own_training(cache: LatentCache, tmp_path: Path, kind: str):
    base = load_parts(save_base(tmp_path / kind, prediction_type=kind), "network")
    batch = Batches(cache, torch.arange(len(cache)), STYLE, CPU, grid=1000).draw(0)
    assert batch.index.max() >= 500  # timesteps, not rows of a coarse grid
    losses = Denoising(base).losses(batch)
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(base.scheduler_config)
    x = scheduler.add_noise(batch.z, batch.noise, batch.index)
    velocity = scheduler.get_velocity(batch.z, batch.noise, batch.index)
    target = {"epsilon": batch.noise, "sample": batch.z, "v_prediction": velocity}[kind]
    with torch.no_grad():
        expected = (base.predict(x, batch.index, batch.conditioning) - target).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [STYLE, WHOLE], ids=["style", "whole"])
def test_the_loss_falls_on_validation_pictures(base_folder: Path, cache: LatentCache, tmp_path: Path, settings: Tuning):
    logger = Recorder()
    longer = settings.model_copy(update={"steps": 60, "batch": 8, "validate_every": 10, "checkpoint_every": 60})
    facts = _train(base_folder, cache, tmp_path, longer, logger)
    assert min(logger.validation) < 0.9 * logger.validation[0]
    assert facts.validation.best_step == 10 * (1 + logger.validation.index(min(logger.validation)))


def test_a_style_is_an_adapter_that_loads(base_folder: Path, cache: LatentCache, tmp_path: Path):
    _train(base_folder, cache, tmp_path, STYLE)
    base = load_parts(base_folder, "network")
    lora.load(base.network, tmp_path / "out" / lora.WEIGHTS)
    assert lora.adapted_layers(base.network) * 2 == len(load_file(tmp_path / "out" / lora.WEIGHTS))


def test_a_whole_checkpoint_is_a_base_of_its_own(base_folder: Path, cache: LatentCache, tmp_path: Path):
    _train(base_folder, cache, tmp_path, WHOLE)
    settings = Base(source=str(tmp_path / "out"), resolution=RESOLUTION, license="apache-2.0")
    tuned = bases.load("tuned", settings, tmp_path / "out", device=CPU)
    before = load_parts(base_folder, "network", "vae", "text")
    assert torch.equal(tuned.encode_text(["tree"])["encoder_hidden_states"],
                       before.encode_text(["tree"])["encoder_hidden_states"])  # fmt: skip
    changed = [
        not torch.equal(a, b) for a, b in zip(tuned.network.parameters(), before.network.parameters(), strict=True)
    ]
    assert all(changed)
    assert folders.identity(settings, tmp_path / "out")["digest"] != folders.identity(settings, base_folder)["digest"]


@pytest.mark.parametrize("settings", [STYLE, WHOLE], ids=["style", "whole"])
def test_killed_and_started_again_it_ends_with_the_same_bytes(
    base_folder: Path, cache: LatentCache, tmp_path: Path, settings: Tuning
):
    class Killed(BaseException):
        pass

    class Killer(NullLogger):
        def log(self, metrics: dict[str, float], step: int) -> None:
            if step == 4:
                raise Killed

    _train(base_folder, cache, tmp_path / "whole", settings)
    with pytest.raises(Killed):
        _train(base_folder, cache, tmp_path / "killed", settings, Killer())
    _train(base_folder, cache, tmp_path / "killed", settings)
    for path in (tmp_path / "whole/out").rglob("*"):
        if path.is_file():
            assert (
                path.read_bytes() == (tmp_path / "killed/out" / path.relative_to(tmp_path / "whole/out")).read_bytes()
            )


def test_a_whole_checkpoint_in_half_precision_and_too_few_pictures_are_refused(
    base_folder: Path, cache: LatentCache, tmp_path: Path
):
    base = load_parts(base_folder, "network")
    base.dtype = torch.bfloat16
    with pytest.raises(UserError, match="a whole checkpoint is trained in fp32"):
        train_variation(base, cache, WHOLE, tmp_path, tmp_path / "out", identity={}, logger=NullLogger())
    with pytest.raises(UserError, match="8 pictures to train on are less than a batch of 64"):
        _train(base_folder, cache, tmp_path, STYLE.model_copy(update={"batch": 64}))


@pytest.mark.slow
def test_a_whole_checkpoint_of_a_base_in_a_variant_is_loaded_in_that_variant(
    base_folder: Path, cache: LatentCache, tmp_path: Path
):
    half = tmp_path / "half"
    shutil.copytree(base_folder, half)
    for path in list(half.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    _train(half, cache, tmp_path, WHOLE, variant="fp16")
    settings = Base(source=str(tmp_path / "out"), resolution=RESOLUTION, license="apache-2.0", variant="fp16")
    bases.load("tuned", settings, tmp_path / "out", device=CPU)
