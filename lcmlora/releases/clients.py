"""What to set in each program to draw with an adapter, and how near that comes to the adapter's own sampler.

The model card, the report page, docs/clients.md and comfyui.json are made of these instructions, so that they cannot
contradict one another. tests/releases/test_clients.py holds the timesteps against each program's own formula.

A program's step is the same as ours if it evaluates the network at the same timesteps and its sampler makes the same
step between them. Programs keep timesteps of their own:

* Those for latent consistency keep 50 of 1000, whatever the adapter was distilled on: 19, 39, ..., 999.
* `simple` takes every (N / steps)-th of N kept timesteps from the noisiest down, as `solver.student_timesteps` does.
* `sgm_uniform` divides the span of timesteps into equal parts, and takes the upper end of each.
* Without a schedule type (A1111's Automatic) both ends of the span are taken: 2 steps are at 999 and 19, and the second
  of them adds next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import NamedTuple

from lcmlora.adapters.metadata import SCHEDULER, Sampler
from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.bases.schedule import Schedule
from lcmlora.config import Base
from lcmlora.diffusion import solver
from lcmlora.errors import UserError
from lcmlora.evaluation.figures import Metrics
from lcmlora.io import faults

_KEPT = 50  # timesteps that programs keep for latent consistency: `original_timesteps` in their code
LATENT_CONSISTENCY = "LCMScheduler"
_ONE_ETA = "with one eta for all steps, each adds a little more or less noise than the adapter's own sampler"


@dataclass(frozen=True)
class Student:
    """An adapter, as far as drawing with it is concerned.

    prediction_type: of the base.
    steps: for which the instructions are.
    ancestral_eta: see `ancestral_eta`; None without noise between the steps.
    """

    sampler: Sampler
    prediction_type: str
    train_timesteps: int
    steps: int
    ancestral_eta: float | None

    @classmethod
    def of(cls, sampler: Sampler, schedule: Schedule, steps: int) -> Student:
        """Returns the adapter with these sampler settings on a base with this schedule."""
        eta = ancestral_eta(sampler, schedule, steps) if sampler.gamma else None
        return cls(sampler, schedule.prediction_type, len(schedule), steps, eta)

    @classmethod
    def of_release(cls, folder: Path, sampler: Sampler, steps: int) -> Student:
        """Returns the adapter in a folder that has its scheduler_config.json, which holds the base's schedule.

        Raises:
            UserError: diffusers has no such scheduler, or the adapter cannot take as many steps.
        """
        import diffusers

        config = LibraryConfig.read(folder / SCHEDULER)
        try:
            scheduler = getattr(diffusers, sampler.scheduler).from_config(config)
            schedule = Schedule.variance_preserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / SCHEDULER}: diffusers cannot load it: {faults.chain(error)}") from error
        if not 1 <= steps <= sampler.grid:
            raise UserError(f"steps: expected 1 to {sampler.grid}, the timesteps of this adapter, got {steps}")
        return cls.of(sampler, schedule, steps)

    @property
    def timesteps(self) -> list[int]:
        """At which the network is evaluated, by our sampler and by the release's scheduler_config.json."""
        return solver.student_timesteps(self.train_timesteps, self.sampler.grid, self.steps)

    @property
    def predicts_v(self) -> bool:
        """Whether the base predicts v; the programs' samplers for latent consistency take it for noise."""
        return self.prediction_type == "v_prediction"


@dataclass(frozen=True)
class Instructions:
    """How to draw with an adapter in one program.

    client: the program, with the add-on that is needed.
    tried: the versions whose code adapters of this package were loaded with.
    folder: where the file goes.
    settings: what to set, a sentence each, in Markdown.
    timesteps: at which the program then evaluates the network; None if that was not looked up.
    deviation: in what the program's steps differ from the adapter's own; None if in nothing.
    """

    client: str
    tried: str
    folder: str
    settings: tuple[str, ...]
    timesteps: list[int] | None
    deviation: str | None


class Note(NamedTuple):
    """How many network evaluations a use besides drawing from noise takes, program by program, in Markdown."""

    title: str
    texts: tuple[str, ...]


