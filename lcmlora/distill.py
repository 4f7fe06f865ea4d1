"""Distillation of a LoRA: the training loop, readable from top to bottom.

One frozen base serves as teacher (adapter off), student (adapter on, with gradients) and target (adapter on, without).
A step costs four UNet forwards and one backward: the teacher's conditional and unconditional passes in one batch, the
target, and the student. It reads the latent cache only: no text encoder is in memory, and a VAE only where pictures are
asked for, behind the `decode` that is passed in.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lcmlora import diffusion, lora, objectives
from lcmlora.bases import Conditioning, LoadedBase, unet_forward
from lcmlora.batches import Batch, Batches, split
from lcmlora.checkpoint import Checkpoints
from lcmlora.config import Distill
from lcmlora.data.cache import LatentCache
from lcmlora.errors import UserError
from lcmlora.execution import AdapterCheck, compiled, recompute
from lcmlora.files import atomic_folder, write_json
from lcmlora.objectives import Objective, Prediction, pseudo_huber
from lcmlora.optimization import Optimization
from lcmlora.progress import track
from lcmlora.ranks import Ranks
from lcmlora.validation import Validation

if TYPE_CHECKING:
    from PIL.Image import Image

_PATIENCE = 10  # steps in a row whose loss is not finite


class Logger(Protocol):
    """Where figures go while the loop runs."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def picture(self, name: str, picture: Image, step: int) -> None: ...


class NullLogger:
    """Keeps nothing; the loop never asks whether anybody listens."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        del metrics, step

    def picture(self, name: str, picture: Image, step: int) -> None:
        del name, picture, step


class Teacher:
    """The base with its adapter off, taking one guided DDIM step on a grid whose every step has its loss weight."""

    def __init__(self, base: LoadedBase, unconditional: Conditioning, settings: Distill) -> None:
        self._base = base
        self._unconditional = {k: v.to(base.device) for k, v in unconditional.items()}
        upper, lower = diffusion.ddim_grid(len(base.alphas_cumprod), settings.grid)
        self.t, self.t_prev = upper.to(base.device), lower.to(base.device)
        self.weight = diffusion.loss_weights(base.alphas_cumprod, self.t, settings.weighting)

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, t_prev: Tensor, w: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns zhat_{t_n} (B, C, h, w): the DDIM step from t to t_prev with guidance w (B,)."""
        base = self._base
        both = {
            # The unconditional pass keeps the picture's own micro-conditioning.
            k: torch.cat([v, v if k == "time_ids" else self._unconditional[k].expand_as(v)])
            for k, v in conditioning.items()
        }
        with lora.disabled(base.unet):
            output = unet_forward(base.unet, torch.cat([x, x]), torch.cat([t, t]), both)
        conditional, unconditional = output.chunk(2)
        guided = diffusion.guide(conditional, unconditional, w)
        alpha, sigma = diffusion.alpha_sigma(base.alphas_cumprod, t)
        x0 = diffusion.predicted_x0(guided, x, alpha, sigma, base.prediction_type)
        noise = diffusion.predicted_noise(guided, x, alpha, sigma, base.prediction_type)
        return diffusion.ddim_step(x0, noise, *diffusion.alpha_sigma(base.alphas_cumprod, t_prev))


