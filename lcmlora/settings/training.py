"""Settings of training: `distill`, `style`, `finetune` and `launch`.

Their defaults are the papers' and the published example's. What depends on the size of a base comes from its family
(lcmlora/settings/presets.yaml).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lcmlora.errors import UserError
from lcmlora.plugins import OBJECTIVES
from lcmlora.settings.data import Rollouts
from lcmlora.settings.fields import Device, OneOf, Positive, Seed, Share, Strict


class Training(Strict):
    """A run of the training loop."""

    seed: Seed = 0
    """Seed of initial weights, noise, timesteps and the order of pictures."""
    steps: Positive
    """Optimizer steps."""
    batch: Positive
    """Pictures in a step, over all processes."""
    accumulate: Positive = 1
    """Forward passes into which each process divides its pictures of a step. Must divide `batch`."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    warmup: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises from zero."""
    cooldown: Share = 0.5
    """Last share of the steps, over which the learning rate falls linearly to zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the optimizer."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm to which gradients are clipped."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedule-free"] = "adamw"
    """Optimizer. `schedule-free` needs cooldown 0."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moving average of the weights. The average is what is validated and saved."""
    empty_prompts: Share = 0.0
    """Share of the samples that are given the unconditional embedding instead of their caption."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen base. auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Recompute activations in the backward pass, to save memory. auto: selective on a GPU, none on a CPU."""
    compile: bool = False
    """Compile the network by torch.compile."""
    device: Device = "auto"
    """auto: the GPU where there is one."""
    checkpoint_every: Positive
    """Steps between two checkpoints, from which a killed run continues."""
    log_every: Positive = 10
    """Steps between two entries of the loss in MLflow."""
    validate_every: Positive
    """Steps between two validations."""
    validation_pictures: Positive
    """Pictures for validation, kept from training by caption. At most a tenth of the cache."""
    window: Positive = 1 << 18
    """Pictures that are shuffled with each other. A larger data set is read window by window."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.window < self.batch:
            raise ValueError(f"window {self.window} is less than batch {self.batch}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch {self.batch}")
        if self.optimizer == "schedule-free" and self.cooldown:
            raise ValueError(f"cooldown must be 0 with optimizer schedule-free, got {self.cooldown}")
        return self


class Polish(Strict):
    """Distribution matching after the distillation (stage `polish`)."""

    steps: Positive = 300
    """Optimizer steps of the student."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of the student."""
    fake_lr: Annotated[float, Field(gt=0)] = 2e-4
    """Learning rate of the fake score, the diffusion model of the student's pictures."""
    fake_updates: Positive = 2
    """Steps of the fake score before each step of the student."""
    head_start: Annotated[int, Field(ge=0)] = 20
    """More steps of the fake score, before the student's first."""
    w: Annotated[float, Field(ge=0)] = 1.0
    """Guidance weight of the teacher in the papers' convention, c + w (c - u). The higher it is, the more alike are the
    pictures of one caption."""
    consistency: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the loss of the distillation beside distribution matching. 0: distribution matching alone."""
    student_steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4)
    """Numbers of steps with which the student draws its pictures, in turns at random."""
    anchor: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss that keeps the student's first step on the teacher's path from the same noise, for diversity
    (arXiv 2602.03139, whose weight is 0.05). 0: none."""
    anchor_steps: Positive = 4
    """Steps of the teacher, from noise on `distill.grid`, to whose end the anchor leads."""

    def most_steps(self) -> int:
        """Returns the most steps that student or teacher take on `distill.grid`."""
        return max(*self.student_steps, self.anchor_steps if self.anchor else 1)


