from pathlib import Path

import torch

from benchmarks.reference import Reference
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.loss import Distillation, add_adapter, sample_stream
from lcmlora.training.loop import take_step
from tests.support.distillation import CPU, SETTINGS, load_parts


def test_both_compute_the_same_losses_from_the_same_samples(base_folder: Path, cache: LatentCache):
    settings = SETTINGS.model_copy(update={"cooldown": 0.0, "lr": 1e-3})
    batches = sample_stream(cache, torch.arange(len(cache)), settings, CPU)
    reference = Reference(
        load_parts(base_folder, "network"), load_parts(base_folder, "network"), settings, torch.float32
    )
    base = load_parts(base_folder, "network")
    optimization = add_adapter(base, settings)
    distillation = Distillation(base, cache.unconditional(), settings)
    for step in range(5):
        of_recipe = reference.step(batches.draw(step), cache.unconditional())
        losses, _ = take_step(distillation, optimization, batches, settings, step)
        torch.testing.assert_close(losses[0], of_recipe, rtol=1e-3, atol=1e-6)
    first = reference.step(batches.draw(0), cache.unconditional())
    assert not torch.allclose(first, losses[0], rtol=0.1)  # the losses of other samples differ


def test_the_recipe_encodes_pictures_and_captions_in_every_step(base_folder: Path, cache: LatentCache):
    base = load_parts(base_folder, "network", "vae", "text")
    batch = sample_stream(cache, torch.arange(len(cache)), SETTINGS, CPU).draw(0)
    reference = Reference(base, load_parts(base_folder, "network"), SETTINGS, torch.float32)
    pictures = torch.rand(SETTINGS.batch, 3, 16, 16).mul(2).sub(1)
    encoded = reference.encode(batch, pictures, ["red apple"] * SETTINGS.batch)
    assert encoded.z.shape == batch.z.shape
    assert encoded.conditioning.keys() == batch.conditioning.keys()
    assert not torch.equal(encoded.z, batch.z)