class Distillation:
    """One frozen base in its roles, and what is asked of the student."""

    def __init__(self, base: LoadedBase, unconditional: Conditioning, settings: Distill) -> None:
        self.base = base
        self.teacher = Teacher(base, unconditional, settings)
        self.objective: Objective = objectives.make(settings, base.alphas_cumprod)
        self._huber_c = settings.huber_c

    def noisy(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns z_{t_{n+k}} (B, C, h, w) at these rows of the grid (B,)."""
        t = self.teacher.t[index]
        return diffusion.add_noise(batch.z, batch.noise, *diffusion.alpha_sigma(self.base.alphas_cumprod, t))

    def student(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Returns what the base with its adapter says of x (B, C, h, w) at t (B,)."""
        output = unet_forward(self.base.unet, x, t, conditioning)
        alpha, sigma = diffusion.alpha_sigma(self.base.alphas_cumprod, t)
        kind = self.base.prediction_type
        return Prediction(
            diffusion.predicted_x0(output, x, alpha, sigma, kind),
            diffusion.predicted_noise(output, x, alpha, sigma, kind),
        )

    def losses(self, batch: Batch, target: contextlib.AbstractContextManager[object] | None = None) -> Tensor:
        """Returns the weighted loss of each sample, (B,), with gradients to the adapter alone.

        Args:
            target: within it the adapter has the weights that the target is computed with; the live ones without it.
        """
        t, t_prev = self.teacher.t[batch.index], self.teacher.t_prev[batch.index]
        x = self.noisy(batch, batch.index)
        x_prev = self.teacher.step(x, t, t_prev, batch.w, batch.conditioning)
        s = self.objective.destination(batch.index, batch.u)
        # The target first: what the student's forward keeps for the backward pass must not change any more.
        with torch.no_grad(), target or contextlib.nullcontext():
            aim = self.objective.jump(x_prev, self.student(x_prev, t_prev, batch.conditioning), t_prev, s)
        online = self.objective.jump(x, self.student(x, t, batch.conditioning), t, s)
        return self.teacher.weight[batch.index] * pseudo_huber(online, aim, self._huber_c)


def distill(
    base: LoadedBase,
    cache: LatentCache,
    settings: Distill,
    scratch: Path,
    out: Path,
    *,
    identity: dict[str, Any],
    run: dict[str, Any],
    logger: Logger,
    ranks: Ranks | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Trains the adapter and writes the folder `out`; returns its config.json.

    Of many processes all call this with the same arguments; the first one writes, validates and logs.

    Args:
        base: with its UNet loaded, bare; it carries the adapter, active, when this returns.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.
        identity: what config.json says of the base.
        run: where the figures are logged, written to run.json.
        decode: latents to pictures in [0, 1], for the validation pictures; without it there are none.

    Raises:
        UserError: the cache was made for other latents or holds less than a batch, the loss is not finite ten times in
            a row, the adapter does not do what it should, or the processes have different files.
    """
    ranks = ranks or Ranks()
    if cache.latent_shape != base.latent_shape:
        raise UserError(
            f"the latent cache holds {cache.latent_shape}, {base.name} needs {base.latent_shape}: encode again"
        )
    rows, held = split(cache, settings)
    if len(rows) < settings.batch or not len(held):
        raise UserError(
            f"distill.batch: {settings.batch} is more than the {len(rows)} pictures of the cache that are left beside "
            f"{len(held)} for validation"
        )
    unconditional = cache.unconditional()
    batches = Batches(cache, rows, settings, base.device, ranks, unconditional)
    probe = _probe(base, batches.at(range(-2, 0), rows[:1].expand(2)))
    check = AdapterCheck(base, *probe)
    optimization = equip(base, settings, ranks)
    distillation = Distillation(base, unconditional, settings)

    checkpoints = Checkpoints(scratch)
    state = checkpoints.load() or {"step": 0, "loss": float("nan"), "best": None, "history": {}}
    if "optimization" in state:
        optimization.restore(state["optimization"])
    ranks.agree(base=identity, latent_cache=cache.digest, settings=settings, first_step=state["step"])
    check.teacher(compiled=settings.compile)
    validation = None
    if ranks.first and state["step"] < settings.steps:
        validation = Validation(distillation, cache, held, settings, batches.size, decode)

    window = _Window(batches, settings, cache, ranks)
    remaining = range(state["step"], settings.steps)
    progress = track(
        remaining,
        "distill",
        total=settings.steps,
        completed=remaining.start,
        unit=settings.batch,
        quiet=not ranks.first,
    )
    for step in progress:
        losses, norm = take_step(distillation, optimization, batches, settings, step)
        window.add(step, losses)

        done = state["step"] = step + 1
        last = done == settings.steps
        saving = last or done % settings.checkpoint_every == 0
        if saving or done % settings.log_every == 0:
            figures = window.close(norm)
            check.student()
            state["loss"] = figures["loss"]
            logger.log(figures | {"learning_rate": optimization.rate(step)}, done)
            progress.note(loss=figures["loss"])
        if validation and (last or done % settings.validate_every == 0):
            with window.paused(), optimization.averaged() as weights:
                loss = validation.look(done, logger)
                if state["best"] is None or loss < state["best"]["loss"]:
                    state["best"] = {"step": done, "loss": loss, "weights": weights.to("cpu", copy=True)}
            progress.note(validation=loss)
            state["history"][str(done)] = loss
        if saving and ranks.first:
            with window.paused():
                checkpoints.save(state | {"optimization": optimization.state()})

    facts = {
        "model": base.name,
        "base": identity,
        "prediction_type": base.prediction_type,
        "data_digest": cache.digest,
        "pictures": len(rows),
        "distill": settings.model_dump(mode="json"),
        "steps": settings.steps,
        "final_loss": state["loss"],
        "sampler": asdict(distillation.objective.sampler) | {"grid": settings.grid},
        "seed": settings.seed,
        "adapted_layers": lora.adapted_layers(base.unet),
        "lora_parameters": lora.parameters(base.unet),
        "versions": versions(),
    }
    if ranks.first:
        best = state["best"]
        facts["validation"] = {"pictures": len(held), "loss": state["history"], "best_step": best["step"]}
        # Weights of a half-precision base are released in fp16, as the published adapters are.
        dtype = torch.float32 if base.dtype == torch.float32 else torch.float16
        optimization.use(best["weights"], dtype)
        scheduler = scheduler_config(base, distillation.objective.sampler.scheduler, settings.grid)
        with atomic_folder(out) as folder:
            tensors, metadata = lora.state_dict(base.unet), lora.adapter_metadata(settings.rank)
            lora.save_file(tensors, folder / lora.WEIGHTS, dtype=dtype, metadata=metadata)
            write_json(folder / "scheduler_config.json", scheduler)
            write_json(folder / "config.json", facts)
            write_json(folder / "run.json", run)
            _save_probe(base, probe, folder / "probe.safetensors")
    ranks.wait()
    return facts


def equip(base: LoadedBase, settings: Distill, ranks: Ranks | None = None) -> Optimization:
    """Gives a bare base its adapter, executed as the settings say, and returns the adapter's optimization."""
    parameters = lora.inject(base.unet, settings.rank, settings.alpha, settings.seed)
    lora.direct_forwards(base.unet)
    recompute(base.unet, settings.checkpointing)
    if settings.compile:
        compiled(base.unet)
    scaled = base.dtype == torch.float16 and base.device.type == "cuda"
    return Optimization(parameters, settings, ranks=ranks, scaled=scaled)


def take_step(
    distillation: Distillation, optimization: Optimization, batches: Batches, settings: Distill, step: int
) -> tuple[Tensor, Tensor]:
    """Returns the losses of this process's samples, (accumulate, B), and the norm of the gradient over all, ()."""
    losses = []
    for part in range(settings.accumulate):
        target = optimization.averaged() if settings.target == "ema" else None
        loss = distillation.losses(batches.draw(step, part), target)
        optimization.backward(loss.mean() / settings.accumulate)
        losses.append(loss.detach())
    return torch.stack(losses), optimization.step(step)


class _Window:
    """The losses since the last look at them. They stay on the device, which the host waits for only when looking."""

    def __init__(self, batches: Batches, settings: Distill, cache: LatentCache, ranks: Ranks) -> None:
        self._batches = batches
        self._settings = settings
        self._cache = cache
        self._ranks = ranks
        self._loss = float("nan")  # of the last window that had one
        self._bad = 0  # steps in a row up to now whose loss is not finite
        self._losses: list[tuple[int, Tensor]] = []
        self._began = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The rate does not count the time spent in this block."""
        paused = time.monotonic()
        yield
        self._began += time.monotonic() - paused

    def add(self, step: int, losses: Tensor) -> None:
        self._losses.append((step, losses))

    def close(self, norm: Tensor) -> dict[str, float]:
        """Returns the figures of the steps since the last call: the mean of the losses that are finite, and the rate.

        Raises:
            UserError: too many steps in a row had a loss that is not finite; with the pictures it came from.
        """
        s = self._settings
        first, last = self._losses[0][0], self._losses[-1][0]
        losses = torch.zeros(last - first + 1, s.batch, device=norm.device)
        for step, values in self._losses:
            place = self._batches.positions(step, 0).start - step * s.batch
            losses[step - first, place : place + values.numel()] = values.flatten()
        self._ranks.add_up(losses)
        finite = losses.isfinite().all(1).tolist()
        for offset, fine in enumerate(finite):
            self._bad = 0 if fine else self._bad + 1
            if self._bad == _PATIENCE:
                step = first + offset
                rows = self._batches.rows(range(step * s.batch, (step + 1) * s.batch))
                culprits = self._cache.names(rows[~losses[offset].isfinite().cpu()])
                raise UserError(
                    f"step {step + 1}: the loss is not finite, for the {_PATIENCE}th time in a row; lower distill.lr "
                    f"or raise distill.precision. In this step it was so for {', '.join(dict.fromkeys(culprits))}"
                )
        skipped = len(finite) - sum(finite)
        if skipped and self._ranks.first:
            told = f"of the steps {first + 1} to {last + 1} {skipped} were skipped: their loss was not finite"
            print(f"warning: {told}", file=sys.stderr, flush=True)
        if any(finite):
            self._loss = losses[torch.tensor(finite)].mean().item()
        rate = losses.numel() / (time.monotonic() - self._began)
        self._losses, self._began = [], time.monotonic()
        return {
            "loss": self._loss,
            "gradient_norm": norm.item(),
            "images_per_second": rate,
            "skipped_steps": float(skipped),
        }


def versions() -> dict[str, str]:
    """Returns the versions that decide what a run computes."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers", "peft")}