class Distill(Training):
    """Distillation of the adapter (stage `distill`).

    An objective of another package may bring settings of its own: it names a subclass of this (`settings_class`).
    """

    steps: Positive = 1000
    """Optimizer steps. Source: LCM-LoRA in diffusers, examples/consistency_distillation/README_sdxl.md."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate. Source: LCM-LoRA in diffusers, examples/consistency_distillation/README_sdxl.md."""
    checkpoint_every: Positive = 200
    """Steps between two checkpoints, from which a killed run continues. Source: LCM-LoRA in diffusers,
    examples/consistency_distillation/README_sdxl.md."""
    validate_every: Positive = 100
    """Steps between two validations."""
    validation_pictures: Positive = 16
    """Pictures for validation, kept from training by caption. At most a tenth of the cache."""
    objective: Annotated[str, OneOf(OBJECTIVES)] = "lcm"
    """Distillation objective. docs/objectives.md compares them."""
    phases: Positive = 4
    """pcm: phases into which the timesteps are divided, which are also the steps that the student is trained for."""
    gamma: Share = 0.3
    """tcd, tdd: how far a sampling step goes below the next timestep before noise takes it back up."""
    target: Literal["stop-gradient", "ema"] = "stop-gradient"
    """Weights that the target is computed with: the student's own without gradient, or their moving average."""
    rank: Positive = 64
    """Rank of the LoRA. Source: arXiv 2311.05556."""
    alpha: Annotated[float, Field(gt=0)] = 64
    """Scale of the LoRA: its product is multiplied by alpha / rank. Source: arXiv 2311.05556."""
    w_min: Annotated[float, Field(ge=0)] = 7.5
    """Lowest guidance weight of the teacher in the papers' convention, c + w (c - u). A pipeline's guidance_scale is
    w + 1. Source of 7.5: arXiv 2311.05556."""
    w_max: Annotated[float, Field(ge=0)] = 7.5
    """Highest guidance weight of the teacher. Each sample's w is drawn between w_min and w_max."""
    grid: Positive = 50
    """Solver timesteps: N of Algorithm 1 in arXiv 2310.04378, whose number 50 is. With fewer a short run reaches far
    steps sooner."""
    huber_c: Annotated[float, Field(gt=0)] = 0.001
    """c of the pseudo-Huber loss, mean(sqrt(d^2 + c^2) - c)."""
    weighting: Literal["uniform", "snr+1"] = "uniform"
    """Weight of a sample's loss by its timestep. Uniform is the paper's (arXiv 2310.04378). snr+1 is for short
    runs."""
    trajectory: Share = 0.0
    """Share of the steps that begin at states of teacher rollouts, for which the teacher need not be run. Needs
    data.source prompts and encode.rollouts.states."""
    rollout: Share = 0.0
    """Share of the steps that begin at states of student rollouts: where the student's own first one or two steps
    lead."""
    polish: Annotated[Polish | None, Field(exclude_if=lambda polish: polish is None)] = None
    """Distribution matching after the distillation (stage `polish`). null: none."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.trajectory + self.rollout > 1:
            raise ValueError(f"trajectory {self.trajectory} and rollout {self.rollout} are shares and add up to over 1")
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is above w_max {self.w_max}")
        if self.phases > self.grid:
            raise ValueError(f"phases {self.phases} is more than the {self.grid} timesteps of grid")
        if self.polish is not None and (most := self.polish.most_steps()) > self.grid:
            raise ValueError(f"polish: {most} steps are more than the {self.grid} timesteps of grid")
        return self

    def alone(self) -> Self:
        """Returns the settings of the distillation without those of the polish after it."""
        return self.model_copy(update={"polish": None})

    @classmethod
    def own_keys(cls) -> list[str]:
        """Returns the settings that the objective brings."""
        return [key for key in cls.model_fields if key not in Distill.model_fields]

    @classmethod
    def advice_on_keys(cls, values: Mapping[str, Any]) -> str:
        if all(map(OBJECTIVES.is_built_in, OBJECTIVES.names)):
            return ""
        objective = values.get("objective", cls.model_fields["objective"].default)
        return f"; of its own, objective {objective} has {', '.join(cls.own_keys()) or 'no settings'}"


def distill_settings(objective: object) -> type[Distill]:
    """Returns the class of `distill` for an objective: the one that its class names as `settings_class`.

    The objectives of this package have their settings in Distill, and are not imported for this: they need torch.

    Args:
        objective: as it stands in params.yaml. What is no name gets Distill, which refuses it.

    Raises:
        UserError: another package's objective cannot be imported, or its settings are no subclass of Distill.
    """
    if not isinstance(objective, str) or OBJECTIVES.is_built_in(objective) or objective not in OBJECTIVES.names:
        return Distill
    found = OBJECTIVES.get(objective).settings_class
    if not (isinstance(found, type) and issubclass(found, Distill)):
        raise UserError(
            f"{OBJECTIVES.key}: {objective}: its settings_class is {found!r}, expected a subclass of "
            "lcmlora.config.Distill"
        )
    return found


def extended_distill_settings() -> dict[str, type[Distill]]:
    """Returns the class of `distill` for each objective that brings settings of its own. Raises UserError as above."""
    found = {name: distill_settings(name) for name in OBJECTIVES.names}
    return {name: cls for name, cls in found.items() if cls.own_keys()}


class Tuning(Training):
    """A style LoRA (`style`) or a fine-tuned checkpoint (`finetune`), trained by the ordinary diffusion loss."""

    steps: Positive = 400
    """Optimizer steps."""
    batch: Positive = 16
    """Pictures in a step, over all processes."""
    empty_prompts: Share = 0.1
    """Share of the samples that are given the unconditional embedding instead of their caption, so that guidance goes
    on working."""
    checkpoint_every: Positive = 50
    """Steps between two checkpoints, from which a killed run continues."""
    validate_every: Positive = 50
    """Steps between two validations."""
    validation_pictures: Positive = 32
    """Pictures for validation, kept from training by caption. At most a tenth of the cache."""
    rank: Positive | None = None
    """Rank of a style LoRA. A fine-tuned checkpoint has none."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of a style LoRA: its product is multiplied by alpha / rank. null: the rank."""