def recommended_steps(figures: Metrics, failures: Mapping[int, Sequence[str]]) -> int:
    """Returns the smallest number of steps within the gate. If none is, the smallest that no larger number improves on
    by more than the excess's interval.

    Args:
        failures: why a number of steps is not within the gate, see `gate.by_steps`.
    """
    within = [steps for steps, reasons in failures.items() if not reasons]
    if within:
        return min(within)
    excess, students = figures.excess, figures.students
    low = {key: (figures.interval("excess", key) or (excess[key],))[0] for key in students}
    return next(
        key.steps for key in students if all(excess[more] >= low[key] for more in students if more.steps > key.steps)
    )


def is_on_hub(base: Base) -> bool:
    """Returns whether a base is a model of the hub: `bases/emoji` has a hub id's form, too, but no commit."""
    return base.revision is not None and not base.source.endswith(".safetensors")


def loading_arguments(model: str, base: Base) -> str:
    """Returns the arguments, as code, with which `DiffusionPipeline.from_pretrained` loads a model's base.

    A checkpoint in one file is loaded from the folder that lcmlora makes of it.
    """
    if base.source.endswith(".safetensors"):
        return f'"bases/{model}"'
    named = {"revision": base.revision, "variant": base.variant}
    return ", ".join([f'"{base.source}"', *(f'{name}="{value}"' for name, value in named.items() if value)])


def drawing_arguments(student: Student, side: int | None = None) -> str:
    """Returns the arguments, as code, with which a pipeline of diffusers draws as the student does.

    Args:
        side: of the picture in pixels, if the base's configuration does not say it.
    """
    eta = f", eta={student.sampler.gamma:g}" if student.sampler.gamma else ""
    size = f", height={side}, width={side}" if side else ""
    return f"num_inference_steps={student.steps}, guidance_scale=1.0{eta}{size}"


def diffusers_steps(evaluations: int, strength: float) -> int:
    """Returns the `num_inference_steps` for which diffusers' img2img evaluates the network so often.

    Its pipelines make `int(num_inference_steps * strength)` of the steps (`get_timesteps`).
    """
    return next(steps for steps in count(evaluations) if int(steps * strength) == evaluations)


def notes(steps: int) -> list[Note]:
    """Returns what to mind when drawing starts from a picture, or goes with other add-ons.

    The programs' own rules: diffusers 0.42 (`get_timesteps` of the pipelines), ComfyUI a125cd84 (`KSampler.set_steps`),
    A1111 1.10 (`setup_img2img_steps`) and InvokeAI (`init_scheduler`).
    """
    return [
        Note(
            "img2img and inpainting",
            (
                "`lcmlora generate --image FILE --strength S` and `lcmlora.load_pipeline` evaluate the network as "
                "often as you ask for steps, at every strength, and refuse what would be none.",
                "diffusers evaluates it `int(num_inference_steps * strength)` times: 4 steps at strength 0.2 are none, "
                "and end in noise or an error. Divide the steps by the strength and round up: "
                f"{diffusers_steps(steps, 0.5)} for {steps} at 0.5.",
                "ComfyUI: as often as `steps` says, at every `denoise`.",
                "A1111 and Forge: turn on the setting `With img2img, do exactly the amount of steps the slider "
                "specifies`; without it they take fewer.",
                "InvokeAI leaves out the steps that are noisier than the strength: take steps divided by strength.",
            ),
        ),
        Note(
            "ControlNet and IP-Adapter",
            (
                "Both change no number of steps. A ControlNet is evaluated once more in each. In `lcmlora`, name its "
                "folder: `load_pipeline(..., controlnet=FOLDER)`, and give its picture as `control`.",
                "They act through the base, so their weights are as for the base; negative prompts do nothing at "
                "guidance 1.",
            ),
        ),
    ]


