"""The files beside an adapter's weights: their names, and the sampler settings and facts in them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lcmlora.errors import UserError
from lcmlora.io.documents import Document, Number
from lcmlora.io.parsing import JsonObject

WEIGHTS = "pytorch_lora_weights.safetensors"
SCHEDULER = "scheduler_config.json"
FACTS = "config.json"  # written by distill and combine


@dataclass(frozen=True)
class Sampler:
    """The sampler settings of a student; lcmlora/diffusion/samplers.py has the steps.

    scheduler: the scheduler of diffusers that takes the same steps.
    gamma: how far a step goes below the next timestep before noise is added, as a share; `eta` of TCDScheduler.
    grid: the number of timesteps that the steps are chosen from; `original_inference_steps` of the scheduler.
    """

    scheduler: str = "LCMScheduler"
    gamma: float | None = None
    grid: int = 50


LATENT_CONSISTENCY = Sampler()  # for an adapter without sampler settings of its own


USUAL_STEPS = 4  # with which an adapter draws of which nothing else is known


@dataclass(frozen=True)
class AdapterFacts:
    """The facts in the files beside an adapter; None if they are unknown."""

    model: str | None = None
    base: dict[str, str | None] | None = None  # the identity of the base that it was made for
    resolution: int | None = None  # the pictures' side, in pixels
    sampler: Sampler | None = None
    kohya: str | None = None  # the name of the release's file for ComfyUI and A1111
    recommended_steps: int | None = None  # the fewest with which a release's student is within its gate


def read_sampler(settings: JsonObject, place: str) -> Sampler:
    """Returns the sampler settings in a file. Keys that older files lack have the values of that time.

    Args:
        place: the file and key, for errors.

    Raises:
        UserError: a value is out of range, or a key unknown, as in files of a newer lcmlora.
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
    """The sampler settings of the student in a file, see `Sampler`."""

    scheduler: str
    gamma: Number | None
    grid: int


class Validated(Document):
    """The loss on pictures that were not trained on."""

    pictures: int
    loss: dict[str, Number]  # by step
    best_step: int  # the step with the lowest loss, whose weights the adapter has


class DistillSettings(Document):
    """The settings of a distillation. Those that are read again have a field; the others are kept."""

    objective: str = "lcm"
    alpha: Number | None = None
    gamma: Number | None = None


class Polished(Document):
    """What a polish made of a distilled adapter."""

    of: str  # SHA-256 of the distilled adapter's weights
    steps: int
    final_loss: Number
    distances: dict[str, Number]  # of pictures of validation captions from the teacher's, by step
    best_step: int  # the step with the lowest distance, whose weights the adapter has


class Distilled(Document):
    """config.json of a distilled adapter."""

    model: str
    base: dict[str, str | None]
    prediction_type: str = "epsilon"
    data_digest: str
    pictures: int | None = None
    distill: DistillSettings
    steps: int
    final_loss: Number
    sampler: SamplerFacts
    seed: int
    adapted_layers: int
    lora_parameters: int
    versions: dict[str, str]
    validation: Validated
    polish: Polished | None = None


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
    """The error of an adapter of smaller rank: relative Frobenius norms of the difference in effective weight."""

    rank: int
    overall: Number  # of all layers together
    worst: Number  # of the layer with the largest error
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