def scheduler_config(base: LoadedBase, name: str, grid: int) -> dict[str, Any]:
    """Returns the configuration of diffusers' scheduler of this name for an adapter of this base."""
    import diffusers

    scheduler = getattr(diffusers, name).from_config(base.scheduler_config, original_inference_steps=grid)
    return dict(scheduler.config) | {"_class_name": name}


Probe = tuple[Tensor, Tensor, Conditioning]


def _probe(base: LoadedBase, batch: Batch) -> Probe:
    """Returns latents, timesteps and conditioning of one fixed forward."""
    timesteps = len(base.alphas_cumprod)
    t = torch.tensor([timesteps - 1, timesteps // 2], device=base.device)
    return batch.noise, t, {name: value.contiguous() for name, value in batch.conditioning.items()}


@torch.no_grad()
def _save_probe(base: LoadedBase, probe: Probe, path: Path) -> None:
    """Writes one forward of the live student and of the base alone, for whoever reloads the file to compare with."""
    latents, timesteps, conditioning = probe
    student = unet_forward(base.unet, *probe)
    with lora.disabled(base.unet):
        alone = unet_forward(base.unet, *probe)
    tensors = {"latents": latents, "timesteps": timesteps, "student": student, "base": alone} | conditioning
    from safetensors.torch import save_file

    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path)