def ancestral_eta(sampler: Sampler, schedule: Schedule, steps: int) -> float:
    """Returns the `eta` with which an ancestral Euler sampler adds as much noise as strategic stochastic sampling.

    A TCD step goes from t down to (1 - gamma) s and adds noise up to s (arXiv 2402.19159, Algorithm 4). With noise
    levels y = sigma / alpha it adds the variance y(s)^2 - y((1 - gamma) s)^2. An ancestral step with eta adds
    eta^2 y(s)^2 (y(t)^2 - y(s)^2) / y(t)^2 (k-diffusion, `get_ancestral_step`). The eta that makes both equal differs
    from step to step, and programs take one for all: their mean. For gamma 0.3 in 4 steps of Stable Diffusion's
    schedule they are 0.95, 0.86 and 0.76.

    A single step adds no noise, and any eta will do: 1.
    """
    noise = (schedule.sigma / schedule.alpha).double()
    found = []
    for t, s in pairwise(solver.student_timesteps(len(schedule), sampler.grid, steps)):
        below = int((1 - (sampler.gamma or 0.0)) * s)
        added = noise[s] ** 2 - noise[below] ** 2
        most = noise[s] ** 2 * (noise[t] ** 2 - noise[s] ** 2) / noise[t] ** 2
        found.append(math.sqrt(added / most))
    return sum(found) / len(found) if found else 1.0


