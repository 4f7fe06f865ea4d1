"""What lies beside an adapter's weights: the names of these files, its sampler settings, and the base it is for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lcmlora.errors import UserError
from lcmlora.io.documents import Document, Number
from lcmlora.io.parsing import JsonObject

WEIGHTS = "pytorch_lora_weights.safetensors"
SCHEDULER = "scheduler_config.json"
FACTS = "config.json"  # what distill and combine say of an adapter


@dataclass(frozen=True)
class Sampler:
    """The sampler settings of a student; lcmlora/diffusion/samplers.py has the steps.

    scheduler: of diffusers, which draws the same.
    gamma: how far a step goes below the next timestep before noise takes it back up, as a share; TCDScheduler's `eta`.
    grid: of how many timesteps its steps are taken; `original_inference_steps` of the scheduler.
    """

    scheduler: str = "LCMScheduler"
    gamma: float | None = None
    grid: int = 50


LATENT_CONSISTENCY = Sampler()  # for an adapter without sampler settings of its own


@dataclass(frozen=True)
class AdapterFacts:
    """What is known of an adapter by the files beside it; None where nothing is."""

    model: str | None = None
    base: dict[str, str | None] | None = None  # source, revision and digest of the base that it was made for
    resolution: int | None = None  # pixels
    sampler: Sampler | None = None
    kohya: str | None = None  # the name of the release's file for ComfyUI and A1111


def read_sampler(settings: JsonObject, place: str) -> Sampler:
    """Returns the sampler that a file describes; what older files lack is as it was then.

    Args:
        place: of the description, for messages.

    Raises:
        UserError: it describes none, or one of a newer lcmlora.
    """
    given = {field.name: settings.get(field.name, field.default) for field in fields(Sampler)}
    scheduler, gamma, grid = given.values()
    if unknown := settings.keys() - given.keys():
        raise UserError(f"{place}: does not know {ascii(min(unknown))[:80]}, which a newer lcmlora may have written")
    if not isinstance(scheduler, str):
        raise UserError(f"{place}: scheduler: expected a name, got {ascii(scheduler)[:80]}")
    if gamma is not None and not (type(gamma) in (int, float) and 0 <= gamma <= 1):
        raise UserError(f"{place}: gamma: expected 0 to 1, got {ascii(gamma)[:80]}")
    if type(grid) is not int or not 1 <= grid <= 1000:
        raise UserError(f"{place}: expected 1 to 1000 timesteps, got {ascii(grid)[:80]}")
    return Sampler(scheduler, gamma, grid)


class SamplerFacts(Document):
    """The sampler settings of the student, as files have them."""

    scheduler: str
    gamma: Number | None
    grid: int


class Validated(Document):
    """The loss on pictures kept from training."""

    pictures: int
    loss: dict[str, Number]  # by step
    best_step: int  # whose weights these are


class Distilled(Document):
    """config.json of a distilled adapter."""

    model: str
    base: dict[str, str | None]
    prediction_type: str = "epsilon"
    data_digest: str
    pictures: int | None = None
    distill: JsonObject  # the settings
    steps: int
    final_loss: Number
    sampler: SamplerFacts
    seed: int
    adapted_layers: int
    lora_parameters: int
    versions: dict[str, str]
    validation: Validated


class Tuned(Document):
    """config.json of a style LoRA or a fine-tuned checkpoint."""

    model: str
    base: dict[str, str | None]
    data_digest: str
    pictures: int
    training: JsonObject  # the settings
    parameters: int  # that were trained
    final_loss: Number
    validation: Validated


class CombinedPart(Document):
    """One of the adapters of a combination."""

    adapter: str  # as the person named it
    sha256: str
    weight: Number


class Truncation(Document):
    """What a smaller rank lost: relative Frobenius norms of the difference in effective weight."""

    rank: int
    overall: Number  # of all layers together
    worst: Number  # of the layer that lost most
    worst_layer: str


class Combined(Document):
    """config.json of adapters that were combined into one."""

    combined: list[CombinedPart]
    layers: int
    rank: int  # the largest of a layer
    truncation: Truncation | None
    error: Number | None = None  # largest difference of an effective weight, by rounding
    # Of the acceleration adapter, if its own files say them:
    model: str | None = None
    base: dict[str, str | None] | None = None
    resolution: int | None = None
    sampler: SamplerFacts | None = None