class StyleTraining(Tuning):
    """Training of style LoRAs, to which acceleration is added (stage `style`)."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    rank: Positive | None = 16
    """Rank of the LoRA."""

    @model_validator(mode="after")
    def _is_a_lora(self) -> Self:
        if self.rank is None:
            raise ValueError("rank: a style is a LoRA and needs a rank; a whole checkpoint is made by finetune")
        return self


class FinetuneTraining(Tuning):
    """Training of whole checkpoints (stage `finetune`)."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of the optimizer."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Precision of the weights that are trained."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.rank is not None:
            raise ValueError("rank: a whole checkpoint has no rank; a LoRA is made by style")
        return self


class Launch(Strict):
    """On how many processes and machines the stages run. Results do not depend on it, but for rounding.

    `prepare`, `encode`, `reference` and `evaluate` deal their work to workers as these become free; `distill` divides
    each step among its processes.
    """

    processes: Positive = 1
    """Processes on each machine, one for each GPU."""
    engine: Literal["local", "ray"] = "local"
    """Where the workers run: local, as `processes` of this machine; ray, on all nodes of a Ray cluster, one for each
    GPU, or `processes` on a node without any. `distill` does not use it."""
    address: str | None = None
    """ray: host:port of the cluster, which `ray start` prints. null: a Ray of this machine alone, for one stage."""
    machines: Positive = 1
    """distill: machines. Each runs the same command on the same files."""
    rendezvous: str | None = None
    """distill: host:port on one of several machines, which all of them reach."""

    @property
    def alone(self) -> bool:
        """Whether there are no workers, but one process that does everything."""
        return self.engine == "local" and self.processes == 1

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.machines > 1 and not self.rendezvous:
            raise ValueError(f"rendezvous (host:port) is needed for {self.machines} machines")
        if self.address is not None and self.engine != "ray":
            raise ValueError(f"address is for engine ray, and engine is {self.engine}")
        if self.address is not None and "://" in self.address:
            raise ValueError(f"address: expected host:port, got {self.address!r}")
        return self


def check_trajectory(settings: Distill, rollouts: Rollouts | None, where: str = "") -> None:
    """Raises UserError where a distillation on the teacher's trajectories does not go with the teacher's rollouts.

    Args:
        rollouts: how they were made; None where the data are pictures.
        where: what the message begins with.
    """
    if not settings.trajectory:
        return
    if rollouts is None or not rollouts.states:
        raise UserError(
            f"{where}distill.trajectory: {settings.trajectory:g} needs data.source: prompts, and "
            "encode.rollouts.states: true"
        )
    if rollouts.steps != settings.grid:
        raise UserError(
            f"{where}encode.rollouts.steps: {rollouts.steps} is not distill.grid, {settings.grid}, whose steps count"
        )
    if not settings.w_min <= rollouts.w <= settings.w_max:
        raise UserError(
            f"{where}encode.rollouts.w: {rollouts.w:g} is not within distill.w_min {settings.w_min:g} and w_max "
            f"{settings.w_max:g}"
        )