def simple(kept: int, steps: int) -> list[int]:
    """Returns the timesteps of the schedule `simple`, of `kept` that lie evenly in 1000."""
    return [999 - 1000 // kept * int(i * kept / steps) for i in range(steps)]


def instructions(student: Student, file: str) -> list[Instructions]:
    """Returns the instructions for all programs, the exact ones of each program first.

    Args:
        file: the name of the release's weights.
    """
    return [*_comfyui(student, file), *_webui(student, file), _invokeai(student)]


def _comfyui(student: Student, file: str) -> list[Instructions]:
    loading = (
        f"`Load Checkpoint` with the base, then `LoraLoaderModelOnly` with `{file}`, strength 1.0. The adapter has no "
        "part for the text encoder.",
    )
    tried, folder = "ComfyUI a125cd84 (2026-11)", "ComfyUI/models/loras"
    steps, gamma = student.steps, student.sampler.gamma
    v: tuple[str, ...] = ()
    if student.predicts_v:
        v = ("`ModelSamplingDiscrete` with sampling `v_prediction`, if ComfyUI does not see it in the checkpoint.",)
    if student.sampler.scheduler == LATENT_CONSISTENCY:
        model = () if student.predicts_v else ("`ModelSamplingDiscrete` with sampling `lcm`.",)
        drawing = f"`KSampler` with sampler_name `lcm`, scheduler `simple`, steps {steps}, cfg 1.0, denoise 1.0."
        kept = 1000 if student.predicts_v else _KEPT
        settings = (*loading, *v, *model, drawing)
        return [_compared(student, "ComfyUI", tried, folder, settings, simple(kept, steps))]
    if not gamma:
        drawing = f"`KSampler` with sampler_name `euler`, scheduler `simple`, steps {steps}, cfg 1.0, denoise 1.0."
        note = "Without noise a TCD step is an Euler step. The sampler `lcm` is for other adapters."
        settings = (*loading, *v, drawing, note)
        return [_compared(student, "ComfyUI", tried, folder, settings, simple(1000, steps))]
    ancestral = (
        *loading,
        *v,
        f"`SamplerCustom` at cfg 1.0 with `SamplerEulerAncestral` (eta {student.ancestral_eta:.2f}, s_noise 1.0) and "
        f"`BasicScheduler` (scheduler `simple`, steps {steps}, denoise 1.0).",
        f"This `eta` is not TCD's, which is {gamma:g}: with {student.ancestral_eta:.2f} as much noise is added in "
        f"{steps} steps. Other numbers of steps need another one.",
    )
    alone = _compared(student, "ComfyUI without further nodes", tried, folder, ancestral, simple(1000, steps))
    if steps > 1:
        alone = _deviating(alone, _ONE_ETA)
    if student.predicts_v:  # the nodes take what the network says for noise
        return [alone]
    node = (
        *loading,
        f"`TCD Model Sampling Discrete` with steps {steps}, scheduler `simple`, denoise 1.0, eta {gamma:g}; its three "
        "outputs go to `SamplerCustom` with cfg 1.0.",
    )
    client = "ComfyUI with JettHu/ComfyUI-TCD"
    return [_compared(student, client, f"{tried}, ComfyUI-TCD 1.0", folder, node, simple(_KEPT, steps)), alone]


def _webui(student: Student, file: str) -> list[Instructions]:
    steps = student.steps
    tried, folder = "A1111 1.8-dev, Forge dfdcbab6", "models/Lora"
    prompt = f"Write `<lora:{file.removesuffix('.safetensors')}:1>` in the prompt. Steps {steps}, CFG scale 1."
    new, old = "A1111 from 1.10, Forge", "A1111 1.9"
    if student.sampler.scheduler == LATENT_CONSISTENCY and not student.predicts_v:
        sampler, kept = "LCM", _KEPT
    elif student.sampler.gamma == 0:
        sampler, kept = "Euler", 1000
    else:
        sampler, kept = "Euler a", 1000
    noise = {
        "LCM": "",
        "Euler": " Without noise a TCD step is an Euler step.",
        "Euler a": " In Settings, Sampler parameters, set the eta for k-diffusion samplers to "
        f"{student.ancestral_eta or 1:.2f}: with it as much noise is added as the adapter's own sampler adds.",
    }[sampler]
    settings = (prompt, f"Sampling method `{sampler}`, schedule type `Simple`.{noise}")
    first = _compared(student, new, tried, folder, settings, simple(kept, steps))
    settings = (prompt, f"Sampling method `{sampler}`, schedule type `SGM Uniform`.{noise}")
    second = _compared(student, old, tried, folder, settings, sgm_uniform(kept, steps))
    found = [first, second]
    if sampler == "LCM":
        settings = (prompt, "Sampling method `LCM`. There are no schedule types: take 4 steps or more.")
        third = _compared(student, "A1111 1.8", tried, folder, settings, both_ends(_KEPT, steps))
        if steps == 2:
            third = _deviating(third, "its second step, at timestep 19, adds next to nothing, so that 2 steps are 1")
        found.append(third)
    if sampler == "Euler a":
        found = [
            _deviating(each, "each step adds a little more or less noise") if steps > 1 else each for each in found
        ]
    return found


def _invokeai(student: Student) -> Instructions:
    scheduler = "lcm" if student.sampler.scheduler == LATENT_CONSISTENCY else "tcd"
    settings: tuple[str, ...] = (
        f"Add the LoRA with weight 1. Scheduler `{scheduler}`, steps {student.steps}, CFG scale 1.",
    )
    found = _compared(student, "InvokeAI", "InvokeAI 8e71a8a", "", settings, _invoke_timesteps(student))
    if scheduler == "tcd" and student.sampler.gamma != 1 and student.steps > 1:
        found = _deviating(found, "it always draws with gamma 1 (`init_scheduler` sets the scheduler's eta)")
    return found


def _invoke_timesteps(student: Student) -> list[int]:
    # It makes diffusers' scheduler from the base's configuration, in which the grid is 50.
    return solver.student_timesteps(student.train_timesteps, _KEPT, student.steps)


def sgm_uniform(kept: int, steps: int) -> list[int]:
    """Returns the timesteps of the schedule `sgm_uniform`, the nearest of `kept` that lie evenly in 1000."""
    return _divided(kept, steps, steps)


def both_ends(kept: int, steps: int) -> list[int]:
    """Returns the timesteps that divide the span of the kept ones evenly, both ends among them."""
    return _divided(kept, steps, max(steps - 1, 1))


def _divided(kept: int, steps: int, parts: int) -> list[int]:
    apart = 1000 // kept
    lowest = apart - 1
    exact = (999 - (999 - lowest) * i / parts for i in range(steps))
    return [lowest + apart * math.floor((t - lowest) / apart + 0.5) for t in exact]


def _compared(
    student: Student, client: str, tried: str, folder: str, settings: tuple[str, ...], timesteps: list[int]
) -> Instructions:
    deviation = None
    if timesteps != student.timesteps:
        theirs, ours = (", ".join(map(str, each)) for each in (timesteps, student.timesteps))
        deviation = f"it evaluates the network at {theirs}, the adapter's own sampler at {ours}"
    return Instructions(client, tried, folder, settings, timesteps, deviation)


def _deviating(found: Instructions, why: str) -> Instructions:
    both = why if found.deviation is None else f"{found.deviation}; {why}"
    return Instructions(found.client, found.tried, found.folder, found.settings, found.timesteps, both)
